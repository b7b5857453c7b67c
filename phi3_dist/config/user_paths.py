"""Paths as a person types them: one place for `~`, and for what no path may hold."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import TypeVar

from phi3_dist.errors import ConfigError, Problem

__all__ = ["user_path"]

PathOrText = TypeVar("PathOrText", Path, str)


def user_path(typed: PathOrText) -> PathOrText:
    """`typed` with its `~` or `~user` written out: shells do so only for a word that begins with it.

    Raises ConfigError for a control character, which would write lines of its own into scripts and terminals, and for
    a home folder that isn't known.
    """
    text = str(typed)
    if control := next((c for c in text if unicodedata.category(c) == "Cc"), None):
        what = f"has the control character {control!a}, which no path may have here"
        raise ConfigError(Problem(ascii(text), what, "leave it out; rename a file or folder that is called so"))
    if not text.startswith("~"):
        return typed
    try:
        return type(typed)(Path(text).expanduser())
    except RuntimeError:
        what = f"begins with {text.partition('/')[0]}, and that home folder is not known here"
        raise ConfigError(Problem(text, what, "write the path out, or set HOME")) from None
