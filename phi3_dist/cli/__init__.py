"""The verbs of `phi3-dist`. No logic here: each verb loads what it needs and calls one function.

Everything that imports torch is imported inside the verb that needs it, so that help, `config` and `plan` answer
at once on a login node.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import NoReturn

import typer

from phi3_dist.cli import training  # noqa: F401 -- each adds its verbs to the app, in the order of the help

# isort: split
from phi3_dist.cli import looking, outside, slurm  # noqa: F401
from phi3_dist.cli.app import app
from phi3_dist.errors import ConfigError, Phi3DistError, Problem
from phi3_dist.machine.terminal import print_in_any_encoding, printable

__all__ = ["app", "main"]


def _tell(error: Phi3DistError) -> None:
    """One message: on rank 0 in full, on a launcher's other ranks in one line with the rank."""
    rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ and "MASTER_ADDR" in os.environ else "0"
    if rank == "0":
        lines = [f"{type(error).__name__}:", *(f"  {problem}" for problem in error.problems)]
    else:
        lines = [f"[rank {rank}] {type(error).__name__}: {error.problems[0].where} {error.problems[0].what}"]
    typer.echo(printable("\n".join(lines)), err=True)


def _end_with(error: Phi3DistError) -> NoReturn:
    _tell(error)
    sys.stdout.flush()
    sys.exit(error.exit_code)


def main() -> None:
    """Run the command line. A user's mistake ends in one message and its exit code; a bug in a traceback."""
    print_in_any_encoding()
    # bitsandbytes announces at import that an optional kernel for 4-bit inference is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except Phi3DistError as error:
        _end_with(error)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _end_with(ConfigError(Problem(f"{error.filename!s:.60}...", "is longer than a path can be", "shorten it")))
    except Exception as error:
        if "RANK" in os.environ:
            error.add_note(f"on rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}")
        raise
