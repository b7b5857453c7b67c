"""Values out of other toolkits' files, each with its place. What they mean here is the rules' business.

A foreign file is parsed, never run: a script is read as a syntax tree, and only literals, names of literals and
torch dtypes have a value; everything else is `Computed`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Computed", "Entry", "Foreign", "Unread", "read_script"]


@dataclass(frozen=True)
class Computed:
    """A value that exists only once the script runs; `text` is its source."""

    text: str

    def __str__(self) -> str:
        return self.text if len(self.text) <= 60 else f"{self.text[:57]}..."


@dataclass(frozen=True)
class Entry:
    """One key as the source names it. `section` says what it configures: training, lora, model, data, …, or nothing."""

    key: str
    value: Any
    place: str
    section: str = ""


@dataclass(frozen=True)
class Unread:
    """A part of the source that could not be parsed, and why."""

    place: str
    why: str


@dataclass(frozen=True)
class Foreign:
    """A foreign file: its dialect in words, its keys in order, and for scripts the syntax trees."""

    name: str
    dialect: str
    entries: tuple[Entry, ...]
    trees: tuple[tuple[str, ast.Module], ...] = ()
    """(prefix of places, tree): one for a script, one for each code cell of a notebook."""
    unread: tuple[Unread, ...] = ()

    @property
    def is_unsloths(self) -> bool:
        """Whether the script asks Unsloth for its adapter: `FastLanguageModel.get_peft_model(model, r=16, …)`."""
        calls = (node.func for _, tree in self.trees for node in ast.walk(tree) if isinstance(node, ast.Call))
        owners = (
            ast.unparse(func.value)
            for func in calls
            if isinstance(func, ast.Attribute) and func.attr == "get_peft_model"
        )
        return any(owner.startswith("Fast") for owner in owners)

    def first(self, *keys: str) -> Any:
        """The value of the first entry with one of these keys, or None."""
        return next((entry.value for entry in self.entries if entry.key in keys), None)


_CONFIG_CALLS: Mapping[str, str] = {
    "TrainingArguments": "training",
    "Seq2SeqTrainingArguments": "training",
    "SFTConfig": "training",
    "LoraConfig": "lora",
    "BitsAndBytesConfig": "quantization",
}
_TRAINER_KEYS = ("max_seq_length", "max_length", "packing", "dataset_text_field", "neftune_noise_alpha")
_TOKENIZER_ATTRIBUTES = ("model_max_length", "padding_side", "pad_token", "add_eos_token")
_DTYPES = ("float16", "half", "bfloat16", "float32", "float")
_DICT_KIND = r"_?(?:config|conf|args|arguments|params|kwargs)$"
# what a dict literal configures, by its name
_DICT_NAMES = (
    ("lora", re.compile(rf"(?:lora|peft){_DICT_KIND}")),
    ("quantization", re.compile(rf"(?:bnb|quant\w*){_DICT_KIND}")),
    ("model", re.compile(rf"model{_DICT_KIND}")),
    ("training", re.compile(rf"(?:train\w*|sft){_DICT_KIND}|^args$")),
)


@dataclass
class _Script:
    """Collects entries of one script, or of all cells of a notebook, in the order they stand."""

    names: dict[str, ast.expr] = field(default_factory=dict)
    twice: set[str] = field(default_factory=set)
    entries: list[Entry] = field(default_factory=list)
    dicts: dict[str, list[tuple[str, ast.expr, str]]] = field(default_factory=dict)
    used: set[tuple[str, str]] = field(default_factory=set)

    def learn_names(self, tree: ast.Module) -> None:
        """Which name stands for which expression; a name that is set to different things has no value."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in self.names and ast.dump(self.names[name]) != ast.dump(node.value):
                    self.twice.add(name)
                self.names[name] = node.value

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """The literal value of an expression, or `Computed`."""
        if isinstance(node, ast.Name) and node.id in self.names and node.id not in self.twice and depth < 8:
            return self.value(self.names[node.id], depth + 1)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch" and node.attr in _DTYPES:
            return node.attr
        if isinstance(node, ast.List | ast.Tuple):
            items = [self.value(item, depth) for item in node.elts]
            return Computed(ast.unparse(node)) if any(isinstance(item, Computed) for item in items) else items
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
            pairs = [(keyword.arg, self.value(keyword.value, depth)) for keyword in node.keywords]
            literal = all(key is not None and not isinstance(value, Computed) for key, value in pairs)
            return dict(pairs) if literal else Computed(ast.unparse(node))
        try:
            value = ast.literal_eval(node)
            repr(value)  # a number of thousands of digits has no text in decimals
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return Computed(ast.unparse(node))
        return value

    def add(self, key: str, node: ast.expr, prefix: str, section: str) -> None:
        self.entries.append(Entry(key, self.value(node), f"{prefix}:{node.lineno}", section))

    def add_items(self, items: list[tuple[str, ast.expr, str]], section: str) -> None:
        for key, node, prefix in items:
            self.add(key, node, prefix, section)

    def visit(self, trees: list[tuple[str, ast.Module]]) -> None:
        """Assignments of all cells first: a call may use a dict by its name (`**training_config`)."""
        for prefix, tree in trees:
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign) and len(node.targets) == 1:
                    self.assignment(node.targets[0], node.value, prefix)
        for prefix, tree in trees:
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    self.call(node, prefix)
                elif isinstance(node, ast.Subscript):
                    self.split_of(node, prefix)

    def assignment(self, target: ast.expr, value: ast.expr, prefix: str) -> None:
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
            if "tokenizer" in target.value.id and target.attr in _TOKENIZER_ATTRIBUTES:
                self.add(target.attr, value, prefix, "tokenizer")
        elif isinstance(target, ast.Name) and (items := _dict_items(value, prefix)) is not None:
            self.dicts[target.id] = items
            section = next((s for s, pattern in _DICT_NAMES if pattern.search(target.id.lower())), "")
            if section:
                self.used.add((target.id, section))
                self.add_items(items, section)

    def split_of(self, node: ast.Subscript, prefix: str) -> None:
        """`raw["train_sft"]`, where `raw` is what `load_dataset` gave."""
        source = self.names.get(node.value.id) if isinstance(node.value, ast.Name) else None
        split = node.slice.value if isinstance(node.slice, ast.Constant) else None
        loaded = isinstance(source, ast.Call) and ast.unparse(source.func).endswith("load_dataset")
        if loaded and isinstance(split, str) and re.match(r"train|test|val|eval|dev", split):
            key = "dataset_train_split" if split.startswith("train") else "dataset_test_split"
            self.add(key, node.slice, prefix, "data")

    def call(self, node: ast.Call, prefix: str) -> None:
        owner, _, name = ast.unparse(node.func).rpartition(".")
        positional = node.args[0] if node.args else None
        if name in _CONFIG_CALLS:
            self.keywords(node, prefix, _CONFIG_CALLS[name])
        elif name == "get_peft_model" and node.keywords and positional is not None and len(node.args) == 1:
            self.keywords(node, prefix, "lora", but=("peft_config", "adapter_name"))
        elif name in ("SFTTrainer", "Trainer"):
            self.keywords(node, prefix, "trainer", only=_TRAINER_KEYS)
        elif name == "from_pretrained" and "Model" in owner and "Peft" not in owner:
            if positional is not None:
                self.add("model_name_or_path", positional, prefix, "model")
            self.keywords(node, prefix, "model")
        elif name == "from_pretrained" and "Tokenizer" in owner:
            self.keywords(node, prefix, "tokenizer")
        elif name == "load_dataset":
            if positional is not None:
                self.add("dataset_name", positional, prefix, "data")
            self.keywords(node, prefix, "data", only=("split", "data_files", "revision"))
        elif name == "train_test_split":
            self.keywords(node, prefix, "data", only=("test_size",))
        elif name == "select" and positional is not None and ast.unparse(positional).startswith("range("):
            assert isinstance(positional, ast.Call)
            if len(positional.args) == 1:
                self.add("max_samples", positional.args[0], prefix, "data")

    def keywords(
        self, node: ast.Call, prefix: str, section: str, only: tuple[str, ...] = (), but: tuple[str, ...] = ()
    ) -> None:
        for keyword in node.keywords:
            if keyword.arg is None and isinstance(keyword.value, ast.Name):
                name = keyword.value.id
                if (name, section) not in self.used and name in self.dicts:
                    self.used.add((name, section))
                    self.add_items(self.dicts[name], section)
            elif keyword.arg is not None and (not only or keyword.arg in only) and keyword.arg not in but:
                self.add(keyword.arg, keyword.value, prefix, section)


def _dict_items(node: ast.expr, prefix: str) -> list[tuple[str, ast.expr, str]] | None:
    """(key, expression, prefix) of a dict literal or a `dict(...)` call with text keys, else None."""
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return [(k.value, v, prefix) for k, v in pairs if isinstance(k, ast.Constant) and isinstance(k.value, str)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return [(keyword.arg, keyword.value, prefix) for keyword in node.keywords if keyword.arg is not None]
    return None


def _in_source_order(entries: list[Entry], order: Mapping[str, int]) -> Iterator[Entry]:
    """`ast.walk` goes level by level; readers go line by line. Each key of a section once per value."""
    seen: set[tuple[str, str, str]] = set()

    def line(entry: Entry) -> tuple[int, int]:
        prefix, _, number = entry.place.rpartition(":")
        return order[prefix], int(number)

    for entry in sorted(entries, key=line):
        mark = (entry.section, entry.key, repr(entry.value))
        if mark not in seen:
            seen.add(mark)
            yield entry


def read_script(cells: list[tuple[str, str]]) -> tuple[list[Entry], list[tuple[str, ast.Module]], list[Unread]]:
    """Entries, trees and unreadable parts of a script, or of a notebook's code cells: (prefix of places, text) each.

    A cell that is not Python (a shell cell, prose) is left out and named.
    """
    trees: list[tuple[str, ast.Module]] = []
    unread: list[Unread] = []
    for prefix, text in cells:
        try:
            tree = ast.parse(text)
            # recursion, as in what follows: what nests too deep for it is told here
            (ast.dump(tree), ast.unparse(tree))
            trees.append((prefix, tree))
        except (SyntaxError, ValueError, RecursionError) as error:
            why = "nests too deep" if isinstance(error, RecursionError) else getattr(error, "msg", None) or error
            unread.append(Unread(prefix, f"is not Python: {why}"))
    script = _Script()
    for _, tree in trees:
        script.learn_names(tree)
    script.visit(trees)
    order = {prefix: number for number, (prefix, _) in enumerate(trees)}
    return list(_in_source_order(script.entries, order)), trees, unread
