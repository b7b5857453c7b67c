"""`--as gguf-merged`: the file alone is the live model, and its tokenizer the one of the training."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from phi3_dist.errors import AdapterError, ConfigError
from phi3_dist.exports.exporting import export
from phi3_dist.exports.gguf_model import read_gguf_model
from phi3_dist.exports.gguf_tokenizer import BYTE, CONTROL, UNUSED, vocabulary_of
from phi3_dist.exports.modelfile import ollama_template
from phi3_dist.modeling.tokenizer import load_tokenizer, tiny_tokenizer
from tests.export_cases import CASES, LONGROPE, small_adapter, small_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("gguf") / "base")


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(str(path)).fields.items()}


FULL = ("lora", "rslora", "patterns", "some_layers", "bias", "embedding")


@pytest.mark.parametrize("name", ["dora", "whole_head", *(pytest.param(name, marks=pytest.mark.full) for name in FULL)])
def test_the_file_alone_is_the_live_model(name: str, base: Path, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "adapter", base, **CASES[name])
    done = export(adapter, tmp_path / "out", "gguf-merged")
    assert done.drift.error < 1e-5 < done.drift.effect
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.gguf", "Modelfile", "README.md", "checksums.json"}


def test_taught_tokens_bring_their_rows_and_their_names(base: Path, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "adapter", base, new_tokens=("<|a|>",))
    done = export(adapter, tmp_path / "out", "gguf-merged")
    assert done.drift.error < 1e-5
    said = fields(tmp_path / "out" / "model.gguf")
    tokenizer = load_tokenizer(str(adapter))
    i = tokenizer.convert_tokens_to_ids("<|a|>")
    assert said["tokenizer.ggml.tokens"][i] == "<|a|>"
    assert said["tokenizer.ggml.token_type"][i] == CONTROL
    assert len(said["tokenizer.ggml.tokens"]) == said["phi3.vocab_size"]
    assert "drops the white space after <|a|>" in done.what


@pytest.mark.parametrize(("stored", "most"), [("f16", 0.02), ("bf16", 0.05)])
def test_16_bits_are_asked_for_or_the_bases(stored: Any, most: float, base: Path, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "adapter", base)
    done = export(adapter, tmp_path / "out", "gguf-merged", stored=stored)
    assert 1e-5 < done.drift.error < most
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "out" / "model.gguf")).tensors}
    assert kinds == {"F32", stored.upper()}  # norms stay in float32


def test_a_16_bit_base_gives_16_bits_and_a_tied_head_stays_tied(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    base = small_base(tmp_path / "base", torch.bfloat16, tie_word_embeddings=True, rope_parameters=rope)
    export(small_adapter(tmp_path / "adapter", base), tmp_path / "out", "gguf-merged")
    tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "out" / "model.gguf")).tensors}
    assert tensors["token_embd.weight"] == "BF16"
    assert "output.weight" not in tensors
    assert fields(tmp_path / "out" / "model.gguf")["phi3.rope.dimension_count"] == 8


@pytest.mark.parametrize(("factors", "context"), [("short", 64), ("long", 128)])
def test_longropes_factors_and_scale_are_in_the_file(factors: str, context: int, tmp_path: Path) -> None:
    changes = {"rope_parameters": {**LONGROPE}, "original_max_position_embeddings": 64, "max_position_embeddings": 512}
    base = small_base(tmp_path / "base", **changes)
    adapter = small_adapter(tmp_path / "adapter", base, facts={"longrope": factors})
    done = export(adapter, tmp_path / "out", "gguf-merged")
    assert done.drift.error < 1e-5
    said = fields(tmp_path / "out" / "model.gguf")
    assert said["phi3.rope.scaling.original_context_length"] == 64
    assert said["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + 3 / 6) ** 0.5)  # 512 is 2^3 times 2^6
    assert f"\nPARAMETER num_ctx {context}\n" in (tmp_path / "out" / "Modelfile").read_text()


def test_a_file_that_is_not_the_live_model_gets_no_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi3_dist.exports import exporting

    def spoiled(path: Path, dtype: torch.dtype) -> Any:
        model = read_gguf_model(path, dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        return model

    monkeypatch.setattr(exporting, "read_gguf_model", spoiled)
    with pytest.raises(AdapterError, match="would not be the model that was trained"):
        export(small_adapter(tmp_path / "adapter", base), tmp_path / "out", "gguf-merged")
    assert not (tmp_path / "out").exists()


# --- tokenizers -----------------------------------------------------------------------------------------------------

TEXTS = ["low lower lowest newest widest", "the lower the newer, slow and low", "low new wide"]


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Of Phi-3's form: merges of SentencePiece, bytes to fall back on, a space before each part of a text."""
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=60, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    for piece in learnt["vocab"]:
        pieces.setdefault(piece, len(pieces))
    merges = [tuple(merge) for merge in learnt["merges"]]
    backend = tokenizers.Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for token in tiny_tokenizer().added_tokens_decoder.values():
        backend.add_special_tokens([AddedToken(token.content, rstrip=token.rstrip, normalized=False, special=True)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>", pad_token="<unk>"
    )
    made.chat_template = tiny_tokenizer().chat_template
    return made


def by_scores(words: Any, text: str) -> list[str]:
    """As llama.cpp joins: of all neighbours the pair whose piece has the greatest score, the leftmost of equals."""
    score = {token: s for token, s, kind in zip(words.tokens, words.scores, words.kinds, strict=True) if kind == 1}
    parts = list("▁" + text.replace(" ", "▁"))
    while pairs := [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_phi3s_tokenizer_becomes_scores_that_join_the_same_pieces() -> None:
    tokenizer = llama_tokenizer()
    words = vocabulary_of(tokenizer, len(tokenizer) + 5, "here")
    assert (words.model, words.pre, words.merges) == ("llama", "default", ())
    assert [words.kinds[3], words.kinds[258], words.kinds[-1]] == [BYTE, BYTE, UNUSED]
    for text in [*TEXTS, "slowest newer  low"]:
        assert by_scores(words, text) == tokenizer.tokenize(text), text


@pytest.mark.parametrize(
    ("cut", "pre"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(
                        tokenizers.Regex(
                            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                        ),
                        "isolated",
                    ),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            "dbrx",
        ),
        (pre_tokenizers.Whitespace(), None),
    ],
)
def test_byte_level_tokenizers_are_known_by_how_they_cut(cut: Any, pre: str | None) -> None:
    tokenizer = tiny_tokenizer()
    backend = tokenizers.Tokenizer(models.BPE(tokenizer.backend_tokenizer.get_vocab() | {"lo": 300}, [("l", "o")]))
    backend.pre_tokenizer = cut
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    if pre is None:
        with pytest.raises(AdapterError, match=r"in a way that llama\.cpp has no name for"):
            vocabulary_of(made, 301, "here")
        return
    words = vocabulary_of(made, 301, "here")
    assert (words.model, words.pre, words.merges) == ("gpt2", pre, ("l o",))


def test_ollamas_template_is_the_chat_template_of_one_exchange() -> None:
    assert ollama_template(tiny_tokenizer()) == (
        "{{ if .System }}<|system|>\n{{ .System }}<|end|>\n{{ end }}<|user|>\n{{ .Prompt }}<|end|>\n"
        "<|assistant|>\n{{ .Response }}<|end|>\n"
    )
    odd = tiny_tokenizer()
    odd.chat_template = "{{ messages | length }}" + str(odd.chat_template)
    assert ollama_template(odd) is None


def test_a_word_that_is_no_type_is_a_mistake(base: Path, tmp_path: Path) -> None:
    from phi3_dist import api

    with pytest.raises(ConfigError, match="one of f32, f16, bf16"):
        api.export(tmp_path, tmp_path / "out", "gguf-merged", stored="q4")  # type: ignore[arg-type]
