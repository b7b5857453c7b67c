"""`phi3-dist board`: the runs of a folder in a browser on this machine, refreshed while they train.

It listens on the loopback address alone, answers only requests that name it (so that no other page can reach it under
a name of its own), reads run folders that lie below its own, and writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from phi3_dist.errors import MachineError, Phi3DistError, Problem, RunFolderError, plain, redacted
from phi3_dist.report.page import board_page, comparison_page, parts_of_comparison, parts_of_run, run_page, runs_part
from phi3_dist.report.run_view import RunView, drawn, read_view
from phi3_dist.report.runs import RunRow, list_runs, run_cells

__all__ = ["Board", "open_board", "serve_board"]

HOST, EVERY_MS = "127.0.0.1", 2000
COMPARED_AT_MOST = 24
_FILES = ("metrics.jsonl", "heartbeat.json", "exit.json", "plan.json", "evaluation.json", "config.yaml")
_OURS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.IGNORECASE)


class Board:
    """What the server answers, without the server: a path to a page or its news."""

    def __init__(self, folder: Path) -> None:
        """Raises RunFolderError where `folder` is none."""
        self.folder = folder
        list_runs(folder)
        self._views: dict[Path, tuple[object, RunView]] = {}
        self._lock = threading.Lock()

    def answer(self, address: str) -> tuple[str, str]:
        """The type and the text that an address stands for. Raises LookupError for none, RunFolderError for a run
        that can't be read."""
        split = urlsplit(address)
        run_names = parse_qs(split.query).get("run", [])
        pages: dict[str, Callable[[], str]] = {
            "/": self._list,
            "/run": lambda: self._run(run_names),
            "/compare": lambda: self._compare(run_names),
        }
        news: dict[str, Callable[[], dict[str, Any]]] = {
            "/news": self._list_news,
            "/news/run": lambda: self._run_news(run_names),
            "/news/compare": lambda: self._compare_news(run_names),
        }
        if split.path in pages:
            return "text/html; charset=utf-8", pages[split.path]()
        return "application/json", json.dumps(news[split.path](), separators=(",", ":"))

    def _rows(self) -> list[dict[str, Any]]:
        found = []
        for row in list_runs(self.folder):
            key, cells = self._key(row), run_cells(row, self.folder)
            share = min(1.0, row.step / row.steps) if row.steps and row.state == "running" else None
            own = {"key": key, "query": urlencode({"run": key}, errors="surrogateescape"), "share": share}
            found.append({**cells, "speed": cells["tokens/s"], **own})
        return found

    def _key(self, row: RunRow) -> str:
        return row.folder.relative_to(self.folder).as_posix()

    def _list(self) -> str:
        return board_page(self._rows(), self.folder, {"url": "/news", "every_ms": EVERY_MS})

    def _list_news(self) -> dict[str, Any]:
        return {"above": runs_part(self._rows()), "below": "", "charts": [], "runs": []}

    def _view(self, key: str) -> RunView:
        """The run of a name that the list has given, read anew when one of its files has changed."""
        row = next((row for row in list_runs(self.folder) if self._key(row) == key), None)
        if row is None:
            raise LookupError(key)
        seen = (row.state, tuple(_changed(row.folder / name) for name in _FILES))
        with self._lock:
            kept = self._views.get(row.folder)
            if kept is None or kept[0] != seen:
                kept = self._views[row.folder] = (seen, read_view(row.folder, may_be_empty=True))
            return kept[1]

    def _one(self, asked: list[str]) -> RunView:
        if len(asked) != 1:
            raise LookupError("run")
        return self._view(asked[0])

    def _run(self, asked: list[str]) -> str:
        url = f"/news/run?{urlencode({'run': asked}, doseq=True, errors='surrogateescape')}"
        return run_page(self._one(asked), {"url": url, "every_ms": EVERY_MS})

    def _run_news(self, asked: list[str]) -> dict[str, Any]:
        view = self._one(asked)
        title = f"running: {view.name}" if view.row.state == "running" else view.name
        return {"title": title, **parts_of_run(view), **drawn([view], [view.name])}

    def _compared(self, asked: list[str]) -> list[RunView]:
        if not asked:
            raise RunFolderError(Problem("compare", "no run is chosen", "go back and choose some"))
        return [self._view(key) for key in dict.fromkeys(asked[:COMPARED_AT_MOST])]

    def _compare(self, asked: list[str]) -> str:
        views = self._compared(asked)
        url = f"/news/compare?{urlencode({'run': asked}, doseq=True, errors='surrogateescape')}"
        return comparison_page(views, {"url": url, "every_ms": EVERY_MS})

    def _compare_news(self, asked: list[str]) -> dict[str, Any]:
        views = self._compared(asked)
        names, above = parts_of_comparison(views)
        return {"above": above, **drawn(views, names)}


def _changed(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class _Handler(BaseHTTPRequestHandler):
    server_version = "phi3_dist"
    sys_version = ""
    timeout = 30

    def __init__(self, board: Board, *arguments: Any) -> None:
        self.board = board
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if not _OURS.fullmatch(self.headers.get("Host", "")):
            self._send(HTTPStatus.FORBIDDEN, "text/plain; charset=utf-8", "this board answers to localhost alone\n")
            return
        try:
            kind, text = self.board.answer(self.path)
            status = HTTPStatus.OK
        except LookupError:
            status, kind, text = HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", "no such page or run here\n"
        except Phi3DistError as error:
            status, kind = HTTPStatus.UNPROCESSABLE_ENTITY, "text/plain; charset=utf-8"
            text = plain(redacted(str(error))) + "\n"
        self._send(status, kind, text)

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8", "backslashreplace")
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        unchanged = status == HTTPStatus.OK and self.headers.get("If-None-Match") == tag
        self.send_response(HTTPStatus.NOT_MODIFIED if unchanged else status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(0 if unchanged else len(body))),
            ("ETag", tag),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("X-Frame-Options", "DENY"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if not unchanged:
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """The terminal belongs to whoever started the board."""

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the browser has gone
            self.close_connection = True


def open_board(folder: Path, port: int) -> ThreadingHTTPServer:
    """The board's server, listening; `serve_forever` answers. Port 0: one that is free.

    Raises RunFolderError for no folder, MachineError for a port that is taken.
    """
    board = Board(folder)
    try:
        server = ThreadingHTTPServer((HOST, port), partial(_Handler, board))
    except OSError as error:
        what = f"cannot be listened on: {error.strerror or error}"
        fix = "--port with another number, or 0 for any that is free"
        raise MachineError(Problem(f"port {port}", what, fix)) from error
    server.daemon_threads = True
    return server


def serve_board(folder: Path, port: int, print_line: Callable[[str], object]) -> None:
    """Serve until Ctrl-C; `print_line` gets the address. Raises as `open_board` does."""
    with open_board(folder, port) as server:
        found = server.server_address[1]
        print_line(f"{folder}: http://{HOST}:{found}/ (Ctrl-C ends it)")
        print_line(f"from elsewhere: ssh -N -L {found}:{HOST}:{found} THIS_MACHINE, then the same address there")
        server.serve_forever(poll_interval=0.2)
