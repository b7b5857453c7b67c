"""How well an answer fits the wanted one, each score from 0 to 1: exact match, ROUGE-L, chrF, a pattern, a function.

A metric is named `exact_match`, `rouge_l`, `chrf`, `regex:PATTERN` (what the pattern finds last in both, its first
group where it has one, must be equal: GSM8K's number is `regex:####\\s*(-?[\\d.,]+)`) or `module:function`, which is
called with the answer and the wanted one. ROUGE-L is rouge-score's F measure, which knows the letters a to z and digits
alone; chrF is sacrebleu's of each answer, over 100.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from phi3_dist.errors import ConfigError, DataError, MachineError, Problem

__all__ = ["DEFAULT", "Metric", "available", "exact_match", "metric_of", "scored"]

Score = Callable[[str, str], float]
DEFAULT = ("exact_match", "rouge_l", "chrf")
_PACKAGES = {"rouge_l": ("rouge_score", "rouge-score"), "chrf": ("sacrebleu", "sacrebleu")}
_EXTRA = "pip install 'phi3-dist[eval]'"


@dataclass(frozen=True)
class Metric:
    """A score and what it is called in tables and files."""

    name: str
    score: Score


def exact_match(answer: str, wanted: str) -> float:
    """1 where they are equal but for white space at the ends."""
    return float(answer.strip() == wanted.strip())


def available() -> tuple[list[str], list[str]]:
    """The default metrics that can be computed here, and a line for each that can't."""
    missing = {name: pip for name, (module, pip) in _PACKAGES.items() if find_spec(module) is None}
    said = [f"{name} is left out: {pip} is not installed ({_EXTRA})" for name, pip in missing.items()]
    return [name for name in DEFAULT if name not in missing], said


def metric_of(name: str) -> Metric:
    """The metric of that name. Raises ConfigError for an unknown one, MachineError for one whose package is missing."""
    if name == "exact_match":
        return Metric(name, exact_match)
    if name in _PACKAGES:
        module, pip = _PACKAGES[name]
        if find_spec(module) is None:
            raise MachineError(Problem(f"--metric {name}", f"needs {pip}, which is not installed", _EXTRA))
        return Metric(name, _rouge_l() if name == "rouge_l" else _chrf())
    kind, colon, rest = name.partition(":")
    if colon and kind == "regex":
        return Metric(name, _pattern(rest))
    if colon and kind and rest:
        return Metric(name, _function(name, kind, rest))
    fix = f"one of {', '.join(DEFAULT)}, regex:PATTERN or module:function"
    raise ConfigError(Problem(f"--metric {name}", "is not a metric", fix))


def _rouge_l() -> Score:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return lambda answer, wanted: float(scorer.score(wanted, answer)["rougeL"].fmeasure)


def _chrf() -> Score:
    from sacrebleu.metrics.chrf import CHRF

    scorer = CHRF()
    return lambda answer, wanted: float(scorer.sentence_score(answer, [wanted]).score) / 100


def _pattern(text: str) -> Score:
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError) as error:
        what = f"is not a regular expression: {error}"
        raise ConfigError(Problem(f"--metric regex:{text}", what, "quote it for the shell")) from error

    def found(where: str) -> str | None:
        hits = list(pattern.finditer(where))
        if not hits:
            return None
        part = hits[-1][1] if pattern.groups else hits[-1][0]
        return re.sub(r"(?<=\d),(?=\d)", "", part or "").strip().rstrip(".")

    def score(answer: str, wanted: str) -> float:
        right = found(wanted)
        if right is None:
            raise ValueError(f"the pattern finds nothing in the wanted answer {wanted[:60]!r}")
        return float(found(answer) == right)

    return score


def _function(name: str, module: str, function: str) -> Score:
    """A user's function, looked for in the folder that the command was given in, too."""
    where = f"--metric {name}"
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        fix = "write module:function, of a module in this folder or installed"
        raise ConfigError(Problem(where, f"there is no module {error.name}", fix)) from error
    except AttributeError as error:
        raise ConfigError(Problem(where, f"{module} has no {function}", "name one of its functions")) from error
    if not callable(found):
        raise ConfigError(
            Problem(where, f"{function} is not a function", "name a function of answer and wanted answer")
        )
    return found  # type: ignore[no-any-return]


def scored(metric: Metric, answers: Sequence[str], wanted: Sequence[str], places: Sequence[str]) -> list[float]:
    """The score of each answer. Raises DataError, with the row, where the metric fails or gives no number."""
    scores = []
    for answer, right, place in zip(answers, wanted, places, strict=True):
        try:
            score = float(metric.score(answer, right))
        except Exception as error:  # a user's function may raise anything
            what = f"raised {type(error).__name__}: {error}, for the answer {answer[:60]!r}"
            fix = "it gets the answer and the wanted one, two texts, and returns a number"
            raise DataError(Problem(f"--metric {metric.name}, {place}", what, fix)) from error
        if score != score:  # noqa: PLR0124 -- NaN
            raise DataError(Problem(f"--metric {metric.name}, {place}", "gave no number (NaN)", "return 0 to 1"))
        scores.append(score)
    return scores
