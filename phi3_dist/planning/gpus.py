"""Named GPUs, as their makers' data sheets describe them: what a plan takes until a card was measured.

Dense bf16 products (float32 accumulation, without sparsity) where the card has them, else float32. `link` is what one
GPU sends and receives to its neighbours in a node together, as data sheets count it: NVLink, else PCIe. `network` is
that of the maker's own node of eight, or 100 Gbit/s where there is none.

Sources: NVIDIA's data sheets of A100 (PCIe 40 and SXM 80 GB), H100 (SXM, PCIe, NVL), H200, B200 (DGX B200), L4, L40S,
A10, RTX A6000, V100 (SXM2) and T4; the architecture papers of Ampere GA102 (RTX 3090), Ada (RTX 4090) and Blackwell
(RTX 5090); DGX A100 and DGX H100 for the network (eight adapters of 200 and 400 Gbit/s).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from phi3_dist.errors import PlanError, Problem

__all__ = ["GPUS", "Gpu", "find_gpu", "gib_of"]


@dataclass(frozen=True)
class Gpu:
    """A card. Memory in GiB, arithmetic in TFLOP/s, memory and link in GB/s, network of a node of eight in Gbit/s."""

    name: str
    memory_gib: float
    tflops: float
    memory_gbs: float
    link_gbs: float
    network_gbit: float = 100.0
    capability: tuple[int, int] = (9, 0)
    source: str = "data sheet"

    @property
    def driver_name(self) -> str:
        """As the driver names it, where measurements of it are kept."""
        return f"NVIDIA {self.name.upper()}"

    @property
    def fast_bf16(self) -> bool:
        return self.capability >= (8, 0)


_PCIE4, _PCIE5 = 64.0, 128.0
GPUS: tuple[Gpu, ...] = (
    Gpu("b200", 180, 2250, 8000, 1800, 3200, (10, 0)),
    Gpu("h200", 141, 989, 4800, 900, 3200),
    Gpu("h100-80gb", 80, 989, 3350, 900, 3200),
    Gpu("h100-nvl", 94, 835, 3900, 600, 1600),
    Gpu("h100-pcie", 80, 756, 2000, _PCIE5, 400),
    Gpu("a100-80gb", 80, 312, 2039, 600, 1600, (8, 0)),
    Gpu("a100-40gb", 40, 312, 1555, 600, 1600, (8, 0)),
    Gpu("l40s", 48, 362, 864, _PCIE4, capability=(8, 9)),
    Gpu("l4", 24, 121, 300, _PCIE4, capability=(8, 9)),
    Gpu("a10", 24, 125, 600, _PCIE4, capability=(8, 6)),
    Gpu("rtx-a6000", 48, 155, 768, _PCIE4, capability=(8, 6)),
    Gpu("rtx-5090", 32, 210, 1792, _PCIE5, capability=(12, 0)),
    Gpu("rtx-4090", 24, 165, 1008, _PCIE4, capability=(8, 9)),
    Gpu("rtx-3090", 24, 71, 936, _PCIE4, capability=(8, 6)),
    Gpu("v100-32gb", 32, 15.7, 900, 300, capability=(7, 0)),
    Gpu("t4", 16, 8.1, 320, 32, capability=(7, 5)),
)
_ALIASES = {
    "h100": "h100-80gb",
    "h100sxm": "h100-80gb",
    "h10080gbhbm3": "h100-80gb",
    "a100": "a100-80gb",
    "a100sxm480gb": "a100-80gb",
    "a100pcie40gb": "a100-40gb",
    "4090": "rtx-4090",
    "3090": "rtx-3090",
    "5090": "rtx-5090",
    "a6000": "rtx-a6000",
    "v100": "v100-32gb",
    "h200141gb": "h200",
}


def _plain(name: str) -> str:
    return re.sub(r"nvidia|tesla|geforce|[^a-z0-9]", "", name.lower())


def find_gpu(name: str) -> Gpu:
    """The card of this name, spelled as a shop or a driver spells it. Raises PlanError with the nearest one."""
    known = {_plain(gpu.name): gpu for gpu in GPUS}
    plain = _plain(name)
    plain = _plain(_ALIASES.get(plain, plain))
    if plain in known:
        return known[plain]
    spelled = [*known, *_ALIASES]
    near = difflib.get_close_matches(plain, spelled, n=1, cutoff=0.3) or [spelled[0]]
    nearest = known[_plain(_ALIASES.get(near[0], near[0]))].name
    every = ", ".join(gpu.name for gpu in GPUS)
    what = f"{name!r} is not a card whose data sheet is known here; there are {every}"
    raise PlanError(Problem("--gpu", what, f"nearest: {nearest}; or --memory-gib for any other card"))


_MOST_GIB = {"--host-memory-gib": 65536}
"""A plain number that is larger is one of MiB."""


def gib_of(text: str, option: str = "--memory-gib") -> float:
    """GiB of `80`, `80GiB`, `80G`, `80 GB` or `81920MiB`; a card's GB are GiB. Raises PlanError for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT]?)(i?[bB]?)\s*", text)
    factor = {"": 1.0, "m": 1 / 1024, "g": 1.0, "t": 1024.0}.get(found[2].lower() if found else "?")
    if found is None or factor is None or (not found[2] and found[3]) or not float(found[1]):
        what = f"is {text[:40]!r}, which is not an amount of memory"
        raise PlanError(Problem(option, what, f"a number of GiB, as in {option} 80, or 80GiB"))
    value = float(found[1]) * factor
    if not found[2] and value > _MOST_GIB.get(option, 4096):
        what = f"is {text[:40]}, and nothing has that many GiB"
        raise PlanError(Problem(option, what, f"with its unit, as in {text.strip()[:20]}MiB"))
    return value
