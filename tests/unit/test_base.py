"""Base weights: what is missing, damaged, pickled or not Phi-3 is one message; what is there is mapped, not copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Phi3ForCausalLM

from phi3_dist.errors import ModelError
from phi3_dist.modeling.base import find_base, load_full, rows_of_rank, tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Phi3ForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_saved_base_loads_to_the_bit_and_gives_the_same_logits(saved: Path) -> None:
    ours = load_full(find_base(str(saved)), torch.float32, CPU)
    theirs = Phi3ForCausalLM.from_pretrained(saved).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    config = tiny_config()
    config.tie_word_embeddings = True
    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    model = load_full(find_base(str(tmp_path)), torch.float32, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_wrong_with_a_folder_is_one_message(saved: Path) -> None:
    weights = saved / "model.safetensors"
    tensors = load_file(weights)
    config = json.loads((saved / "config.json").read_text())

    def replace(changed: dict[str, torch.Tensor]) -> None:
        """Beside it, then in its place: safetensors before 0.8 writes over the file that `tensors` are mapped from."""
        save_file(changed, saved / "changed")
        (saved / "changed").replace(weights)

    replace({k: v for k, v in tensors.items() if "layers.1.mlp" not in k})
    with pytest.raises(ModelError, match="2 weights missing in the files"):
        load_full(find_base(str(saved)), torch.float32, CPU)

    replace({**tensors, "lm_head.weight": tensors["lm_head.weight"][:-1].clone()})
    with pytest.raises(ModelError, match=r"lm_head\.weight has shape"):
        load_full(find_base(str(saved)), torch.float32, CPU)

    (saved / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        find_base(str(saved))

    (saved / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    with pytest.raises(ModelError):
        find_base(str(saved))

    (saved / "config.json").write_text(json.dumps(config))
    weights.rename(saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        find_base(str(saved))


def test_a_hub_id_without_a_hub_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="HF_ENDPOINT"):
        find_base("microsoft/Phi-3-mini-4k-instruct")


@pytest.mark.parametrize(("rows", "world"), [(10, 4), (3, 4), (8, 2), (1, 2), (7, 7)])
def test_rows_of_rank_is_torch_chunk(rows: int, world: int) -> None:
    chunks = torch.arange(rows).chunk(world)
    for rank in range(world):
        start, stop = rows_of_rank(rows, rank, world)
        expected = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(range(start, stop)) == expected
