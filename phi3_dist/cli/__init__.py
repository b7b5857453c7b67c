"""The verbs of `phi3-dist`. No logic here: each verb loads what it needs and calls one function. Begin with app.py.

Everything that imports torch is imported inside the verb that needs it, so that help, `config` and `plan` answer
at once on a login node.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
from contextlib import nullcontext, suppress
from typing import NoReturn

import typer

from phi3_dist.cli import training  # noqa: F401 -- each adds its verbs to the app, in the order of the help

# isort: split
from phi3_dist.cli import planning, slurm, sweep  # noqa: F401

# isort: split
from phi3_dist.cli import generate_and_eval  # noqa: F401

# isort: split
from phi3_dist.cli import export_and_push, report  # noqa: F401

# isort: split
from phi3_dist.cli import cache, convert, project, show  # noqa: F401
from phi3_dist.cli.app import app
from phi3_dist.errors import ConfigError, MachineError, Phi3DistError, Problem, plain, redacted
from phi3_dist.machine.print_encoding import print_in_any_encoding
from phi3_dist.machine.terminal import failing_output, open_standard_streams, unfailing_streams
from phi3_dist.training.signals import Stopped, answered, starts_a_run

__all__ = ["app", "main"]

_LONG = ("train", "prepare", "sweep")
"""Verbs that go on whatever becomes of the terminal."""


def _print_error(error: Phi3DistError) -> None:
    """One message: on rank 0 in full, on a launcher's other ranks the first problem in one line with the rank.

    Every line has the fix: the rank that ends first has rank 0 stopped by the launcher before it has spoken.
    """
    rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ and "MASTER_ADDR" in os.environ else "0"
    if rank == "0":
        lines = [f"{type(error).__name__}:", *(f"  {problem}" for problem in error.problems)]
    else:
        first = " ".join(plain(redacted(str(error.problems[0]))).split())
        lines = [f"[rank {rank}] {type(error).__name__}: {first}"]
    with suppress(OSError):  # the exit code says the rest
        typer.echo("\n".join(lines), err=True)


def _end(error: Phi3DistError) -> NoReturn:
    _print_error(error)
    sys.stdout.flush()
    sys.exit(error.exit_code)


def _leave(code: int) -> NoReturn:
    """End now: a process group that still waits for its other ranks would hold the interpreter's end up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Run the command line. A user's mistake ends in one message and its exit code; a bug in a traceback."""
    open_standard_streams()
    print_in_any_encoding()
    words = sys.argv[1:]
    speaks_on = bool(words) and words[0] in _LONG
    if not speaks_on:
        failing_output()
    early = answered(words) if starts_a_run(words) else nullcontext()
    with early, unfailing_streams() if speaks_on else nullcontext():
        try:
            try:
                app(prog_name="phi3-dist")
            finally:
                with suppress(BrokenPipeError):
                    sys.stdout.flush()  # here, where a full disk has a message, not at the interpreter's end
        except Stopped as stop:
            if os.environ.get("RANK", "0") == "0":
                typer.echo(f"phi3-dist: {stop}", err=True)
            _leave(stop.exit_code)
        except Phi3DistError as error:
            _end(error)
        except ModuleNotFoundError as error:
            missing = (error.name or "phi3_dist").partition(".")[0]
            if missing == "phi3_dist" or missing in sys.stdlib_module_names or importlib.util.find_spec(missing):
                raise
            every = "or pip install phi3-dist for all that is needed; phi3-dist doctor checks each package"
            _end(
                MachineError(Problem(missing, "is needed here and is not installed", f"pip install {missing}, {every}"))
            )
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            _end(ConfigError(Problem(f"{error.filename!s:.60}...", "is longer than a path can be", "shorten it")))
        except Exception as error:
            if "RANK" in os.environ:
                error.add_note(f"on rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}")
            raise
