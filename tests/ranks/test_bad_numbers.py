"""A loss that is not a number, on one rank of several, costs that step on all of them, and changes no other number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import Phi3ForCausalLM

from phi3_dist.modeling.base import tiny_config
from phi3_dist.modeling.tokenizer import tiny_tokenizer
from tests.ranks.test_resume import interrupted, same_bits
from tests.ranks.test_strategies import launch, rows, tiny_base

pytestmark = pytest.mark.ranks

POISON = "~"  # stands in one row alone, and its embedding is no number
OPTIONS = (
    "data.validation_share=0",
    "data.pack_length=64",
    "train.global_batch=2",
    "train.max_steps=12",
    "train.shuffle=false",
)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Overrides that name a base in which one token spoils every number, and 60 rows, one of which holds it."""
    folder = tmp_path_factory.mktemp("material")
    base = tiny_base(folder / "base")
    tokenizer = tiny_tokenizer()
    model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert model.config.vocab_size == tiny_config().vocab_size
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(POISON)] = math.nan
    model.save_pretrained(base)
    chats = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"It is {n}."}] for n in range(60)
    ]
    chats[12][0]["content"] += POISON
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return f"model.source={base}", f"data.train={folder / 'rows.jsonl'}"


@pytest.fixture(scope="module")
def alone(material: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's run: what is skipped depends on the rows of a step, not on who computes them."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = launch(None, folder, *material, *OPTIONS)
    assert done.returncode == 0, done.stderr
    (skipped,) = rows(folder, "skipped")
    assert "rows.jsonl:13" in skipped["rows"]
    assert f"step {skipped['step']} skipped: loss nan" in done.stdout
    assert [row["step"] for row in rows(folder)] == [n for n in range(1, 13) if n != skipped["step"]]
    return folder


STRATEGIES = ["zero3", "fsdp2", "zero1", "zero2_offload", "zero3_offload"]


@pytest.mark.parametrize("strategy", ["cpu_2", "zero2", *(pytest.param(s, marks=pytest.mark.full) for s in STRATEGIES)])
def test_one_rank_without_a_number_skips_the_step_on_all(
    strategy: str, material: tuple[str, str], alone: Path, tmp_path: Path, deepspeed_ops: Path
) -> None:
    done = launch(strategy, tmp_path / "run", *material, *OPTIONS, options=("--num_processes", "2"))
    assert done.returncode == 0, done.stderr
    (ours,), (theirs,) = rows(tmp_path / "run", "skipped"), rows(alone, "skipped")
    assert ours["step"] == theirs["step"]
    assert len(ours["ranks"]) == 1, "one of the two ranks had the row"
    assert "rows.jsonl:13" in ours["rows"]
    for our, their in zip(rows(tmp_path / "run"), rows(alone), strict=True):
        assert our["step"] == their["step"]
        for key in ("loss", "grad_norm", "lr"):
            assert our[key] == pytest.approx(their[key], rel=1e-4), (our["step"], key)


@pytest.mark.parametrize("strategy", [None, *(pytest.param(s, marks=pytest.mark.full) for s in ("zero2", "zero3"))])
def test_a_skipped_step_is_no_update_after_a_resume_either(
    strategy: str | None, material: tuple[str, str], tmp_path: Path, deepspeed_ops: Path
) -> None:
    """Adam's step count is that of the updates; a checkpoint keeps how many steps were skipped."""
    options = ("--num_processes", "2") if strategy else ()
    overrides = (*material, *OPTIONS, "save.every=1", "save.keep=99")
    done = launch(strategy, tmp_path / "whole", *overrides, options=options)
    assert done.returncode == 0, done.stderr
    (skipped,) = rows(tmp_path / "whole", "skipped")
    assert 1 < skipped["step"] < 12
    again = interrupted(tmp_path / "whole", tmp_path / "again", step=skipped["step"])
    done = launch(strategy, again, *overrides, "--resume", options=options)
    assert done.returncode == 0, done.stderr
    same_bits(again, tmp_path / "whole")


def test_a_run_of_bad_steps_ends_the_run_with_step_rank_and_rows(material: tuple[str, str], tmp_path: Path) -> None:
    done = launch("cpu_2", tmp_path / "run", *material, *OPTIONS, "train.max_bad_steps=1")
    assert done.returncode != 0
    (skipped,) = rows(tmp_path / "run", "skipped")
    assert f"step {skipped['step']}: loss nan" in done.stderr
    assert f"on rank {skipped['ranks'][0]}, in rows" in done.stderr
    assert "rows.jsonl:13" in done.stderr
    assert "train.max_bad_steps" in done.stderr
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 9
