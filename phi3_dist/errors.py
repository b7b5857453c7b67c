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
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the place, what is wrong there, and the fix (may be empty)."""

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}" + (f"\n    fix: {self.fix}" if self.fix else "")


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
