"""Ranks that share packs give one process's numbers: losses, norms, held-out losses, answers, adapters, resumes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phi3_dist.adapters.reading import read_metadata
from tests.ranks.launcher import REPO, free_port, run_ranks
from tests.ranks.long_row_bodies import train
from tests.ranks.test_strategies import clean_environment, rows
from tests.small_models import longrope_base

pytestmark = pytest.mark.ranks
HERE = "tests.ranks.long_row_bodies"
STEPS, ORIGINAL = 4, 96
"""ORIGINAL: the base's window before LongRoPE, which some rows exceed and others don't."""


def chats_of(file: Path) -> Path:
    """Rows of many lengths, which share packs; and long questions with short answers, which the last rank has."""
    sizes = [(20 + 9 * i, 15 + 7 * (i % 5)) for i in range(14)] + [(290, 3), (280, 5), (285, 4)]
    lines = []
    for number, (asked, answered) in enumerate(sizes):
        letter = "abcdefghijklmnopqrstuvwxyz"[number]
        turns = [("user", f"{number} {letter * asked}"), ("assistant", f"{letter} {number} " * (answered // 4 + 1))]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    file.write_text("\n".join(lines) + "\n")
    return file


def options(base: Path, chats: Path, *more: str) -> list[str]:
    return [
        f"model.source={base}", f"data.train={chats}", "model.precision=fp32", "data.pack_length=340",
        "data.validation_share=0.3", "train.global_batch=4", "train.micro_batch=1", f"train.max_steps={STEPS}",
        "train.eval_every=2", "eval.generate=2", "eval.max_new_tokens=3", "optim.lr=0.001", "save.every=2",
        "save.keep=9", "log.trackers=[]", *more,
    ]  # fmt: skip


def compare(folder: Path, reference: Path, tolerance: float = 1e-6) -> None:
    """Losses, norms, held-out losses, scores of answers, and the adapter to a hundredth of the learning rate.

    AdamW divides by the root of what may be next to nothing: of 2,048 values one differed by 3.7e-6 after four steps.
    """
    for kind, keys in (("train", ("loss", "grad_norm", "supervised_tokens", "lr")), ("eval", ("heldout_loss",))):
        ours, theirs = rows(folder, kind), rows(reference, kind)
        assert len(ours) == len(theirs) > 0
        for our, their in zip(ours, theirs, strict=True):
            for key in keys:
                assert our[key] == pytest.approx(their[key], rel=tolerance), (our["step"], key)
            answers = {key: value for key, value in their.items() if key.startswith("answers_") and key != "answers_s"}
            assert {key: our[key] for key in answers} == answers
    saved, expected = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, reference))
    assert set(saved) == set(expected)
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], atol=10 * tolerance, rtol=tolerance)


class Numbers:
    """The base, its rows, and one process's runs, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base, self.chats = (
            folder,
            longrope_base(folder / "base", ORIGINAL),
            chats_of(folder / "chats.jsonl"),
        )

    def options(self, *more: str) -> list[str]:
        return options(self.base, self.chats, *more)

    def of_one(self, name: str, *more: str) -> Path:
        if not (self.folder / name).exists():
            train(str(self.folder / name), "single", self.options(*more))
        return self.folder / name


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    return Numbers(tmp_path_factory.mktemp("long_rows"))


SHARED = "train.sequence_parallel=2"
DROPPED = ("lora.dropout=0.1", "model.activation_checkpointing=true")


def test_two_ranks_that_share_packs_give_one_process_numbers(numbers: Numbers, tmp_path: Path) -> None:
    """With dropout, grouped heads, documents across the border, ranks without a supervised token, and long factors."""
    runs = [
        ("ddp", "ddp", free_port(), numbers.options(SHARED, *DROPPED)),
        ("fsdp2", "fsdp2", free_port(), numbers.options(SHARED, "lora.dropout=0.0")),
    ]
    args = {"folder": str(tmp_path), "runs": runs}
    run_ranks(f"{HERE}:exchanges_then_trains", 2, args=args, timeout_s=200)
    one = numbers.of_one("dropped", *DROPPED)
    assert rows(one)[-1]["loss"] < rows(one)[0]["loss"]
    compare(tmp_path / "ddp", one)
    compare(tmp_path / "fsdp2", numbers.of_one("plain", "lora.dropout=0.0"))
    assert read_metadata(tmp_path / "ddp" / "adapter")["longrope"] == "long"
    choices = {c["name"]: c["value"] for c in json.loads((tmp_path / "ddp" / "plan.json").read_text())["choices"]}
    assert choices["sequence parallel"] == "2 ranks share a pack"
    assert "1 groups of 2 ranks" in next(c for c in _choices(tmp_path / "ddp") if c["name"] == "accumulation")["why"]
    _goes_on_alone(tmp_path / "ddp", tmp_path / "again", numbers, one)


def _choices(folder: Path) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = json.loads((folder / "plan.json").read_text())["choices"]
    return choices


def _goes_on_alone(finished: Path, copy: Path, numbers: Numbers, one: Path) -> None:
    """Cut after step 2, and resumed by one process that shares with nobody."""
    cut(finished, copy)
    train(str(copy), "single", numbers.options(*DROPPED), resume=True)
    compare(copy, one)


def cut(finished: Path, copy: Path) -> None:
    """The run as a kill in its third step would have left it."""
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "adapter")
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:06d}")
    (copy / "exit.json").unlink()


STRATEGIES = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
FORMS = [
    *((s, 2, 2, ("lora.dropout=0.1",), 1e-6) for s in STRATEGIES),
    ("ddp", 4, 2, DROPPED, 1e-6),
    ("fsdp2", 4, 2, ("lora.dropout=0.1",), 1e-6),
    ("zero3", 4, 2, ("lora.dropout=0.0", "model.activation_checkpointing=true"), 1e-6),
    *((s, 2, 2, ("model.quantization=nf4", "lora.dropout=0.1"), 1e-5) for s in ("ddp", "zero2", "zero3", "fsdp2")),
    ("ddp", 2, 2, ("lora.dropout=0.1", "lora.targets=[qkv_proj, lm_head]"), 1e-6),
    ("ddp", 2, 2, ("lora.dropout=0.1", "lora.modules_to_save=[lm_head]"), 1e-6),
    ("ddp", 2, 2, ("lora.dropout=0.1", "model.fused_layers=false"), 1e-6),
    ("ddp", 2, 2, ("lora.dropout=0.0", "lora.dora=true"), 1e-6),
    ("ddp", 2, 2, ("lora.dropout=0.0", "model.fused_lora=false", "model.fused_layers=false"), 1e-6),
    ("ddp", 2, 2, ("lora.dropout=0.1", "train.micro_batch=2"), 1e-6),
    ("ddp", 2, 2, ("lora.dropout=0.1", "model.new_tokens=['<|tool|>']"), 1e-6),
]


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}-{form[1]}-{' '.join(form[3])}")
def test_every_form_gives_one_process_numbers(
    form: tuple[str, int, int, tuple[str, ...], float], numbers: Numbers, tmp_path: Path, deepspeed_ops: Path
) -> None:
    strategy, world, parts, more, tolerance = form
    shared = numbers.options(f"train.sequence_parallel={parts}", *more)
    args = {"folder": str(tmp_path / "run"), "strategy": strategy, "overrides": shared}
    run_ranks(f"{HERE}:train", world, args=args, deepspeed=strategy.startswith("zero"), timeout_s=200)
    compare(tmp_path / "run", numbers.of_one(" ".join(more).replace("/", "_"), *more), tolerance)


@pytest.mark.full
def test_one_process_run_goes_on_in_two_that_share(numbers: Numbers, tmp_path: Path) -> None:
    one = numbers.of_one("dropped", *DROPPED)
    cut(one, tmp_path / "again")
    args: dict[str, Any] = {"folder": str(tmp_path / "again"), "strategy": "ddp", "resume": True}
    run_ranks(f"{HERE}:train", 2, args={**args, "overrides": numbers.options(SHARED, *DROPPED)})
    compare(tmp_path / "again", one)


@pytest.mark.full
def test_the_exchange_is_deepspeeds(deepspeed_ops: Path) -> None:
    run_ranks(f"{HERE}:as_deepspeeds", 2, deepspeed=True)


@pytest.mark.full
def test_the_benchmark_of_a_long_row_runs_on_one_process_and_on_two(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "phi3_dist.bench.long_rows", "--tokens", "512", "--layers", "1", "--json"]
    done = subprocess.run(
        [*command, str(tmp_path / "found.json")], cwd=REPO, env=clean_environment(), text=True, capture_output=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    (one,), two = found["1"], found["2"]
    for rank in two:
        assert rank["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert rank["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert rank["tensors_mib"] < 0.6 * one["tensors_mib"]
