"""A trained adapter judged: held-out loss, scored answers, beside its base or another one, with intervals."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phi3_dist.config.schema import DataConfig
from phi3_dist.data.answers import Question, last_questions, spread, text_of
from phi3_dist.data.pack.packs import Packs
from phi3_dist.data.prepare import prepare
from phi3_dist.data.scores import Metric, available, metric_of, scored
from phi3_dist.errors import ConfigError, DataError, Problem, RunFolderError, control_character
from phi3_dist.evaluation.bootstrap import Difference, paired
from phi3_dist.evaluation.harness import check_harness, run_tasks
from phi3_dist.evaluation.held_out import RowLosses, row_losses
from phi3_dist.evaluation.ranks import Ranks
from phi3_dist.inference.answers_file import How, refuse_too_long
from phi3_dist.inference.engine import answers
from phi3_dist.inference.open_model import Opened, Options, open_model
from phi3_dist.machine.storage import cache_folder
from phi3_dist.modeling.stop_ids import stop_ids

__all__ = ["FILE", "ROWS_FILE", "Evaluation", "EvaluationRequest", "Side", "check_folder", "evaluate"]

FILE, ROWS_FILE = "evaluation.json", "evaluation_rows.jsonl"
_OURS, _OUR_ROWS = ("evaluated", "answers"), ("prompt", "wanted")
"""Keys by which a file of these names is known to be of an earlier evaluation."""
SHOWN = 5
"""Samples in evaluation.json, the worst first; all are in evaluation_rows.jsonl."""
GENERATE = 100
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure. `data`: rows, by default those that the run has held out; `split` of them, where they have any.

    `generate`: rows whose answers are scored, evenly spread; 0: none. `metrics`: see data/scores.py; () are those that
    can be computed here. `tasks`: of lm-eval, `limit` rows of each.
    """

    data: str | None = None
    split: str = "test"
    base: bool = False
    against: str | None = None
    generate: int = GENERATE
    metrics: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class Side:
    """One model's losses by row, answers by asked row, scores by metric and asked row, and lm-eval's numbers."""

    name: str
    losses: RowLosses
    answers: tuple[str, ...] = ()
    scores: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    tasks: Mapping[str, float] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, float | int]:
        """By measure; scores are means, from 0 to 1."""
        loss = self.losses.loss
        found: dict[str, float | int] = {"heldout_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        found["supervised_tokens"] = int(self.losses.tokens_R.sum())
        return {**found, **{name: float(of.mean()) for name, of in self.scores.items()}, **self.tasks}


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `differences`: the first side's less the second's, by measure, where there are two."""

    target: str
    data: str
    sides: tuple[Side, ...]
    differences: Mapping[str, Difference]
    asked: tuple[Mapping[str, Any], ...]
    """One row each: prompt, wanted, every side's answer, its scores; the worst first."""
    notices: tuple[str, ...] = ()

    @property
    def numbers(self) -> dict[str, float | int]:
        """The first side's."""
        return self.sides[0].numbers

    def to_json(self) -> dict[str, Any]:
        """The form of evaluation.json: mappings of numbers stand side by side, `samples` are rows."""
        groups = {side.name: _finite(side.numbers) for side in self.sides}
        if self.differences:
            groups["difference"] = _finite({name: d.value for name, d in self.differences.items()})
            groups["from (95 %)"] = _finite({name: d.low for name, d in self.differences.items()})
            groups["to (95 %)"] = _finite({name: d.high for name, d in self.differences.items()})
        rows = len(self.sides[0].losses.tokens_R)
        facts = {"evaluated": self.target, "data": self.data, "rows": rows, "answers": len(self.asked)}
        return {**groups, **facts, "samples": list(self.asked[:SHOWN])}

    def write(self, folder: Path) -> Path:
        """Write evaluation.json and evaluation_rows.jsonl. Raises RunFolderError as `check_folder` and the disk do."""
        check_folder(folder)
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.asked)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / ROWS_FILE, rows)
            _replace(folder / FILE, json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            what = f"the evaluation cannot be written: {error.strerror or error}"
            raise RunFolderError(
                Problem(str(folder), what, "make room, or name another folder with --output")
            ) from error
        return folder / FILE


def check_folder(folder: Path) -> None:
    """Raises RunFolderError where an evaluation can't be written to `folder`, or would replace what is none of ours.

    Before anything is measured: a file in the folder's place, files of the same names that somebody else has written.
    """
    fix = "name another folder with --output"
    if found := control_character(folder.name):
        raise RunFolderError(Problem(str(folder), f"has {found} in its name", fix))
    try:
        blocked = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        if blocked.exists() and not blocked.is_dir():
            raise RunFolderError(Problem(str(blocked), "is not a folder", fix))
        for name, ours in ((FILE, _OURS), (ROWS_FILE, _OUR_ROWS)):
            path = folder / name
            if path.exists() and (not path.is_file() or not _begins_with(path, ours)):
                what = "is there already, and is not an evaluation of this toolkit: nothing is replaced"
                raise RunFolderError(Problem(str(path), what, fix))
    except OSError as error:
        raise RunFolderError(Problem(str(folder), f"cannot be read: {error.strerror or error}", fix)) from error


def _begins_with(path: Path, keys: Sequence[str]) -> bool:
    with path.open("rb") as file:
        head = file.read(2**24).lstrip()
    return not head or (head.startswith(b"{") and all(f'"{key}": '.encode() in head for key in keys))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _finite(numbers: Mapping[str, float | int]) -> dict[str, float | int | None]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def evaluate(
    target: str | Path,
    request: EvaluationRequest | None = None,
    *,
    how: How | None = None,
    options: Options | None = None,
    ranks: Ranks | None = None,
    progress: Progress = lambda what, done, of: None,
) -> Evaluation:
    """Measure what `target` names, alone or beside its base or another one. Collective: every rank calls it.

    Losses are in nats per supervised token: over the run's own held-out rows they are the run's, to rounding. Each
    process holds a whole model. Raises the errors of `open_model`, DataError for rows that can't be used or ask
    nothing, and for a metric that fails, MachineError for a package that is missing.
    """
    request, how, ranks = request or EvaluationRequest(), how or How(), ranks or Ranks()
    if request.base and request.against:
        raise ConfigError(Problem("--base --against", "cannot be combined", "give one of them"))
    if request.tasks:
        check_harness()
    names, notices = (list(request.metrics), []) if request.metrics else available()
    metrics = [metric_of(name) for name in names] if request.generate else []
    opened = open_model(target, options)
    if request.base and not opened.has_adapter:
        raise ConfigError(Problem("--base", f"{target} is a base itself", "leave --base out, or name a run"))
    packs, label, row_notices = _rows(opened, request)
    stops = stop_ids(opened.model, opened.tokenizer)
    which = spread(len(packs.rows.lengths), request.generate)
    questions = last_questions(packs.rows, which, stops) if which else []
    refuse_too_long(opened, [one.place for one in questions], [one.prompt for one in questions], how.max_new_tokens)

    def measure(of: Opened, name: str) -> Side:
        return _side(
            of, name, packs, questions, metrics=metrics, request=request, how=how, ranks=ranks, progress=progress
        )

    sides = [measure(opened, "adapter" if opened.has_adapter else "base")]
    if request.base:
        with opened.base_alone():
            sides.append(measure(opened, "base"))
    elif request.against:
        other = open_model(request.against, options)
        _refuse_other_tokens(opened, other, request.against)
        sides.append(measure(other, "against"))
    rows = _answered_rows(opened, questions, sides)
    return Evaluation(str(target), label, tuple(sides), _differences(sides), tuple(rows), (*notices, *row_notices))


def _rows(opened: Opened, request: EvaluationRequest) -> tuple[Packs, str, list[str]]:
    """The rows to measure on, what they are called, and what a user should hear of them."""
    cfg = opened.cfg.data if opened.cfg else None
    if request.data is None:
        if cfg is None:
            fix = "name rows: phi3-dist eval ADAPTER DATA"
            raise DataError(Problem(opened.name, "is not inside a run whose held-out rows could be used", fix))
        prepared = prepare(cfg, opened.tokenizer, cache_folder(cfg.cache))
        if prepared.held_out is None:
            fix = "name rows: phi3-dist eval RUN DATA"
            raise DataError(Problem(str(opened.run), "has held out no rows", fix))
        return prepared.held_out, "the held-out rows of the run", []
    longest = min(int(opened.base.config.max_position_embeddings), 32768)
    changes = {"train": request.data, "validation": None, "validation_share": 0, "split": request.split,
               "max_rows": None, "max_validation_rows": None, "revision": None}  # fmt: skip
    like = cfg.model_dump() if cfg else {"pack_length": longest}
    prepared = prepare(DataConfig.model_validate({**like, **changes}), opened.tokenizer, None)
    notices = [f"{len(prepared.dropped)} rows are longer than a pack and left out"] if prepared.dropped else []
    return prepared.train, request.data, [*prepared.notices, *notices]


def _refuse_other_tokens(ours: Opened, theirs: Opened, against: str) -> None:
    if ours.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
        what = f"{against} has another tokenizer: a loss per token can't be compared"
        raise ConfigError(Problem("--against", what, "evaluate each alone"))


def _side(
    opened: Opened,
    name: str,
    packs: Packs,
    questions: Sequence[Question],
    *,
    metrics: Sequence[Metric],
    request: EvaluationRequest,
    how: How,
    ranks: Ranks,
    progress: Progress,
) -> Side:
    losses = row_losses(opened, packs, ranks, lambda done, of: progress(f"{name}: loss", done, of))
    if not losses.tokens_R.sum():
        raise DataError(Problem("the rows", "supervise no token: there is no loss", "give rows with answers"))
    texts = _answers(opened, questions, how, ranks, lambda done, of: progress(f"{name}: answers", done, of))
    wanted = [text_of(opened.tokenizer, one.wanted) for one in questions]
    places = [one.place for one in questions]
    scores = {m.name: np.array(scored(m, texts, wanted, places)) for m in metrics} if questions else {}
    tasks = {}
    if request.tasks:  # on every rank the same: the harness would want a launch of its own
        tasks = run_tasks(opened, request.tasks, limit=request.limit, batch_size=how.batch_size)
    return Side(name, losses, tuple(texts), scores, tasks)


def _answers(
    opened: Opened, questions: Sequence[Question], how: How, ranks: Ranks, progress: Callable[[int, int], None]
) -> list[str]:
    """The answer to each, on every rank. Collective."""
    mine = list(range(ranks.rank, len(questions), ranks.world))
    stops = stop_ids(opened.model, opened.tokenizer)
    found: dict[int, str] = {}
    options: dict[str, Any] = {"max_new_tokens": how.max_new_tokens, "batch_size": how.batch_size}
    for i, answer in answers(opened.model, [questions[k].prompt for k in mine], stops, **options):
        found[mine[i]] = text_of(opened.tokenizer, answer.ids)
        progress(len(found), len(mine))
    everyone = {k: text for part in ranks.gather(found) for k, text in part.items()}
    return [everyone[k] for k in range(len(questions))]


def _differences(sides: Sequence[Side]) -> dict[str, Difference]:
    if len(sides) < 2:
        return {}
    ours, theirs = sides
    found = {"heldout_loss": paired(ours.losses.nll_R, theirs.losses.nll_R, ours.losses.tokens_R)}
    return {**found, **{name: paired(of, theirs.scores[name]) for name, of in ours.scores.items()}}


def _answered_rows(opened: Opened, questions: Sequence[Question], sides: Sequence[Side]) -> list[dict[str, Any]]:
    """What people read: prompt, answer, wanted, score of each; the worst by the first side's mean score first."""
    rows = []
    for i, one in enumerate(questions):
        scores = {name: float(of[i]) for name, of in sides[0].scores.items()}
        row: dict[str, Any] = {"prompt": opened.tokenizer.decode(one.prompt, skip_special_tokens=False)}
        row["wanted"] = text_of(opened.tokenizer, one.wanted)
        row |= {side.name: side.answers[i] for side in sides}
        rows.append({**row, **scores, "place": one.place})
    order = sorted(range(len(rows)), key=lambda i: sum(float(of[i]) for of in sides[0].scores.values()))
    return [rows[i] for i in order]
