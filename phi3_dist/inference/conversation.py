"""A conversation with a trained model: turns, commands, and answers that are shown while they are made.

Over a pipe each line is a message, and nothing but answers is printed. Ctrl-C stops an answer and not the program.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from phi3_dist.config.json_text import parse_json
from phi3_dist.config.user_paths import user_path
from phi3_dist.data.answers import text_of
from phi3_dist.errors import ConfigError, DataError, Phi3DistError, plain
from phi3_dist.inference.answers_file import How, refuse_too_long
from phi3_dist.inference.engine import stream
from phi3_dist.inference.open_model import Opened
from phi3_dist.inference.prompts import Prompt, prompt_ids
from phi3_dist.modeling.stop_ids import stop_ids

__all__ = ["Conversation", "chat"]

HELP = """\
/system TEXT   a system message from the next answer on; without a text: none
/reset         forget all turns
/undo          forget the last question and its answer
/base          switch the adapter off, and on again
/save FILE     add the conversation to a file of rows that can be trained on
/help          this
/quit          end, as Ctrl-D does; Ctrl-C stops an answer"""
_HALF = "\ufffd"
"""What a token decodes to that holds a part of a character."""


@dataclass
class Conversation:
    """Turns so far, and who answers."""

    opened: Opened
    how: How
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    of_base: bool = False

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """What the model is shown."""
        return (*(({"role": "system", "content": self.system},) if self.system else ()), *self.turns)

    def ask(self, text: str) -> Iterator[str]:
        """The pieces of the answer as they come. The turns hold as much of it as was given; none after an error.

        Raises DataError for a message that can't be asked, or a conversation that has become too long.
        """
        self.turns.append({"role": "user", "content": text})
        opened, tokenizer, shown_text = self.opened, self.opened.tokenizer, ""
        try:
            (ids,) = prompt_ids(tokenizer, [Prompt(self.messages, place="the message")])
            refuse_too_long(opened, ["the conversation"], [ids], self.how.max_new_tokens)
        except DataError:
            self.turns.pop()
            raise
        new: list[int] = []
        stops = stop_ids(opened.model, tokenizer)
        options = {"max_new_tokens": self.how.max_new_tokens, "sampling": self.how.sampling}
        try:
            with opened.base_alone(self.of_base):
                for token in stream(opened.model, ids, stops, **options):  # type: ignore[arg-type]
                    new.append(token)
                    text = text_of(tokenizer, new)
                    if text.startswith(shown_text) and not text.endswith(_HALF) and text != shown_text:
                        yield text[len(shown_text) :]
                        shown_text = text
            text = text_of(tokenizer, new)
            if text != shown_text and text.startswith(shown_text):
                yield text[len(shown_text) :]
            shown_text = text
        finally:
            self.turns.append({"role": "assistant", "content": shown_text})

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says, and answer it. Raises OSError where a file refuses."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        done: dict[str, Callable[[], str]] = {
            "/help": lambda: HELP,
            "/system": lambda: self._system(rest),
            "/reset": self._reset,
            "/undo": self._undo,
            "/base": self._base,
            "/save": lambda: self._save(rest),
        }
        return done[word]() if word in done else f"{word} is not a command here; /help lists them"

    def _system(self, text: str) -> str:
        self.system = text
        return "the system message is set" if text else "there is no system message now"

    def _reset(self) -> str:
        self.turns.clear()
        return "all turns are forgotten" + ("; the system message stays" if self.system else "")

    def _undo(self) -> str:
        if not self.turns:
            return "there is nothing to undo"
        del self.turns[-2:]
        return f"forgotten; {len(self.turns) // 2} questions are left"

    def _base(self) -> str:
        if not self.opened.has_adapter:
            return "there is no adapter: the base answers"
        self.of_base = not self.of_base
        return "the base answers now, without the adapter" if self.of_base else "the adapter answers again"

    def _save(self, name: str) -> str:
        if not name:
            return "/save FILE: name a file"
        if not self.turns:
            return "there is nothing to save"
        try:
            path = user_path(Path(name))
        except ConfigError as error:
            return str(error)
        last = _last_line(path)
        if last is None or (last and not _is_row(last)):
            return f"{name}: is not a file of such rows, and nothing else is added to; name another file"
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" if last and not last.endswith(b"\n") else "")
            file.write(json.dumps({"messages": list(self.messages)}, ensure_ascii=False) + "\n")
        return f"added to {name}: {len(self.turns) // 2} questions with their answers"


def _last_line(path: Path) -> bytes | None:
    """Of a file; empty of one that is new, None of a folder or a device. Raises OSError."""
    if not path.exists():
        return b""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return next(iter(deque(file, maxlen=1)), b"")


def _is_row(line: bytes) -> bool:
    try:
        row = parse_json(line)
    except ValueError:
        return False
    return isinstance(row, dict) and "messages" in row


def chat(conversation: Conversation, *, read: TextIO | None = None, write: TextIO | None = None) -> None:
    """Talk until the end of the input or /quit. On a terminal `input` reads, with its own editing of a line."""
    read, write = read or sys.stdin, write or sys.stdout
    person = read.isatty()
    if person:
        name = conversation.opened.name
        write.write(f"{name} answers. /help lists commands, Ctrl-D ends.\n")
    while True:
        try:
            line = _line(read, person)
        except KeyboardInterrupt:
            write.write("\nCtrl-D or /quit ends\n")
            continue
        if line is None or line in ("/quit", "/exit"):
            write.write("\n" if person and line is None else "")
            return
        if line:
            _turn(conversation, line, write, person=person)


def _line(read: TextIO, person: bool) -> str | None:
    if person and read is sys.stdin:
        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = read.readline()
    return line.strip() if line else None


def _turn(conversation: Conversation, line: str, write: TextIO, *, person: bool) -> None:
    if line.startswith("/"):
        try:
            said = conversation.command(line)
        except OSError as error:
            said = f"{error.filename}: cannot be written: {error.strerror}"
        (write if person else sys.stderr).write(plain(said) + "\n")
        return
    pieces = conversation.ask(line)
    try:
        for piece in pieces:
            write.write(plain(piece))
            write.flush()
        write.write("\n")
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        write.write("\n(stopped)\n")
    except Phi3DistError as error:
        (write if person else sys.stderr).write("\n".join(str(problem) for problem in error.problems) + "\n")
    write.flush()
