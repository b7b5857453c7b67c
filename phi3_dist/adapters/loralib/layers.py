"""One layer of loralib (microsoft/LoRA, 0.1.2) as PEFT's, and back: where the two forms are equal, and where not.

    kind         loralib                                    PEFT                            to PEFT   from PEFT
    Linear       A (r, in)        B (out, r)                the same                        exact     exact
    Embedding    A (r, num)       B (dim, r)                the same                        exact     exact
    MergedLinear A (r n, in)      B (out n / groups, r)     A (r n, in), B block-diagonal   exact     exact
    Conv2d       A (r k, in k)    B (out k, r k)            A (r, in, k, k), B (out, r, 1, 1)  no     exact

n is the number of enabled groups, k the kernel. Each layer adds `alpha / r * update` to its frozen weight; MergedLinear
becomes an adapter of rank r·n and alpha·n. The shapes are those of `loralib/layers.py` and of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from phi3_dist.errors import AdapterError, ConfigError, Problem
from phi3_dist.family.variants import Shape

__all__ = ["KINDS", "Kind", "Layer", "Review", "Update", "conv2d", "end", "from_merged", "lookup", "to_merged", "whole"]

Kind = Literal["linear", "embedding", "conv2d", "merged"]
KINDS: Mapping[Kind, str] = {
    "linear": "Linear",
    "embedding": "Embedding",
    "conv2d": "Conv2d",
    "merged": "MergedLinear",
}
V = TypeVar("V")


@dataclass(frozen=True)
class Layer:
    """How a layer of loralib is built so that a file fits it."""

    kind: Kind
    r: int
    alpha: float
    enable_lora: tuple[bool, ...] = ()

    def __str__(self) -> str:
        enabled = f", enable_lora={list(self.enable_lora)}" if self.kind == "merged" else ""
        return f"lora.{KINDS[self.kind]}(r={self.r}, lora_alpha={self.alpha:g}{enabled})"


@dataclass(frozen=True)
class Update:
    """A and B of one module, in either form."""

    module: str
    kind: Kind
    a: Tensor
    b: Tensor


def end(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def whole(alpha: float) -> float:
    """32 for 32.0, as people write it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _fits(key: str, module: str) -> bool:
    return module == key or module.endswith(f".{key}")


def lookup(values: Mapping[str, V] | None, module: str) -> V | None:
    """The value whose key is the longest end of the module's name."""
    fitting = [key for key in values or {} if _fits(key, module)]
    return (values or {})[max(fitting, key=len)] if fitting else None


class Review:
    """What is wrong with a file and what has to be asked for it: one problem for all modules that share it.

    base: the shape of the Phi-3 model that the file belongs to, where it is known.
    """

    def __init__(self, base: Shape | None) -> None:
        self.base = base
        self.found: dict[tuple[str, str, bool], list[str]] = {}

    def wrong(self, module: str, what: str, fix: str = "") -> None:
        """The file cannot be converted."""
        self.found.setdefault((what, fix, False), []).append(module)

    def ask(self, module: str, what: str, fix: str) -> None:
        """An argument is missing, or does not belong to the file."""
        self.found.setdefault((what, fix, True), []).append(module)

    def raise_if_any(self) -> None:
        """AdapterError where the file cannot be converted, ConfigError where the arguments alone are at fault."""
        problems = []
        for (what, fix, _), modules in self.found.items():
            more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
            problems.append(Problem(f"{modules[0]}{more}", what, fix))
        if problems:
            only_arguments = all(ask for _, _, ask in self.found)
            raise ConfigError(*problems) if only_arguments else AdapterError(*problems)

    def unused(self, argument: str, values: Mapping[str, Any] | None, modules: Iterable[str]) -> None:
        """Ask about keys that are the end of no module's name."""
        ends = ", ".join(sorted({end(module) for module in modules}))
        for key in values or {}:
            if not any(_fits(key, module) for module in modules):
                self.ask(argument, f"'{key}' is not an adapted module", f"the adapted modules end in {ends}")

    def size(self, update: Update) -> None:
        """Inputs and outputs of a PEFT-like A (r, in), B (out, r) against the base's."""
        if self.base is None:
            return
        hidden, vocab = self.base.hidden, self.base.vocab
        sizes = {**self.base.linear_sizes, "lm_head": (hidden, vocab), "embed_tokens": (vocab, hidden)}
        have, wanted = (update.a.shape[1], update.b.shape[0]), sizes.get(end(update.module))
        if wanted not in (None, have):
            what = f"the update is for {have[0]} inputs and {have[1]} outputs, the base has {wanted[0]} and {wanted[1]}"
            self.wrong(update.module, what, "give the base model that the file was trained on, and its enable_lora")

    def groups(self, update: Update, groups: int, rows: int) -> None:
        """MergedLinear cuts its rows into equal groups: under grouped-query attention these are not q, k and v."""
        parts, size = self._parts(update, rows), rows // groups
        if all(boundary % size == 0 for boundary in accumulate(parts)):
            return
        names = ("q", "k", "v") if len(parts) == 3 else ("gate", "up")
        have = ", ".join(f"{name} has {part}" for name, part in zip(names, parts, strict=True))
        why = ": grouped-query attention" if len(parts) == 3 and parts[0] != parts[1] else ""
        what = f"MergedLinear's {groups} groups of {size} rows cut across what the module fuses ({have}{why})"
        self.wrong(update.module, what, "use lora.Linear or PEFT for this module: they adapt the fused weight as one")

    def _parts(self, update: Update, rows: int) -> tuple[int, ...]:
        """Rows of the projections that Phi-3 fuses into this module; () where it is not one of those.

        Without the base's shape q is taken to be as wide as the hidden state, as in every published Phi-3.
        """
        if end(update.module) == "gate_up_proj":
            return (rows // 2, rows - rows // 2)
        if end(update.module) != "qkv_proj":
            return ()
        q = min(self.base.q_out if self.base else update.a.shape[1], rows)
        return (q, (rows - q) // 2, rows - q - (rows - q) // 2)


def from_merged(update: Update, flags: tuple[bool, ...], review: Review) -> Update:
    """MergedLinear's A (r n, in), B (out n / groups, r) as A (r n, in), B (out, r n) with one block for each group."""
    a, b, n, r = update.a, update.b, sum(flags), update.b.shape[1]
    if n == 0 or a.shape[0] != r * n or b.shape[0] % n:
        what = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit {n} enabled groups of {len(flags)}"
        review.wrong(update.module, what, "give the enable_lora that the layer was built with")
        return update
    size = b.shape[0] // n
    review.groups(update, len(flags), size * len(flags))
    wide = b.new_zeros(size * len(flags), r * n)
    for index, group in enumerate(i for i, flag in enumerate(flags) if flag):
        block = b[index * size : (index + 1) * size]
        wide[group * size : (group + 1) * size, index * r : (index + 1) * r] = block
    return replace(update, b=wide)


def to_merged(update: Update, flags: tuple[bool, ...], r: int | None, review: Review) -> Update:
    """A (R, in), B (out, R) as MergedLinear's A (r n, in), B (out n / groups, r).

    With r = R (the default) A is repeated for each group; with r = R / n the blocks of a block-diagonal B are taken.
    """
    module, a, b = update.module, update.a, update.b
    rank, rows, n = a.shape[0], b.shape[0], sum(flags)
    if update.kind != "linear" or n == 0 or rows % len(flags):
        what = f"a {KINDS[update.kind]} of {rows} outputs is not a MergedLinear of {len(flags)} groups, {n} enabled"
        review.wrong(module, what, "leave this module out of enable_lora, or correct its groups")
        return update
    review.size(update)
    review.groups(update, len(flags), rows)
    groups, enabled = b.view(len(flags), rows // len(flags), rank), torch.tensor(flags)
    if groups[~enabled].any():
        every = ",".join(["true"] * len(flags))
        what = "the adapter changes rows of groups that enable_lora leaves out"
        review.wrong(module, what, f"enable all groups: {end(module)}={every}")
    kept = groups[enabled]
    if r is None or r == rank:
        return replace(update, kind="merged", a=a.repeat(n, 1), b=kept.reshape(-1, rank))
    if r * n != rank:
        review.ask(module, f"rank {rank} cannot become {n} groups of rank {r}", f"r={rank}, or r={rank}/{n} if whole")
        return update
    blocks = kept.view(n, rows // len(flags), n, r)
    compact = torch.stack([blocks[group, :, group] for group in range(n)])
    if blocks.count_nonzero() != compact.count_nonzero():
        review.wrong(module, f"lora_B is not block-diagonal: groups of rank {r} cannot hold it", "leave r out")
    return replace(update, kind="merged", b=compact.reshape(-1, r))


def conv2d(update: Update, review: Review) -> Update:
    """PEFT's A (r, in, k, k), B (out, r, 1, 1) as loralib's A (r k, in k), B (out k, r k).

    loralib reads `B @ A` as the weight (out, in, k, k) row by row, so that row o·k + i of B stands for row i of the
    kernels of output o, if groups = 1: B ⊗ 1 keeps the rows apart.
    """
    a, b = update.a, update.b
    rank, channels, height, width = a.shape
    if height != width:
        review.wrong(update.module, f"the kernel is {height}×{width}", "loralib's Conv2d has square kernels only")
    elif b.shape[1:] != (rank, 1, 1):
        review.wrong(update.module, "is a grouped convolution", "loralib and PEFT lay its update out in different ways")
    else:
        wide = torch.kron(b[:, :, 0, 0].contiguous(), torch.eye(width, dtype=b.dtype))
        return replace(update, a=a.reshape(rank * width, channels * width), b=wide)
    return update
