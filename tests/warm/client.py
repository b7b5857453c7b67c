"""What tests start in place of Python (see `tests/warm/__init__.py`): ask the server for a process, and end as it ends.

It is started in isolated mode and without site packages, with SOCKET set on a line before this, and imports next to
nothing: 20 ms.
"""

import _socket
import array
import marshal
import os
import signal
import sys


def main(path: str) -> None:
    process = 0
    early = []

    def hand_on(number: int, frame: object) -> None:
        if not process:
            early.append(number)
            return
        try:  # noqa: SIM105 - contextlib takes its time to import
            os.kill(process, number)
        except ProcessLookupError:
            pass  # it has ended, and its exit code is on its way

    streams = [fd for fd in (0, 1, 2) if _is_open(fd)]
    request = {
        "arguments": sys.argv[1:],
        "environment": dict(os.environb),
        "folder": os.getcwd(),  # noqa: PTH109 - pathlib takes its time to import
        "umask": _umask(),
        "streams": streams,
        "ignored": [int(n) for n in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(n) is signal.SIG_IGN],
    }
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE}:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, hand_on)
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    server.connect(path)
    message = marshal.dumps(request)
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", streams))] if streams else []
    server.sendmsg([len(message).to_bytes(8, "big")], rights)
    sent = 0
    while sent < len(message):
        sent += server.send(message[sent:])
    process = int.from_bytes(_read(server, 8), "big")
    for fd in streams:  # the process alone holds them: who reads them sees their end when it ends
        os.close(fd)
    while early:
        hand_on(early.pop(0), None)
    _end(int.from_bytes(_read(server, 8), "big", signed=True))


def _read(server: "_socket.socket", size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = server.recv(size - len(found))
        if not part:
            os._exit(97)  # the server has gone: its log says why
        found += part
    return found


def _end(code: int) -> None:
    if code >= 0:
        os._exit(code)
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
    os.kill(os.getpid(), -code)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


main(SOCKET)  # type: ignore[name-defined]  # noqa: F821
