"""A tokenizer as llama.cpp reads it: tokens with kinds and scores or merges, and the name of its way to cut text.

llama.cpp runs no tokenizer.json. It has two programs that can be Phi-3's: `llama`, SentencePiece's BPE by scores with
bytes to fall back on (Phi-3), and `gpt2`, byte-level BPE by merges behind a regular expression that it knows by a name
(Phi-4, and ChatML bases). A tokenizer that is neither is refused: its ids would be others than in training.
Source: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from phi3_dist.data.render.template_probe import ChatFormat
from phi3_dist.errors import AdapterError, Problem

__all__ = ["Vocabulary", "strips_after_roles", "vocabulary_of", "write_vocabulary"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_NEVER_STRIP = {"<unk>", "<s>", "<|endoftext|>"}
"""After these llama.cpp keeps white space, whatever a model is called."""
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PROBE = (
    "Hello, world! It's we'll THEY'RE don'T 12345 007 a1b2c3 3.14 x=y;  two   three\n\n  next\tline \r\n\r\n"
    "Grüße Ärger ÉCOLE HTMLParser iPhone 你好世界 123 привет 🙂👍🏽 path/to//file ... !!! "
    "?? (a) [b] {c} <d> 'quoted' \"said\" e\u0301 ١٢٣ end of it \n \n"
)
"""Text that every way to cut it cuts differently."""
_FIX = "serve the folder of --as merged with vLLM or transformers, which read tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """What `tokenizer.ggml.*` says. `scores` are of `llama` alone, `merges` of `gpt2`."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    notes: tuple[str, ...]
    """What llama.cpp does otherwise than the tokenizer of the training."""


def _ways_to_cut() -> dict[str, Any]:
    def split(pattern: str) -> Any:
        return pre_tokenizers.Split(Regex(pattern), "isolated")

    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "dbrx": pre_tokenizers.Sequence([split(_CL100K), bytes_only]),
        "gpt-4o": pre_tokenizers.Sequence([split(_O200K), bytes_only]),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "gpt-2": plain,
    }


def _name_of_cut(backend: Tokenizer, merges: Sequence[Any]) -> str | None:
    """llama.cpp's name for a pre-tokenizer that cuts as this one does."""
    if not merges:
        return "gpt-2"  # single bytes, however they are cut
    if backend.pre_tokenizer is None:
        return None
    ours = backend.pre_tokenizer.pre_tokenize_str(_PROBE)
    return next((name for name, way in _ways_to_cut().items() if way.pre_tokenize_str(_PROBE) == ours), None)


def strips_after_roles(tokenizer: Any) -> bool:
    """Whether its special tokens swallow the white space behind them, as Phi-3's do.

    llama.cpp has no field for that: it does so for models whose name has `phi-3` or `phi3` in it.
    """
    return any(token.rstrip and token.special for token in tokenizer.added_tokens_decoder.values())


def vocabulary_of(tokenizer: Any, rows: int, where: str) -> Vocabulary:
    """The tokenizer as `rows` tokens of llama.cpp's. Raises AdapterError for one that llama.cpp has no program for."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    merges = model.get("merges") or []
    sentencepiece = bool(model.get("byte_fallback")) and _begins_with_a_space(backend)
    pre = "default" if sentencepiece else _name_of_cut(tokenizer.backend_tokenizer, merges)
    if model.get("type") != "BPE" or pre is None or (not sentencepiece and backend.get("normalizer")):
        what = "cuts text in a way that llama.cpp has no name for: its ids would be others than in training"
        raise AdapterError(Problem(where, f"its tokenizer {what}", _FIX))
    tokens, kinds = _tokens(model["vocab"], backend["added_tokens"], rows)
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre=pre,
        tokens=tuple(tokens),
        kinds=tuple(_spoken(kinds, tokens, model, sentencepiece=sentencepiece)),
        scores=tuple(_scores(tokens, kinds, pairs)) if sentencepiece else (),
        # llama.cpp refuses a file without merges; this one joins nothing that a text has
        merges=() if sentencepiece else tuple(" ".join(pair) for pair in pairs) or (f"{tokens[-1]} {tokens[-1]}",),
        notes=tuple(_notes(tokenizer)),
    )


def _begins_with_a_space(backend: dict[str, Any]) -> bool:
    """Llama's normalizer: `▁` before each part of a text and for each space."""
    normalizer = backend.get("normalizer") or {}
    kinds = [one.get("type") for one in normalizer.get("normalizers", [])]
    return kinds == ["Prepend", "Replace"] and backend.get("pre_tokenizer") is None


def _tokens(vocab: dict[str, int], added: Sequence[dict[str, Any]], rows: int) -> tuple[list[str], list[int]]:
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in vocab.items():
        if i < rows:
            tokens[i], kinds[i] = token, NORMAL
    for one in added:
        if one["id"] < rows:
            tokens[one["id"]], kinds[one["id"]] = one["content"], CONTROL if one["special"] else USER_DEFINED
    return tokens, kinds


def _spoken(kinds: Sequence[int], tokens: Sequence[str], model: dict[str, Any], *, sentencepiece: bool) -> list[int]:
    """The kinds, with SentencePiece's bytes and its unknown."""
    if not sentencepiece:
        return list(kinds)
    found = []
    for token, kind in zip(tokens, kinds, strict=True):
        is_byte = kind == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        found.append(UNKNOWN if token == model.get("unk_token") else BYTE if is_byte else kind)
    return found


def _scores(tokens: Sequence[str], kinds: Sequence[int], pairs: Sequence[tuple[str, ...]]) -> list[float]:
    """SentencePiece joins what has the greatest score first: minus the rank of the first merge that makes a token."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(pairs):
        rank.setdefault("".join(pair), i)
    single = len(pairs)
    return [
        -1000.0 if kind != NORMAL else -float(rank.get(token, single))
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _notes(tokenizer: Any) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    if not strips_after_roles(tokenizer):
        return []
    odd = [t.content for t in added if t.special and t.rstrip is (t.content in _NEVER_STRIP)]
    if not odd:
        return []
    return [f"llama.cpp drops the white space after {', '.join(odd)}, which the tokenizer of the training keeps"]


def write_vocabulary(writer: Any, words: Vocabulary, tokenizer: Any) -> None:
    """All of `tokenizer.*` into a GGUFWriter. No token is put before a text: training puts none either."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.kinds))
    if words.scores:
        writer.add_token_scores(list(words.scores))
    if words.merges:
        writer.add_token_merges(list(words.merges))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if words.model == "llama":
        writer.add_add_space_prefix(True)
    for role, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
                      ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):  # fmt: skip
        i = getattr(tokenizer, f"{role}_token_id")
        if i is not None and i < len(words.tokens):
            add(i)
    writer.add_eot_token_id(ChatFormat.of(tokenizer).end_of_turn)
    writer.add_chat_template(tokenizer.chat_template)
