"""The gather: an adapter's tensors to rank 0, at the cost of the adapter and not of the model.

    plain, DDP, ZeRO-1/2   every rank has them whole: rank 0 copies, nothing moves
    ZeRO-3                 each rank sends its partition of the adapter's tensors to rank 0
    FSDP2                  each rank of rank 0's shard group sends its rows to rank 0

A partition of ZeRO-3 and a `Shard(0)` of FSDP2 are the same thing: rank r of the group holds elements
[r * stride, (r + 1) * stride) of the flat tensor, short or empty at the end. So one path serves both. It cuts tensors
into slices that fill buckets of bounded size; a rank other than 0 holds its share of one bucket and keeps nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from phi3_dist.adapters.select import Bias, Chosen, check_tensors, choose
from phi3_dist.errors import AdapterError, Problem

__all__ = ["GatherStats", "gather_adapter", "gather_adapter_with_stats", "raised_together"]


@dataclass(frozen=True)
class GatherStats:
    """What a gather cost this rank."""

    tensor_bytes: int
    """Size of the whole adapter."""
    moved_bytes: int
    """Tensor bytes that collectives delivered to this rank or took from it; two short agreement messages come on
    top."""
    seconds: float
    buckets: int
    """Collectives that carried tensors."""
    tensors: int


def gather_adapter(
    model: nn.Module, *, bias: Bias | None = None, bucket_mib: int = 64, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """The adapter as CPU tensors under PEFT's saved names on rank 0; an empty dict on the other ranks.

    Collective: every rank of the default process group must call it, between steps. `model` is a PEFT model or holds
    one (DDP, a DeepSpeed engine of any stage, an FSDP2 module, any wrapper); of a model without PEFT, such as
    loralib's, every trainable tensor is gathered under its own name.
    bias: by default what the PEFT config trains; else loralib's modes: `none`, `all`, or `lora_only`, the biases of
    layers with an adapter. bucket_mib: most MiB in flight at a time.
    Raises AdapterError on every rank, with all problems: nothing to save, a tensor without elements, one that trains
    but would not be saved, a dtype that cannot train, a non-finite value, ranks that hold different models.
    """
    return gather_adapter_with_stats(model, bias=bias, bucket_mib=bucket_mib, adapter_name=adapter_name)[0]


def gather_adapter_with_stats(
    model: nn.Module, *, bias: Bias | None = None, bucket_mib: int = 64, adapter_name: str = "default"
) -> tuple[dict[str, Tensor], GatherStats]:
    """`gather_adapter`, and what it cost this rank."""
    if bucket_mib < 1:
        raise ValueError(f"bucket_mib is {bucket_mib}; it must be at least 1")
    start_s = time.perf_counter()
    wire = _Wire(bucket_mib * 2**20)
    tensors: dict[str, Tensor] = {}
    with raised_together() as digests, torch.no_grad():
        jobs = [_Job(c, _place(c)) for c in choose(model, bias, adapter_name)]
        digests.append(_digest(jobs))
        if _rank() == 0:
            # room for the result is made here, so that a rank without memory says so before others wait for it
            tensors = {job.chosen.key: torch.empty(job.chosen.shape, dtype=job.chosen.dtype) for job in jobs}
    with torch.no_grad():
        _move(jobs, tensors, wire)
    with raised_together():
        expected = {job.chosen.key: (job.chosen.shape, job.chosen.dtype) for job in jobs}
        problems = check_tensors(tensors, expected) if _rank() == 0 else []
        if problems:
            raise AdapterError(*problems)
    size = sum(job.chosen.shape.numel() * job.chosen.dtype.itemsize for job in jobs)
    return tensors, GatherStats(size, wire.moved_bytes, time.perf_counter() - start_s, wire.buckets, len(jobs))


# --- agreement ------------------------------------------------------------------------------------------------------


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def raised_together() -> Iterator[list[str]]:
    """An error inside the block on one rank is raised on all of them at its end. Collective; no collectives inside.

    Strings put into the yielded list must be equal on all ranks, or every rank raises AdapterError. A bug (an
    exception outside of AdapterError) stays itself on its own rank and becomes AdapterError on the others.
    """
    digests: list[str] = []
    try:
        yield digests
    except AdapterError as error:
        _agree(error.problems, digests)
    except Exception as error:
        with contextlib.suppress(AdapterError):
            _agree([Problem(f"rank {_rank()}", f"{type(error).__name__}: {error}")], digests)
        raise
    else:
        _agree([], digests)


def _agree(problems: Sequence[Problem], digests: Sequence[str]) -> None:
    reports: list[tuple[Sequence[Problem], Sequence[str]]] = [(problems, digests)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        reports = [([], [])] * dist.get_world_size()
        dist.all_gather_object(reports, (tuple(problems), tuple(digests)))
    found = list(dict.fromkeys(problem for theirs, _ in reports for problem in theirs))
    if not found:
        differ = [str(rank) for rank, (_, theirs) in enumerate(reports) if theirs != reports[0][1]]
        if differ:
            what = f"rank {', '.join(differ)} would gather other tensors, shapes or shards than rank 0"
            found.append(Problem("adapter", what, "build the same model and strategy on every rank"))
    if found:
        raise AdapterError(*found)


# --- where a tensor is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Whole:
    """This rank has all of it."""

    tensor: Tensor


@dataclass(frozen=True)
class _Shards:
    """Rank r of `group` has elements [r * stride, (r + 1) * stride) of the flat tensor; `local` is this rank's part."""

    local: Tensor
    stride: int
    group: Any


@dataclass(frozen=True)
class _Scattered:
    """Laid out in a way only its owner knows (NVMe offload, two sharded dimensions): the owner makes it whole."""

    tensor: Tensor


@dataclass(frozen=True)
class _Job:
    chosen: Chosen
    place: _Whole | _Shards | _Scattered


def _place(chosen: Chosen) -> _Whole | _Shards | _Scattered:
    tensor = chosen.tensor
    if hasattr(tensor, "ds_id"):
        return _place_zero3(chosen.key, tensor)
    if isinstance(tensor, DTensor):
        return _place_dtensor(tensor)
    return _Whole(tensor.detach())


def _place_zero3(key: str, param: Any) -> _Whole | _Shards | _Scattered:
    """DeepSpeed 0.19 `partition_parameters.py`: `ds_tensor` is this rank's slice of the flat tensor, padded."""
    status = param.ds_status.name
    if status == "AVAILABLE":
        return _Whole(param.detach())
    if status != "NOT_AVAILABLE":
        raise AdapterError(Problem("adapter", f"{key} is being fetched by DeepSpeed", "gather between steps"))
    part, group = param.ds_tensor, param.ds_process_group
    if part.dtype != param.dtype:
        raise AdapterError(Problem("adapter", f"{key} is {param.dtype}, its ZeRO-3 partition is {part.dtype}"))
    stride = int(part.ds_numel)
    simple = part.status.name == "AVAILABLE" and part.numel() == stride
    if not simple or getattr(param, "ds_numel_aligned", -1) != stride * dist.get_world_size(group):
        return _Scattered(param)
    return _Shards(part.detach().view(-1), stride, group)


def _place_dtensor(tensor: DTensor) -> _Whole | _Shards | _Scattered:
    """FSDP2 shards rows as `torch.chunk` does, on one mesh dimension; HSDP repeats that on another one."""
    sharded = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not sharded:
        return _Whole(tensor.to_local().detach())
    placement = tensor.placements[sharded[0]]
    if len(sharded) > 1 or type(placement) is not Shard or placement.dim != 0:
        return _Scattered(tensor)
    mesh, dim = tensor.device_mesh, sharded[0]
    rows = -(-tensor.shape[0] // mesh.size(dim))
    stride = rows * (tensor.numel() // tensor.shape[0])
    return _Shards(tensor.to_local().detach().reshape(-1), stride, mesh.get_group(dim))


def _digest(jobs: Sequence[_Job]) -> str:
    lines = [f"{j.chosen.key} {tuple(j.chosen.shape)} {j.chosen.dtype} {type(j.place).__name__}" for j in jobs]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- moving ---------------------------------------------------------------------------------------------------------


class _Wire:
    """The only place that moves tensors between ranks, and so the place that counts them."""

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes, self.moved_bytes, self.buckets = bucket_bytes, 0, 0

    def to_rank_0(self, part: Tensor, group: Any) -> list[Tensor]:
        """The parts of all ranks of `group` on rank 0, an empty list elsewhere."""
        world = dist.get_world_size(group)
        parts = [torch.empty_like(part) for _ in range(world)] if _rank() == 0 else []
        dist.gather(part, parts or None, dst=0, group=group)
        self.moved_bytes += part.nbytes * (world if parts else 1)
        self.buckets += 1
        return parts

    @contextlib.contextmanager
    def whole(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The tensors whole, on every rank, for as long as the block lasts: by the code of whoever sharded them."""
        self.buckets += 1
        if isinstance(tensors[0], DTensor):
            full = [t.full_tensor() for t in tensors if isinstance(t, DTensor)]
            self.moved_bytes += sum(t.nbytes for t in full)
            yield full
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(tensors)):
            self.moved_bytes += sum(t.nbytes for t in tensors)
            yield [t.detach() for t in tensors]


def _move(jobs: Sequence[_Job], tensors: dict[str, Tensor], wire: _Wire) -> None:
    """Fill rank 0's `tensors` from all ranks, in the same order of collectives on each."""
    lots: dict[tuple[int, torch.dtype, torch.device], list[_Job]] = {}
    rest: list[_Job] = []
    for job in jobs:
        if isinstance(job.place, _Whole):
            if tensors:
                tensors[job.chosen.key].copy_(job.place.tensor)
        elif isinstance(job.place, _Shards):
            lots.setdefault((id(job.place.group), job.chosen.dtype, job.place.local.device), []).append(job)
        else:
            rest.append(job)
    for lot in lots.values():
        _move_shards(lot, tensors, wire)
    _move_scattered(rest, tensors, wire)


def _wire_device(local: Tensor, group: Any) -> torch.device:
    """Where a collective of this group wants its tensors: shards that are offloaded to the CPU may have NCCL only."""
    if local.device.type != "cpu" or "gloo" in str(dist.get_backend_config(group)):
        return local.device
    accelerator = torch.accelerator.current_accelerator()
    return (
        torch.device("cpu")
        if accelerator is None
        else torch.device(accelerator.type, torch.accelerator.current_device_index())
    )


@dataclass(frozen=True)
class _Slice:
    """Elements [start, stop) of every rank's part of one tensor, at `at` in the bucket."""

    job: _Job
    shards: _Shards
    start: int
    stop: int
    at: int


def _buckets(lot: Sequence[_Job], capacity: int) -> Iterator[list[_Slice]]:
    """Cut parts into slices that fill buckets of at most `capacity` elements of each rank."""
    bucket: list[_Slice] = []
    used = 0
    for job in lot:
        assert isinstance(job.place, _Shards)
        start = 0
        while start < job.place.stride:
            stop = min(job.place.stride, start + capacity - used)
            bucket.append(_Slice(job, job.place, start, stop, used))
            used, start = used + stop - start, stop
            if used == capacity:
                yield bucket
                bucket, used = [], 0
    if bucket:
        yield bucket


def _move_shards(lot: Sequence[_Job], tensors: dict[str, Tensor], wire: _Wire) -> None:
    first = lot[0].place
    assert isinstance(first, _Shards)
    if 0 not in dist.get_process_group_ranks(first.group):
        return  # HSDP: another replica's shards; rank 0's own group has them all
    world, dtype = dist.get_world_size(first.group), first.local.dtype
    device = _wire_device(first.local, first.group)
    for bucket in _buckets(lot, max(1, wire.bucket_bytes // (world * dtype.itemsize))):
        part = torch.zeros(bucket[-1].at + bucket[-1].stop - bucket[-1].start, dtype=dtype, device=device)
        for s in bucket:
            piece = s.shards.local[s.start : s.stop]  # shorter, or empty, where the last rank's part ends
            part[s.at : s.at + piece.numel()].copy_(piece)
        for rank, received in enumerate(wire.to_rank_0(part, first.group)):
            for s in bucket:
                target = tensors[s.job.chosen.key].view(-1)
                low = rank * s.shards.stride + s.start
                high = min(rank * s.shards.stride + s.stop, target.numel())
                if high > low:
                    target[low:high].copy_(received[s.at : s.at + high - low])


def _move_scattered(rest: Sequence[_Job], tensors: dict[str, Tensor], wire: _Wire) -> None:
    """Whole tensors on every rank, as many at a time as fit into a bucket (one at least)."""
    bucket: list[_Job] = []
    size = 0
    for index, job in enumerate(rest):
        bucket.append(job)
        size += job.chosen.shape.numel() * job.chosen.dtype.itemsize
        following = rest[index + 1] if index + 1 < len(rest) else None
        more = following.chosen.shape.numel() * following.chosen.dtype.itemsize if following else 0
        same_owner = following is not None and isinstance(following.chosen.tensor, DTensor) == isinstance(
            job.chosen.tensor, DTensor
        )
        if same_owner and size + more <= wire.bucket_bytes:
            continue
        with wire.whole([j.chosen.tensor for j in bucket]) as full:
            if tensors:
                for j, tensor in zip(bucket, full, strict=True):
                    tensors[j.chosen.key].copy_(tensor)
        bucket, size = [], 0
