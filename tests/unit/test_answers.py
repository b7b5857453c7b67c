"""Answers to a file that a kill does not undo, and a conversation that Ctrl-C does not end."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from phi3_dist.cli.app import app
from phi3_dist.errors import DataError, plain
from phi3_dist.inference import answers_file as files
from phi3_dist.inference.answers_file import How, answer_all, answer_file, check_output
from phi3_dist.inference.conversation import Conversation, chat
from phi3_dist.inference.engine import Sampling
from phi3_dist.inference.open_model import Opened, open_model
from phi3_dist.inference.prompts import Prompt
from phi3_dist.modeling.greedy_answers import answer
from phi3_dist.modeling.stop_ids import published_stops, stop_ids

HOW = How(max_new_tokens=10, batch_size=3)
PROMPTS = [Prompt.of(f"Question {'x' * (i * 5 % 17)} {i}", place=f"rows.jsonl:{i + 1}") for i in range(7)]


@pytest.fixture(scope="module")
def opened() -> Opened:
    found = open_model("tiny-random")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in found.model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn_like(weight) * 0.3)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_answers_is_in_the_order_of_the_rows(opened: Opened, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert answer_file(opened, PROMPTS, out, HOW) == (7, 7)
    chats = [[dict(m) for m in prompt.messages] for prompt in PROMPTS]
    wanted = answer(opened.model, opened.tokenizer, chats, max_new_tokens=10)
    assert [row["answer"] for row in lines(out)] == wanted == answer_all(opened, PROMPTS, HOW)
    assert [row["index"] for row in lines(out)] == list(range(7))
    assert lines(out)[2]["messages"] == chats[2]
    before = out.read_bytes()
    assert answer_file(opened, PROMPTS, out, HOW) == (0, 7)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3)])
def test_a_killed_call_goes_on(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    """Killed in the middle of a line: what was whole stays, the torn line is made again, all is as undisturbed."""
    how = dataclasses.replace(HOW, sampling=sampling)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer_file(opened, PROMPTS, whole, how)

    def killed(done: int, of: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_file(opened, PROMPTS, out, how, progress=killed)
    out.write_bytes(out.read_bytes()[:-7])
    assert answer_file(opened, PROMPTS, out, how) == (4, 7)
    assert out.read_bytes() == whole.read_bytes()


def test_a_call_goes_on_after_texts_with_line_separators_of_their_own(opened: Opened, tmp_path: Path) -> None:
    prompts, out = [Prompt.of("One\u2028two\x85three."), Prompt.of("Hi?")], tmp_path / "out.jsonl"
    assert answer_file(opened, prompts, out, How(max_new_tokens=2)) == (2, 2)
    assert answer_file(opened, prompts, out, How(max_new_tokens=2)) == (0, 2)


def test_a_file_of_something_else_is_left_alone(opened: Opened, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for text in ("my notes", "my notes\n", '{"a": 1}\n'):
        out.write_text(text)
        with pytest.raises(DataError, match="--overwrite"):
            answer_file(opened, PROMPTS, out, HOW)
        assert out.read_text() == text
        with pytest.raises(DataError, match="nothing else is replaced"):
            answer_file(opened, PROMPTS, out, HOW, overwrite=True)
        assert out.read_text() == text
    out.unlink()
    assert answer_file(opened, PROMPTS[:2], out, How(max_new_tokens=3)) == (2, 2)
    kept = out.read_bytes()
    with pytest.raises(DataError, match="passes the model's"):
        answer_file(opened, [Prompt.of("x" * 5000)], out, HOW, overwrite=True)
    with out.open("a") as other_call:
        fcntl.flock(other_call, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process writes to it"):
            answer_file(opened, PROMPTS[:2], out, HOW, overwrite=True)
    assert out.read_bytes() == kept
    assert answer_file(opened, PROMPTS[:2], out, HOW, overwrite=True) == (2, 2)
    for other, prompts, how in (
        (opened, PROMPTS[1:3], HOW),
        (opened, PROMPTS[:2], How(max_new_tokens=11)),
        (dataclasses.replace(opened, weights="others"), PROMPTS[:2], HOW),
    ):
        with pytest.raises(DataError, match=r"out\.jsonl:1: was made from another prompt"):
            answer_file(other, prompts, out, how)
    with pytest.raises(DataError, match="cannot be written"):
        answer_file(opened, PROMPTS, tmp_path / "absent" / "out.jsonl", HOW)


def test_where_answers_cannot_go_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    """The prompts' own file, under a second name too; a folder, a pipe, a device; names that move a cursor."""
    rows, linked, pipe = tmp_path / "rows.jsonl", tmp_path / "linked.jsonl", tmp_path / "pipe"
    rows.write_text('{"prompt": "Hi?"}\n')
    linked.symlink_to(rows)
    os.mkfifo(pipe)
    cases = {
        rows: "is the file of the prompts",
        linked: "is the file of the prompts",
        tmp_path: "is a folder",
        pipe: "is not a plain file",
        Path("/dev/full"): "is not a plain file",
        tmp_path / "absent" / "out.jsonl": "no folder",
        tmp_path / "a\x1b[2J": "x1b in its name",
        tmp_path / "a\nb": "n in its name",
        tmp_path / ("n" * 300): "cannot be written",
    }
    for out, said in cases.items():
        with pytest.raises(DataError, match=said):
            check_output(out, rows, overwrite=True)
    ran = CliRunner().invoke(app, ["generate", "absent", str(rows), "--output", str(rows), "--overwrite"])
    assert isinstance(ran.exception, DataError)
    assert rows.read_text() == '{"prompt": "Hi?"}\n'


def test_a_prompt_longer_than_the_models_positions_is_named(opened: Opened) -> None:
    with pytest.raises(DataError, match="passes the model's 4,096"):
        answer_all(opened, [Prompt.of("x" * 5000, place="rows.jsonl:9")], HOW)


def test_every_end_id_that_the_base_publishes_ends_an_answer(tmp_path: Path) -> None:
    """Phi-3's config.json names one, generation_config.json all three."""
    model = open_model("tiny-random").model
    model.save_pretrained(tmp_path)
    open_model("tiny-random").tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8, 9]}')
    found = open_model(tmp_path)
    assert {7, 8, 9} <= set(stop_ids(found.model, found.tokenizer))
    (tmp_path / "generation_config.json").write_text("[")
    assert published_stops(tmp_path) == []


# --- the conversation -------------------------------------------------------------------------------------------------


def talk(opened: Opened, *said: str) -> tuple[Conversation, list[str]]:
    conversation, out = Conversation(opened, HOW), io.StringIO()
    chat(conversation, read=io.StringIO("".join(f"{line}\n" for line in said)), write=out)
    return conversation, out.getvalue().split("\n")


def test_a_pipe_gets_one_answer_a_line_and_nothing_else(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    conversation, out = talk(opened, "Hi.", "", "/help", "And then?", "/quit", "never read")
    first, second = (turn["content"] for turn in conversation.turns if turn["role"] == "assistant")
    assert "\n".join(out) == plain(f"{first}\n{second}\n")
    (alone,) = answer_all(opened, [Prompt.of("Hi.")], HOW)
    (later,) = answer_all(opened, [Prompt(tuple(conversation.turns[:3]))], HOW)
    assert (first, second) == (alone, later)
    assert "/undo" in capsys.readouterr().err


def test_commands_change_what_the_model_is_shown(opened: Opened, tmp_path: Path) -> None:
    conversation, _ = talk(opened, "/system Be brief.", "Hi.", "More?", "/undo", f"/save {tmp_path / 'kept.jsonl'}")
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    assert lines(tmp_path / "kept.jsonl") == [{"messages": list(conversation.messages)}]
    conversation.command("/reset")
    conversation.command("/system")
    assert conversation.messages == ()
    assert conversation.command("/undo") == "there is nothing to undo"
    assert "not a command" in conversation.command("/jump")
    assert "no adapter" in conversation.command("/base")


def test_a_conversation_is_added_to_rows_and_to_nothing_else(opened: Opened, tmp_path: Path) -> None:
    conversation = Conversation(opened, HOW, turns=[{"role": r, "content": "Hi."} for r in ("user", "assistant")])
    for name, text in {
        "notes.txt": "my notes\n",
        "run.yaml": "model: {}",
        "one.json": '{\n  "messages": []\n}\n',
    }.items():
        (tmp_path / name).write_text(text)
        assert "is not a file of such rows" in conversation.command(f"/save {tmp_path / name}")
        assert (tmp_path / name).read_text() == text
    assert "is not a file of such rows" in conversation.command(f"/save {tmp_path}")
    assert "begins with ~nobody-here" in conversation.command("/save ~nobody-here/x")
    assert "control character" in conversation.command("/save a\x00b")
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"messages": []}')  # a line without its end
    assert "1 questions" in conversation.command(f"/save {kept}")
    assert [len(row["messages"]) for row in lines(kept)] == [0, 2]


def test_base_switches_the_adapter_off(opened: Opened) -> None:
    from phi3_dist.config.schema import LoraConfig
    from phi3_dist.modeling.lora import add_lora

    (of_base,) = answer_all(opened, [Prompt.of("Hi.")], HOW)
    fresh = open_model("tiny-random")
    fresh.model.load_state_dict(opened.model.state_dict())
    model = add_lora(fresh.model, LoraConfig(), "tiny-random")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.fill_(0.2)
    adapted = dataclasses.replace(fresh, model=model.eval())
    conversation = Conversation(adapted, HOW)
    assert "".join(conversation.ask("Hi.")) != of_base
    conversation.command("/reset")
    conversation.command("/base")
    assert "".join(conversation.ask("Hi.")) == of_base


def test_ctrl_c_stops_the_answer_and_not_the_program(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            done = super().write(text)
            if len(self.getvalue()) >= 3 and not self.getvalue().count("(stopped)"):
                raise KeyboardInterrupt
            return done

    conversation, out = Conversation(opened, HOW), Interrupted()
    chat(conversation, read=io.StringIO("Hi.\nAgain.\n"), write=out)
    assert "(stopped)" in out.getvalue()
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * 2
    assert conversation.turns[1]["content"] != conversation.turns[3]["content"]


def test_a_message_that_cannot_be_asked_is_told_and_forgotten(
    opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation, out = talk(opened, "a <|end|> b", "x" * 5000)
    assert conversation.turns == []
    assert out == [""]
    told = capsys.readouterr().err
    assert "<|end|>" in told
    assert "4,096" in told


# --- the verbs --------------------------------------------------------------------------------------------------------


def test_the_verbs(tmp_path: Path) -> None:
    runner = CliRunner()
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"prompt": "Hi?"}\n{"prompt": "Ho?", "completion": "Hm."}\n')
    words = ["generate", "tiny-random", str(rows), "-o", str(out), "--max-new-tokens", "3"]
    done = runner.invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "2 answers" in done.output
    assert [row.get("wanted") for row in lines(out)] == [None, "Hm."]
    assert "2 of them by an earlier call" in runner.invoke(app, words).output
    one = runner.invoke(app, ["generate", "tiny-random", "-p", "Hi?", "--max-new-tokens", "3"])
    assert one.exit_code == 0, one.output
    talked = runner.invoke(app, ["chat", "tiny-random", "--max-new-tokens", "3"], input="Hi?\n")
    assert talked.exit_code == 0, talked.output
    assert talked.output.rstrip("\n") == one.output.rstrip("\n")
    for wrong in (["generate", "tiny-random"], ["generate", "tiny-random", str(rows)], [*words, "-p", "x"]):
        assert "takes one prompt" in str(runner.invoke(app, wrong).exception)


def test_answers_are_made_in_parts(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer_all(opened, PROMPTS, HOW)
    monkeypatch.setattr(files, "_ROWS_AT_A_TIME", 3)
    assert answer_all(opened, PROMPTS, HOW) == whole
