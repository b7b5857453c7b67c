"""The support matrix: strategy × quantisation × device × precision → yes, or no with the reason and the nearest choice.

nf4 and int8 with DDP, ZeRO-1 and ZeRO-2, and nf4 with ZeRO-3 and FSDP2, were trained on two CPU processes, in fp32 and
bf16 (bitsandbytes 0.50.2, DeepSpeed 0.19.8); the `cuda` columns say what should hold there. One function answers, and
the tables of docs/strategies.md are generated from it, so that the two can't differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from string import ascii_lowercase

__all__ = [
    "STRATEGIES",
    "Yes",
    "No",
    "support",
    "support_adapter",
    "support_fp8",
    "support_optimizer",
    "support_sharing",
    "matrix_markdown",
]

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload")
"""Every way to place one model on the ranks, simplest first."""

QUANTIZATIONS = ("none", "nf4", "int8")
DEVICES = ("cpu", "cuda")
PRECISIONS = ("bf16", "fp32")

_REPLICATED = ("single", "ddp", "zero1", "zero2")
"""Strategies that keep the whole frozen base on each rank and touch none of its tensors."""


@dataclass(frozen=True)
class Yes:
    """It runs. `note`: what a user should expect of it, or nothing."""

    note: str = ""

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True)
class No:
    """It's refused, for this reason; `nearest` is the closest choice that works."""

    reason: str
    nearest: str

    def __bool__(self) -> bool:
        return False


def support(  # noqa: PLR0911 -- one return for each refusal, in the order a user should hear them
    strategy: str,
    quantization: str = "none",
    device: str = "cuda",
    precision: str = "bf16",
    *,
    fast_bf16: bool = True,
    packages: Mapping[str, str] | None = None,
) -> Yes | No:
    """Whether this combination runs. `packages` (name → version) is what is installed; None: everything.

    The caller's spelling is the run file's (`none`, `nf4`, `int8`; `bf16`, `fp32`); `strategy` is one of `STRATEGIES`.
    """
    if strategy not in STRATEGIES:
        return No(f"there is no strategy {strategy!r}", f"one of {', '.join(STRATEGIES)}")
    if device not in DEVICES:
        return No(f"{device} is not a device of this toolkit", "cpu or cuda")
    if strategy.startswith("zero") and packages is not None and "deepspeed" not in packages:
        return No("DeepSpeed is not installed", "`pip install 'phi3-dist[deepspeed]'`, or strategy ddp")
    if quantization != "none" and packages is not None and "bitsandbytes" not in packages:
        return No("bitsandbytes is not installed", "`pip install 'phi3-dist[qlora]'`, or quantization none")
    if strategy == "fsdp2_offload" and device == "cpu":
        return No("FSDP2 offloads from a GPU to host memory, and on a CPU there is nothing to offload", "fsdp2")
    if quantization != "none" and strategy not in _REPLICATED:
        return _sharded_quantized(strategy, quantization)
    if precision == "bf16" and not fast_bf16:
        return Yes("bf16 works here, but without hardware for it: slower than fp32")
    return Yes()


def _sharded_quantized(strategy: str, quantization: str) -> Yes | No:
    """Quantised weights where each rank should hold a part: tests/ranks/test_quantized_shards.py counts the bytes."""
    if strategy.startswith(("zero3", "fsdp2")) and quantization == "nf4":
        return Yes("every rank quantises the whole base while it loads, and keeps its part of the 4-bit weights")
    if strategy == "zero2_offload":
        return No("offload beside quantised weights has not been proven", "zero2")
    name = "ZeRO-3" if strategy.startswith("zero3") else "FSDP2"
    return No(f"{name} is proven to shard 4-bit weights, not int8's with their scales beside them", "zero2")


def support_fp8(
    strategy: str, quantization: str, device: str, capability: tuple[int, int] | None, torch_version: str
) -> Yes | No:
    """Whether `model.fp8` runs. Compute capability 8.9 brought FP8 products.

    torch 2.9 has no `scaled_mm`; 2.11 has it, without a CPU kernel (its products were run on an H200); 2.13 has both.
    2.10 and 2.12 were not tried.
    """
    if quantization != "none":
        return No(f"the base is in {quantization} already", "model.quantization=none")
    if strategy not in ("single", "ddp"):
        return No(f"FP8 weights have not been proven under {strategy}", "ddp")
    if device == "cuda" and capability is not None and capability < (8, 9):
        return No(f"FP8 products need compute capability 8.9, and this is {capability[0]}.{capability[1]}", "bf16")
    oldest = (2, 13) if device == "cpu" else (2, 11)
    if tuple(int(n) for n in torch_version.split(".")[:2]) < oldest:
        needed = ".".join(map(str, oldest))
        return No(f"needs torch {needed} on {device}, and this is {torch_version}", f"pip install 'torch>={needed}'")
    return Yes("on a CPU for checks: slower than fp32" if device == "cpu" else "")


def support_optimizer(name: str, strategy: str, device: str) -> Yes | No:
    """Whether `optim.name` runs under this strategy on this device.

    bitsandbytes 0.50 steps its 8-bit AdamW on a CPU too (run); its paged ones have no pages there.
    """
    if name == "adamw":
        return Yes()
    if device == "cpu" and name.startswith("paged"):
        return No("a paged optimizer pages between GPU and host memory, and bitsandbytes has none on a CPU", "adamw")
    if strategy.endswith("_offload"):
        return No("offloaded optimizer states are stepped on the host, by torch's AdamW", "adamw")
    if strategy.startswith("fsdp"):
        return No(f"bitsandbytes' optimizers have not been proven on the shards of {strategy} here", "adamw, or ddp")
    if strategy.startswith("zero"):
        what = "ZeRO cuts the moments across tensors, and bitsandbytes' blocks with them: no checkpoint could tell them"
        return No(f"{what} apart", "adamw, whose moments ZeRO shards, or ddp")
    return Yes()


ADAPTERS = ("dora", "pissa", "loftq", "eva", "new tokens")
"""Kinds of LoRA that don't run everywhere. rsLoRA, LoRA+, LoRA-FA, patterns and a subset of layers do."""


def support_adapter(  # noqa: PLR0911 -- one return for each refusal, as in `support`
    kind: str, strategy: str, quantization: str = "none"
) -> Yes | No:
    """Whether this kind of LoRA (`ADAPTERS`) runs under this strategy and quantisation, for which `fp8` counts too."""
    shards = strategy.startswith(("zero3", "fsdp2"))
    if kind == "dora" and quantization == "int8":
        what = "on a CPU PEFT 0.21's DoRA loses the scales of int8 weights in its first pass, and no GPU has run it"
        return No(what, "model.quantization nf4")
    if kind == "dora" and strategy.startswith("zero3"):
        what = "DoRA reads each base weight outside its layer's own forward, when ZeRO-3 holds only shards of it"
        return No(what, "zero2")
    if kind == "dora" and strategy.startswith("fsdp2") and quantization != "none":
        return No("DoRA has not been proven on shards of 4-bit weights", "zero2")
    if kind == "pissa" and quantization != "none":
        nearest = "loftq" if quantization == "nf4" else "default"
        return No("PiSSA takes part of each weight away, and the rest would have to be quantised again", nearest)
    if kind == "loftq" and quantization != "nf4":
        return No("LoftQ makes up for what NF4 loses", "model.quantization nf4, or init pissa")
    if kind == "eva" and shards:
        return No("EVA passes rows through the base before the ranks share it out", "zero2")
    return Yes()


def support_sharing(strategy: str, quantization: str = "none") -> Yes | No:
    """Whether ranks can share packs (`train.sequence_parallel`) under this strategy and quantisation (or `fp8`).

    tests/ranks/test_long_rows_ranks.py holds what says yes against one process, except FSDP2's offload: it needs a GPU.
    """
    if strategy == "single":
        return No("one process has no other to share its packs with", "ddp on as many processes")
    if quantization == "int8":
        what = "LLM.int8() looks for outlier columns over all tokens of a product, and a rank has a part of them"
        return No(what, "model.quantization nf4")
    if quantization == "fp8":
        return No("FP8 weights have not been proven where ranks share packs", "model.fp8 false")
    return Yes()


def _table(
    heads: Iterable[str], rows: Iterable[tuple[str, str, list[Yes | No]]], marks: Sequence[str], listed: str
) -> list[str]:
    """A Markdown table of answers by strategy and weights; then each reason once, its mark in the form of `listed`."""
    reasons: list[str] = []
    columns = ["strategy", "weights", *heads]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for strategy, quantization, answers in rows:
        cells = []
        for answer in answers:
            if isinstance(answer, Yes):
                cells.append("yes")
                continue
            reason = f"{answer.reason}; nearest: {answer.nearest}"
            if reason not in reasons:
                reasons.append(reason)
            cells.append(f"no [{marks[reasons.index(reason)]}]")
        lines.append(f"| {strategy} | {quantization} | {' | '.join(cells)} |")
    return [*lines, "", *(f"{listed.format(mark)} {reason}" for mark, reason in zip(marks, reasons, strict=False))]


def matrix_markdown() -> str:
    """Both tables as Markdown, one row for each strategy and quantisation, with the reasons below each.

    The second one holds `support_adapter`'s and `support_sharing`'s answers, where the strategy and weights themselves
    are supported.
    """
    every = list(product(STRATEGIES, QUANTIZATIONS))
    columns = list(product(DEVICES, PRECISIONS))
    lines = _table(
        (" ".join(column) for column in columns),
        ((*row, [support(*row, *column) for column in columns]) for row in every),
        [str(number) for number in range(1, 100)],
        "{}.",
    )
    keys = "`lora.dora`, `lora.init`, `model.new_tokens`"
    lines += ["", f"Starts and kinds of LoRA ({keys}), and packs shared by ranks (`train.sequence_parallel`):", ""]
    lines += _table(
        (*ADAPTERS, "shared packs"),
        (
            (*row, [*(support_adapter(kind, *row) for kind in ADAPTERS), support_sharing(*row)])
            for row in every
            if support(*row)
        ),
        ascii_lowercase,
        "- {}:",
    )
    return "\n".join(lines) + "\n"
