"""What a step asks of the device: launches, bytes moved, waits, collectives, and the bytes that live at its peak.

A launch is an ATen operation that starts a kernel, counted as one: views and allocations start none, and an attention
kernel's own parts are not told apart. Bytes are those of the operands as they are laid out, each read or written once.
A wait is whatever lets the host stand still until the device is done: a number read, a copy from or to memory that is
not pinned, an operation whose result's size depends on values.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phi3_dist.bench.live_bytes import Live

__all__ = ["Fault", "RealWatch", "Tally", "Wait", "Watch"]

_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_"}
_NO_KERNEL = _ALLOCATES | {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "alias", "set_", "record_stream"}
_ASKS = {"device", "is_pinned", "sym_size", "sym_numel", "sym_stride", "is_contiguous", "sym_storage_offset", "layout"}
_WRITES_ONLY = {"copy_", "zero_", "fill_", "uniform_", "normal_", "bernoulli_", "random_"}
_READS_ROWS = {"embedding", "index_select", "gather", "index"}
_WRITES_ROWS = {"scatter_add_", "index_add_", "index_copy_", "index_put_", "scatter_"}
_SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount"}
_UNCOUNTED = {"load", "resume"}
_ZEROS_AND_COPY = {"select_backward", "slice_backward", "index_backward"}
"""Backward of a view by fill and copy, where another view (squeeze, split, chunk) costs nothing."""
_NUMBERS = {torch.bool: False, torch.float32: 0.5, torch.float64: 0.5, torch.bfloat16: 0.5, torch.float16: 0.5}
"""The number that is read of a tensor that has none: a sound gradient norm, and no overflow. Of integers 0."""
_PACKAGE = Path(__file__).parents[1]


@dataclass
class Tally:
    """Launches and the bytes they read and write."""

    launches: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    ops: Counter[str] = field(default_factory=Counter)

    @property
    def moved_bytes(self) -> int:
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class Wait:
    """The host stands still until the device is done: for what, at which line, in which phase of the run."""

    what: str
    where: str
    phase: str


@dataclass(frozen=True)
class Fault:
    """What a GPU would refuse, or do in more passes than there need be."""

    what: str
    where: str
    phase: str


@dataclass(frozen=True)
class _Call:
    """One dispatched operation."""

    name: str
    func: Any
    args: Any
    options: Mapping[str, Any]

    @property
    def inputs(self) -> list[Tensor]:
        return _tensors((self.args, self.options))

    def argument(self, number: int, name: str, default: Any = None) -> Any:
        return self.args[number] if len(self.args) > number else self.options.get(name, default)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _where() -> str:
    """The innermost line of this package outside its benchmarks, and below it the library that was called."""
    frame: FrameType | None = sys._getframe(2)
    inner = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and path.parent != _PACKAGE / "bench":
            return f"phi3_dist/{path.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}{inner}"
        if not inner and "torch" not in path.parts and path.parent != _PACKAGE / "bench":
            inner = f" ({'/'.join(path.parts[-2:])}:{frame.f_lineno})"
        frame = frame.f_back
    return inner.strip(" ()") or "autograd"


def _laid_out_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's elements; what is expanded lies there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


class Watch(TorchDispatchMode):
    """Counts all that is dispatched inside, under `phase`; of one decoder layer also by itself, see `watch_layer`.

    Enter it after the fake devices. A number that is read is made up, so that one rehearsal finds all waits.
    """

    def __init__(self, *, resizes: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase, self.section, self.resizes = "load", "", resizes
        self.tallies: dict[str, Tally] = {}
        self.waits: list[Wait] = []
        self.faults: list[Fault] = []
        self.collectives: Counter[str] = Counter()
        self.live = Live()
        self._pinned: set[int] = set()

    # --- what the rehearsal tells it ----------------------------------------------------------------------------------

    def wait(self, what: str) -> None:
        if self.phase not in _UNCOUNTED:
            self.waits.append(Wait(what, _where(), self.phase))

    def fault(self, what: str) -> None:
        self.faults.append(Fault(what, _where(), self.phase))

    def restart(self) -> None:
        """Count from here on; what lives stays known, and faults stay."""
        if self.resizes:
            self.live.measure_again()
        self.waits.clear()
        self.tallies.clear()
        self.collectives.clear()
        self.live.restart()

    def name_tensors(self, model: nn.Module, optimizer: Any) -> None:
        """Tell weights, adapter, gradients and optimizer state from what a step makes."""
        for param in model.parameters():
            self.live.call(_local(param), "adapter" if param.requires_grad else "base weights")
        states = getattr(optimizer, "state", {})
        for tensor in tree_leaves([dict(state) for state in states.values()]):
            if isinstance(tensor, Tensor):
                self.live.call(_local(tensor), "optimizer")

    def name_gradients(self, model: nn.Module) -> None:
        """No hook does this while they come: FSDP2 then waits for each that it offloads."""
        for param in model.parameters():
            if param.grad is not None:
                self.live.call(_local(param.grad), "gradients")

    def watch_layer(self, layer: nn.Module) -> None:
        """Count a decoder layer's forward and backward under `layer forward` and `layer backward` as well.

        Its backward is from the moment its output's gradient is known to that of its input's.
        """

        def before(_: nn.Module, inputs: Any, options: Any) -> None:
            if self.phase == "forward":
                self.section = "layer forward"
                hidden = inputs[0] if inputs else options["hidden_states"]
                if hidden.requires_grad:
                    hidden.register_hook(lambda _: self._enter(""))

        def after(_: nn.Module, inputs: Any, options: Any, output: Any) -> None:
            if self.phase == "forward":
                self.section = ""
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad:
                    hidden.register_hook(lambda _: self._enter("layer backward"))

        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after, with_kwargs=True)

    def _enter(self, section: str) -> None:
        self.section = section

    # --- what it sees -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(getattr(kind, "__name__", "") == "DTensor" for kind in types):
            return NotImplemented  # its local tensors come by again
        call = _Call(func._schema.name.split("::")[-1], func, args, kwargs or {})
        if call.name in _ASKS:
            return self._is_pinned(args[0]) if call.name == "is_pinned" else func(*args, **call.options)
        inputs = call.inputs
        answer = _ANSWERED.get(call.name)
        if answer is None or (call.name in _SIZED_BY_VALUES and not _on_device(inputs)):
            self._check_devices(call.name, inputs)
            out = func(*args, **call.options)
        else:
            out = answer(self, call)
        outputs = _tensors(out)
        self._remember(call, outputs)
        if func.namespace == "c10d":
            self.collectives[call.name] += 1
        elif not func.is_view and call.name not in _NO_KERNEL:
            self._count(call, inputs, outputs)
        return out

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _check_devices(self, name: str, inputs: Sequence[Tensor]) -> None:
        on_host = [t for t in inputs if t.device.type == "cpu"]
        if len(on_host) in {0, len(inputs)} or name in {"copy_", "_to_copy"}:
            return
        if name.startswith("_fused") or any(t.ndim for t in on_host):
            self.fault(f"{name}: {len(on_host)} of {len(inputs)} tensors are on the host")

    def _remember(self, call: _Call, outputs: Sequence[Tensor]) -> None:
        if self.resizes and self.phase not in _UNCOUNTED:
            self.live.measure_again()
        kinds = {"load": "other", "forward": "activations", "backward": "backward's own", "update": "update's own"}
        for tensor in outputs:
            if not call.func.is_view:
                self.live.add(tensor, kinds.get(self.phase, "other"))
            if call.name == "_pin_memory" or call.options.get("pin_memory"):
                self._pin(tensor)

    def _pin(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)

    def _count(self, call: _Call, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if call.name in {"copy_", "_to_copy"} and self._is_copy_between(call, inputs, outputs):
            return
        read, written = _moved(call, outputs)
        if not read and not written:
            return
        if call.name in _ZEROS_AND_COPY and self.phase == "backward":
            self.fault(f"{call.name}: zeros and a copy for the gradient of a view")
        for tally in self._tallies():
            tally.launches += 1
            tally.read_bytes += read
            tally.written_bytes += written
            tally.ops[call.name] += 1

    def _tallies(self) -> Iterator[Tally]:
        for key in (self.phase, self.section):
            if key:
                yield self.tallies.setdefault(key, Tally())

    def _is_copy_between(self, call: _Call, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Whether this copies between host and device: no kernel, but a wait unless it is from or to pinned memory."""
        in_place = call.name == "copy_"
        source, target = (inputs[1], inputs[0]) if in_place else (inputs[0], outputs[0])
        kinds = (source.device.type, target.device.type)
        if "cuda" not in kinds or kinds[0] == kinds[1]:
            return False
        at_once = call.argument(2, "non_blocking") if in_place else call.options.get("non_blocking")
        on_host = source if kinds[0] == "cpu" else target
        if at_once and not in_place and kinds[1] == "cpu":  # torch makes that memory pinned by itself
            self._pin(target)
        if not (at_once and self._is_pinned(on_host)):
            way = "from host to device" if kinds[0] == "cpu" else "from device to host"
            memory = "pinned memory, blocking" if self._is_pinned(on_host) else "memory that is not pinned"
            self.wait(f"a copy {way}, {memory}: {_size(source)}")
        return True


class RealWatch(Watch):  # type: ignore[no-untyped-call]
    """What lives while real tensors compute: nothing is counted, and numbers that are read are the real ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(getattr(kind, "__name__", "") == "DTensor" for kind in types):
            return NotImplemented  # its local tensors come by again
        call = _Call(func._schema.name.split("::")[-1], func, args, kwargs or {})
        out = func(*args, **call.options)
        self._remember(call, _tensors(out))
        return out


def _size(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
    return local.detach()


def _on_device(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.device.type == "cuda" for tensor in tensors)


# --- what fake tensors can't answer by themselves, and what a GPU would be waited for ---------------------------------


def _number(watch: Watch, call: _Call) -> bool | int | float:
    if _on_device(call.inputs):
        watch.wait("a number is read")
    return _NUMBERS.get(call.args[0].dtype, 0)


def _sized_by_values(watch: Watch, call: _Call) -> Any:
    watch.wait(f"{call.name}: the result's size depends on values")
    given: Tensor = call.args[0]
    return True if call.name == "equal" else given.new_empty((given.numel(), max(given.ndim, 1)), dtype=torch.int64)


def _sdp_choice(_: Watch, call: _Call) -> int:
    """torch's choice on CUDA, in short: 1 flash-attention, 2 memory-efficient, 0 plain mathematics."""
    query, mask = call.args[0], call.argument(3, "attn_mask")
    if query.device.type != "cuda":
        return 0
    if query.dtype in {torch.float16, torch.bfloat16} and mask is None:
        return 1
    return 0 if call.options.get("enable_gqa") else 2


def _int8_rows(watch: Watch, call: _Call) -> Any:
    rows, scales, nothing = call.func(call.args[0])
    if not call.argument(1, "threshold"):
        return rows, scales, nothing
    watch.wait("LLM.int8() looks for outliers above its threshold")
    return rows, scales, call.args[0].new_empty(1, dtype=torch.int64)


def _int8_product(_: Watch, call: _Call) -> Any:
    """Without outliers."""
    product: Any = torch.ops.bitsandbytes.int8_scaled_mm
    return product(*call.args[1:5], call.argument(6, "bias"), call.args[0].dtype), None


_ANSWERED: dict[str, Callable[[Watch, _Call], Any]] = {
    "_local_scalar_dense": _number,
    "_fused_sdp_choice": _sdp_choice,
    "_pin_memory": lambda _, call: torch.empty_like(call.args[0]),
    "record_stream": lambda *_: None,
    "int8_vectorwise_quant": _int8_rows,
    "int8_mixed_scaled_mm": _int8_product,
    **dict.fromkeys(_SIZED_BY_VALUES, _sized_by_values),
}


def _moved(call: _Call, outputs: Sequence[Tensor]) -> tuple[int, int]:
    """Bytes read and written on the device."""
    writes: list[Tensor] = []
    reads: list[Tensor] = []
    for number, argument in enumerate(call.func._schema.arguments):
        tensors = [t for t in _tensors(call.argument(number, argument.name)) if t.device.type == "cuda"]
        changed = argument.alias_info is not None and argument.alias_info.is_write
        writes += tensors if changed else []
        reads += [] if changed and (argument.is_out or call.name in _WRITES_ONLY) else tensors
    fresh = [t for t in outputs if t.device.type == "cuda" and not writes]
    if call.name in _READS_ROWS:
        rows = sum(map(_laid_out_bytes, fresh))
        return rows + sum(map(_laid_out_bytes, reads[1:])), rows
    if call.name in _WRITES_ROWS:
        rows = sum(map(_laid_out_bytes, reads[1:]))
        return 2 * rows, rows
    return sum(map(_laid_out_bytes, reads)), sum(map(_laid_out_bytes, [*writes, *fresh]))
