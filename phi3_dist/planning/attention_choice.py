"""Which attention backends can run, and why not where they can't: facts in, reasons out. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from packaging.version import Version

__all__ = ["BACKENDS", "PACKAGES", "Backend", "backends", "choose_backend", "choose_deterministic"]

BACKENDS = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "sdpa", "flex")
"""From the first choice to the last. `auto` takes the first that can run, so `flex` is only ever asked for by name."""

PACKAGES = ("torch", "flash-attn", "flash-attn-3", "flash-attn-4")
"""The distributions whose versions decide."""

_SIXTEEN_BITS = ("bf16", "fp16")
_DISTRIBUTION = {
    "flash_attention_4": "flash-attn-4",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_2": "flash-attn",
}
_VARLEN_NEEDS = {"scale", "window_size"}
_INSTALL = {
    "flash_attention_4": "pip install --pre flash-attn-4",
    "flash_attention_3": "pip install --no-build-isolation "
    "'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    "flash_attention_2": "pip install flash-attn --no-build-isolation",
    "varlen": "pip install 'torch>=2.11'",
}


class Backend(NamedTuple):
    """A backend, whether it can run, the reason, and the command or setting that would let it (may be empty)."""

    name: str
    available: bool
    reason: str
    fix: str = ""


def backends(
    device: str,
    head_dim: int | None,
    dtype: str,
    window: int | None,
    packages: Mapping[str, str],
    *,
    capability: tuple[int, int] | None = None,
    varlen_arguments: frozenset[str] | None = None,
) -> list[Backend]:
    """Every backend in order of preference.

    `device` is torch's device type, `dtype` one of fp32, bf16, fp16, `window` in positions (the query's own counts),
    `packages` maps a distribution to its version, `capability` is the CUDA compute capability. A head size or a
    capability of None is not known yet: flash-attention 3 and 4 are then left alone, the others are not refused for it.
    `varlen_arguments` are those of torch's `varlen_attn` here; None: judged by torch's version.

    Head sizes: flash-attention takes multiples of 8 up to 256 (its README); version 3 was written for Hopper, 9.x, and
    version 4 for Hopper and Blackwell, 9.x, 10.x and 11.x, where the latter take up to 128 (`_validate_head_dims` in
    flash_attn/cute/interface.py of 4.0.0b36). torch's `varlen_attn` calls flash-attention 2 inside torch; it has
    `scale` and `window_size` from 2.11 on. Grouped heads it takes from 2.12 on; before, they are repeated for it.
    """

    def one(name: str) -> Backend:
        if name == "sdpa":
            return Backend(name, True, f"one call for each document, on any device{seen}")
        if device != "cuda":
            why = "flex attention has no backward elsewhere: it needs CUDA" if name == "flex" else "needs CUDA"
            return Backend(name, False, f"{why}, and the device is {device}", "model.attention=sdpa")
        if name == "flex":
            return _flex(dtype, capability, seen)
        what, fix = _obstacle(name, head_dim, dtype, capability)
        missing = _missing(name, packages, varlen_arguments)
        if what or missing:
            return Backend(name, False, what or missing, fix if what else _INSTALL[name])
        size = "" if head_dim is None else f"head size {head_dim} in "
        return Backend(name, True, f"{size}{dtype} on CUDA{seen}")

    seen = "" if window is None else f", window of {window:,} positions"
    return [one(name) for name in BACKENDS]


def choose_backend(configured: str, found: list[Backend]) -> Backend:
    """The backend for `model.attention`: the first that can run where `auto` is asked, else the one asked for.

    The reason of `auto` also says why each better one was passed over. `available` is False where the one asked for
    cannot run: the caller refuses.
    """
    if configured != "auto":
        return next(one for one in found if one.name == configured)
    position = next(i for i, one in enumerate(found) if one.available)
    passed: dict[str, list[str]] = {}
    for one in found[:position]:
        passed.setdefault(one.reason, []).append(one.name)
    others = [f"{', '.join(names)}: {reason}" for reason, names in passed.items()]
    return found[position]._replace(reason="; ".join([found[position].reason, *others]))


def choose_deterministic(configured: str | bool, device: str, backend: str) -> tuple[bool, str]:
    """Whether attention's backward adds up in one order, and why. The answer for `train.deterministic`."""
    if device != "cuda":
        return True, "a CPU adds up in one order anyway"
    if backend == "flex":
        return True, "flex attention's backward has no atomic additions"
    if configured != "auto":
        return bool(configured), "as the run file says"
    return True, "a resumed run gives the same bits; train.deterministic=false takes less time"


def _flex(dtype: str, capability: tuple[int, int] | None, seen: str) -> Backend:
    if capability is not None and capability < (7, 0):
        return Backend("flex", False, "torch.compile on CUDA needs compute capability 7.0", "model.attention=sdpa")
    return Backend("flex", True, f"compiled for this run, {dtype} on CUDA{seen}")


def _obstacle(name: str, head_dim: int | None, dtype: str, capability: tuple[int, int] | None) -> tuple[str, str]:
    """What no installation would mend, and what would."""
    if dtype not in _SIXTEEN_BITS:
        return f"works in 16 bits, and the precision is {dtype}", "model.precision=bf16, or model.attention=sdpa"
    if head_dim is not None and (head_dim % 8 or head_dim > 256):
        return f"takes head sizes that are multiples of 8 up to 256, and this is {head_dim}", "model.attention=sdpa"
    if name == "flash_attention_4":
        return _obstacle_4(head_dim, capability)
    if name == "flash_attention_3" and (capability is None or capability[0] != 9):
        this = "that is not known here" if capability is None else f"this is {capability[0]}.{capability[1]}"
        return f"needs Hopper (compute capability 9), and {this}", "model.attention=auto"
    if capability is not None and capability < (8, 0):
        return f"needs compute capability 8.0, and this is {capability[0]}.{capability[1]}", "model.attention=sdpa"
    return "", ""


def _obstacle_4(head_dim: int | None, capability: tuple[int, int] | None) -> tuple[str, str]:
    if capability is None or capability[0] not in {9, 10, 11}:
        this = "that is not known here" if capability is None else f"this is {capability[0]}.{capability[1]}"
        return f"needs Hopper or Blackwell (compute capability 9 to 11), and {this}", "model.attention=auto"
    if head_dim is not None and head_dim > 128 and capability[0] != 9:
        return f"takes head sizes up to 128 on Blackwell, and this is {head_dim}", "model.attention=auto"
    return "", ""


def _missing(name: str, packages: Mapping[str, str], varlen_arguments: frozenset[str] | None) -> str:
    if name == "varlen":
        have = packages.get("torch", "0")
        if varlen_arguments is None:
            return "" if Version(have) >= Version("2.11") else f"needs torch 2.11, and this is {have}"
        lacks = sorted(_VARLEN_NEEDS - varlen_arguments)
        return f"torch {have}'s varlen_attn does not take {' and '.join(lacks)}" if lacks else ""
    package = _DISTRIBUTION[name]
    return "" if package in packages else f"{package} is not installed ({_INSTALL[name]})"
