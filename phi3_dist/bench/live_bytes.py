"""Bytes that live on host and device while a step is rehearsed, by what they are for."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor

__all__ = ["Live"]


class Live:
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
