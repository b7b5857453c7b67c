"""Several questions, one report: what each raises is kept, and raised together at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from phi3_dist.errors import Phi3DistError

__all__ = ["Collected"]

T = TypeVar("T")


class Collected:
    """`ask` answers None for what raised; `raise_all` raises the first error's kind with every problem, each once."""

    def __init__(self) -> None:
        self._errors: list[Phi3DistError] = []

    def ask(self, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except Phi3DistError as error:
            self._errors.append(error)
            return None

    def add(self, error: Phi3DistError) -> None:
        self._errors.append(error)

    def raise_all(self) -> None:
        if self._errors:
            problems = dict.fromkeys(problem for error in self._errors for problem in error.problems)
            raise type(self._errors[0])(*problems)
