"""The demo's chats: the same on every machine, no row leaks, each ticket says what was ordered."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path

import pytest

from phi3_dist.adapters.front_matter import evaluation_of
from phi3_dist.config.load import load_run
from phi3_dist.config.schema import DataConfig
from phi3_dist.data.blocks import read_chats
from phi3_dist.data.read import row_formats
from phi3_dist.data.read.turns import Message
from phi3_dist.demo.__main__ import PROCESSES, _check, _page, _refuse_others
from phi3_dist.demo.chats import (
    DRINKS,
    HELD_OUT_NAMES,
    HELD_OUT_ROWS,
    NAMES,
    PLACES,
    TRAIN_ROWS,
    Chat,
    debug_rows,
    make_rows,
    write_chats,
    write_rows,
)
from phi3_dist.demo.score import Score
from phi3_dist.errors import RunFolderError, TrainingError
from phi3_dist.evaluation.evaluate import check_folder

REPO = Path(__file__).resolve().parents[2]


def _rows(path: Path) -> list[Chat]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _prompts(rows: list[Chat]) -> set[str]:
    return {
        json.dumps(row["messages"][:i])
        for row in rows
        for i, message in enumerate(row["messages"])
        if message["role"] == "assistant"
    }


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again, other = (write_chats(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for part in ("train", "validation"):
        assert first[part].read_bytes() == again[part].read_bytes()
        assert first[part].read_bytes() != other[part].read_bytes()


def test_the_shipped_debug_rows_are_the_generators(tmp_path: Path) -> None:
    made = write_rows(tmp_path / "debug.jsonl", debug_rows())
    assert made.read_bytes() == (REPO / "configs/run/debug_chats.jsonl").read_bytes()


def test_every_row_is_read_and_the_mix_is_as_promised(tmp_path: Path) -> None:
    paths = write_chats(tmp_path)
    chats = read_chats(DataConfig(train=str(paths["train"]), validation=str(paths["validation"])))
    assert (len(chats.train), len(chats.held_out)) == (TRAIN_ROWS, HELD_OUT_ROWS)
    assert len(chats.train) >= 600
    assert len(chats.held_out) >= 60
    for part in (chats.train, chats.held_out):
        several = sum(sum(m.role == "user" for m in chat.messages) > 1 for chat in part) / len(part)
        with_system = sum(chat.messages[0].role == "system" for chat in part) / len(part)
        assert 0.2 < several < 0.5
        assert 0.12 < with_system < 0.4


def test_held_out_chats_share_no_prompt_name_or_drinks_with_training(tmp_path: Path) -> None:
    paths = write_chats(tmp_path)
    train, held_out = _rows(paths["train"]), _rows(paths["validation"])
    assert len({json.dumps(row["messages"][:-1]) for row in train}) == TRAIN_ROWS
    assert len({json.dumps(row["messages"][:-1]) for row in held_out}) == HELD_OUT_ROWS
    assert _prompts(train).isdisjoint(_prompts(held_out))
    assert set(NAMES).isdisjoint(HELD_OUT_NAMES)

    def drinks(rows: list[Chat]) -> set[str]:
        return {m["content"].split(" | ")[0] for row in rows for m in row["messages"] if m["role"] == "assistant"}

    assert drinks(train).isdisjoint(drinks(held_out))


def test_each_first_ticket_says_what_the_guest_said() -> None:
    """An independent reading of the order: every field of the ticket has its words in the guest's sentence."""
    for row in make_rows(200, "reading"):
        messages = [m for m in row["messages"] if m["role"] != "system"]
        said, ticket = messages[0]["content"].lower(), messages[1]["content"]
        drinks, place, name, *till = ticket.split(" | ")
        assert name.lower() in said
        assert [any(words in said for words in PLACES[p]) for p in ("GO", "STAY")] == [place == "GO", place == "STAY"]
        assert bool(till) == (row["messages"][0]["role"] == "system")
        if till:
            assert till[0].removeprefix("#") in row["messages"][0]["content"]
        lines = drinks.split("; ")
        for line in lines:
            code = line.split(" ")[1]
            assert any(drink in said for drink, (_, known) in DRINKS.items() if known == code)
            for word in line.split(" ")[2:]:
                assert word in said
        counted = sum(f"{word} " in f"{said} " for word in ("oat", "soy", "almond", "iced", "decaf"))
        assert counted <= sum(len(line.split(" ")) - 2 for line in lines)


def test_a_second_turn_gives_the_whole_new_ticket() -> None:
    for row in make_rows(200, "turns"):
        tickets = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        if len(tickets) == 2:
            assert tickets[0] != tickets[1]
            assert tickets[1].count(" | ") == tickets[0].count(" | ")


def test_the_demo_and_debug_run_files_are_valid() -> None:
    demo, debug = (load_run(REPO / f"configs/run/{name}.yaml", ()) for name in ("demo", "debug"))
    assert demo.model.precision == "fp32"
    assert demo.train.global_batch % (PROCESSES * demo.train.micro_batch) == 0
    assert debug.model.source == "tiny-random"
    assert (REPO / str(debug.data.train)).is_file()


def test_the_demo_is_a_check(tmp_path: Path) -> None:
    curves = tmp_path / "curves.png"
    before, good = Score(100.0, 0.02, ()), Score(50.0, 0.52, ())
    with pytest.raises(TrainingError) as caught:
        _check(before, replace(good, perplexity=50.1, exact_match=0.51), 51.0, curves)
    assert [problem.where for problem in caught.value.problems] == ["adapter", "perplexity", "exact match", str(curves)]
    curves.touch()
    _check(before, good, 50.0, curves)
    with pytest.raises(TrainingError, match="halve"):
        _check(before, replace(good, perplexity=float("nan")), 50.0, curves)


def test_the_demo_replaces_no_rows_and_no_run_but_its_own(tmp_path: Path) -> None:
    paths = write_chats(tmp_path, keep_others=True)
    wanted = paths["train"].read_bytes()
    write_chats(tmp_path, keep_others=True)  # its own
    paths["train"].write_bytes(wanted[:1000])  # what a kill has left
    write_chats(tmp_path, keep_others=True)
    assert paths["train"].read_bytes() == wanted
    paths["train"].write_text("mine\n")
    paths["validation"].unlink()
    with pytest.raises(RunFolderError, match=r"train\.jsonl: is there already and holds other rows(.|\n)*--folder"):
        write_chats(tmp_path, keep_others=True)
    assert paths["train"].read_text() == "mine\n"
    assert not paths["validation"].exists()

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: demo\n")
    _refuse_others(tmp_path)
    (run / "config.yaml").write_text("name: thesis\n")
    with pytest.raises(RunFolderError, match="holds the run 'thesis', and not the demo's"):
        _refuse_others(tmp_path)


def test_the_demo_ends_with_a_page_of_its_answers(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    chats = [
        row_formats.Chat((Message("user", f"{n} lattes"), Message("assistant", f"{n}x LATTE")), f"row {n}")
        for n in (2, 3)
    ]
    before = Score(100.0, 0.0, ("Sure!", "<b>Hm</b>"))
    after = Score(1.5, 0.5, ("2x LATTE", "4x LATTE"))
    page = _page(tmp_path, chats, before, after)
    text = html.unescape(page.read_text(encoding="utf-8"))
    assert page.name == "report.html"
    for wanted in ("user: 3 lattes", "<b>Hm</b>", "4x LATTE", "3x LATTE", "Sure!", "50%", "0% before"):
        assert wanted in text
    assert text.index("3 lattes") < text.index("2 lattes"), "what went wrong stands first"
    check_folder(tmp_path)  # phi3-dist eval of the demo's run may replace what the demo has written
    _, measures = evaluation_of(json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")))
    assert measures == {"perplexity": 1.5, "exact_match": 0.5}, "the adapter's, for its card"
