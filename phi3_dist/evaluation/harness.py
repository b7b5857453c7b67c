"""Tasks of EleutherAI's lm-evaluation-harness, through its own API, where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from phi3_dist.errors import ConfigError, MachineError, Problem
from phi3_dist.inference.open_model import Opened

__all__ = ["check_harness", "numbers_of", "run_tasks"]

_LIST = "lm-eval ls tasks lists them; or name a task's own file, FILE.yaml"


def check_harness() -> None:
    """Raises MachineError where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise MachineError(Problem("--task", "needs lm-eval, which is not installed", "pip install lm-eval"))


def run_tasks(opened: Opened, tasks: Sequence[str], *, limit: int | None, batch_size: int) -> dict[str, float]:
    """`task metric` → value of each number that the harness reports, its filter named where it is not `none`.

    tasks: names that lm-eval knows, or files of tasks (`FILE.yaml`, with lm-eval's own keys). Raises MachineError where
    lm-eval is not installed, ConfigError for a task that it does not know or can't read.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    of_files = all(_is_file(name) for name in tasks)  # lm-eval's own thousands take it many seconds to list
    manager = TaskManager(include_defaults=not of_files)
    wanted = [_task(name, manager) for name in tasks]
    model = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)
    found: Any = simple_evaluate(model=model, tasks=wanted, task_manager=manager, limit=limit, log_samples=False)
    return numbers_of((found or {}).get("results", {}))


def _task(name: str, manager: Any) -> Any:
    """What lm-eval takes for it: a name that it knows, or the contents of a file."""
    if _is_file(name):
        return _of_file(Path(name))
    if name not in manager.all_tasks:
        raise ConfigError(Problem("--task", f"lm-eval knows no task {name!r}", _LIST))
    return name


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _of_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        task = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(Problem("--task", f"{path} cannot be read: {error.strerror}", _LIST)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = f"{path} is not YAML without lm-eval's own tags: {' '.join(str(error).split())[:200]}"
        raise ConfigError(
            Problem("--task", what, "put the task in lm-eval's folder of tasks and give its name")
        ) from error
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise ConfigError(Problem("--task", f"{path} names no task", "task: NAME, dataset_path, doc_to_text, …"))
    return task


def numbers_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The harness's `results`, flat: its keys are `metric,filter`."""
    flat = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            counted = metric.endswith("_stderr") or metric == "sample_len"
            if isinstance(value, int | float) and not isinstance(value, bool) and not counted:
                flat[f"{task} {metric}" + (f" ({filtered})" if filtered not in ("", "none") else "")] = float(value)
    return flat
