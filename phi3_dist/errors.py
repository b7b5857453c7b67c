"""Every error a user can meet, and the exit code each one ends the process with.

    Phi3DistError                 1   never raised itself
      ├─ ConfigError              2   the run file or an override: unknown key, wrong type, impossible pair
      ├─ DataError                3   rows that cannot be read, or rows that supervise nothing
      ├─ ModelError               4   base model, tokenizer or LoRA targets: missing, gated, not supported
      ├─ PlanError                5   a combination that cannot run, or a plan that differs from reality
      ├─ AdapterError             6   a gather or a file that is not what it should be
      ├─ RunFolderError           7   a run folder that exists, cannot be written, or is not one
      ├─ MachineError             8   this machine: a package, a lock, a device
      └─ TrainingError            9   a run that went wrong: non-finite numbers, a rank that died

Exit code 0 is success. A bug in this toolkit is not in this tree: it shows its own traceback and exits with 1.
Each error holds one or more `Problem`s, so that a user sees all mistakes at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "AdapterError",
    "ConfigError",
    "DataError",
    "MachineError",
    "ModelError",
    "Phi3DistError",
    "PlanError",
    "Problem",
    "RunFolderError",
    "TrainingError",
    "control_character",
    "kind",
    "plain",
    "redacted",
    "shown",
]

# C0 and C1 but tab and line end, marks that turn the direction of writing, line separators, halves of surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ANY_CONTROL = re.compile(rf"{_CONTROL.pattern}|[\n\t]")
_USER_INFO = re.compile(r"(?<=://)[^\s/?#:]*:[^\s/?#]*@")
_TOKEN = re.compile(
    r"\b(hf_)(?=[a-zA-Z0-9]*[A-Z0-9])[a-zA-Z0-9]{10,}|\b(gh[pousr]_|github_pat_|glpat-|sk-(?:proj|ant|or)-)[\w-]{16,}"
    r"|\b(AKIA)[A-Z0-9]{12,}"
)


def control_character(text: str) -> str:
    """The first character of `text` that could write a line, a file name or a terminal of its own, as Python writes it.

    Empty where there is none. Newline and tab are among them.
    """
    found = _ANY_CONTROL.search(text)
    return ascii(found[0])[1:-1] if found else ""


def redacted(text: str) -> str:
    """`text` without the user and password of an address, and without tokens that are known by their form."""
    shown = _USER_INFO.sub("***@", text)
    return _TOKEN.sub(lambda found: f"{found[1] or found[2] or found[3]}***", shown)


def plain(text: str) -> str:
    """`text` for a terminal: what a row or a file holds moves no cursor and sets no colour. Newlines stay."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the place, what is wrong there, and the fix (may be empty)."""

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return plain(redacted(f"{place}{self.what}" + (f"\n    fix: {self.fix}" if self.fix else "")))


class Phi3DistError(Exception):
    """Base of the tree. `problems` holds everything that was found, in order."""

    exit_code = 1

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(Problem("", p) if isinstance(p, str) else p for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> Phi3DistError:
        return cls(*problems)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.problems)


class ConfigError(Phi3DistError):
    exit_code = 2


class DataError(Phi3DistError):
    exit_code = 3


class ModelError(Phi3DistError):
    exit_code = 4


class PlanError(Phi3DistError):
    exit_code = 5


class AdapterError(Phi3DistError):
    exit_code = 6


class RunFolderError(Phi3DistError):
    exit_code = 7


class MachineError(Phi3DistError):
    exit_code = 8


class TrainingError(Phi3DistError):
    exit_code = 9


def kind(value: object) -> str:
    """What a YAML value is, in words."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true or false"
    names = ((dict, "a section"), (list, "a list"), (str, "text"), (int, "a whole number"), (float, "a number"))
    return next((name for type_, name in names if isinstance(value, type_)), f"a {type(value).__name__}")


def shown(value: object) -> str:
    """A value for a message: as YAML would show it, cut after 60 characters."""
    text = (
        {None: "null", True: "true", False: "false"}.get(value)
        if value is None or value is True or value is False
        else None
    )
    text = text or (repr(value) if isinstance(value, str | int | float | list | dict) else f"'{value}'")
    return text if len(text) <= 60 else f"{text[:57]}..."
