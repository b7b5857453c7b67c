"""A finished run's report, whose failure is not a failure of the run."""

from __future__ import annotations

from pathlib import Path

from phi3_dist.errors import RunFolderError

__all__ = ["draw_report"]


def draw_report(run_folder: Path) -> str:
    """Draw curves and page; the lines to tell of it. What can't be drawn now is said, with how to draw it later."""
    try:
        from phi3_dist.report.page import write_page

        page = f"page: {write_page(run_folder)}"
        from phi3_dist.report.curves_png import (
            draw_curves,  # matplotlib, which looks for a place of its own to write to
        )

        return f"curves: {draw_curves(run_folder)}\n{page}"
    except RunFolderError as error:
        why = f"{error.problems[0].where} {error.problems[0].what}"
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        why = f"{name} is not installed (pip install {name})"
    except OSError as error:
        why = f"{error.filename or run_folder}: {error.strerror or error}"
    return f"the run has finished, but its report was not drawn: {why}\n    later: phi3-dist report {run_folder}"
