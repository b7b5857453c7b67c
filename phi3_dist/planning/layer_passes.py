"""What computes a layer's passes: Triton's kernels on CUDA, or torch; and whether compiling the latter pays.

`model.compile`: seconds that compiling takes against seconds that a run's tokens gain by it.

What is compiled are the four passes of modeling/passes.py. Measured with torch 2.13 on one core of a CPU, 1,024 tokens
at a time, by hand and compiled in turns: widths of 576, 1,152 and 3,072, of which the least gain counts here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_dist.family.variants import Shape

__all__ = [
    "COLD_S",
    "KERNELS_INSTALL",
    "choose_compile",
    "choose_kernels",
    "gain_s",
    "pays_from",
    "why_not_triton",
]

KERNELS_INSTALL = "pip install triton (torch's CUDA wheels bring it)"

COLD_S = 13.0
"""From nothing to all four compiled, torch's compiler imported, with an empty cache; 3.3 where the cache has them."""
_NORM_NS, _SWIGLU_NS, _ROTARY_NS = 0.65, 0.5, 0.2
"""Gain for a value of a token, forward and backward: of hidden (two norms a layer), intermediate, and joined heads."""


def gain_s(shape: Shape, tokens: int, threads: int) -> float:
    """Seconds that compiled passes save over `tokens` tokens of one rank on a CPU, with so many threads."""
    heads = shape.q_out + 2 * shape.kv_out
    token_ns = shape.layers * (2 * _NORM_NS * shape.hidden + _SWIGLU_NS * shape.intermediate + _ROTARY_NS * heads)
    return tokens * token_ns * 1e-9 / threads


def pays_from(shape: Shape, threads: int) -> int:
    """Tokens of one rank from which compiling gains what it takes, the cache being empty."""
    return round(COLD_S / gain_s(shape, 1, threads))


def why_not_triton(
    device: str, packages: Mapping[str, str], *, capability: tuple[int, int] | None, fused: bool
) -> tuple[str, str]:
    """Why Triton's kernels can't compute norms, rotary embedding, SwiGLU and LoRA, and the fix; empty where they can.

    `fused`: whether both `model.fused_layers` and `model.fused_lora` hold, and nothing is to be compiled. A capability
    of None is not known yet.
    """
    if device != "cuda":
        return f"Triton's kernels need CUDA, and the device is {device}", "model.kernels=torch"
    if capability is not None and capability < (8, 0):
        return f"they need compute capability 8.0, and this is {capability[0]}.{capability[1]}", "model.kernels=torch"
    if "triton" not in packages:
        return "triton is not installed", KERNELS_INSTALL
    if not fused:
        return "model.fused_layers or model.fused_lora is false, or model.compile true", "model.kernels=torch"
    return "", ""


def choose_kernels(configured: str, obstacle: str, measured: Mapping[str, Any]) -> tuple[str, str]:
    """`triton` or `torch`, and the reason. What is asked for and has an obstacle is the caller's to refuse.

    `auto` takes Triton's where whole steps were timed with them on such a card (`measured`, of `make card`) and gained.
    """
    if configured != "auto":
        return configured, "as the run file says"
    if obstacle:
        return "torch", obstacle
    gain = measured.get("kernels_gain")
    if not isinstance(gain, int | float):
        why = (
            "steps with Triton's kernels were not timed on this card (make card does; model.kernels=triton takes them)"
        )
        return "torch", why
    chosen = "triton" if measured.get("kernels") == "triton" else "torch"
    return chosen, f"measured on this card: a step with Triton's kernels has {gain:.2f} times the speed"


def _on_a_card(measured: Mapping[str, Any]) -> str:
    gain = measured.get("compile_gain")
    if not isinstance(gain, int | float):
        return "its gain on this card has not been measured (make card does); model.compile=true compiles"
    return f"measured on this card: compiled, a step has {gain:.2f} times the speed"


def choose_compile(
    configured: str | bool,
    device: str,
    *,
    no_compiler: str,
    fused: bool,
    shape: Shape | None,
    tokens: int | None,
    threads: int,
    measured: Mapping[str, Any] | None = None,
) -> tuple[int | None, str]:
    """From how many tokens of a rank on the passes are compiled (0: always, None: never), and the reason.

    `tokens` are those of the whole run on one rank; None: not counted yet. `no_compiler` is the reason why nothing can
    be compiled here, or empty; what is asked for all the same is the caller's to refuse.
    """
    measured = measured or {}
    if isinstance(configured, bool):
        return (0 if configured else None), "as the run file says"
    why_not = {
        "model.fused_layers is false, and only the fused layers' passes are compiled": not fused,
        _on_a_card(measured): device != "cpu" and not measured.get("compile"),
        no_compiler: bool(no_compiler),
    }
    against = next((why for why, holds in why_not.items() if holds), "")
    if not against and device != "cpu":
        return 0, _on_a_card(measured)
    if against or shape is None:
        return None, against or "the model's shape is not known here"
    from_tokens = pays_from(shape, threads)
    if tokens is None:
        return from_tokens, f"pays from {from_tokens:,} tokens a rank on, which are counted with the data"
    words = (
        f"gains about {gain_s(shape, tokens, threads):.1f} s over {tokens:,} tokens a rank, and takes {COLD_S:.0f} s"
    )
    return (0 if tokens >= from_tokens else None), words
