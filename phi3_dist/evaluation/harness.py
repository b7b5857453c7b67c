"""Tasks of EleutherAI's lm-evaluation-harness, through its own API, where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from phi3_dist.errors import ConfigError, MachineError, Problem
from phi3_dist.inference.opening import Opened

__all__ = ["check_harness", "numbers_of", "run_tasks"]


def check_harness() -> None:
    """Raises MachineError where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise MachineError(Problem("--tasks", "needs lm-eval, which is not installed", "pip install lm-eval"))


def run_tasks(opened: Opened, tasks: Sequence[str], *, limit: int | None, batch_size: int) -> dict[str, float]:
    """`task metric` → value of each number that the harness reports, its filter named where it is not `none`.

    Raises MachineError where lm-eval is not installed, ConfigError for a task that it does not know.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)
    try:
        found: Any = simple_evaluate(model=model, tasks=list(tasks), limit=limit)
    except KeyError as error:
        what = f"lm-eval knows no task {error}"
        raise ConfigError(Problem("--tasks", what, "lm-eval ls tasks lists them")) from error
    return numbers_of((found or {}).get("results", {}))


def numbers_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The harness's `results`, flat: its keys are `metric,filter`."""
    flat = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and not isinstance(value, bool) and not metric.endswith("_stderr"):
                flat[f"{task} {metric}" + (f" ({filtered})" if filtered not in ("", "none") else "")] = float(value)
    return flat
