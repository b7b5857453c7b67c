"""`train.profile`: torch's profiler over a few steps, as a trace to open and a table to read."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

__all__ = ["StepProfile"]

_ROWS = 40


class StepProfile:
    """Records `steps` steps, from the second on: the first allocates, and what is compiled is compiled there.

    Writes `trace.json.gz` (open it in ui.perfetto.dev or chrome://tracing) and `table.txt`, the operators by their
    own time, into `folder`. With 0 steps, or where not `active`, it does nothing.
    """

    def __init__(self, steps: int, folder: Path, *, active: bool) -> None:
        self.folder, self.written, self.failed = folder, False, ""
        self._profile: Any = None
        if steps == 0 or not active:
            return
        self._by = "self_cpu_time_total"
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            self._by = "self_device_time_total"
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )

    def _write(self, done: Any) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(self.folder / "trace.json.gz"))
            table = done.key_averages().table(sort_by=self._by, row_limit=_ROWS, max_name_column_width=60)
            (self.folder / "table.txt").write_text(table + "\n", encoding="utf-8")
        except OSError as error:
            self.failed = f"not written: {error.strerror or error}"
        self.written = True

    def __enter__(self) -> StepProfile:
        if self._profile is not None:
            self._profile.start()
        return self

    def step(self) -> bool:
        """After each step; True once, after the step that ends the recording."""
        if self._profile is None or self.written:
            return False
        self._profile.step()
        return self.written

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.stop()
