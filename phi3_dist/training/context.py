"""What the parts of a run share: from its first line to its last, and during its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.data.pack.packs import Packs
from phi3_dist.data.pack_order import Order
from phi3_dist.modeling.weights_watch import WeightsWatch
from phi3_dist.training.engines.backward_and_update import Engine
from phi3_dist.training.monitor.metrics import Metrics
from phi3_dist.training.monitor.profiling import StepProfile
from phi3_dist.training.monitor.start_clock import StartClock
from phi3_dist.training.monitor.time_left import TimeLeft
from phi3_dist.training.monitor.transcript import Transcript
from phi3_dist.training.patience import Patience
from phi3_dist.training.run_folder import RunFolder
from phi3_dist.training.runtime import Runtime
from phi3_dist.training.sample_answers import SampleAnswers
from phi3_dist.training.signals import StopFlag

__all__ = ["RunContext", "Session"]


@dataclass(frozen=True)
class Session:
    """What a rank has from the first line of a run to its last."""

    folder: RunFolder
    clock: StartClock
    flag: StopFlag
    weights: WeightsWatch
    transcript: Transcript | None


@dataclass(frozen=True)
class RunContext:
    """What the steps share. `identity` is what a checkpoint carries (training/checkpoints/compatibility.py)."""

    cfg: RunConfig
    runtime: Runtime
    engine: Engine
    train: Packs
    held_out: Packs | None
    order: Order
    total: int
    """Optimizer steps of the whole run."""
    metrics: Metrics
    folder: RunFolder
    identity: Mapping[str, Any]
    clock: StartClock
    profile: StepProfile
    flag: StopFlag
    time_left: TimeLeft
    patience: Patience
    answers: SampleAnswers | None = None
    """What `eval.generate` asks at each evaluation."""
