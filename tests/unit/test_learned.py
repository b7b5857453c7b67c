"""`phi3-dist plan --learn`: a card's overheads out of finished runs, kept, used, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from phi3_dist.cli.app import app
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import PlanError
from phi3_dist.family.variants import FAMILIES
from phi3_dist.machine.learned_overheads import overheads_file, overheads_of
from phi3_dist.planning.advice import Cluster, advise
from phi3_dist.planning.fitted_overheads import FinishedRun, Overheads, fit_overheads
from phi3_dist.planning.gpus import find_gpu
from phi3_dist.planning.memory import Term
from phi3_dist.planning.timing import rates_of_gpu
from phi3_dist.report.measured_overheads import finished_run, finished_runs

MINI = next(family for family in FAMILIES if family.name == "mini-4k")
H100 = "NVIDIA H100 80GB HBM3"
RUN = f"""\
model: {{source: {MINI.hub_ids[0]}, precision: bf16}}
data: {{train: HuggingFaceH4/ultrachat_200k, split: train_sft, pack_length: 2048}}
train: {{global_batch: 8, max_steps: 50}}
"""
PACKAGES = {"torch": "2.13.0", "deepspeed": "0", "bitsandbytes": "0", "triton": "3"}


def planned_step_s() -> float:
    cfg = RunConfig.model_validate(
        {
            "model": {"source": MINI.hub_ids[0], "precision": "bf16"},
            "data": {"train": "rows.jsonl", "pack_length": 2048},
            "train": {"global_batch": 8, "max_steps": 50},
        }
    )
    card = find_gpu(H100)
    cluster = Cluster(1, 8, card.memory_gib, 1024.0, rates_of_gpu(card), card)
    time = next(one.time for one in advise(cfg, cluster, MINI, PACKAGES).options if one.name == "ddp")
    assert time is not None
    return time.total_s


@pytest.fixture
def cuda_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run folder as one on eight H100s leaves it, its steps half filled and 1.5 times slower than planned."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    slow = 1.5 * planned_step_s()

    def made(name: str = "run", steps: int = 12, **plan: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(RUN)
        first = {"planned_gib": 20.0, "measured_gib": 19.0, "reserved_gib": 20.9, "device_used_gib": 22.4}
        values = {
            "device": "cuda",
            "strategy": "ddp",
            "world_size": 8,
            "nodes": 1,
            "global_batch": 8,
            "hardware": {"device": H100},
            "lengths": {"train": {"pack_length": 2048}},
            "first_step": first,
        }
        (folder / "plan.json").write_text(json.dumps(values | plan))
        row = {"kind": "train", "tokens": 4 * 2048, "loss": 1.0, "peak_gib": 19.0}
        rows = [{**row, "step": step, "step_s": slow * (9 if step == 1 else 0.5)} for step in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        return folder

    return made


def test_what_a_run_on_a_card_says_is_kept_and_the_next_plan_uses_it(cuda_run: Callable[..., Path]) -> None:
    folder = cuda_run()
    said = CliRunner().invoke(app, ["plan", "--learn", str(folder)])
    assert said.exit_code == 0, said.output
    learned = overheads_of(H100)
    assert learned is not None
    assert learned.context_gib == pytest.approx(1.5)
    assert learned.allocator == pytest.approx(0.1)
    assert learned.step_time == pytest.approx(1.5, rel=1e-3)  # half a step's tokens in half of its time
    assert "context 1.5 GiB" in said.output
    assert str(overheads_file(H100)) in said.output.replace("\n", "")

    card = find_gpu(H100)
    cfg = RunConfig.model_validate({"model": {"source": MINI.hub_ids[0]}, "data": {"train": "x.jsonl"}})
    plain = Cluster(1, 1, card.memory_gib, 1024.0, rates_of_gpu(card), card)
    knowing = replace(plain, overheads=learned, rates=learned.slower(plain.rates))
    before, after = (advise(cfg, one, MINI, PACKAGES).options[0] for one in (plain, knowing))
    assert before.time is not None
    assert after.time is not None
    assert after.time.arithmetic_s == pytest.approx(1.5 * before.time.arithmetic_s, rel=1e-3)
    planned = CliRunner().invoke(app, ["plan", str(folder / "config.yaml"), "--gpu", H100, "--gpus-per-node", "8"])
    assert "learned from 1 run" in planned.output


def test_learned_room_is_context_and_allocator_in_place_of_a_tenth() -> None:
    learned = Overheads(H100, 1, "2026-11-28", context_gib=1.0, allocator=0.02)
    assert learned.leaves_room([Term("weights", 77.0, "")], 80.0)
    assert not learned.leaves_room([Term("weights", 77.6, "")], 80.0)
    assert not Overheads(H100, 1, "2026-11-28", step_time=1.1).leaves_room([Term("weights", 73.0, "")], 80.0)


def test_the_worst_of_memory_and_the_median_of_time_are_learned() -> None:
    one = FinishedRun("a", H100, 10.0, 9.0, 10.0, 11.0, 1.0, 1.1)
    runs = [one, replace(one, device_used_gib=12.5, step_s=1.2), replace(one, reserved_gib=None, step_s=2.0)]
    found = fit_overheads(runs, "2026-11-28")
    assert found.context_gib == 2.5
    assert found.allocator == pytest.approx(10 / 9 - 1, abs=1e-4)
    assert found.step_time == pytest.approx(1.2)
    assert Overheads.of(found.to_dict()) == found
    assert Overheads.of({"device": H100, "runs": "3"}) is None


def test_folders_that_teach_nothing_are_named_together(cuda_run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    on_cpu = cuda_run("on_cpu", device="cpu")
    short = cuda_run("short", steps=2, first_step={})
    other = cuda_run("other", hardware={"device": "NVIDIA A100-SXM4-80GB"})
    with pytest.raises(PlanError) as caught:
        finished_runs([tmp_path / "empty", on_cpu, short, other, cuda_run()])
    said = [(Path(problem.where).name, problem.what) for problem in caught.value.problems]
    assert [where for where, _ in said] == ["empty", "on_cpu", "short", "plan --learn"]
    assert "NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3" in said[-1][1]
    assert finished_run(cuda_run("first_release", first_step={})).step_s is not None
