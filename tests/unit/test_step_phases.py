"""What a run writes down for its page: the parts of its steps, its memory, its rows' lengths, its machine."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from phi3_dist.data.pack.packs import make_packs
from phi3_dist.data.render.encode import Encoded
from phi3_dist.data.token_rows import TokenRows
from phi3_dist.training.monitor.step_phases import BINS, TimedEngine, lengths_of, peak_gib


class SlowEngine:
    """Passes that take known times."""

    optimizer = "adamw"
    calls: list[str]

    def __init__(self) -> None:
        self.calls = []

    def model(self, **batch: Any) -> torch.Tensor:
        time.sleep(0.02)
        return torch.tensor(float(batch["n"]))

    def start_micro_batch(self, *, last: bool) -> None:
        self.calls.append(f"start {last}")

    def backward(self, loss: torch.Tensor) -> None:
        time.sleep(0.04)
        self.calls.append(f"backward {loss:.0f}")

    def update(self, lr: float) -> torch.Tensor:
        self.calls.append(f"update {lr}")
        return torch.tensor(0.5)


def test_the_parts_of_a_step_are_timed_over_its_micro_batches() -> None:
    engine = SlowEngine()
    timed: Any = TimedEngine(engine, torch.device("cpu"))  # type: ignore[arg-type]
    for n in (1, 2):
        timed.start_micro_batch(last=n == 2)
        timed.backward(timed.model(n=n))
    assert float(timed.update(0.1)) == 0.5
    assert engine.calls == ["start False", "backward 1", "start True", "backward 2", "update 0.1"]
    found = timed.seconds()
    assert found.keys() == {"forward_s", "backward_s", "update_s"}
    assert found["forward_s"] >= 0.04
    assert found["backward_s"] >= 0.08
    assert found["update_s"] < 0.02


def test_a_gpus_parts_are_events_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, other: Event) -> float:
            return 1000.0 * (other.at - self.at)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    engine = SimpleNamespace(optimizer=None, model=lambda: 1, backward=lambda _: None, update=lambda _: 2)
    timed: Any = TimedEngine(engine, torch.device("cuda"))  # type: ignore[arg-type]
    timed.backward(timed.model())
    timed.update(0.1)
    assert timed.seconds() == {"forward_s": 1.0, "backward_s": 1.0, "update_s": 1.0}


def test_lengths_are_counted_whole() -> None:
    lengths = [1, 5, 16, 17, 33, 40, 40]
    rows = TokenRows.of([Encoded([7] * n, [False] + [True] * (n - 1)) for n in lengths], [str(n) for n in lengths])
    packs, _ = make_packs(rows, 48, "error")
    found = lengths_of(packs)
    assert (found["rows"], found["tokens"], found["pack_length"]) == (7, sum(lengths), 48)
    assert found["packs"] == len(packs.packs)
    assert found["supervised_tokens"] == sum(lengths) - len(lengths)
    for key, values in (("row_tokens", lengths), ("pack_tokens", None)):
        edges, counts = found[key]["up_to"], found[key]["count"]
        assert len(edges) == len(counts) <= BINS
        if values:
            below = [sum(n <= edge for n in values) for edge in edges]
            assert np.cumsum(counts).tolist() == below
        else:
            assert sum(counts) == found["packs"]


def test_a_processs_peak_covers_what_it_holds() -> None:
    held = np.ones(2**27, dtype=np.uint8)
    assert 0.125 < peak_gib(torch.device("cpu")) < 64
    assert held.nbytes == 2**27
