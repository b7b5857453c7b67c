"""Answers to the rows of a file, one line of JSON each, in a file that a killed call goes on from.

A line holds `index` (the row, from 0), `key` (what was asked, of which model, and how), the prompt's messages,
`answer`, `ended` (false where it was cut off at the most tokens allowed), `tokens`, and `wanted` where the row has an
answer. Rows are written as they end; once all are there, the file is written anew in the order of the rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi3_dist.data.answers import text_of
from phi3_dist.errors import DataError, Problem, control_character
from phi3_dist.inference.engine import GREEDY, Answer, Sampling, answers
from phi3_dist.inference.open_model import Opened
from phi3_dist.inference.prompts import Prompt, prompt_ids
from phi3_dist.modeling.stop_ids import stop_ids

__all__ = ["How", "answer_all", "answer_file", "check_output", "refuse_too_long"]

_ROWS_AT_A_TIME = 4096
_SHOWN = 20
_LONGEST_FIRST = 2**24  # bytes


@dataclass(frozen=True)
class How:
    """How answers are made."""

    max_new_tokens: int = 256
    batch_size: int = 16
    sampling: Sampling = GREEDY


def refuse_too_long(opened: Opened, places: Sequence[str], prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    """Raises DataError for prompts that leave no room for an answer in the positions that the model has."""
    most = int(opened.base.config.max_position_embeddings)
    long = [
        Problem(place, f"has {len(ids):,} tokens, and with {max_new_tokens:,} more it passes the model's {most:,}", "")
        for place, ids in zip(places, prompts, strict=True)
        if len(ids) + max_new_tokens > most
    ]
    if long:
        raise DataError(*long[:_SHOWN], Problem("--max-new-tokens", "does not fit", "lower it, or shorten the prompts"))


def answer_all(opened: Opened, prompts: Sequence[Prompt], how: How | None = None) -> list[str]:
    """The answer to each prompt, in order. Raises DataError for prompts that can't be asked."""
    how = how or How()
    found = [""] * len(prompts)

    def keep(i: int, answer: Answer) -> None:
        found[i] = text_of(opened.tokenizer, answer.ids)

    _answer(opened, _asked(opened, prompts, how), how, list(range(len(prompts))), keep)
    return found


def _asked(opened: Opened, prompts: Sequence[Prompt], how: How) -> list[list[int]]:
    """The ids of the prompts. Raises DataError for prompts that can't be asked."""
    ids = prompt_ids(opened.tokenizer, prompts)
    refuse_too_long(opened, [prompt.place for prompt in prompts], ids, how.max_new_tokens)
    return ids


def _answer(
    opened: Opened, ids: Sequence[list[int]], how: How, which: Sequence[int], done: Callable[[int, Answer], None]
) -> None:
    stops = stop_ids(opened.model, opened.tokenizer)
    options: dict[str, Any] = {"max_new_tokens": how.max_new_tokens, "batch_size": how.batch_size}
    for first in range(0, len(which), _ROWS_AT_A_TIME):
        some = which[first : first + _ROWS_AT_A_TIME]
        asked = [ids[k] for k in some]  # a row's number goes into what is drawn for it
        for i, answer in answers(opened.model, asked, stops, sampling=how.sampling, numbers=some, **options):
            done(some[i], answer)


def _keys(opened: Opened, prompts: Sequence[Prompt], how: How) -> list[str]:
    said = {"max_new_tokens": how.max_new_tokens, "sampling": asdict(how.sampling), "model": opened.weights}
    settings = json.dumps([said, opened.precision], sort_keys=True)
    return [hashlib.sha256(f"{prompt.hash} {settings}".encode()).hexdigest()[:16] for prompt in prompts]


def check_output(out: Path, rows: Path | None = None, *, overwrite: bool = False) -> None:
    """Raises DataError for an `out` that answers can't go to or that is not ours to replace, before a model is loaded.

    That is the file of `rows` itself, a folder, a device, and with `overwrite` a file of anything but answers.
    """
    fix = "name another file with --output"
    if found := control_character(out.name):
        raise DataError(Problem(str(out), f"has {found} in its name", fix))
    try:
        if rows is not None and out.exists() and out.samefile(rows):
            raise DataError(Problem(str(out), "is the file of the prompts", fix))
        if out.exists() and not out.is_file():
            what = (
                "is a folder" if out.is_dir() else "is not a plain file, and answers are read back where a call stopped"
            )
            raise DataError(Problem(str(out), what, fix))
        if not out.parent.is_dir():
            raise DataError(Problem(str(out), f"cannot be written: no folder {out.parent}", f"create it, or {fix}"))
        with out.open("a+b") if out.exists() else contextlib.nullcontext(io.BytesIO()) as file:
            file.seek(0)
            first = file.readline(_LONGEST_FIRST)
    except OSError as error:
        raise DataError(Problem(str(out), f"cannot be written: {error.strerror or error}", fix)) from error
    if overwrite and first and not _is_answer(first):
        what = "is not a file that generate has written, and nothing else is replaced"
        raise DataError(Problem(str(out), what, f"{fix}, or remove it"))


def _is_answer(line: bytes) -> bool:
    if not line.endswith(b"\n"):  # torn by a kill
        return line.startswith(b'{"index": ')
    try:
        row = json.loads(line)
        return isinstance(row["index"], int) and isinstance(row["key"], str) and "answer" in row
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _lines_done(path: Path, keys: Sequence[str]) -> dict[int, str]:
    """The lines of an earlier call by the number of their row; a torn last one is cut off the file.

    Raises DataError where the file holds anything else: it is not written to.
    """
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    found: dict[int, str] = {}
    fix = "name another file, or replace this one with --overwrite"
    for number, line in enumerate(whole.decode("utf-8", "replace").split("\n")[:-1], start=1):  # texts hold U+2028
        try:
            row = json.loads(line)
            index, key = int(row["index"]), row["key"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(Problem(f"{path}:{number}", "is not a line that generate has written", fix)) from error
        if not 0 <= index < len(keys) or keys[index] != key:
            what = f"was made from another prompt, by another model or with other settings than row {index} has now"
            raise DataError(Problem(f"{path}:{number}", what, fix))
        found[index] = line
    if raw and not whole and not raw.lstrip().startswith(b'{"index"'):
        raise DataError(Problem(str(path), "is not a file that generate has written", fix))
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    return found


def answer_file(
    opened: Opened,
    prompts: Sequence[Prompt],
    out: Path,
    how: How,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[int, int]:
    """Write the answers to `out`, those of an earlier call left as they are. (made now, all). One call at a time.

    Raises DataError for a file of something else, other weights or settings too, for a prompt that can't be asked, and
    where the disk refuses.
    """
    check_output(out, overwrite=overwrite)
    keys = _keys(opened, prompts, how)
    ids = _asked(opened, prompts, how)
    try:
        with out.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if overwrite:  # not before: a prompt that can't be asked, or another call's lock, costs no answers
                file.truncate(0)
            lines = _lines_done(out, keys)
            before = len(lines)

            def keep(i: int, answer: Answer) -> None:
                row = _row(opened, prompts[i], i, keys[i], answer)
                lines[i] = json.dumps(row, ensure_ascii=False)
                file.write(lines[i] + "\n")
                file.flush()
                progress(len(lines), len(prompts))

            _answer(opened, ids, how, [i for i in range(len(prompts)) if i not in lines], keep)
            partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
            partial.write_text("".join(lines[i] + "\n" for i in range(len(prompts))), encoding="utf-8")
            partial.replace(out)
    except BlockingIOError as error:
        raise DataError(
            Problem(str(out), "another process writes to it", "wait for it, or name another file")
        ) from error
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise DataError(Problem(str(out), what, "make room, or name another file")) from error
    return len(lines) - before, len(lines)


def _row(opened: Opened, prompt: Prompt, index: int, key: str, answer: Answer) -> Mapping[str, Any]:
    row = {
        "index": index,
        "key": key,
        "messages": [dict(message) for message in prompt.messages],
        "answer": text_of(opened.tokenizer, answer.ids),
        "ended": answer.ended,
        "tokens": len(answer.ids),
    }
    return row if prompt.wanted is None else {**row, "wanted": prompt.wanted}
