"""Rows of conversation out of JSONL, Parquet, folders and the hub: checked one by one, each bad one named.

A row is `{"messages": [{"role", "content", "weight"?}, …]}`: at most one system message, which comes first, then user
and assistant in turn, beginning with the user. `weight: 0` on an assistant message keeps it out of the loss.
JSONL lines count from 1, as editors do; rows of Parquet and hub sets count from 0, as `dataset[7]` does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from phi3_dist.config.schema import DataConfig
from phi3_dist.errors import DataError, Problem

__all__ = ["BadRow", "Chat", "Chats", "Message", "locate", "problems_of", "prompt_share", "read_chats"]

ROLES = ("system", "user", "assistant")
SUFFIXES = (".jsonl", ".parquet")
SHOWN_AT_MOST = 20
_TOOL_KEYS = ("tool_calls", "function_call")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Message:
    """One turn. `weight` 0 keeps an assistant turn out of the loss; on other roles it means nothing."""

    role: str
    content: str
    weight: int = 1


@dataclass(frozen=True)
class Chat:
    """One conversation and where it stands: `chats.jsonl:12`, `part-0.parquet row 7`."""

    messages: tuple[Message, ...]
    place: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Chats:
    """What was read: rows to train on, rows held out, rows left out, and the names of the sources."""

    train: list[Chat]
    validation: list[Chat]
    skipped: list[BadRow]
    files: tuple[str, ...]


@dataclass(frozen=True)
class HubSet:
    """One split of a hub data set."""

    name: str
    split: str
    revision: str | None

    def load(self) -> Any:
        """The `datasets.Dataset`, from the cache or the hub. Raises DataError with the fix."""
        import datasets  # a second to import; local files must not pay for it

        try:
            return datasets.load_dataset(self.name, split=self.split, revision=self.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            first_line = str(error).strip().split("\n", 1)[0]
            raise DataError(
                Problem(
                    self.name,
                    f"no such local file or folder, and the hub set can't be loaded: {first_line}",
                    "check the name, data.split and data.revision; for a gated set `hf auth login` or HF_TOKEN; "
                    "without a network, download it elsewhere and name the folder of its Parquet files",
                )
            ) from error


def read_chats(cfg: DataConfig) -> Chats:
    """All rows of the `data` section, checked and divided into training and held-out rows.

    Raises DataError for sources that are missing or empty and, with `on_bad_row: stop`, for bad rows, all of them in
    one error. With `skip` they are in `skipped`. Without `validation`, the prompt decides the side (`prompt_share`).
    """
    train_sources = locate(cfg.train, cfg.split, cfg.revision, "data.train")
    held_sources = (
        locate(cfg.validation, cfg.validation_split, cfg.revision, "data.validation") if cfg.validation else []
    )
    labels = _labels(train_sources + held_sources)
    train, bad = _read(train_sources, labels, cfg.max_rows)
    validation, bad_held = _read(held_sources, labels, None)
    skipped = bad + bad_held
    if skipped and cfg.on_bad_row == "stop":
        raise DataError(*problems_of(skipped))
    _refuse_empty(train, train_sources, labels, bad)
    if held_sources:
        _refuse_empty(validation, held_sources, labels, bad_held)
    elif cfg.validation_share > 0:
        shares = [prompt_share(chat) for chat in train]
        validation = [chat for chat, share in zip(train, shares, strict=True) if share < cfg.validation_share]
        train = [chat for chat, share in zip(train, shares, strict=True) if share >= cfg.validation_share]
        if not train:
            raise DataError(
                Problem(
                    "data.validation_share",
                    f"all {len(validation)} rows fall on the held-out side, none is left to train on",
                    "lower data.validation_share, or name held-out rows in data.validation",
                )
            )
    return Chats(train, validation, skipped, tuple(dict.fromkeys(labels.values())))


def prompt_share(chat: Chat) -> float:
    """A number in [0, 1) that depends on the prompt alone (all before the first assistant turn), by sha256.

    Rows with equal prompts so always land on the same side, whatever the order of rows, machine or version.
    """
    prompt: list[tuple[str, str]] = []
    for message in chat.messages:
        if message.role == "assistant":
            break
        prompt.append((message.role, message.content))
    digest = hashlib.sha256(json.dumps(prompt, ensure_ascii=True).encode("ascii")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def problems_of(bad: Sequence[BadRow]) -> list[Problem]:
    """The bad rows as problems: the first 20, then how many more, then the fix."""
    problems = [Problem(row.place, row.reason) for row in bad[:SHOWN_AT_MOST]]
    rest = len(bad) - len(problems)
    last = f"and {rest:,} more; {len(bad):,} bad rows" if rest else f"{len(bad):,} bad row{'s' * (len(bad) > 1)}"
    return [*problems, Problem("data", last, "correct them, or leave them out with data.on_bad_row: skip")]


def locate(names: str | tuple[str, ...], split: str, revision: str | None, key: str) -> list[Path | HubSet]:
    """The files and hub sets that the names of one config key stand for. Raises DataError naming all that are missing.

    A folder stands for the .jsonl and .parquet files directly in it, in the order of their names.
    """
    found: list[Path | HubSet] = []
    problems: list[Problem] = []
    for name in (names,) if isinstance(names, str) else names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if _readable(p))
            found += inside
            if not inside:
                what = f"the folder {name} holds no .jsonl or .parquet file"
                problems.append(Problem(key, what, "folders inside it are not searched: name them"))
        elif path.is_file():
            if path.suffix.lower() in SUFFIXES:
                found.append(path)
            else:
                what = f"{name} is neither .jsonl nor .parquet"
                problems.append(Problem(key, what, "write one JSON object on each line of a .jsonl file"))
        elif _is_hub_id(name, path):
            found.append(HubSet(name, split, revision))
        else:
            problems.append(Problem(key, f"no such file or folder: {name}", _did_you_mean(path)))
    if not found and not problems:
        problems.append(Problem(key, "names no source", "name a file, a folder or a hub id"))
    if problems:
        raise DataError(*problems)
    return found


def _readable(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _is_hub_id(name: str, path: Path) -> bool:
    """owner/name, unless it looks like a slip in the name of something that is here."""
    if not _HUB_ID.fullmatch(name) or name.startswith(".") or path.suffix.lower() in SUFFIXES:
        return False
    return not (path.parent.is_dir() and _did_you_mean(path))


def _did_you_mean(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3)
    return "did you mean " + " or ".join(str(path.parent / name) for name in near) + "?" if near else ""


def _labels(sources: Iterable[Path | HubSet]) -> dict[Path | HubSet, str]:
    """The name of each source in places: a file's own name, or its path where two files share a name."""
    unique = list(dict.fromkeys(sources))
    names = Counter(s.name for s in unique if isinstance(s, Path))
    return {
        s: f"{s.name}[{s.split}]" if isinstance(s, HubSet) else s.name if names[s.name] == 1 else str(s) for s in unique
    }


def _refuse_empty(
    chats: list[Chat], sources: list[Path | HubSet], labels: dict[Path | HubSet, str], bad: list[BadRow]
) -> None:
    if chats:
        return
    where = ", ".join(dict.fromkeys(labels[s] for s in sources))
    if bad:
        raise DataError(Problem(where, "holds no usable row"), *problems_of(bad)[:-1])
    raise DataError(Problem(where, "holds no rows"))


def _read(
    sources: Iterable[Path | HubSet], labels: dict[Path | HubSet, str], max_rows: int | None
) -> tuple[list[Chat], list[BadRow]]:
    """Good and bad rows, in order; stops after `max_rows` good ones."""
    bad: list[BadRow] = []

    def good() -> Iterator[Chat]:
        for source in sources:
            for place, row in _rows(source, labels[source]):
                checked = row if isinstance(row, BadRow) else _checked(row, place)
                if isinstance(checked, BadRow):
                    bad.append(checked)
                else:
                    yield checked

    return list(islice(good(), max_rows)), bad


def _rows(source: Path | HubSet, label: str) -> Iterator[tuple[str, Any]]:
    """(place, row) for each row; a row that can't even be parsed comes as a BadRow."""
    if isinstance(source, HubSet):
        dataset = source.load()
        _need_messages(label, dataset.column_names)
        for i, row in enumerate(dataset):
            yield f"{label} row {i}", row
    elif source.suffix.lower() == ".parquet":
        yield from _parquet_rows(source, label)
    else:
        yield from _jsonl_rows(source, label)


def _jsonl_rows(path: Path, label: str) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):  # bytes end at \n alone: a U+2028 inside a string is text
                if not line.strip():
                    continue
                place = f"{label}:{number}"
                try:
                    yield place, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    yield place, BadRow(place, f"not UTF-8 (byte 0x{line[error.start]:02x} at {error.start})")
                except json.JSONDecodeError as error:
                    yield place, BadRow(place, f"not JSON: {error.msg} at column {error.colno}")
                except (ValueError, RecursionError):  # a number of thousands of digits; thousands of open brackets
                    yield place, BadRow(place, "not JSON that can be read: nested too deep or a number too long")
    except OSError as error:
        raise DataError(Problem(label, f"can't be read: {error.strerror}")) from error


def _parquet_rows(path: Path, label: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _need_messages(label, file.schema_arrow.names)
            row = 0
            columns = [c for c in ("messages", "tools") if c in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for value in batch.to_pylist():
                    yield f"{label} row {row}", value
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(Problem(label, f"not a Parquet file that can be read: {error}")) from error


def _need_messages(label: str, columns: Sequence[str]) -> None:
    if "messages" not in columns:
        raise DataError(
            Problem(
                label,
                f"has no column `messages`; its columns are {', '.join(columns)}",
                "turn each row into messages of role and content first",
            )
        )


class _UnusableError(Exception):
    """Why a row can't be used."""


def _checked(row: Any, place: str) -> Chat | BadRow:
    try:
        messages = _messages_of(row)
        _check_turns(messages)
    except _UnusableError as reason:
        return BadRow(place, str(reason))
    return Chat(messages, place)


def _messages_of(row: Any) -> tuple[Message, ...]:
    if not isinstance(row, dict):
        raise _UnusableError(f"not an object but {_kind(row)}")
    values = row.get("messages")
    if values is None:
        raise _UnusableError("no messages" + (f"; its keys are {', '.join(map(str, row))}" if row else ""))
    if row.get("tools"):
        raise _UnusableError("has tools, which are not supported")
    if not isinstance(values, list):
        raise _UnusableError(f"messages is {_kind(values)}, not a list")
    if not values:
        raise _UnusableError("messages is empty")
    messages: list[Message] = []
    for i, value in enumerate(values):
        try:
            messages.append(_message_of(value))
        except _UnusableError as reason:
            raise _UnusableError(f"messages[{i}]: {reason}") from None
    return tuple(messages)


def _message_of(value: Any) -> Message:
    if not isinstance(value, dict):
        raise _UnusableError(f"not an object but {_kind(value)}")
    role, content, weight = value.get("role"), value.get("content"), value.get("weight")
    if role not in ROLES:
        raise _UnusableError(f"unknown role {role!r}; known are {', '.join(ROLES)}")
    for key in _TOOL_KEYS:
        if value.get(key):
            raise _UnusableError(f"has {key}, which is not supported")
    if content is None or (isinstance(content, str) and not content.strip()):
        raise _UnusableError(f"empty content ({role})")
    if not isinstance(content, str):
        raise _UnusableError(f"content is {_kind(content)}, not text")
    if weight is not None and (type(weight) is not int or weight not in (0, 1)):
        raise _UnusableError(f"weight is {weight!r}; it can be 0 or 1")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise _UnusableError("content holds half of a surrogate pair, which is no character") from None
    return Message(role, content, 1 if weight is None else weight)


def _check_turns(messages: tuple[Message, ...]) -> None:
    turns = messages[1:] if messages[0].role == "system" else messages
    first = len(messages) - len(turns)
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            rule = "system may only come first" if message.role == "system" else "user and assistant take turns"
            raise _UnusableError(f"messages[{first + i}] is {message.role} where {expected} is due ({rule})")
    answers = [m for m in turns if m.role == "assistant"]
    if not answers:
        raise _UnusableError("no assistant turn")
    if not any(m.weight for m in answers):
        raise _UnusableError("supervises nothing: every assistant turn has weight 0")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
