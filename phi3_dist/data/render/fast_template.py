"""Many conversations through one chat template, as `apply_chat_template` renders them, in a fraction of its time.

Most templates put contents into the text as they are and decide everything else by the roles. Where the template's own
syntax tree proves that, two conversations with the same roles differ in nothing but their contents: the text around
them is rendered once for each sequence of roles and kept. Every other template is rendered row by row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError, nodes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Renderer", "puts_contents_verbatim"]

Turn = dict[str, str]
_SHAPES_AT_MOST = 4096
_SLOT = re.compile("\x01([0-9]+)\x02")
_LOOP_FACTS = {"first", "last", "index", "index0", "revindex", "revindex0", "length"}
_OUTSIDE_OUTPUT = (nodes.FilterBlock, nodes.CallBlock, nodes.AssignBlock, nodes.Macro, nodes.Include, nodes.Extends)
_ALSO_NOT = (nodes.Import, nodes.FromImport, nodes.Block, nodes.ScopedEvalContextModifier, nodes.EvalContextModifier)


class Renderer:
    """The template of one tokenizer. Not for several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        self._verbatim = isinstance(template, str) and puts_contents_verbatim(template)
        self._shapes: dict[tuple[str, ...], list[str | int] | None] = {}

    def texts(self, chats: Sequence[list[Turn]]) -> list[str]:
        """The text of each conversation (role and content of its turns), no answer asked for.

        Raises jinja2.TemplateError where the template refuses one.
        """
        if not self._verbatim:
            return [str(text) for text in self._tokenizer.apply_chat_template(chats, tokenize=False)] if chats else []
        return [self._text(chat) for chat in chats]

    def _text(self, chat: list[Turn]) -> str:
        roles = tuple([turn["role"] for turn in chat])
        pieces = self._shapes.get(roles)
        # an empty content may be asked about (`if message['content']`); extra keys may be, too
        if pieces is None or any(len(turn) != 2 or not turn["content"] for turn in chat):
            return self._first_text(roles, chat)
        return "".join([piece if isinstance(piece, str) else chat[piece]["content"] for piece in pieces])

    def _first_text(self, roles: tuple[str, ...], chat: list[Turn]) -> str:
        """Rendered whole; also keeps the shape, if filling it gives the same text."""
        text = str(self._tokenizer.apply_chat_template(chat, tokenize=False))
        usable = all(len(turn) == 2 and turn["content"] for turn in chat)
        if usable and roles not in self._shapes and len(self._shapes) < _SHAPES_AT_MOST:
            slots = [{"role": role, "content": f"\x01{i}\x02"} for i, role in enumerate(roles)]
            parts = _SLOT.split(str(self._tokenizer.apply_chat_template(slots, tokenize=False)))
            pieces: list[str | int] = [int(part) if i % 2 else part for i, part in enumerate(parts)]
            filled = "".join([piece if isinstance(piece, str) else chat[piece]["content"] for piece in pieces])
            self._shapes[roles] = pieces if filled == text else None
        return text


def puts_contents_verbatim(template: str) -> bool:
    """Whether the text around the contents depends on the roles alone, and contents go into it as they are.

    Proven from the syntax tree, on the safe side: contents may only be printed, alone or joined to other text, or asked
    whether they are empty; messages may only be looped over or asked for role and content.
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:
        return False
    watched = {"messages", "loop"}
    for loop in tree.find_all(nodes.For):
        if _is_messages(loop.iter):
            if not isinstance(loop.target, nodes.Name):
                return False
            watched.add(loop.target.name)
    stored = [name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"]
    loops = sum(_is_messages(loop.iter) for loop in tree.find_all(nodes.For))
    if sum(name in watched for name in stored) != loops:  # a watched name is bound to something else, too
        return False
    return _safe(tree, "other", watched)


def _is_messages(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        node = node.node
    return isinstance(node, nodes.Name) and node.name == "messages"


def _key_of_message(node: nodes.Node, watched: set[str]) -> str | None:
    """The constant key that `message['key']`, `message.key` or `messages[0]['key']` asks a message for."""
    if isinstance(node, nodes.Getattr):
        key: object = node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        key = node.arg.value
    else:
        return None
    of = node.node
    if isinstance(of, nodes.Getitem) and isinstance(of.arg, nodes.Const | nodes.Neg) and _is_messages(of.node):
        return key if isinstance(key, str) else None
    is_message = isinstance(of, nodes.Name) and of.name in watched - {"messages", "loop"}
    return key if is_message and isinstance(key, str) else None


def _safe(node: nodes.Node, where: str, watched: set[str]) -> bool:
    if isinstance(node, _OUTSIDE_OUTPUT + _ALSO_NOT):
        return False
    key = _key_of_message(node, watched)
    if key is not None:
        return key == "role" or (key == "content" and where in ("printed", "asked"))
    if isinstance(node, nodes.Name):
        return node.name not in watched
    if isinstance(node, nodes.For) and _is_messages(node.iter):
        return node.test is None and all(_safe(child, "other", watched) for child in (*node.body, *node.else_))
    if isinstance(node, nodes.If):
        statements = (*node.body, *node.elif_, *node.else_)
        return _safe(node.test, "asked", watched) and all(_safe(child, "other", watched) for child in statements)
    inside = "other"
    if isinstance(node, nodes.Output) or (where == "printed" and isinstance(node, nodes.Add | nodes.Concat)):
        inside = "printed"
    elif where == "asked" and isinstance(node, nodes.And | nodes.Or | nodes.Not):
        inside = "asked"
    return _is_loop_fact(node) or all(_safe(child, inside, watched) for child in node.iter_child_nodes())


def _is_loop_fact(node: nodes.Node) -> bool:
    """`loop.last` and its like, which tell nothing of the messages; `loop.nextitem` and `loop.changed()` do."""
    if not isinstance(node, nodes.Getattr) or not isinstance(node.node, nodes.Name):
        return False
    return node.node.name == "loop" and node.attr in _LOOP_FACTS
