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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Fault", "Tally", "Wait", "Watch"]

_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_"}
_NO_KERNEL = _ALLOCATES | {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "alias", "set_", "record_stream"}
_ASKS = {"device", "is_pinned", "sym_size", "sym_numel", "sym_stride", "is_contiguous", "sym_storage_offset", "layout"}
_WRITES_ONLY = {"copy_", "zero_", "fill_", "uniform_", "normal_", "bernoulli_", "random_"}
_READS_ROWS = {"embedding", "index_select", "gather", "index"}
_WRITES_ROWS = {"scatter_add_", "index_add_", "index_copy_", "index_put_", "scatter_"}
_SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount"}
_ZEROS_AND_COPY = {"select_backward", "slice_backward", "index_backward"}
"""Backward of a view by fill and copy, where another view (squeeze, split, chunk) costs nothing."""
_ANSWERS = {torch.bool: False, torch.float32: 0.5, torch.float64: 0.5, torch.bfloat16: 0.5, torch.float16: 0.5}
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


def _where() -> str:
    """The innermost line of this package outside its benchmarks, and below it the library that was called."""
    frame, inner = sys._getframe(2), ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and path.parent != _PACKAGE / "bench":
            return f"phi3_dist/{path.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}{inner}"
        if not inner and "torch" not in path.parts and path.parent != _PACKAGE / "bench":
            inner = f" ({'/'.join(path.parts[-2:])}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return inner.strip(" ()") or "autograd"


def _laid_out_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's elements; what is expanded lies there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


class _Live:
    """Bytes of the storages that live, by device and by what they are for, and the most there were at once."""

    def __init__(self) -> None:
        self.now: dict[str, Counter[str]] = {"cuda": Counter(), "cpu": Counter()}
        self.peak: dict[str, Counter[str]] = {"cuda": Counter(), "cpu": Counter()}
        self._held: dict[int, tuple[weakref.ref[Any], str, str, int]] = {}

    def add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._held or tensor.device.type not in self.now:
            return
        key, device, size = storage._cdata, tensor.device.type, storage.nbytes()
        self._held[key] = (weakref.ref(storage, lambda _: self._drop(key)), device, kind, size)
        self._grow(device, kind, size)

    def _grow(self, device: str, kind: str, size: int) -> None:
        now = self.now[device]
        now[kind] += size
        if size > 0 and now.total() > self.peak[device].total():
            self.peak[device] = Counter(now)

    def _drop(self, key: int) -> None:
        _, device, kind, size = self._held.pop(key)
        self.now[device][kind] -= size

    def call(self, tensor: Tensor, kind: str) -> None:
        """From now on the tensor's storage is of this kind."""
        storage = tensor.untyped_storage()
        self.add(tensor, kind)
        held, device, before, size = self._held[storage._cdata]
        self.now[device][before] -= size
        self.now[device][kind] += size
        self._held[storage._cdata] = (held, device, kind, size)

    def measure_again(self) -> None:
        """FSDP2 and ZeRO-3 empty storages and fill them again without an operation."""
        for key, (held, device, kind, size) in list(self._held.items()):
            storage = held()
            now = size if storage is None else storage.nbytes()
            if now != size:
                self._held[key] = (held, device, kind, now)
                self._grow(device, kind, now - size)

    def restart(self) -> None:
        self.peak = {device: Counter(now) for device, now in self.now.items()}


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
        self.live = _Live()
        self._pinned: set[int] = set()

    # --- what the rehearsal tells it ----------------------------------------------------------------------------------

    def wait(self, what: str) -> None:
        if self.phase not in {"load", "resume"}:
            self.waits.append(Wait(what, _where(), self.phase))

    def fault(self, what: str) -> None:
        self.faults.append(Fault(what, _where(), self.phase))

    def restart(self) -> None:
        """Count from here on; what lives stays known, and faults stay."""
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
        options: dict[str, Any] = kwargs or {}
        name, space = func._schema.name.split("::")[-1], func.namespace
        if name in _ASKS:
            return self._is_pinned(args[0]) if name == "is_pinned" else func(*args, **options)
        inputs = [t for t in tree_leaves((args, options)) if isinstance(t, Tensor)]
        answered, out = self._answer(name, func, args, options, inputs)
        if not answered:
            self._check_devices(name, inputs)
            out = func(*args, **options)
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self._remember(name, func, options, outputs)
        if space == "c10d" or "allgather" in name or "reduce_scatter" in name:
            self.collectives[name] += 1
        elif not func.is_view and name not in _NO_KERNEL:
            self._count(name, func, args, options, inputs, outputs)
        return out

    def _answer(
        self, name: str, func: Any, args: Any, options: Mapping[str, Any], inputs: Sequence[Tensor]
    ) -> tuple[bool, Any]:
        """What fake tensors can't say by themselves, and what a GPU would wait for."""
        on_device = any(t.device.type == "cuda" for t in inputs)
        if name == "_fused_sdp_choice":
            return True, _sdp_choice(*args, **options)
        if name == "record_stream":
            return True, None
        if name == "_pin_memory":
            return True, torch.empty_like(args[0])
        if name == "_local_scalar_dense":
            if on_device:
                self.wait("a number is read")
            return True, _ANSWERS.get(args[0].dtype, 0)
        if name == "int8_vectorwise_quant" and (args[1] if len(args) > 1 else options.get("threshold")):
            self.wait("LLM.int8() looks for outliers above its threshold")
            rows, scales, _ = func(args[0])
            return True, (rows, scales, args[0].new_empty(1, dtype=torch.int64))
        if name == "int8_mixed_scaled_mm":
            bias = args[6] if len(args) > 6 else options.get("bias")
            return True, (torch.ops.bitsandbytes.int8_scaled_mm(*args[1:5], bias, args[0].dtype), None)
        if on_device and name in _SIZED_BY_VALUES:
            self.wait(f"{name}: the result's size depends on values")
            if name == "equal":
                return True, True
            return True, args[0].new_empty((args[0].numel(), max(args[0].ndim, 1)), dtype=torch.int64)
        return False, None

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _check_devices(self, name: str, inputs: Sequence[Tensor]) -> None:
        on_host = [t for t in inputs if t.device.type == "cpu"]
        if len(on_host) in {0, len(inputs)} or name in {"copy_", "_to_copy"}:
            return
        if name.startswith("_fused") or any(t.ndim for t in on_host):
            self.fault(f"{name}: {len(on_host)} of {len(inputs)} tensors are on the host")

    def _remember(self, name: str, func: Any, options: Mapping[str, Any], outputs: Sequence[Tensor]) -> None:
        if self.resizes:
            self.live.measure_again()
        kinds = {"load": "other", "forward": "activations", "backward": "backward's own", "update": "update's own"}
        for tensor in outputs:
            if not func.is_view:
                self.live.add(tensor, kinds.get(self.phase, "other"))
            if name == "_pin_memory" or options.get("pin_memory"):
                self._pin(tensor)

    def _pin(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)

    def _count(
        self, name: str, func: Any, args: Any, options: Mapping[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        if name in {"copy_", "_to_copy"} and self._is_copy_between(name, args, options, inputs, outputs):
            return
        read, written = _moved(name, func, args, options, inputs, outputs)
        if not read and not written:
            return
        if name in _ZEROS_AND_COPY and self.phase == "backward":
            self.fault(f"{name}: zeros and a copy for the gradient of a view")
        for tally in self._tallies():
            tally.launches += 1
            tally.read_bytes += read
            tally.written_bytes += written
            tally.ops[name] += 1

    def _tallies(self) -> Iterator[Tally]:
        for key in (self.phase, self.section):
            if key:
                yield self.tallies.setdefault(key, Tally())

    def _is_copy_between(
        self, name: str, args: Any, options: Mapping[str, Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> bool:
        """Whether this copies between host and device: no kernel, but a wait unless it is from or to pinned memory."""
        source, target = (inputs[1], inputs[0]) if name == "copy_" else (inputs[0], outputs[0])
        kinds = (source.device.type, target.device.type)
        if "cuda" not in kinds or kinds[0] == kinds[1]:
            return False
        at_once = options.get("non_blocking", len(args) > 2 and bool(args[2]))
        on_host = source if kinds[0] == "cpu" else target
        if at_once and name == "_to_copy" and kinds[1] == "cpu":  # torch makes that memory pinned by itself
            self._pin(target)
        if not (at_once and self._is_pinned(on_host)):
            way = "from host to device" if kinds[0] == "cpu" else "from device to host"
            memory = "pinned memory, blocking" if self._is_pinned(on_host) else "memory that is not pinned"
            self.wait(f"a copy {way}, {memory}: {_size(source)}")
        return True


def _size(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
    return local.detach()


def _sdp_choice(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
) -> int:
    """torch's choice on CUDA, in short: 1 flash-attention, 2 memory-efficient, 0 plain mathematics."""
    if query.device.type != "cuda":
        return 0
    if query.dtype in {torch.float16, torch.bfloat16} and attn_mask is None:
        return 1
    return 0 if options.get("enable_gqa") else 2


def _moved(
    name: str, func: Any, args: Any, options: Mapping[str, Any], inputs: list[Tensor], outputs: list[Tensor]
) -> tuple[int, int]:
    """Bytes read and written on the device."""
    writes: list[Tensor] = []
    reads: list[Tensor] = []
    for number, argument in enumerate(func._schema.arguments):
        given = args[number] if number < len(args) else options.get(argument.name)
        tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.device.type == "cuda"]
        changed = argument.alias_info is not None and argument.alias_info.is_write
        writes += tensors if changed else []
        reads += [] if changed and (argument.is_out or name in _WRITES_ONLY) else tensors
    fresh = [t for t in outputs if t.device.type == "cuda" and not any(t is w for w in writes)]
    if name in _READS_ROWS:
        rows = sum(map(_laid_out_bytes, fresh))
        return rows + sum(map(_laid_out_bytes, reads[1:])), rows
    if name in _WRITES_ROWS:
        rows = sum(map(_laid_out_bytes, reads[1:]))
        return 2 * rows, rows
    return sum(map(_laid_out_bytes, reads)), sum(map(_laid_out_bytes, writes)) + (
        0 if writes else sum(map(_laid_out_bytes, fresh))
    )
