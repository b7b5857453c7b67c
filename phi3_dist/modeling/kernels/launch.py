"""From a call to a compiled kernel, and what every kernel's tensors and sizes are brought to before.

Shapes: T tokens, C columns.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["launch", "power_of_two", "warps_for", "whole_rows"]

_COMPILED: dict[tuple[Any, ...], Any] = {}
_ALIGNED = 16


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    fixed: tuple[int, ...],
    warps: int,
    stages: int = 3,
) -> None:
    """Run a kernel over its tensors, the numbers that change from call to call, and those that are compiled into it.

    Triton's own way from a call to the compiled kernel takes longer on the host than most kernels here on the device:
    after the first call it is looked up by what it was compiled for. A fake tensor has nothing to compute with.
    """
    first, places = tensors[0], 0
    if type(first) is FakeTensor:
        return
    for tensor in tensors:
        places |= tensor.data_ptr()
    kinds = tuple([tensor.dtype for tensor in tensors])
    key = (kernel, fixed, warps, stages, kinds, places % _ALIGNED == 0, first.get_device())
    known = _COMPILED.get(key)
    if known is None:
        known = kernel[grid](*tensors, *numbers, *fixed, num_warps=warps, num_stages=stages)
        if known is not None and places % _ALIGNED == 0:  # Triton's interpreter compiles nothing
            _COMPILED[key] = known
        return
    known[grid](*tensors, *numbers, *fixed)


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def warps_for(block: int) -> int:
    return min(max(block // 512, 1), 16)


def whole_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor with whole rows (its last dimension), and the step from row to row. A view takes its time."""
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    flat = tensor.reshape(-1, tensor.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return flat, flat.stride(0)
