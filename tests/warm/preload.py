"""For a fork server that takes names of modules: importing this imports what a run imports."""

from __future__ import annotations

from tests.warm.imports import import_all

import_all()
