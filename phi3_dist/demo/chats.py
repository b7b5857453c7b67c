"""A chat data set made from a seed: a spoken café order becomes the till's ticket.

    Two large oat lattes and a small mocha to go, for Ana.   →   2xL LATTE oat; 1xS MOCHA | GO | Ana

About a third of the chats have a second turn that changes the order and gets the whole new ticket; in a quarter a
system message names the till, and the ticket then ends in its number. There is one right answer to each order, so an
exact match can be counted, and no base model knows the notation. The held-out chats have names and combinations of
drinks that no training row has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phi3_dist.errors import Problem, RunFolderError

__all__ = ["HELD_OUT_ROWS", "TRAIN_ROWS", "Chat", "debug_rows", "make_rows", "write_chats", "write_rows"]

TRAIN_ROWS = 900
HELD_OUT_ROWS = 64

Chat = dict[str, list[dict[str, str]]]
"""One row: `{"messages": [{"role": …, "content": …}, …]}`."""

COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
SIZES = {"small": "S", "medium": "M", "large": "L"}
DRINKS = {  # as spoken: (several, on the ticket)
    "latte": ("lattes", "LATTE"),
    "mocha": ("mochas", "MOCHA"),
    "cappuccino": ("cappuccinos", "CAPP"),
    "flat white": ("flat whites", "FLAT"),
    "americano": ("americanos", "AMER"),
    "cortado": ("cortados", "CORT"),
    "espresso": ("espressos", "ESPR"),
    "macchiato": ("macchiatos", "MACC"),
    "hot chocolate": ("hot chocolates", "CHOC"),
    "chai": ("chais", "CHAI"),
    "green tea": ("green teas", "GTEA"),
    "black tea": ("black teas", "BTEA"),
}
MILKS = ("oat", "soy", "almond")
WAYS = ("iced", "decaf")
PLACES = {
    "GO": ("to go", "to take away", "as a takeaway", "to take with us"),
    "STAY": ("for here", "to drink here", "to have in", "to stay"),
}
NAMES = (
    *(
        "Ana",
        "Ben",
        "Carla",
        "David",
        "Emma",
        "Felix",
        "Grace",
        "Hugo",
        "Irene",
        "Jack",
        "Kate",
        "Liam",
        "Maria",
        "Noah",
    ),
    *(
        "Olga",
        "Paul",
        "Rosa",
        "Sam",
        "Tina",
        "Victor",
        "Wendy",
        "Yusuf",
        "Zoe",
        "Adam",
        "Bella",
        "Chris",
        "Diana",
        "Eric",
    ),
    *("Fiona", "George", "Helen", "Ivan", "Julia", "Kevin", "Laura", "Mark", "Nina", "Oscar", "Petra", "Ralph", "Sara"),
    *("Tom", "Uma", "Vera", "Will", "Alice", "Boris", "Clara"),
)
HELD_OUT_NAMES = ("Anton", "Daisy", "Edgar", "Greta", "Henry", "Iris", "Karl", "Lucy", "Martin", "Nora", "Otto", "Rita")
OPENERS = ("", "", "Can I get ", "I'd like ", "Could we have ", "I'll take ", "Please make ", "Hi, ")
NAME_PHRASES = ("for {}", "the name is {}", "under {}", "it's for {}")
TILLS = ("You are till number {}.", "Write the tickets of till {}.", "This is till {}.")


@dataclass(frozen=True)
class Line:
    """One line of an order."""

    count: int
    size: str
    drink: str
    milk: str = ""
    way: str = ""

    def ticket(self) -> str:
        words = (f"{self.count}x{SIZES[self.size]}", DRINKS[self.drink][1], self.milk, self.way)
        return " ".join(word for word in words if word)

    def spoken(self, rng: random.Random) -> str:
        drink = self.drink if self.count == 1 else DRINKS[self.drink][0]
        milk_last = bool(self.milk) and rng.random() < 0.4
        count = "a" if self.count == 1 and rng.random() < 0.5 else COUNTS[self.count]
        milk = ("", f"with {self.milk} milk") if milk_last else (self.milk, "")
        return " ".join(word for word in (count, self.size, self.way, milk[0], drink, milk[1]) if word)


@dataclass(frozen=True)
class Order:
    """An order as the till knows it. `till` is 0 where no system message names one."""

    lines: tuple[Line, ...]
    place: str
    name: str
    till: int = 0

    def ticket(self) -> str:
        fields = ["; ".join(line.ticket() for line in self.lines), self.place, self.name]
        return " | ".join([*fields, f"#{self.till}"] if self.till else fields)

    def spoken(self, rng: random.Random) -> str:
        lines = [line.spoken(rng) for line in self.lines]
        drinks = ", ".join(lines[:-1]) + (" and " if lines[1:] else "") + lines[-1]
        place, opener = rng.choice(PLACES[self.place]), rng.choice(OPENERS)
        name = rng.choice(NAME_PHRASES).format(self.name)
        text = rng.choice(
            (
                f"{opener}{drinks} {place}, {name}.",
                f"{opener}{drinks}, {name}, {place}.",
                f"This is {self.name}: {drinks} {place}, please.",
                f"{place}, {name}: {drinks}.",
            )
        )
        return text[0].upper() + text[1:]


def _line(rng: random.Random, taken: Sequence[str] = ()) -> Line:
    return Line(
        count=rng.choice((1, 1, 2, 3, 4)),
        size=rng.choice(tuple(SIZES)),
        drink=rng.choice([drink for drink in DRINKS if drink not in taken]),
        milk=rng.choice((*MILKS, "", "")),
        way=rng.choice((*WAYS, "", "", "")),
    )


def _order(rng: random.Random, names: Sequence[str]) -> Order:
    lines: list[Line] = []
    for _ in range(rng.choice((1, 2, 2))):
        lines.append(_line(rng, [line.drink for line in lines]))
    till = rng.randint(1, 9) if rng.random() < 0.25 else 0
    return Order(tuple(lines), rng.choice(tuple(PLACES)), rng.choice(names), till)


def _change(rng: random.Random, order: Order, names: Sequence[str]) -> tuple[str, Order]:
    """What the guest says next, and the order after it."""
    at = rng.randrange(len(order.lines))
    line = order.lines[at]
    drink = line.drink if line.count == 1 else DRINKS[line.drink][0]
    several = len(order.lines) > 1
    kind = rng.choice(("place", "name", "size", "drop" if several else "add"))
    if kind == "place":
        place = "STAY" if order.place == "GO" else "GO"
        utterance = rng.choice(("Make it {}.", "Sorry, {}.", "Actually {}, please.")).format(rng.choice(PLACES[place]))
        return utterance, replace(order, place=place)
    if kind == "name":
        name = rng.choice([name for name in names if name != order.name])
        utterance = rng.choice(("Put it under {}.", "The name is {} now.", "Make it for {} instead.")).format(name)
        return utterance, replace(order, name=name)
    if kind == "size":
        size = rng.choice([size for size in SIZES if size != line.size])
        utterance = rng.choice(("Make the {} {}.", "The {} should be {}.")).format(drink, size)
        return utterance, replace(order, lines=(*order.lines[:at], replace(line, size=size), *order.lines[at + 1 :]))
    if kind == "drop":
        utterance = rng.choice(("Leave out the {}.", "No {} after all.", "Without the {}, please.")).format(drink)
        return utterance, replace(order, lines=(*order.lines[:at], *order.lines[at + 1 :]))
    new = _line(rng, [line.drink])
    utterance = rng.choice(("Add {}.", "And {}, please.", "We also want {}.")).format(new.spoken(rng))
    return utterance, replace(order, lines=(*order.lines, new))


def _chat(rng: random.Random, names: Sequence[str]) -> Chat:
    order = _order(rng, names)
    messages = []
    if order.till:
        messages.append({"role": "system", "content": rng.choice(TILLS).format(order.till)})
    messages.append({"role": "user", "content": order.spoken(rng)})
    messages.append({"role": "assistant", "content": order.ticket()})
    if rng.random() < 0.35:
        said, order = _change(rng, order, names)
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": order.ticket()})
    return {"messages": messages}


def _drinks(chat: Chat) -> set[str]:
    """The first field of each ticket in the chat."""
    return {message["content"].split(" | ")[0] for message in chat["messages"] if message["role"] == "assistant"}


def make_rows(count: int, seed: str, names: Sequence[str] = NAMES, unlike: Sequence[Chat] = ()) -> list[Chat]:
    """`count` chats with different prompts, none with the same drinks on a ticket as a chat in `unlike`.

    The same arguments give the same rows on every machine (`random.Random` is stable across versions for a string).
    """
    rng = random.Random(seed)
    taken = {drinks for chat in unlike for drinks in _drinks(chat)}
    rows: dict[str, Chat] = {}
    while len(rows) < count:
        chat = _chat(rng, names)
        if taken.isdisjoint(_drinks(chat)):
            rows.setdefault(json.dumps(chat["messages"][:-1]), chat)
    return list(rows.values())


def write_rows(path: Path, rows: Sequence[Chat]) -> Path:
    """Write one JSON object a line, the same bytes on every platform."""
    path.write_text(_lines(rows), encoding="utf-8", newline="\n")
    return path


def _lines(rows: Sequence[Chat]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_chats(folder: Path, seed: int = 0, *, keep_others: bool = False) -> dict[str, Path]:
    """Write `train.jsonl` and `validation.jsonl` into `folder`; returns their paths under `train`, `validation`.

    The two share no prompt, no name and no drinks of a ticket. The same seed gives the same bytes. With
    `keep_others`, raises RunFolderError where a file of either name holds anything else.
    """
    train = make_rows(TRAIN_ROWS, f"train {seed}")
    rows = {"train": train, "validation": make_rows(HELD_OUT_ROWS, f"validation {seed}", HELD_OUT_NAMES, unlike=train)}
    paths = {name: folder / f"{name}.jsonl" for name in rows}
    others = [path for name, path in paths.items() if keep_others and _is_another(path, rows[name])]
    if others:
        what, fix = (
            "is there already and holds other rows: nothing is replaced",
            "another --folder, or move it elsewhere",
        )
        raise RunFolderError(*(Problem(str(path), what, fix) for path in others))
    folder.mkdir(parents=True, exist_ok=True)
    return {name: write_rows(paths[name], rows[name]) for name in rows}


def _is_another(path: Path, rows: Sequence[Chat]) -> bool:
    """Whether something stands at `path` that is not the file of these rows, nor what a kill has left of it."""
    try:
        return not _lines(rows).encode().startswith(path.read_bytes())
    except FileNotFoundError:
        return False
    except OSError:  # a folder, or what may not be read
        return True


def debug_rows() -> list[Chat]:
    """The rows shipped as `configs/run/debug_chats.jsonl`."""
    return make_rows(60, "debug")
