"""The rules of servers, and `phi3-dist check`. What the servers themselves say is in tests/serve."""

from __future__ import annotations

import json
import stat
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.errors import ConfigError, MachineError
from phi3_dist.exports import checking
from phi3_dist.exports.checking import check, served_of, try_server
from phi3_dist.exports.open_adapter import open_adapter
from phi3_dist.serving.asking import Answer, ask, why_absent
from phi3_dist.serving.rules import RULES, SERVERS, Server, judge
from phi3_dist.serving.served import Served
from tests.export_cases import CASES, LONGROPE, small_adapter, small_base

PLAIN = Served("adapter", "someone/phi3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize(
    ("changes", "loads", "right"),
    [  # by server: vllm, llama.cpp
        ({}, (True, True), (True, True)),
        ({"rslora": True, "patterns": True}, (True, True), (True, True)),
        ({"dora": True}, (False, False), (False, False)),
        ({"whole": ("lm_head",)}, (False, False), (False, False)),
        ({"taught": 2}, (False, False), (False, False)),
        ({"ranks": (1024,)}, (False, True), (False, True)),
        ({"targets": ("q_proj",)}, (False, True), (False, True)),
        ({"bias": "all"}, (False, True), (False, True)),
        ({"lora_bias": True}, (False, True), (False, True)),
        ({"lora_init": "loftq", "trained_on": "nf4"}, (True, True), (True, False)),
    ],
)
def test_what_loads_and_what_is_right(
    changes: dict[str, object], loads: tuple[bool, bool], right: tuple[bool, bool]
) -> None:
    verdicts = [judge(replace(PLAIN, **changes), server) for server in ("vllm", "llama.cpp")]  # type: ignore[arg-type]
    assert tuple(v.loads for v in verdicts) == loads
    assert tuple(v.right for v in verdicts) == right
    assert all(bool(v.command) == v.loads for v in verdicts)
    assert all(judge(replace(PLAIN, **changes), s).loads for s in ("peft", "transformers"))  # type: ignore[arg-type]


@pytest.mark.parametrize("server", SERVERS)
def test_a_base_that_is_made_in_memory_is_served_merged_or_not_at_all(server: Server) -> None:
    verdict = judge(replace(PLAIN, base="tiny-random"), server)
    assert (verdict.loads, verdict.command) == (False, "")
    (finding,) = (one for one in verdict.findings if one.effect == "refused")
    assert "tiny-random, is made in memory" in finding.what
    assert finding.fix.startswith("phi3-dist export adapter OUT --as ")


@pytest.mark.parametrize(
    ("server", "changes", "flags"),
    [
        ("vllm", {"ranks": (3,)}, "--max-lora-rank 8"),
        ("vllm", {"ranks": (16, 33)}, "--max-lora-rank 64"),
        ("vllm", {"longrope": "short"}, "--max-model-len 4096"),
        ("vllm", {"longrope": "long", "original_context": 64}, "--max-model-len 128"),
        ("vllm", {"revision": "v2"}, "--revision v2"),
        ("vllm", {}, "--lora-modules adapter=adapter"),
        ("vllm", {}, "--tokenizer adapter"),
        ("llama.cpp", {"longrope": "short"}, "-c 4096 -np 1"),
        ("llama.cpp", {"longrope": "long"}, "-c 8192 -np 1"),
        ("llama.cpp", {}, "--lora OUT/adapter.gguf"),
        ("peft", {"revision": "v2"}, 'revision="v2"'),
    ],
)
def test_the_exact_flags(server: Server, changes: dict[str, object], flags: str) -> None:
    assert flags in judge(replace(PLAIN, **changes), server).command  # type: ignore[arg-type]


def test_every_rule_has_its_words_and_what_refuses_has_a_way_out() -> None:
    everything = Served(
        "adapter", "base", "v1", (2048, 4), True, True, True, "all", True, ("lm_head",), 3, 400, "short", 4096, 2047,
        "nf4", "loftq", ("q_proj",),
    )  # fmt: skip
    for server in SERVERS:
        for finding in judge(everything, server).findings:
            assert "{" not in finding.what + finding.fix + finding.flags
            assert finding.fix or finding.effect not in {"refused", "wrong"}
    assert all(rule.source for rule in RULES if rule.effect in {"refused", "wrong"})


def test_the_facts_are_read_from_the_files(base: Path, tmp_path: Path) -> None:
    long = small_base(tmp_path / "long", rope_parameters=LONGROPE, sliding_window=33)
    adapter = small_adapter(tmp_path / "a", long, facts={"longrope": "short"}, new_tokens=("<|a|>",))
    served = served_of(open_adapter(adapter))
    assert (served.longrope, served.taught, served.window, served.has_tokenizer) == ("short", 1, 33, True)
    patterns = served_of(open_adapter(small_adapter(tmp_path / "b", base, **CASES["patterns"])))
    assert (patterns.ranks, patterns.patterns) == ((3, 4, 5), True)
    dora = served_of(open_adapter(small_adapter(tmp_path / "c", base, dora=True, rslora=True)))
    assert (dora.dora, dora.rslora, dora.base) == (True, True, str(base))


# --- the verb -------------------------------------------------------------------------------------------------------


def test_check_says_it_all_and_exits_with_6_where_it_is_not_right(base: Path, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "a", base)
    done = CliRunner().invoke(app, ["check", str(adapter), "--for", "vllm"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("vllm: loads, and answers as trained with the flags below\n")
    assert f"vllm serve {base} --enable-lora --lora-modules adapter={adapter} --max-lora-rank 8" in done.output
    dora = small_adapter(tmp_path / "d", base, dora=True)
    done = CliRunner().invoke(app, ["check", str(dora), "--for", "vllm", "--json"])
    assert done.exit_code == 6
    said = json.loads(done.output)
    assert (said["loads"], said["right"], said["trial"]) == (False, False, None)
    assert said["findings"][0]["what"] == "vLLM does not load DoRA"
    with pytest.raises(ConfigError, match="is not a known server"):
        check(adapter, "tgi")  # type: ignore[arg-type]


def server(folder: Path, answers: str) -> str:
    """A Python that writes `answers`, an expression over the request, in place of a server."""
    path = folder / "python"
    path.write_text(
        f"#!{sys.executable}\nimport json, sys\nif '-c' in sys.argv[1:3]:\n    sys.exit(0)\n"
        f"request = json.load(open(sys.argv[-2]))\njson.dump({answers}, open(sys.argv[-1], 'w'))\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize("right", [True, False])
def test_a_servers_answers_are_held_against_the_live_models(right: bool, base: Path, tmp_path: Path) -> None:
    """A stand-in answers what PEFT answers, or what PEFT answers without the adapter."""
    adapter = small_adapter(tmp_path / "a", base)
    opened = open_adapter(adapter)
    rows = checking.rows_for(opened, checking.tokenizer_of(opened))
    model = checking.live_model(opened, checking.torch.float32)
    found = []
    for prompt in checking.prompts_of(rows):
        if right:
            found.append(checking.greedy(model, prompt, 16))
        else:
            with model.disable_adapter():
                found.append(checking.greedy(model, prompt, 16))
    said = [{"answers": [{"ids": ids, "logprobs": logprobs} for ids, logprobs, _ in found]}]
    first = found[0][0]
    model.generation_config.eos_token_id = first[1]  # servers are asked to go past an end id
    with nullcontext() if right else model.disable_adapter():
        assert checking.greedy(model, checking.prompts_of(rows)[0], 16)[0] == first
    python = server(tmp_path, repr(said))
    trial = try_server(opened, "vllm", python)
    assert trial.right is right
    assert (trial.same == trial.prompts) is right
    assert "generated chats" in str(trial)
    done = CliRunner().invoke(app, ["check", str(adapter), "--for", "vllm", "--run", "--server-python", python])
    assert done.exit_code == (0 if right else 6)
    assert f"{trial.same} of {trial.prompts} greedy answers are the live model's" in done.output


def test_what_a_server_refuses_is_its_answer_and_what_fails_to_start_is_an_error(base: Path, tmp_path: Path) -> None:
    opened = open_adapter(small_adapter(tmp_path / "a", base))
    refused = try_server(opened, "vllm", server(tmp_path, "[{'error': 'ValueError: no  DoRA\\n'}]"))
    assert refused.refused == "ValueError: no DoRA"
    assert not refused.right
    request = {"base": "x", "adapters": [None], "prompts": [[1]], "new_tokens": 1, "context": 9}
    assert ask("vllm", server(tmp_path, "[{'answers': [{'ids': [4], 'logprobs': [-0.5]}]}]"), request) == [
        [Answer((4,), (-0.5,))]
    ]
    with pytest.raises(MachineError, match=r"before it answered: .*ZeroDivisionError"):
        ask("vllm", server(tmp_path, "1 / 0"), request)
    with pytest.raises(MachineError, match="cannot be started: No such file"):
        ask("vllm", str(tmp_path / "none"), request)
    with pytest.raises(MachineError, match="cannot be started"):
        checking.require("vllm", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="needs the base as a GGUF file"):
        try_server(opened, "llama.cpp", sys.executable)
    with pytest.raises(ConfigError, match="starts no server for peft"):
        try_server(opened, "peft", sys.executable)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("ModuleNotFoundError: No module named 'vllm'", "is not installed for"),
        ("RuntimeError: libc.so.6: version `GLIBC_2.38' not found (required by x)", "wants GLIBC_2.38: the C library"),
        ("ImportError: libnuma.so.1: cannot open shared object file", "does not load it: ImportError: libnuma.so.1"),
    ],
)
def test_why_a_server_is_not_there_is_told(last: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\ncat >&2 <<'END'\nTraceback\n{last}\nEND\nexit 1\n")
    path.chmod(0o755)
    assert said in why_absent("vllm", str(path))
    with pytest.raises(MachineError, match="make test-serve makes one"):
        checking.require("vllm", str(path))
    assert "cannot be started: No such file" in why_absent("vllm", str(tmp_path / "none"))
