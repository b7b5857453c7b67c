"""The demo's base model: converted exactly, built whole or not at all, kept while intact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Phi3ForCausalLM

from phi3_dist.data.read.row_formats import Chat
from phi3_dist.data.read.turns import Message
from phi3_dist.data.render.encode import encode_chats
from phi3_dist.data.render.template_probe import ChatFormat
from phi3_dist.demo import base
from phi3_dist.demo.base import build_base, find_gguf, is_intact
from phi3_dist.errors import ModelError
from phi3_dist.modeling.base import find_base, load_full
from phi3_dist.modeling.greedy_answers import answer
from phi3_dist.modeling.tokenizer import load_tokenizer

REPO = Path(__file__).resolve().parents[2]
NUMBERS: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@pytest.fixture(scope="module")
def demo_base() -> Path:
    return build_base(REPO / ".cache" / "demo-base")


def test_fused_weights_give_llamas_logits() -> None:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaForCausalLM.config_class(**NUMBERS)).eval()
    weights = {name: tensor for name, tensor in made.state_dict().items() if name != "lm_head.weight"}
    phi3 = base._model(Phi3ForCausalLM, NUMBERS, base._fuse(weights, NUMBERS["num_hidden_layers"]))
    llama = base._model(LlamaForCausalLM, NUMBERS, weights)
    ids_1T = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(llama(ids_1T).logits, made(ids_1T).logits)
        assert (phi3(ids_1T).logits - made(ids_1T).logits).abs().max() <= 1e-5


def test_ggufs_order_of_rotary_rows_is_undone() -> None:
    """A head of 6 rows: GGUF stores 0 3 1 4 2 5, transformers wants the halves one after the other."""
    stored = torch.tensor([0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11.0])[:, None]
    assert base._unpermute(stored, 2).flatten().tolist() == list(range(12))


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="embed_tokens"):
        base._model(Phi3ForCausalLM, NUMBERS, {})


def test_two_forms_that_differ_are_refused(demo_base: Path) -> None:
    good = load_full(find_base(str(demo_base)), torch.float32, torch.device("cpu"))
    bad = load_full(find_base(str(demo_base)), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        bad.model.norm.weight = torch.nn.Parameter(bad.model.norm.weight * 1.001)
    backend = load_tokenizer(str(demo_base)).backend_tokenizer
    assert base._check(backend, good, good) == 0.0
    with pytest.raises(ModelError, match="differ by"):
        base._check(backend, good, bad)


def test_a_build_is_intact_until_a_byte_changes(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert not is_intact(folder)
    base._write_marker(folder, 0.0)
    assert is_intact(folder)
    marker = folder / base.MARKER
    facts = json.loads(marker.read_text())
    marker.write_text(json.dumps({**facts, "format": base.FORMAT + 1}))
    assert not is_intact(folder)
    marker.write_text("half a fi")
    assert not is_intact(folder)
    marker.write_text(json.dumps(facts))
    (folder / "config.json").write_text("{ }")
    assert not is_intact(folder)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ModelError, match="something else"):
        build_base(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "dear"


@pytest.mark.demo_base
def test_the_base_is_built_once_and_leaves_nothing_beside_it(demo_base: Path) -> None:
    said: list[str] = []
    before = (demo_base / "model.safetensors").stat().st_mtime_ns
    assert build_base(demo_base, said.append) == demo_base
    assert said[0].startswith("kept")
    assert (demo_base / "model.safetensors").stat().st_mtime_ns == before
    assert not list(demo_base.parent.glob(".demo-base.building*"))
    assert json.loads((demo_base / base.MARKER).read_text())["max_logit_difference"] <= base.TOLERANCE


@pytest.mark.demo_base
def test_the_tokenizer_renders_what_the_row_holds(demo_base: Path) -> None:
    tokenizer = load_tokenizer(str(demo_base))
    fmt = ChatFormat.of(tokenizer)
    assert (fmt.end_of_turn, fmt.final_end, fmt.system, fmt.added_turns, fmt.notices) == (2, None, "kept", 0, ())
    messages = (Message("system", "Be brief."), Message("user", "One?"), Message("assistant", "1x"))
    row = encode_chats(tokenizer, [Chat(messages, "a:1")], "all")[0]
    turns = (("system", "Be brief."), ("user", "One?"), ("assistant", "1x"))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert tokenizer.decode(row.ids) == text
    learned = [token for token, on in zip(row.ids, row.supervised, strict=True) if on]
    assert tokenizer.decode(learned) == "1x<|im_end|>"
    assert tokenizer.tokenize("123") == ["1", "2", "3"]  # SmolLM2 splits digits


@pytest.mark.demo_base
def test_the_base_answers_as_a_trained_model(demo_base: Path) -> None:
    model = load_full(find_base(str(demo_base)), torch.float32, torch.device("cpu"))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    said = answer(model, load_tokenizer(str(demo_base)), [question], max_new_tokens=12)
    assert "Paris" in said[0]


@pytest.mark.full
@pytest.mark.demo_base
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_weight_is_the_one_transformers_own_loader_reads(demo_base: Path) -> None:
    gguf = find_gguf()
    llama = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights = {name: tensor for name, tensor in llama.state_dict().items() if name != "lm_head.weight"}
    wanted = base._fuse(weights, llama.config.num_hidden_layers)
    found = find_base(str(demo_base)).weights
    assert set(wanted) == found.names()
    for name, tensor in wanted.items():
        assert torch.equal(found.whole(name), tensor), name
