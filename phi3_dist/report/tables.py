"""The tables of a page: the run file with what its user set, evaluations, answers, the memory of the plan, lengths."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_dist.config.load import flatten
from phi3_dist.config.schema import RunConfig
from phi3_dist.report.plain_values import count, finite
from phi3_dist.report.run_files import read_config
from phi3_dist.report.words import bytes_of, gib, shown

__all__ = [
    "Answer",
    "Bar",
    "ConfigLine",
    "adapter_files",
    "answers",
    "bars_of_lengths",
    "choices",
    "config_lines",
    "defaults",
    "leaves",
    "memory_terms",
    "other_lists",
    "scores",
]

ANSWERS_AT_MOST = 200
_WANTED = ("wanted", "reference", "target")
_NOT_SET = object()


@dataclass(frozen=True)
class ConfigLine:
    """A line of the resolved run file; `why` says who set its value, empty where it is the default."""

    text: str
    why: str = ""


@dataclass(frozen=True)
class Bar:
    """A row with a length: its share of the longest, 0 to 1."""

    label: str
    value: str
    share: float
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """What the model was asked, what it should say, and what it said: (who, text, right, wrong or unknown)."""

    prompt: str
    wanted: str
    texts: tuple[tuple[str, str, str], ...]
    more: tuple[tuple[str, str], ...] = ()


def defaults() -> dict[str, Any]:
    """What each key of a run file is where it says nothing; the base and the rows have no default."""
    empty = RunConfig.model_validate({"model": {"source": "x"}, "data": {"train": "x"}})
    flat = flatten(empty.model_dump(mode="json"))
    for key in ("name", "model.source", "data.train", "save.folder"):
        flat[key] = _NOT_SET
    return flat


def config_lines(run_folder: Path, command: Sequence[Any]) -> list[ConfigLine]:
    """The resolved run file line by line, those marked whose value its user chose. Raises RunFolderError."""
    text, document = read_config(run_folder)
    words = [word for word in command if isinstance(word, str) and "=" in word]
    on_command_line = {word.partition("=")[0].lstrip("-").strip() for word in words}
    usual = defaults()
    values = flatten(document.values) if isinstance(document.values, dict) else {}
    why = {}
    for key, value in values.items():
        line = document.places.get(key)
        if key in on_command_line:
            why[line] = "set on the command line"
        elif key in usual and usual[key] is _NOT_SET:
            why[line] = "set by the run file"
        elif key in usual and not _same(usual[key], value):
            why[line] = f"set by the run file; the default is {shown(usual[key]) or 'nothing'}"
    return [ConfigLine(line, why.get(str(n), "")) for n, line in enumerate(text.splitlines(), start=1)]


def _same(one: object, other: object) -> bool:
    one, other = [list(v) if isinstance(v, tuple) else v for v in (one, other)]
    return one == other


def scores(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table: mappings such as `before` and `after` become columns, single values rows of one."""
    groups = {key: value for key, value in evaluation.items() if isinstance(value, dict) and value}
    single = {key: value for key, value in evaluation.items() if isinstance(value, int | float | str)}
    measures = dict.fromkeys(measure for group in groups.values() for measure in group)
    rows = [[measure, *(shown(group.get(measure, "")) for group in groups.values())] for measure in measures]
    rows += [[key, shown(value), *[""] * (len(groups) - 1)] for key, value in single.items()]
    return ["", *(groups or [""])], rows


def answers(evaluation: Mapping[str, Any]) -> list[Answer]:
    """The answers that an evaluation keeps: rows with a prompt, what was wanted, and who said what.

    Who says something is named as the evaluation's own groups are (`before`, `adapter`, …), where a row has those.
    """
    rows = _rows(evaluation.get("samples")) or _rows(evaluation.get("answers"))
    groups = {key for key, value in evaluation.items() if isinstance(value, dict)}
    return [_answer(row, groups & row.keys()) for row in rows[:ANSWERS_AT_MOST] if "prompt" in row]


def _answer(row: Mapping[str, Any], speakers: Collection[str]) -> Answer:
    wanted = next((row[key] for key in _WANTED if key in row), None)
    texts, more = [], []
    for key, value in row.items():
        if key == "prompt" or key in _WANTED:
            continue
        inner = value if isinstance(value, dict) else {"text": value}
        text, score = inner.get("text", inner.get("answer")), finite(inner.get("score"))
        if not isinstance(text, str) or (key not in speakers if speakers else key == "place"):
            more.append((key.replace("_", " "), shown(value)))
            continue
        same = isinstance(wanted, str) and text.strip() == wanted.strip()
        how = "unknown" if wanted is None and score is None else "right" if same or score == 1 else "wrong"
        texts.append((key, text[:4000], how))
    return Answer(shown(row["prompt"]), shown(wanted), tuple(texts), tuple(more))


def other_lists(evaluation: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Every list of an evaluation that holds no answers, as a table: its name, heads and rows."""
    found: list[tuple[str, Sequence[str], list[list[str]]]] = []
    known = {"samples", "answers"} if answers(evaluation) else set()
    for key, value in evaluation.items():
        if isinstance(value, list) and value and key not in known:
            rows = [row if isinstance(row, dict) else {"": row} for row in value[:ANSWERS_AT_MOST]]
            heads = list(dict.fromkeys(head for row in rows for head in row))
            found.append((key, heads, [[shown(row.get(head, "")) for head in heads] for row in rows]))
        elif key == "samples" and isinstance(value, int | float | str):
            found.append((key, [""], [[shown(value)]]))
    return found


def _rows(value: object) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def choices(plan: Mapping[str, Any]) -> list[list[str]]:
    """Each choice of the plan: its name, value and reason."""
    value = plan.get("choices")
    rows = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
    return [[shown(row.get(key, "")) for key in ("name", "value", "why")] for row in rows if isinstance(row, dict)]


def memory_terms(plan: Mapping[str, Any]) -> list[Bar]:
    """The account of one rank, term by term."""
    terms = [term for term in _rows(plan.get("memory")) if finite(term.get("gib")) is not None]
    largest = max((finite(term["gib"]) or 0.0 for term in terms), default=0.0) or 1.0
    return [
        Bar(
            shown(term.get("name")),
            gib(term["gib"]),
            max(0.0, finite(term["gib"]) or 0.0) / largest,
            f"{shown(term.get('formula'))}, on the {shown(term.get('place'))}",
        )
        for term in terms
    ]


def bars_of_lengths(plan: Mapping[str, Any]) -> list[tuple[str, list[Bar]]]:
    """Histograms of the lengths of rows and packs, in tokens."""
    found = []
    lengths = plan.get("lengths")
    wanted = (
        ("train", "row_tokens", "Rows to train on"),
        ("train", "pack_tokens", "Packs to train on"),
        ("held_out", "row_tokens", "Rows held out"),
    )
    for part, key, title in wanted:
        of = lengths.get(part) if isinstance(lengths, dict) else None
        histogram = of.get(key) if isinstance(of, dict) else None
        if isinstance(histogram, dict) and (bars := _bars_of(histogram)):
            found.append((title, bars))
    return found


def _bars_of(histogram: Mapping[str, Any]) -> list[Bar]:
    edges, numbers = histogram.get("up_to"), histogram.get("count")
    if not isinstance(edges, list) or not isinstance(numbers, list):
        return []
    pairs = [(e, n) for e, n in zip(edges, numbers, strict=False) if count(e) is not None and count(n) is not None]
    while pairs and not pairs[0][1]:
        pairs.pop(0)
    most = max((number for _, number in pairs), default=0) or 1
    width = pairs[1][0] - pairs[0][0] if len(pairs) > 1 else 0
    return [
        Bar(f"{edge - width + 1:,}–{edge:,}" if width else f"to {edge:,}", f"{number:,}", number / most)
        for edge, number in pairs
    ]


def leaves(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each value of nested mappings by its dotted path."""
    flat = flatten(tree).items()
    return [(path, " ".join(map(str, value)) if isinstance(value, list) else shown(value)) for path, value in flat]


def adapter_files(folder: Path) -> list[tuple[str, str]]:
    """The files of an adapter and their sizes."""
    if not folder.is_dir():
        return []
    return [(path.name, bytes_of(path.stat().st_size)) for path in sorted(folder.iterdir()) if path.is_file()]
