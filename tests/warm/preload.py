"""For a fork server that takes names of modules: importing this imports what a run imports."""

from __future__ import annotations

import gc

from tests.warm.imports import import_all

import_all()
gc.collect()
gc.freeze()  # what is imported is shared with each process, and not searched for garbage in it
