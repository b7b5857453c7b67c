"""What is answered before torch is imported: rows that are not there, what does not fit, targets, trackers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import ConfigError, DataError, MachineError, ModelError, PlanError
from phi3_dist.family.variants import FAMILIES
from phi3_dist.machine.launcher import deepspeed_file_beside
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.plan import make_plan
from phi3_dist.planning.preview import check_fit, check_rows
from phi3_dist.training.preflight.before_torch import check_before_torch
from phi3_dist.training.preflight.trackers_and_inputs import check_trackers
from tests.ranks.launcher import REPO

CONFIGS = REPO / "configs" / "accelerate"
RUN = REPO / "configs" / "run" / "debug.yaml"
MINI = FAMILIES[0]
RANK_1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
PACKAGES = {"torch": "2.13.0", "deepspeed": "0.19.8", "bitsandbytes": "0.50.2"}


def run(**sections: dict[str, Any]) -> RunConfig:
    base: dict[str, Any] = {"model": {"source": MINI.hub_ids[0]}, "data": {"train": "me/rows"}}
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return RunConfig.model_validate(base)


def phi3_dist(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """With a torch that can't be imported."""
    (folder / "torch.py").write_text("raise SystemExit('torch is imported')\n")
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPO}"}
    command = [sys.executable, "-m", "phi3_dist", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").write_text("")
    check_rows(run(data={"train": [str(tmp_path / "here.jsonl"), "me/a.set-2"], "validation": str(tmp_path)}))
    names = ["gone.jsonl", "data/gone.parquet", "./a", "a/b/c", {"path": "gone", "weight": 2.0}]
    with pytest.raises(DataError) as raised:
        check_rows(run(data={"train": names, "validation": "gone.csv"}))
    assert [p.what.split(" ")[0] for p in raised.value.problems] == [
        "gone.jsonl", "data/gone.parquet", "./a", "a/b/c", "gone", "gone.csv",
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_does_not_fit_comes_with_what_would(device: str) -> None:
    cfg = run(data={"pack_length": 4096}, train={"global_batch": 8, "micro_batch": 4})
    launch = LaunchFacts(1, 1, "single")

    def check(cfg: RunConfig, gib: float) -> None:
        host = gib if device == "cpu" else float("inf")
        machine = MachineFacts(device, device, 1, gib, host, 1, device == "cuda", "assumed", PACKAGES)
        check_fit(cfg, machine, launch, make_plan(cfg, machine, launch, family_or_shape=MINI), MINI)

    check(cfg, 200.0)
    small = 12.0 if device == "cuda" else 18.0
    with pytest.raises(PlanError, match="fits with ") as raised:
        check(cfg, small)
    fix = raised.value.problems[0].fix
    first = fix.removeprefix("fits with ").split(", or ")[0]
    sections: dict[str, dict[str, Any]] = {}
    for word in first.split(" "):
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        typed = {"true": True}.get(value, int(value) if value.isdecimal() else value)
        sections.setdefault(section, getattr(cfg, section).model_dump())[name] = typed
    check(run(**{**{k: getattr(cfg, k).model_dump() for k in ("data", "train", "model")}, **sections}), small)
    with pytest.raises(PlanError, match=r"more memory|take"):
        check(cfg, 2.0)


def test_the_verb_plan_refuses_and_says_what_to_do(tmp_path: Path) -> None:
    done = phi3_dist("plan", str(RUN), "data.train=gone.jsonl", folder=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "gone.jsonl is not there" in done.stderr
    rows = f"data.train={RUN}"
    source = f"model.source={MINI.hub_ids[0]}"
    done = phi3_dist("plan", str(RUN), rows, source, "--memory-gib", "1", folder=tmp_path)
    assert done.returncode == 5
    assert "every strategy needs more than 1.0 GiB a device" in done.stderr
    assert "too large" in done.stdout
    done = phi3_dist("plan", str(RUN), rows, source, "--memory-gib", "9", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "too large: fits with " in done.stdout
    assert "recommended: " in done.stdout


def test_targets_and_trackers() -> None:
    for cfg, error, says in (
        (run(lora={"targets": ["o_proj", "q_proj"]}), ModelError, r"lora.targets\[1\].*'q_proj'.*\n.*qkv_proj"),
        (run(lora={"targets": ["model.layers.0.mlp.up_proj"]}), ModelError, "'model.layers.0.mlp.up_proj' matches no"),
        (run(log={"trackers": ["tensorboad"]}), MachineError, "'tensorboad' is not a tracker"),
        (run(log={"trackers": ["clearml"]}), MachineError, "'clearml' is not installed"),
    ):
        with pytest.raises(error, match=says):
            check_before_torch(cfg, RANK_1, overwrite=False, resume=False)
    good = ["o_proj", "lm_head", "embed_tokens", "model.layers.0.mlp.down_proj"]
    check_before_torch(run(lora={"targets": good}), RANK_1, overwrite=False, resume=False)


@pytest.mark.parametrize("project", ["../../x", "/tmp/x", "a/../../b", "..", "", "."])
def test_a_project_is_no_way_out_of_the_run_folder(project: str) -> None:
    with pytest.raises(ConfigError, match=r"log\.project"):
        check_trackers(run(log={"project": project}).log)
    check_trackers(run(log={"project": project, "trackers": []}).log)
    check_trackers(run(log={"project": "team/phi3"}).log)


def test_a_run_is_refused_before_torch(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text("theirs\n")
    for words, code, says in (
        (("save.folder=project", "--overwrite"), 7, "holds no run"),
        (("lora.targets=[q_proj]",), 4, "qkv_proj"),
        (("log.trackers=[nobody]",), 8, "is not a tracker"),
        (("log.project=../../x",), 2, "log.project"),
    ):
        done = phi3_dist("train", str(RUN), *words, folder=tmp_path)
        assert done.returncode == code, done.stderr
        assert says in done.stderr
        assert "torch is imported" not in done.stderr


def test_a_deepspeed_file_is_found_beside_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder than the repository Accelerate does not find it."""
    monkeypatch.chdir(tmp_path)
    assert deepspeed_file_beside(CONFIGS / "zero3.yaml") == REPO / "configs" / "deepspeed" / "zero3.json"
    assert deepspeed_file_beside(CONFIGS / "ddp.yaml") is None
    assert deepspeed_file_beside(tmp_path / "none.yaml") is None
    monkeypatch.chdir(REPO)
    assert deepspeed_file_beside(CONFIGS / "zero3.yaml") is None
