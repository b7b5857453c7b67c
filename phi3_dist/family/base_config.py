"""A base model's config.json, checked value by value: whatever stands in it is the shape of a Phi-3, or one ModelError.

transformers takes a configuration largely as it comes, and fails later, in a layer or by its size. Ranges are wide:
they tell what no Phi-3 can be, not what is sensible. The keys are those that `transformers.models.phi3` (5.24) reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3_dist.errors import ModelError, Problem, shown
from phi3_dist.family.variants import refuse_unsupported

__all__ = ["checked_config", "read_config"]

_LARGEST_BYTES = 2**20
_WHOLE: Mapping[str, tuple[int, int]] = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 4096),
}
"""Keys without which there is no shape, with the least and the largest value."""
_WHOLE_OR_NONE: Mapping[str, tuple[int, int]] = {
    "num_key_value_heads": (1, 4096),
    "head_dim": (2, 4096),
    "max_position_embeddings": (1, 2**31),
    "original_max_position_embeddings": (1, 2**31),
    "sliding_window": (1, 2**31),
    "bos_token_id": (-1, 2**31),
}
_REAL_OR_NONE: Mapping[str, tuple[float, float]] = {
    "rms_norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e15),
    "partial_rotary_factor": (1e-3, 1.0),
    "attention_dropout": (0.0, 1.0),
    "resid_pdrop": (0.0, 1.0),
    "embd_pdrop": (0.0, 1.0),
    "initializer_range": (0.0, 100.0),
}
_KEPT = (
    *(*_WHOLE, *_WHOLE_OR_NONE, *_REAL_OR_NONE),
    *("architectures", "model_type", "hidden_act", "tie_word_embeddings", "eos_token_id", "pad_token_id"),
)
"""What goes to transformers: nothing else of a file from elsewhere can steer it."""
_LONGROPE = ("longrope", "su", "yarn")
"""`su` is what the files of 2024 call it, and transformers reads `yarn` as the same."""
_DEFAULT_ID = 32000
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_FIX = "compare it with the published config.json of the model"


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """`checked_config` of the config.json in a folder. `where` names the model in messages. Raises ModelError."""
    try:
        with (folder / "config.json").open("rb") as file:
            raw = file.read(_LARGEST_BYTES + 1)
        if len(raw) > _LARGEST_BYTES:
            raise ModelError(Problem(where, "config.json is larger than 1 MiB", "download it again"))
        values = json.loads(raw.decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ModelError(Problem(where, "no config.json in the folder", "give the folder of a saved model")) from error
    except OSError as error:
        what = f"config.json cannot be read: {error.strerror}"
        raise ModelError(Problem(where, what, "make it readable, or name another folder")) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(Problem(where, f"config.json cannot be read: {error}", "download it again")) from error
    return checked_config(values, where)


def checked_config(values: object, where: str) -> dict[str, Any]:
    """The keys that make the model, in one spelling: LongRoPE stands in `rope_parameters`, with its original length.

    Raises ModelError for another class, a base that is quantised already, and with every value that cannot be.
    """
    if not isinstance(values, dict):
        raise ModelError(Problem(where, "config.json is not a JSON object", "download it again"))
    refuse_unsupported(values)
    _refuse_quantised(values, where)
    problems = [Problem(where, f"config.json: {what}", _FIX) for what in _faults(values)]
    if problems:
        raise ModelError(*problems)
    known = {key: values[key] for key in _KEPT if values.get(key) is not None}
    dtype = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # where the file has none, transformers takes 32000, for which a smaller vocabulary has no row
        if key in values or values["vocab_size"] <= _DEFAULT_ID:
            known.setdefault(key, None)
    return {**known, **({"dtype": dtype} if dtype in _DTYPES else {}), **_rope(values)}


def _refuse_quantised(values: Mapping[str, Any], where: str) -> None:
    made = values.get("quantization_config") or values.get("compression_config")
    if not made:
        return
    method = made.get("quant_method") if isinstance(made, dict) else None
    if isinstance(made, dict) and method is None:
        method = next((f"bitsandbytes, {bits} bits" for bits in (4, 8) if made.get(f"load_in_{bits}bit")), None)
    what = f"its weights are quantised already ({shown(method) if method else 'quantization_config'})"
    fix = "name the 16-bit model it was made of; model.quantization: nf4 or int8 quantises it while it is loaded"
    raise ModelError(Problem(where, what, fix))


def _faults(values: Mapping[str, Any]) -> Iterator[str]:
    """Each value that cannot be; relations between values only where each alone is right."""
    found = False
    for what in (*_wrong_numbers(values), *_wrong_kinds(values)):
        found = True
        yield what
    if not found:
        yield from _wrong_relations(values)
        yield from _wrong_rope(values)


def _wrong_numbers(values: Mapping[str, Any]) -> Iterator[str]:
    for key, whole in {**_WHOLE, **_WHOLE_OR_NONE}.items():
        value = values.get(key)
        if value is None and key in _WHOLE:
            yield f"{key} is missing or not a whole number"
        elif value is not None and not (_is_whole(value) and whole[0] <= value <= whole[1]):
            yield f"{key} is {shown(value)}; expected a whole number from {whole[0]:,} to {whole[1]:,}"
    for key, real in _REAL_OR_NONE.items():
        value = values.get(key)
        if value is not None and not (_is_real(value) and real[0] <= value <= real[1]):
            yield f"{key} is {shown(value)}; expected a number from {real[0]:g} to {real[1]:g}"


def _wrong_kinds(values: Mapping[str, Any]) -> Iterator[str]:
    tied, activation = values.get("tie_word_embeddings"), values.get("hidden_act")
    if tied is not None and not isinstance(tied, bool):
        yield f"tie_word_embeddings is {shown(tied)}; expected true or false"
    if activation is not None and not isinstance(activation, str):
        yield f"hidden_act is {shown(activation)}; expected the name of an activation"
    ends = values.get("eos_token_id")
    if ends is not None and not all(_is_whole(one) for one in (ends if isinstance(ends, list) else [ends])):
        yield f"eos_token_id is {shown(ends)}; expected an id or a list of ids"
    pad = values.get("pad_token_id")
    if pad is not None and not _is_whole(pad):
        yield f"pad_token_id is {shown(pad)}; expected an id"
    for key in ("rope_scaling", "rope_parameters"):
        if values.get(key) is not None and not isinstance(values[key], dict):
            yield f"{key} is {shown(values[key])}; expected a section with keys under it"


def _wrong_relations(values: Mapping[str, Any]) -> Iterator[str]:
    heads, kv_heads = values["num_attention_heads"], values.get("num_key_value_heads")
    if values.get("head_dim") is None and values["hidden_size"] % heads:
        yield f"hidden_size {values['hidden_size']} is not a multiple of num_attention_heads {heads}"
    elif _rotary(values) < 2 or _rotary(values) % 2:
        yield f"each head turns {_rotary(values)} values; expected an even number"
    if kv_heads is not None and heads % kv_heads:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
    pad, vocab = values.get("pad_token_id"), values["vocab_size"]
    if pad is not None and not -1 <= pad < vocab:
        yield f"pad_token_id {pad} has no row in a vocabulary of {vocab}"


def _rope_of(values: Mapping[str, Any]) -> Mapping[str, Any]:
    given: Mapping[str, Any] = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return given


def _kind_of(values: Mapping[str, Any]) -> Any:
    rope = _rope_of(values)
    return rope.get("rope_type") or rope.get("type") or "default"


def _rotary(values: Mapping[str, Any]) -> int:
    """Values of a head that are rotated."""
    share = _rope_of(values).get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    return int(width * share) if _is_real(share) else width


def _wrong_rope(values: Mapping[str, Any]) -> Iterator[str]:
    rope, kind = _rope_of(values), _kind_of(values)
    for key in ("rope_theta", "partial_rotary_factor"):
        low, high = _REAL_OR_NONE[key]
        value = rope.get(key)
        if value is not None and not (_is_real(value) and low <= value <= high):
            yield f"rope: {key} is {shown(value)}; expected a number from {low:g} to {high:g}"
    if kind == "default":
        return
    if kind not in _LONGROPE:
        yield f"rope: its type is {shown(kind)}; Phi-3 has longrope (su in older files) or none"
        return
    pairs = _rotary(values) // 2
    for key in ("short_factor", "long_factor"):
        factors = rope.get(key)
        if not isinstance(factors, list) or not all(_is_real(one) and one > 0 for one in factors):
            yield f"rope: {key} is {shown(factors)}; expected a list of numbers above 0"
        elif len(factors) != pairs:
            yield f"rope: {key} has {len(factors)} numbers; expected {pairs}, one for each rotated pair"
    for key in ("factor", "attention_factor"):
        if rope.get(key) is not None and not (_is_real(rope[key]) and rope[key] > 0):
            yield f"rope: {key} is {shown(rope[key])}; expected a number above 0"
    original = _original(values)
    if not _is_whole(original) or not 1 < original <= _WHOLE_OR_NONE["max_position_embeddings"][1]:
        yield f"rope: original_max_position_embeddings is {shown(original)}; expected the length before LongRoPE"


def _original(values: Mapping[str, Any]) -> Any:
    """transformers prefers the one outside, and the published files of 2024 have it nowhere else."""
    outside = values.get("original_max_position_embeddings")
    return outside if outside is not None else _rope_of(values).get("original_max_position_embeddings")


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes them."""
    rope, kind = _rope_of(values), _kind_of(values)
    parameters = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
    if kind == "default":
        return {"rope_parameters": {"rope_type": "default", **parameters}} if parameters else {}
    factors = ("short_factor", "long_factor", "factor", "attention_factor")
    parameters |= {key: rope[key] for key in factors if rope.get(key) is not None}
    original = _original(values)
    parameters |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    return {"rope_parameters": parameters, "original_max_position_embeddings": original}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number larger than any float
        return False
