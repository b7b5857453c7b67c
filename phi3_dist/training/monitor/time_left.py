"""How long a run will still take: steps, evaluations and checkpoints, each as long as it has taken lately."""

from __future__ import annotations

import statistics
from collections import deque

from phi3_dist.config.schema import RunConfig

__all__ = ["TimeLeft"]

WINDOW = 50
FORWARD_SHARE = 1 / 3
"""Of a step's time for a token; an evaluation is guessed by it until one has been made."""


class TimeLeft:
    """Fed with what things took, in seconds; `left_s` adds up what is still to come."""

    def __init__(self, cfg: RunConfig, total: int, *, evaluation_steps: float) -> None:
        """`evaluation_steps`: tokens of an evaluation over those of a step; 0 where there is none."""
        self._total, self._evaluation_steps = total, evaluation_steps
        self._evaluate_every, self._save_every = cfg.train.eval_every, cfg.save.every
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self.evaluation_s: float | None = None
        self.save_s = 0.0

    def step(self, seconds: float) -> None:
        self._steps.append(seconds)

    @property
    def steps_s(self) -> tuple[float, ...]:
        """What the last steps took, the oldest first."""
        return tuple(self._steps)

    def left_s(self, done: int) -> float:
        """Seconds from the end of step `done` on."""
        step_s = statistics.median(self._steps) if self._steps else 0.0
        guess = self._evaluation_steps * step_s * FORWARD_SHARE
        evaluation_s = guess if self.evaluation_s is None else self.evaluation_s
        evaluations = _times(done, self._total, self._evaluate_every) if self._evaluation_steps else 0
        saves = _times(done, self._total, self._save_every) if self._save_every else 0
        # what follows a step that is logged comes before the next: those of `done` itself count
        return step_s * (self._total - done) + evaluations * evaluation_s + saves * self.save_s


def _times(done: int, total: int, every: int) -> int:
    """How often something that comes every `every` steps, and at the end, still comes, after step `done` included."""
    if not every:
        return 1
    at_end = total % every != 0
    return total // every - (done - 1 if done else 0) // every + at_end
