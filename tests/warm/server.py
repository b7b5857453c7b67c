"""Import what is slow to import once, and fork for each process that a client asks for: `tests/warm/__init__.py`."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import marshal
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import struct
import sys
import threading
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.warm.imports import import_all

# A process that wants another value than the server's has to be a real one.
READ_AT_IMPORT = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "TRITON_INTERPRET",
    "LC_",
    "LANG",
)
READ_AT_IMPORT += ("PYTHON", "MKL_", "LD_", "TORCH_LOGS", "TRANSFORMERS_")
READ_LATER = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
LAUNCHERS = (("accelerate.commands.accelerate_cli", "launch"), ("phi3_dist", "launch"))
FORK_SAFE = {"jemalloc_bg_thd"}  # pyarrow's allocator starts its thread anew after a fork
REFUSED = 96
LOGGED = 300  # characters of a command


@dataclass
class Forked:
    """One process that was asked for, and who asked."""

    pid: int
    pidfd: int
    client: socket.socket
    words: str
    test: str  # that asked for it; - if its environment does not say
    known_as: Path  # CLIENT_FORKED, their numbers, among the living


class Server:
    """The socket that clients come to, and the processes that live. One thread, as a process that forks has to have."""

    def __init__(self, folder: Path, owner: int) -> None:
        self.folder = folder
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(folder / "socket.partial"))
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.owner_fd = os.pidfd_open(owner)
        self.living: list[Forked] = []
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
        self.selector.register(self.owner_fd, selectors.EVENT_READ, self._leave)
        (folder / "living").mkdir(exist_ok=True)
        (folder / "socket.partial").rename(folder / "socket")

    def serve(self) -> dict[str, Any]:
        """Answer clients until the owner has gone. Returns in a forked process, with what that is to run."""
        while True:
            for key, _ in self.selector.select():
                request = key.data()
                if request is not None:
                    return request

    def _accept(self) -> dict[str, Any] | None:
        client, _ = self.listener.accept()
        request = _received(client)
        if request is None:
            client.close()
            return None
        pid = os.fork()
        if pid == 0:
            self._forget()
            client.close()
            return request
        for fd in request["received"]:
            os.close(fd)
        words = " ".join(request["arguments"])[:LOGGED]
        running = os.fsdecode(request["environment"].get(b"PYTEST_CURRENT_TEST", b"- "))  # "a.py::b (call)"
        test = running.rpartition(" ")[0]
        known_as = self.folder / "living" / f"{_number_of(client)}_{pid}"
        forked = Forked(pid, os.pidfd_open(pid), client, words, test, known_as)
        forked.known_as.touch()
        self.living.append(forked)
        self.selector.register(forked.pidfd, selectors.EVENT_READ, lambda: self._ended(forked))
        self.selector.register(client, selectors.EVENT_READ, lambda: self._deserted(forked))
        with contextlib.suppress(OSError):
            client.sendall(pid.to_bytes(8, "big"))
        return None

    def _ended(self, forked: Forked) -> None:
        if forked not in self.living:
            return
        _, status, used = os.wait4(forked.pid, 0)
        print(f"{used.ru_utime + used.ru_stime:6.2f} s of CPU time\t{forked.test}\t{forked.words}", flush=True)
        with contextlib.suppress(OSError):
            forked.client.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
        self.living.remove(forked)
        forked.known_as.unlink()
        for file in (forked.pidfd, forked.client):
            self.selector.unregister(file)
        os.close(forked.pidfd)
        forked.client.close()

    def _deserted(self, forked: Forked) -> None:
        """The client was killed: so is its process, with what it started."""
        if forked not in self.living:
            return
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):  # it may not have come to its own group yet
                kill(forked.pid, signal.SIGKILL)
        self._ended(forked)

    def _leave(self) -> None:
        for forked in list(self.living):
            self._deserted(forked)
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(0)

    def _forget(self) -> None:
        """In a forked process: nothing of the server's stays open."""
        self.selector.close()
        self.listener.close()
        os.close(self.owner_fd)
        for other in self.living:
            os.close(other.pidfd)
            other.client.close()


def _number_of(client: socket.socket) -> int:
    """The process at the other end."""
    size = struct.calcsize("3i")
    number, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(number)


def _threads() -> set[str]:
    tasks = Path("/proc/self/task").iterdir()
    return {(task / "comm").read_text().strip() for task in tasks if int(task.name) != os.getpid()}


def _received(client: socket.socket) -> dict[str, Any] | None:
    """What a client asks for, with its streams as `received`; None if it has gone meanwhile."""
    head, fds, _, _ = socket.recv_fds(client, 8, 3)
    left, parts = int.from_bytes(head, "big"), []
    while head and left and (part := client.recv(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    if left or not head:
        for fd in fds:
            os.close(fd)
        return None
    request: dict[str, Any] = marshal.loads(b"".join(parts))
    return {**request, "received": fds}


def become(request: dict[str, Any], began_with: dict[str, str]) -> None:
    """Take the streams, folder, umask and environment that a process of this request would have begun with."""
    os.setsid()
    for fd in {0, 1, 2} - set(request["streams"]):
        os.close(fd)
    for fd, received in zip(request["streams"], request["received"], strict=True):
        os.dup2(received, fd)
    for received in request["received"]:
        if received > 2:
            os.close(received)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.umask(request["umask"])
    os.chdir(request["folder"])
    asked = {os.fsdecode(k): os.fsdecode(v) for k, v in request["environment"].items()}
    _refuse_what_was_read_already(asked, began_with)
    paths = [str(Path(p).absolute()) for p in asked.get("PYTHONPATH", "").split(os.pathsep) if p]
    own = [str(Path(p).absolute()) for p in began_with.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [sys.path[0], *paths, *(p for p in sys.path[1:] if p not in own or p in paths)]
    sys.path[:] = list(dict.fromkeys(sys.path))
    os.environ.clear()
    os.environ.update(asked)
    random.seed()


def _refuse_what_was_read_already(asked: dict[str, str], began_with: dict[str, str]) -> None:
    for key in sorted({*asked, *began_with}):
        if key.startswith(READ_AT_IMPORT) and key not in READ_LATER and asked.get(key) != began_with.get(key):
            print(f"{key}={asked.get(key)} is read at import: start a real process for it", file=sys.stderr, flush=True)
            os._exit(REFUSED)


def streams(unbuffered: bool) -> None:
    """Standard streams as an interpreter makes them."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        try:
            raw = io.FileIO(fd, "r" if fd == 0 else "w", closefd=False)
        except OSError:
            new = None
        else:
            buffer: Any = io.BufferedReader(raw) if fd == 0 else raw if unbuffered else io.BufferedWriter(raw)
            new = io.TextIOWrapper(
                buffer, old.encoding, old.errors, line_buffering=fd == 2 or raw.isatty(), write_through=unbuffered
            )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def run(words: list[str], program: str) -> None:
    """What `python WORDS` runs, as `__main__`, where words are -m, -c or a script.

    A launcher starts its ranks with `program`.
    """
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    kind, *rest = words
    if kind == "-m":
        sys.path[0] = str(Path.cwd())
        sys.argv = ["-m", *rest[1:]]
        if (rest[0], *rest[1:2]) in LAUNCHERS:
            sys.executable = program
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* found in sys.modules after import of package", RuntimeWarning)
            _, spec, code = runpy._get_module_details(rest[0])
        main.__dict__.update(__spec__=spec, __package__=spec.parent, __file__=spec.origin, __loader__=spec.loader)
        sys.argv[0] = spec.origin
        exec(code, main.__dict__)
    elif kind == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0] = str(Path(kind).resolve().parent)
        sys.argv = [kind, *rest]
        main.__dict__["__file__"] = kind
        exec(compile(Path(kind).read_bytes(), kind, "exec"), main.__dict__)


def leave(body: Callable[[], None]) -> NoReturn:
    """Run it and end as an interpreter does, but for the second that it takes to clear four thousand modules."""
    code: object = 0
    try:
        body()
    except SystemExit as asked:
        code = asked.code
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        code = -signal.SIGINT
    except BaseException:  # noqa: BLE001 - it is the interpreter's place to show what nobody caught
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int) and code is not None:
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            try:
                stream.flush()
            except OSError:
                code = 120
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    began_with = dict(os.environ)  # imports may set more
    import_all()
    if others := _threads() - FORK_SAFE:
        raise RuntimeError(f"imports started threads, which a forked process would be without: {others}")
    gc.collect()
    gc.freeze()
    place, owner = Path(sys.argv[1]), int(sys.argv[2])
    asked = Server(place, owner).serve()
    become(asked, began_with)
    words = [os.fsdecode(word) for word in asked["arguments"]]
    unbuffered = words[0] == "-u"
    streams(unbuffered or bool(os.environ.get("PYTHONUNBUFFERED")))
    leave(lambda: run(words[unbuffered:], str(place / "python")))
