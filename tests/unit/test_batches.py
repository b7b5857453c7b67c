"""Rows, packs, the order of packs and the batch of a step: pure functions, each with its invariant."""

from __future__ import annotations

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from phi3_dist.config.schema import DataConfig
from phi3_dist.data import blocks as stream
from phi3_dist.data.batch import assemble
from phi3_dist.data.cache import block_files as parts
from phi3_dist.data.pack.packs import Packs, make_packs
from phi3_dist.data.pack_order import Order
from phi3_dist.data.prepare import prepare
from phi3_dist.data.read.row_formats import Chat
from phi3_dist.data.read.turns import Message
from phi3_dist.data.render.encode import Encoded, encode_chats
from phi3_dist.data.show import length_table, render_rows, show
from phi3_dist.data.token_rows import TokenRows
from phi3_dist.errors import DataError
from phi3_dist.modeling.tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def token_rows() -> TokenRows:
    """Three rows of 3, 4 and 2 tokens; the second begins supervised."""
    rows = [
        Encoded([10, 11, 12], [False, True, True]),
        Encoded([20, 21, 22, 23], [True, False, True, False]),
        Encoded([30, 31], [False, True]),
    ]
    return TokenRows.of(rows, ["a:1", "a:2", "b:1"])


def write(path: Path, n: int = 40) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a" * i + "."}]}
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def config(path: Path, **more: Any) -> DataConfig:
    return DataConfig.model_validate({"train": str(path), "pack_length": 128, "validation_share": 0.2, **more})


def test_rows_saved_and_loaded(tmp_path: Path) -> None:
    rows = token_rows()
    file = tmp_path / "rows"
    rows.save(file)
    again = TokenRows.load(file)
    assert again.places == ("a:1", "a:2", "b:1")
    assert again.lengths.tolist() == [3, 4, 2]
    for name, dtype in (("ids", np.int32), ("supervised", np.bool_), ("offsets", np.int64)):
        assert getattr(again, name).dtype == dtype
        assert np.array_equal(getattr(again, name), getattr(rows, name))
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]
    assert again.fingerprint == rows.fingerprint
    moved = TokenRows(rows.ids, rows.supervised, rows.offsets, ("x", "y", "z"))
    assert moved.fingerprint == rows.fingerprint
    other = TokenRows(rows.ids, ~rows.supervised, rows.offsets, rows.places)
    assert other.fingerprint != rows.fingerprint


def test_rows_joined_and_selected() -> None:
    rows = token_rows()
    twice = TokenRows.join([rows, rows])
    assert twice.select(np.array([3, 4, 5])).fingerprint == rows.fingerprint
    assert twice.select(np.array([2, 1])).ids.tolist() == [30, 31, 20, 21, 22, 23]
    assert len(TokenRows.join([])) == 0


@pytest.mark.parametrize("name", ["facts.json", "ids.bin", "supervised.bin", "offsets.bin", "which.bin", "numbers.bin"])
def test_torn_file_of_rows_is_refused(tmp_path: Path, name: str) -> None:
    token_rows().save(tmp_path / "rows")
    file = tmp_path / "rows" / name
    whole = file.read_bytes()
    for cut in (0, len(whole) // 2, len(whole) - 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"not a whole folder|can't be read|checksum"):
            TokenRows.load(tmp_path / "rows")
    file.unlink()
    with pytest.raises(DataError, match="No such file"):
        TokenRows.load(tmp_path / "rows")


def test_one_changed_byte_is_found(tmp_path: Path) -> None:
    token_rows().save(tmp_path / "rows")
    file = tmp_path / "rows" / "ids.bin"
    raw = bytearray(file.read_bytes())
    at = raw.index(np.array([10, 11, 12], np.int32).tobytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match="checksum"):
        TokenRows.load(tmp_path / "rows")


def test_targets_leave_out_the_first_token_of_a_document() -> None:
    packs, dropped = make_packs(token_rows(), 7, "error")
    assert packs.packs == ((0, 1), (2,))
    assert packs.targets.tolist() == [2 + 1, 1]
    assert dropped == []


def test_assembled_batch() -> None:
    packs, _ = make_packs(token_rows(), 7, "error")
    batch = assemble(packs, [1, 0])
    assert batch.ids_T.tolist() == [30, 31, 10, 11, 12, 20, 21, 22, 23]
    assert batch.positions_T.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 9]
    assert batch.max_length == 4
    assert batch.predict_S.tolist() == [0, 2, 3, 6]
    assert batch.target_S.tolist() == [31, 11, 12, 22]
    assert batch.places == ("b:1", "a:1", "a:2")
    assert [a.dtype for a in (batch.ids_T, batch.positions_T, batch.cu_seqlens)] == [np.int64, np.int64, np.int32]
    assert len(batch.predict_S) == packs.targets.sum()
    assert packs.rows.supervised.tolist() == token_rows().supervised.tolist()  # assembling changes nothing
    with pytest.raises(ValueError, match="at least one pack"):
        assemble(packs, [])


def test_long_rows() -> None:
    with pytest.raises(DataError) as caught:
        make_packs(token_rows(), 2, "error")
    text = str(caught.value)
    assert "a:1: 3 tokens" in text
    assert "a:2: 4 tokens" in text
    assert "2 of 3 rows" in text
    assert "data.pack_length: 4 holds them all" in text
    packs, dropped = make_packs(token_rows(), 2, "drop")
    assert dropped == ["a:1", "a:2"]
    assert packs.rows.places == ("b:1",)
    assert assemble(packs, [0]).ids_T.tolist() == [30, 31]
    with pytest.raises(DataError, match="no row is left"):
        make_packs(token_rows(), 1, "drop")


def test_long_rows_cut_after_an_answer_that_fits() -> None:
    # answers end (exclusive) at 3 and 6; the last run of the row ends with it
    long = Encoded([1, 2, 3, 4, 5, 6, 7, 8, 9], [False, True, True, False, False, True, False, True, True])
    none = Encoded([1, 2, 3, 4, 5, 6, 7, 8, 9], [False] * 7 + [True] * 2)
    rows = TokenRows.of([long, Encoded([10, 11], [False, True]), none], ["a:1", "a:2", "a:3"])
    for length, ids in ((3, [1, 2, 3]), (5, [1, 2, 3]), (6, [1, 2, 3, 4, 5, 6]), (8, [1, 2, 3, 4, 5, 6])):
        after, which = rows.cut(length)
        assert which == [0]
        assert after.ids[: after.offsets[1]].tolist() == ids
        assert after.supervised[: len(ids)].tolist() == long.supervised[: len(ids)]
        assert after.select(np.array([1, 2])).fingerprint == rows.select(np.array([1, 2])).fingerprint
        assert after.places == rows.places
    assert rows.cut(9) == (rows, [])
    assert rows.cut(2) == (rows, [])
    packs, dropped = make_packs(rows.cut(6)[0], 6, "cut_turn")
    assert (packs.rows.places, dropped) == (("a:1", "a:2"), ["a:3"])


def test_prepare_counts_and_names_what_it_cut(tmp_path: Path) -> None:
    turns = [(r, f"{r[0]}{i}") for i in range(4) for r in ("user", "assistant")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    one = {"messages": [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "a"}]}
    file = tmp_path / "a.jsonl"
    file.write_text(f"{json.dumps(chat)}\n{json.dumps(one)}\n")
    cfg = config(file, pack_length=20, on_long_row="cut_turn", validation_share=0)
    for _ in range(2):
        prepared = prepare(cfg, TOKENIZER, tmp_path / "cache")
        assert (prepared.cut, prepared.dropped) == (("a.jsonl:1",), ("a.jsonl:2",))
        assert prepared.notices == (
            "1 rows longer than data.pack_length end after the last answer that fits: a.jsonl:1: 33 to 16 tokens",
        )
    text = TOKENIZER.decode(prepared.train.rows.ids.tolist(), skip_special_tokens=False)
    assert text == "<|user|>u0<|end|><|assistant|>a0<|end|><|user|>u1<|end|><|assistant|>a1<|end|>"
    whole = prepare(config(file, pack_length=64, on_long_row="cut_turn", validation_share=0), TOKENIZER, None)
    assert (whole.cut, whole.dropped, whole.notices) == ((), (), ())


def test_fingerprint_of_packs_holds_rows_and_layout() -> None:
    first, same = (make_packs(token_rows(), 7, "error")[0].fingerprint for _ in range(2))
    assert first == same
    assert first != make_packs(token_rows(), 9, "error")[0].fingerprint


@settings(deadline=None)
@given(
    n=st.integers(1, 30),
    slots=st.integers(1, 3),
    world=st.integers(1, 4),
    micro=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_every_epoch_holds_each_pack_once_for_any_number_of_ranks(
    n: int, slots: int, world: int, micro: int, seed: int
) -> None:
    order = Order(n, slots * world * micro, seed, shuffle=True)
    steps = order.steps(3)
    assert (steps - 1) * order.global_batch < 3 * n <= steps * order.global_batch
    stream: list[int] = []
    for step in range(steps):
        ranks = [order.slots(step, rank, world, micro) for rank in range(world)]
        assert all(len(mine) == slots and all(len(slot) == micro for slot in mine) for mine in ranks)
        joined = [pack for slot in range(slots) for mine in ranks for pack in mine[slot]]
        assert joined == order.packs_of_step(step).tolist()
        stream += joined
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_order_is_fixed_for_ever() -> None:
    # golden: a resumed run must see what the interrupted one would have seen, whatever numpy is installed
    assert Order(10, 4, seed=7, shuffle=True).packs_of_step(2).tolist() == [0, 3, 1, 4]
    assert Order(10, 4, seed=7, shuffle=True).packs_of_step(10**9).tolist() == [9, 7, 6, 3]
    assert Order(10, 4, seed=7, shuffle=False).packs_of_step(2).tolist() == [8, 9, 0, 1]
    orders = {tuple(Order(10, 10, seed, shuffle=True).packs_of_step(step)) for seed in range(3) for step in range(3)}
    assert len(orders) == 9


def test_one_process_with_four_slots_sees_what_two_with_two_see() -> None:
    order = Order(13, 4, seed=0, shuffle=True)
    for step in range(7):
        alone = order.slots(step, 0, 1, 1)
        pair = [order.slots(step, rank, 2, 1) for rank in range(2)]
        assert alone == [pair[0][0], pair[1][0], pair[0][1], pair[1][1]]


def test_steps_of_a_part_of_an_epoch() -> None:
    assert Order(10, 1, 0, True).steps(1.1) == 11
    assert Order(10, 4, 0, True).steps(1) == 3
    assert Order(10, 4, 0, True).steps(0.01) == 1
    assert Order(10, 4, 0, True).steps(1e-05) == 1


def test_orders_that_do_not_exist() -> None:
    order = Order(10, 6, 0, True)
    with pytest.raises(ValueError, match="not a multiple of 4 ranks"):
        order.slots(0, 0, 4, 1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        order.slots(0, 2, 2, 1)
    with pytest.raises(ValueError, match="count from 0"):
        order.packs_of_step(-1)
    with pytest.raises(ValueError, match="not an order"):
        Order(0, 4, 0, True)


def test_prepare_reads_encodes_packs(tmp_path: Path) -> None:
    prepared = prepare(config(write(tmp_path / "a.jsonl")), TOKENIZER, None)
    assert prepared.held_out is not None
    assert len(prepared.train.rows) + len(prepared.held_out.rows) == 40
    assert not set(prepared.train.rows.places) & set(prepared.held_out.rows.places)
    assert prepared.fingerprint == prepared.train.fingerprint
    assert (prepared.skipped, prepared.dropped, prepared.notices, prepared.cached) == ((), (), (), False)
    batch = assemble(prepared.train, range(len(prepared.train)))
    assert len(batch.target_S) == prepared.train.targets.sum() > 0
    assert max(batch.cu_seqlens) == len(prepared.train.rows.ids)


def test_prepare_says_what_it_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl")
    control = {"messages": [{"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "a"}]}
    file.write_text(f"oops\n{json.dumps(control)}\n{file.read_text()}", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        prepare(config(file), TOKENIZER, None)
    prepared = prepare(
        config(file, on_bad_row="skip", pack_length=30, on_long_row="drop", validation_share=1e-9), TOKENIZER, None
    )
    assert [row.place for row in prepared.skipped] == ["a.jsonl:1", "a.jsonl:2"]
    assert "a.jsonl:42" in prepared.dropped
    assert prepared.held_out is None
    assert "no row is held out" in prepared.notices[0]
    only = tmp_path / "only.jsonl"
    only.write_text(json.dumps(control))
    with pytest.raises(DataError, match="supervises nothing"):
        prepare(config(only, on_bad_row="skip", validation_share=0), TOKENIZER, None)


def same(first: Packs, second: Packs) -> bool:
    return first.fingerprint == second.fingerprint and first.rows.places == second.rows.places


def test_cache_is_used_and_knows_what_matters(tmp_path: Path) -> None:
    file, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    file.write_text("oops\n" + file.read_text())
    first = prepare(config(file, on_bad_row="skip"), TOKENIZER, cache)
    again = prepare(config(file, on_bad_row="skip"), TOKENIZER, cache)
    assert (first.cached, again.cached) == (False, True)
    assert same(first.train, again.train)
    assert first.held_out is not None
    assert again.held_out is not None
    assert same(first.held_out, again.held_out)
    assert (again.skipped, again.notices) == (first.skipped, first.notices)
    assert prepare(config(file, on_bad_row="skip", pack_length=256), TOKENIZER, cache).cached  # packed anew
    assert not prepare(config(file, on_bad_row="skip", supervise="last"), TOKENIZER, cache).cached
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("|>\\n'", "|>'")
    assert not prepare(config(file, on_bad_row="skip"), other, cache).cached
    file.write_text(file.read_text() + "\n")
    assert not prepare(config(file, on_bad_row="skip"), TOKENIZER, cache).cached


@pytest.mark.parametrize("name", ["train/ids.bin", "validation/facts.json", "facts.json"])
def test_broken_cache_is_made_anew(tmp_path: Path, name: str) -> None:
    file, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    first = prepare(config(file), TOKENIZER, cache)
    (entry,) = [p for p in cache.iterdir() if p.is_dir()]
    (entry / name).write_bytes((entry / name).read_bytes()[:10])
    second = prepare(config(file), TOKENIZER, cache)
    assert not second.cached
    assert "cache was broken" in second.notices[-1]
    assert same(first.train, second.train)
    third = prepare(config(file), TOKENIZER, cache)
    assert third.cached
    assert third.notices == ()


def test_of_several_callers_one_does_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    reads: list[str] = []
    plain = parts.blocks_of
    monkeypatch.setattr(parts, "blocks_of", lambda cfg: (reads.append("x"), plain(cfg))[1])
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: prepare(config(file), tiny_tokenizer(), cache), range(3)))
    assert len(reads) == 1
    assert sorted(p.cached for p in found) == [False, True, True]
    assert len({p.fingerprint for p in found}) == 1


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cache can't be written: has a file where a folder is needed"):
        prepare(config(write(tmp_path / "a.jsonl")), TOKENIZER, tmp_path / "file")


def test_hub_set_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = write(tmp_path / "a.jsonl").read_text().splitlines()
    hub = {"main": datasets.Dataset.from_list([json.loads(line) for line in lines])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split, revision: hub["main"])
    cfg = DataConfig(train="owner/name", pack_length=128)
    assert [prepare(cfg, TOKENIZER, tmp_path / "cache").cached for _ in range(2)] == [False, True]
    hub["main"] = hub["main"].select(range(30))
    assert not prepare(cfg, TOKENIZER, tmp_path / "cache").cached


def render(what: Any, colour: bool) -> str:
    out = io.StringIO()
    Console(file=out, force_terminal=colour, color_system="standard" if colour else None, width=200).print(what)
    return out.getvalue()


def test_rows_shown_with_their_supervised_tokens() -> None:
    chats = [Chat((Message("user", "[b]Q[/b]"), Message("assistant", "Grüße 🙂")), "a.jsonl:1")] * 3
    rows = TokenRows.of(encode_chats(TOKENIZER, chats, "all"), [chat.place for chat in chats])
    shown = render_rows(TOKENIZER, rows.select(np.arange(2)), 3)
    plain = render(shown, colour=False)
    assert plain.count("<|user|>[b]Q[/b]<|end|><|assistant|>⟦Grüße 🙂<|end|><|endoftext|>⟧") == 2
    assert "a.jsonl:1: 25 tokens, 14 supervised" in plain
    coloured = render(shown, colour=True)
    assert "\x1b[1;32mGrüße 🙂<|end|><|endoftext|>" in coloured
    assert "⟦G" not in coloured


def test_length_table() -> None:
    rows = token_rows()
    learned = [int(rows.supervised[start:end].sum()) for start, end in pairwise(rows.offsets)]
    text = render(length_table(rows.lengths, np.array(learned), 7), colour=False)
    cells = {a.strip(): b.strip() for _, a, b, _ in (line.split("│") for line in text.splitlines() if "│" in line)}
    assert cells["rows"] == "3"
    assert cells["tokens a row, mean"] == "3.0"
    assert cells["tokens a row, max"] == "4"
    assert cells["supervised"] == "55.6 %"
    assert cells["packs"] == "2"
    assert cells["pack fill"] == "64.3 %"


def test_show(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl")
    file.write_text("oops\n" + file.read_text())
    text = render(show(config(file, on_bad_row="skip", pack_length=40), TOKENIZER, 1), colour=False)
    assert "a.jsonl:2" in text
    assert "held out:" in text
    assert "skipped: a.jsonl:1: not JSON" in text
    assert "longer than a pack" in text
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        show(config(file), TOKENIZER, 1)
    last = tmp_path / "last.jsonl"
    last.write_text(file.read_text().splitlines()[-1])
    with pytest.raises(DataError, match="no row is left"):
        show(config(last, pack_length=16, validation_share=0), TOKENIZER, 1)


def long_rows(path: Path) -> Path:
    """One that fits in 60 tokens, one of which the first answer does, and one that has no such answer."""
    short, long = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "a" * 80}
    asked = {"role": "user", "content": "q"}
    every = [[asked, short], [asked, short, asked, long], [asked, long]]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in every))
    return path


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("error", "a run stops at them (data.on_long_row: error; drop: all are dropped; cut_turn: 1 are cut after an"),
        ("drop", "all are dropped (data.on_long_row: drop; error: a run stops at them; cut_turn: 1 are cut after an"),
        ("cut_turn", "1 are cut after an answer, 1 dropped (data.on_long_row: cut_turn; error: a run stops at them;"),
    ],
)
def test_show_says_what_would_become_of_long_rows(tmp_path: Path, choice: Any, said: str) -> None:
    cfg = config(long_rows(tmp_path / "a.jsonl"), pack_length=60, validation_share=0, on_long_row=choice)
    text = " ".join(render(show(cfg, TOKENIZER, 3), colour=False).split())
    assert f"2 rows, such as a.jsonl:2; {said}" in text
    assert "data.pack_length: 92 holds all" in text


def test_show_of_rows_that_are_all_cut(tmp_path: Path) -> None:
    file = long_rows(tmp_path / "a.jsonl")
    file.write_text(file.read_text().splitlines()[1])
    cfg = config(file, pack_length=60, validation_share=0, on_long_row="cut_turn")
    assert "1 are cut after an answer, 0 dropped" in render(show(cfg, TOKENIZER, 3), colour=False)
    assert len(prepare(cfg, TOKENIZER, None).train.rows) == 1
    with pytest.raises(DataError, match="no row is left"):
        show(config(file, pack_length=60, validation_share=0, on_long_row="drop"), TOKENIZER, 3)


def test_show_obeys_no_escape_of_a_row(tmp_path: Path) -> None:
    file = tmp_path / "a\x1b[2Jb.jsonl"
    evil = "\x1b]0;title\x07\x9b31m\u202etxt\rend\ttab\nline"
    row = {"prompt": evil, "completion": evil, f"k{evil}": 1}
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "completion": ""}))
    cfg = config(file, on_bad_row="skip", pack_length=512, validation_share=0)
    text = render(show(cfg, TOKENIZER, 3), colour=False)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert "\\x1b]0;title\\x07\\x9b31m\\u202etxt\\rend" in text
    assert "a\\x1b[2Jb.jsonl:1" in text
    with pytest.raises(DataError) as caught:
        prepare(config(file, pack_length=512), TOKENIZER, None)
    assert "\x1b" not in str(caught.value)


NONE_HELD = [
    (
        20,
        0.0001,
        r"of 20 rows none has a prompt whose hash is below data.validation_share: 0.0001; (0\.\d+) holds some",
    ),
    (1, 0.05, "all rows have the same prompt, and equal prompts stay together; name rows in data.validation, or set"),
]


@pytest.mark.parametrize(("prompts", "share", "why"), NONE_HELD)
def test_a_share_that_holds_out_nothing_says_why(tmp_path: Path, prompts: int, share: float, why: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"q{i % prompts}", "completion": "a"}) for i in range(20)))
    notice = prepare(config(file, pack_length=64, validation_share=share), TOKENIZER, None).notices[-1]
    assert notice.startswith("no row is held out, so there will be no held-out loss: ")
    match = re.search(why, notice)
    assert match
    if prompts > 1:  # what it says holds some out, and leaves some
        assert prepare(config(file, pack_length=64, validation_share=float(match[1])), TOKENIZER, None).held_out


def test_rows_without_answers_are_one_line(tmp_path: Path) -> None:
    for name, row in (("chats", {"messages": [{"role": "user", "content": "q"}]}), ("prompts", {"prompt": "q"})):
        (tmp_path / name).write_text("")
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join([json.dumps(row)] * 50))
        with pytest.raises(DataError) as caught:
            prepare(config(file), TOKENIZER, None)
        first, last = caught.value.problems
        assert first.where == f"{name}.jsonl:1, {name}.jsonl:2, {name}.jsonl:3 and 47 more"
        assert first.what in ("no assistant turn", "no completion beside prompt; its keys are prompt")
        assert last.what == "50 bad rows"


def test_show_reads_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"q{i}", "completion": "a" * (i % 8)}) for i in range(200)))
    cfg = config(file, on_bad_row="skip", pack_length=60, validation_share=0)
    whole = render(show(cfg, TOKENIZER, 7), colour=False)
    assert "7 of 175 rows" in whole
    assert whole.count("completion is empty") == 20
    assert "skipped: and 5 more" in whole
    monkeypatch.setattr(stream, "BLOCK_ROWS", 4)
    assert render(show(cfg, TOKENIZER, 7), colour=False) == whole
