"""The exception tree: its docstring, its exit codes, and what a user reads."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from phi3_dist import errors
from phi3_dist.errors import ConfigError, Phi3DistError, Problem

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Phi3DistError)]


def test_all_names_every_public_class() -> None:
    defined = {name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__}
    assert set(errors.__all__) == defined


def test_exit_codes_are_unique_and_those_of_the_docstring() -> None:
    documented = re.findall(r"^\s+(?:├─ |└─ )?(\w+Error) +(\d+) ", errors.__doc__ or "", flags=re.MULTILINE)
    assert {name: int(code) for name, code in documented} == {c.__name__: c.exit_code for c in CLASSES}
    codes = [c.exit_code for c in CLASSES]
    assert len(codes) == len(set(codes))
    assert all(1 <= code < 64 for code in codes)  # 64 and up is the shell's and the signals'


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_the_way_between_processes(kind: type[Phi3DistError]) -> None:
    error = kind(Problem("data.train", "no such file", "give a path"), "and a bare text")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.problems == error.problems
    assert str(copy) == str(error)


def test_all_problems_are_shown_at_once_with_place_and_fix() -> None:
    problems = [Problem("train.lrr", "unknown key", "did you mean optim.lr?"), Problem("", "no model.source")]
    error = ConfigError.of(problems)
    assert isinstance(error, ConfigError)
    assert str(error) == "train.lrr: unknown key\n    fix: did you mean optim.lr?\nno model.source"
