"""The checks for a GPU, as far as a CPU goes: one that fails spoils no other, and figures become choices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phi3_dist.bench.card import runs
from phi3_dist.bench.card.checks import Group, Skip
from phi3_dist.bench.card.choices import choices_of, read_rows
from phi3_dist.machine import card_measurements as cards
from tests import warm
from tests.ranks.launcher import REPO
from tests.ranks.test_strategies import clean_environment


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "checks.jsonl").read_text().splitlines()]


def test_a_check_that_fails_or_cannot_be_made_says_so_and_the_others_run(tmp_path: Path) -> None:
    group = Group("toys", tmp_path, cpu=True)

    def fails() -> dict[str, Any]:
        raise RuntimeError("broken")

    def skips() -> dict[str, Any]:
        raise Skip("needs CUDA")

    group.check("first", fails)
    group.check("second", skips)
    group.check("third", lambda: {"ms": 2})
    group.check("fourth", lambda: {"ok": False, "error": 0.5})
    assert [(row["check"], row["ok"]) for row in lines(tmp_path)] == [
        ("first", False),
        ("second", None),
        ("third", True),
        ("fourth", False),
    ]
    assert lines(tmp_path)[0]["error"] == "RuntimeError: broken"
    assert group.milliseconds(lambda: None) >= 0


def test_a_lost_cuda_context_ends_the_group(tmp_path: Path) -> None:
    def dies() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit) as ended:
        Group("toys", tmp_path, cpu=True).check("first", dies)
    assert ended.value.code == 3


def row(group: str, check: str, **facts: Any) -> dict[str, Any]:
    return {"group": group, "check": check, "ok": True, **facts}


FOUND = [
    row("facts", "machine", gpu="NVIDIA Card 9", torch="2.99"),
    row("attention", "varlen, deterministic True: 8 documents of 512", ms_both=0.9),
    row("attention", "varlen, deterministic False: 8 documents of 512", ms_both=0.6),
    row("attention", "sdpa, deterministic True: 8 documents of 512", ms_both=2.0),
    *(
        row("lora", f"linear {name}, dropout 0.05", **{"forward, backward, tflops": {"shipped": [2, 3, 9], form: t}})
        for name in ("qkv", "o", "gate_up", "down")
        for form, t in (("triton", [1, 1, 9]),)
    ),
    row("products", "head and cross-entropy", ms_chunk_512=5.0, ms_chunk_2048=4.0, ms_liger=4.5),
    row("model", "LoRA 4096, as planned", tokens_per_s=300, share=0.6, rate_tflops=700),
    row("model", "LoRA 4096, torch's kernels", tokens_per_s=200),
    row("model", "LoRA 4096, Triton's kernels", tokens_per_s=260),
    row("model", "LoRA 4096, compiled passes", tokens_per_s=150),
    row("model", "LoRA 4096, FP8 base", tokens_per_s=390),
]


def test_choices_follow_the_figures() -> None:
    found = choices_of(FOUND)
    assert (found["attention"], found["deterministic_cost"]) == ("varlen", 1.5)
    assert (found["lora_form"], found["lora_form_ms"]) == ("triton", {"shipped": 20, "triton": 8})
    assert (found["loss"], found["chunk_rows"]) == ("chunked", 2048)
    assert (found["kernels"], found["compile"], found["fp8_gain"]) == ("triton", False, 1.3)
    faster = [*FOUND[:-2], row("model", "LoRA 4096, compiled passes", tokens_per_s=250)]
    assert choices_of(faster)["compile"] is True


def test_what_was_not_measured_is_left_out() -> None:
    failed = [{**one, "ok": False} for one in FOUND]
    assert choices_of(failed) == {}
    assert set(choices_of(FOUND[:1])) == {"card", "torch"}


def test_a_cards_figures_are_found_by_its_name_and_a_bad_file_is_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cards.measured_on("NVIDIA Card 9") == {}
    file = cards.write_card("NVIDIA Card 9", choices_of(FOUND))
    assert file.name == "nvidia_card_9.json"
    assert cards.measured_on("NVIDIA Card 9")["attention"] == "varlen"
    file.write_text("[1")
    assert cards.measured_on("NVIDIA Card 9") == {}


def test_every_strategy_is_a_run_of_its_own_on_a_card() -> None:
    names = {run.config for run in runs.runs_of(Path("base"), cpu=False)}
    assert names >= {"ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2", "fsdp2_offload", None}
    assert all((REPO / "configs" / "accelerate" / f"{name}.yaml").is_file() for name in names if name)
    every = runs.runs_of(Path("base"), cpu=False)
    assert len({run.name for run in every}) == len(every)
    assert {run.like for run in every if run.like} <= {run.name for run in every}


# Its groups are processes too, of the same Python.
CARD = "import sys; sys.executable = sys.argv.pop(1); from phi3_dist.bench.card.__main__ import main; main()"


def rehearse(out: Path, program: str, *groups: str, **environment: str) -> list[dict[str, Any]]:
    command = [program, "-c", CARD, program, "--cpu", "--out", str(out), "--patience", "9"]
    command += ["--budget", "3000", "--parallel", "2", "--only", *groups]
    done = subprocess.run(
        command, cwd=REPO, env={**clean_environment(), **environment}, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return read_rows(out)


def test_facts_and_products_are_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    rows = rehearse(tmp_path, warm.python(), "facts", "products", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert {r["group"] for r in rows} == {"facts", "products", "all"}
    assert not [r for r in rows if r["ok"] is False]
    assert not (tmp_path / "cache" / "phi3_dist" / "cards").exists(), "a CPU is not a card"


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_whole_rehearsal_on_a_cpu(tmp_path: Path) -> None:
    rows = rehearse(tmp_path, sys.executable, "facts", "model", "attention", "kernels", "products", "runs")
    assert not [r for r in rows if r["ok"] is False]
    assert {r["group"] for r in rows} >= {"facts", "model", "attention", "products", "runs", "all"}
    resumed = [r for r in rows if r["check"].endswith(": resumed")]
    assert len(resumed) >= 6
    assert all(r["bit_for_bit"] for r in resumed)
