"""A library's notice that is about no run of this package, kept off the screen wherever it is imported."""

from __future__ import annotations

import logging

__all__ = ["keep_quiet_about_missing_kernel"]

_LOGGER, _BEGINNING = "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"


def _is_for_people(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_BEGINNING)


def keep_quiet_about_missing_kernel() -> None:
    """bitsandbytes, which PEFT imports, names at import a kernel package that it could use to answer with 4-bit bases.

    Training never asks for that kernel. Everything else that bitsandbytes has to say is shown.
    """
    logger = logging.getLogger(_LOGGER)
    if _is_for_people not in logger.filters:
        logger.addFilter(_is_for_people)
