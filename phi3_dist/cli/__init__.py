"""The verbs of `phi3-dist`. No logic here: each verb loads what it needs and calls one function.

Everything that imports torch is imported inside the verb that needs it, so that help, `config` and `plan` answer
at once on a login node.
"""

from __future__ import annotations

import logging
import os
import sys

import typer

from phi3_dist.cli import training  # noqa: F401 -- each adds its verbs to the app, in the order of the help

# isort: split
from phi3_dist.cli import caching, looking, outside, slurm  # noqa: F401
from phi3_dist.cli.app import app
from phi3_dist.errors import Phi3DistError

__all__ = ["app", "main"]


def _tell(error: Phi3DistError) -> None:
    """One message: on rank 0 in full, on other ranks in one line with the rank."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        typer.echo(f"{type(error).__name__}:", err=True)
        for problem in error.problems:
            typer.echo(f"  {problem}", err=True)
    else:
        typer.echo(
            f"[rank {rank}] {type(error).__name__}: {error.problems[0].where} {error.problems[0].what}", err=True
        )


def main() -> None:
    """Run the command line. A user's mistake ends in one message and its exit code; a bug in a traceback."""
    # bitsandbytes announces at import that an optional kernel for 4-bit inference is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except Phi3DistError as error:
        _tell(error)
        sys.stdout.flush()
        sys.exit(error.exit_code)
    except Exception as error:
        if "RANK" in os.environ:
            error.add_note(f"on rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}")
        raise
