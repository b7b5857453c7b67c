"""What is wrong before a run starts: every mistake in one report, and the table of `train --dry-run`."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Phi3Config
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.config.load import load_run
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import DataError, MachineError, ModelError, PlanError, Problem
from phi3_dist.family.variants import FAMILIES
from phi3_dist.machine.findings import Finding
from phi3_dist.machine.free_room import free_disk_bytes, free_host_gib, refuse_dead_meeting
from phi3_dist.machine.nodes import NodeView
from phi3_dist.machine.process_group import Ranks
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.plan import RunPlan, make_plan
from phi3_dist.training.preflight import dry_run_checks as this_rank
from phi3_dist.training.preflight import hub
from phi3_dist.training.preflight import memory_and_disk as room
from phi3_dist.training.preflight.across_ranks import node_view, seen_from_all_nodes, shared_folder_findings
from phi3_dist.training.preflight.base_and_plan import plan_start
from phi3_dist.training.preflight.before_torch import check_before_torch
from phi3_dist.training.preflight.collect import Collected
from phi3_dist.training.preflight.context_window import context_finding
from phi3_dist.training.preflight.hub import hub_findings, hub_ids
from phi3_dist.training.preflight.launcher_settings import not_read
from phi3_dist.training.preflight.memory_and_disk import Room, checkpoint_bytes, disk_findings, memory_findings
from phi3_dist.training.run_folder import RunFolder
from tests.ranks.launcher import REPO

RUN = REPO / "configs" / "run" / "debug.yaml"
ROWS = REPO / "configs" / "run" / "debug_chats.jsonl"
MINI = FAMILIES[0]
RANK_0 = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
PACKAGES = {"torch": "2.13.0", "deepspeed": "0.19.8", "bitsandbytes": "0.50.2"}
ON_CPU = MachineFacts("cpu", "a CPU", 1, 8.0, 8.0, 2, False, "a plain CPU", PACKAGES)
ON_GPU = MachineFacts("cuda", "a GPU", 8, 80.0, 512.0, 64, True, "tensor cores", PACKAGES, capability=(9, 0))


def run(folder: Path, *overrides: str) -> RunConfig:
    return load_run(RUN, (f"data.train={ROWS}", f"save.folder={folder / 'run'}", *overrides))


def mini(**data: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"source": MINI.hub_ids[0]}, "data": {"train": "me/rows", **data}})


# --- one report ------------------------------------------------------------------------------------------------------


def test_every_mistake_before_torch_is_in_one_report(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "theirs").write_text("")
    wrong = ("lora.targets=[q_proj]", "log.trackers=[nobody]", "train.global_batch=6", "data.validation=gone.csv")
    environ = {**RANK_0, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "z")}
    zero = {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}, "gradient_clipping": 0.5, "optimizer": {}}
    (tmp_path / "z").write_text(json.dumps(zero))
    with pytest.raises(MachineError) as raised:
        check_before_torch(
            run(tmp_path, *wrong), {**environ, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, overwrite=False, resume=False
        )
    assert [problem.where for problem in raised.value.problems] == [
        "log.trackers",
        "lora.targets[0]",
        str(tmp_path / "run"),
        "data.validation",
        "Accelerate config: zero_stage",
        "DeepSpeed config: gradient_clipping",
        "DeepSpeed config: optimizer",
        "DeepSpeed config: zero_optimization.zero_hpz_partition_size",
        "train.global_batch",
    ]
    good = check_before_torch(run(tmp_path, "save.folder=/tmp/none"), RANK_0, overwrite=False, resume=False)
    assert (good.world_size, good.strategy) == (2, "ddp")


def test_half_a_launch_comes_with_the_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as raised:
        check_before_torch(run(tmp_path, "lora.targets=[q_proj]"), {"RANK": "0", "WORLD_SIZE": "2"}, overwrite=False,
                           resume=False)  # fmt: skip
    assert [problem.where for problem in raised.value.problems] == ["environment", "lora.targets[0]"]


def test_mistakes_of_model_and_plan_are_in_one_report(tmp_path: Path) -> None:
    cfg = run(tmp_path, "lora.targets=[lm_head, no_such]", "model.attention=flash_attention_2")
    with pytest.raises(ModelError) as raised:
        plan_start(cfg, ON_CPU, LaunchFacts(), {}, tmp_path / "cache", None)
    assert {"lora.targets", "model.attention"} <= {one.where.partition("[")[0] for one in raised.value.problems}


def test_what_is_collected_is_raised_once_as_the_first() -> None:
    def fail(error: Exception) -> None:
        raise error

    found = Collected()
    found.raise_all()
    assert found.ask(lambda: 3) == 3
    same = Problem("a", "b")
    for error in (PlanError(same), DataError(same, Problem("c", "d"))):
        assert found.ask(lambda error=error: fail(error)) is None  # type: ignore[misc]
    with pytest.raises(PlanError) as raised:
        found.raise_all()
    assert raised.value.problems == (same, Problem("c", "d"))


# --- the launcher's own settings -------------------------------------------------------------------------------------


def test_settings_of_the_launcher_that_differ_are_said(tmp_path: Path) -> None:
    cfg = run(tmp_path, "model.precision=fp32")  # global_batch 4, micro_batch 2
    plan = make_plan(cfg, ON_CPU, LaunchFacts())
    environ = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }
    lines = list(not_read(cfg, environ, plan))
    assert [line.removeprefix("Accelerate config says ").partition(";")[0] for line in lines] == [
        "mixed_precision bf16",
        "gradient_accumulation_steps 4",
        "gradient_clipping 0.5",
        "dynamo_backend inductor",
    ]
    as_run = {
        "ACCELERATE_MIXED_PRECISION": "fp32",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "ACCELERATE_GRADIENT_CLIPPING": "1.0",
        "ACCELERATE_DYNAMO_BACKEND": "no",
    }
    assert list(not_read(cfg, as_run, plan)) == []
    unasked = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    assert list(not_read(cfg, unasked, plan)) == []
    fsdp = {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    assert list(not_read(cfg, fsdp, plan)) == []
    assert len(list(not_read(cfg, fsdp, replace(plan, strategy="fsdp2")))) == 2


# --- room ------------------------------------------------------------------------------------------------------------


def plan_of(cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts) -> RunPlan:
    return make_plan(cfg, machine, launch, family_or_shape=MINI)


def test_free_memory_against_the_plan() -> None:
    launch = LaunchFacts()
    plan = plan_of(mini(), ON_GPU, launch)
    levels = {}
    for gib in (79.0, 8.0, 2.0):
        first, *_ = memory_findings(plan, launch, Room(gib, 512.0))
        levels[gib] = first.level
    assert levels == {79.0: "ok", 8.0: "warn", 2.0: "bad"}
    (bad, *_) = memory_findings(plan, launch, Room(2.0, 512.0))
    assert bad.what.startswith("2.0 GiB of the device are free, and the run is planned with ")
    on_cpu = plan_of(mini(), replace(ON_CPU, host_memory_gib=64.0), launch)
    assert [one.level for one in memory_findings(on_cpu, launch, Room(None, 1.0))] == ["warn"], "its base is mapped"


def test_a_start_waits_a_moment_for_memory_and_then_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg, launch = mini(), LaunchFacts()
    plan = plan_of(cfg, ON_GPU, launch)
    free: Iterator[float] = iter([2.0, 2.0, 79.0])
    monkeypatch.setattr(room.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(room, "free_device_gib", lambda rank: next(free))
    assert room.refuse_no_room(cfg, plan, launch, {}, MINI.shape, local_rank=0) == []
    monkeypatch.setattr(room, "free_device_gib", lambda rank: 2.0)
    with pytest.raises(MachineError, match="nvidia-smi names it"):
        room.refuse_no_room(cfg, plan, launch, {}, MINI.shape, local_rank=0)


def test_disk_for_the_checkpoints_that_are_kept() -> None:
    cfg = mini()
    adapter, one = checkpoint_bytes(cfg, MINI.shape)
    assert adapter == 4 * 25_165_824 == one // 3
    (bad,) = disk_findings(cfg, MINI.shape, None, 5 * one)
    assert (bad.level, "the adapter and 5 checkpoints take 1.5 GiB" in bad.what) == ("bad", True)
    assert [row.level for row in disk_findings(cfg, MINI.shape, 100, 5 * one)] == ["ok"], "one checkpoint in 100 steps"
    assert list(disk_findings(cfg, MINI.shape, None, None)) == []
    assert free_host_gib() > 0.1
    assert free_disk_bytes(Path("/no/such/folder")) == free_disk_bytes(Path("/"))


def test_a_place_of_meeting_that_is_dead_or_taken() -> None:
    refuse_dead_meeting({})
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = {**RANK_0, "MASTER_PORT": str(held.getsockname()[1])}
        with pytest.raises(MachineError, match="is taken: Address already in use"):
            refuse_dead_meeting(port)
        refuse_dead_meeting({**port, "RANK": "1"})
        refuse_dead_meeting({**port, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    refuse_dead_meeting(port)
    with pytest.raises(MachineError, match="nobody answers there"):
        refuse_dead_meeting({**port, "TORCHELASTIC_USE_AGENT_STORE": "True"})


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_what_is_not_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = mini()
    assert hub_ids(cfg) == (MINI.hub_ids[0], "me/rows")
    (off,) = hub_findings(cfg, {"HF_HUB_OFFLINE": "1"})
    assert (off.level, "HF_HUB_OFFLINE is set" in off.what) == ("bad", True)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://user:secret@127.0.0.1:{closed.getsockname()[1]}"
    (gone,) = hub_findings(cfg, {"HF_ENDPOINT": address})
    assert (gone.level, "secret" in gone.what) == ("bad", False)
    monkeypatch.setattr(hub, "_unreachable", lambda endpoint: "")
    (there,) = hub_findings(cfg, {})
    assert (there.level, "fetched at the start" in there.what) == ("ok", True)
    monkeypatch.setattr(hub, "_cached", lambda name, revision, weights: True)
    (here,) = hub_findings(cfg, {"HF_HUB_OFFLINE": "1"})
    assert here.level == "ok"


def test_a_base_of_which_a_part_is_in_the_cache_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--me--base" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    files = {"model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'}
    files |= {"config.json": "{}", "1.safetensors": ""}
    for name, text in files.items():
        (snapshot / name).write_text(text)
        assert not hub._cached("me/base", None, weights=True)
    assert hub._cached("me/base", None, weights=False)
    (snapshot / "2.safetensors").write_text("")
    assert hub._cached("me/base", None, weights=True)


def test_nothing_is_asked_for_what_lies_here(tmp_path: Path) -> None:
    assert list(hub_findings(run(tmp_path), {})) == []


# --- several ranks ---------------------------------------------------------------------------------------------------


class TwoNodes(Ranks):
    """Rank 0 of two, whose other rank sees nothing of what rank 0 writes."""

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, NodeView):
            return [value, NodeView(1, "other", value.time_s + 60, sees=False)]
        return [value, value]


def test_a_folder_that_another_node_does_not_see(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    folder.parent.mkdir()
    (blind,) = shared_folder_findings(TwoNodes(world=2, nodes=2), folder)
    assert (blind.level, blind.check) == ("bad", "shared folder")
    assert "is not seen on other" in blind.what
    assert list(folder.parent.iterdir()) == [], "nothing is left"
    assert shared_folder_findings(Ranks(world=2), folder) == [], "one node"
    views = TwoNodes().gather(node_view(folder.parent, 0))
    assert [(one.check, one.level) for one in seen_from_all_nodes(views, folder)] == [
        ("clocks", "warn"),
        ("shared folder", "warn"),
    ]


# --- the table -------------------------------------------------------------------------------------------------------


def states(findings: list[Finding]) -> dict[str, str]:
    return {one.check: one.level for one in findings}


def test_a_dry_run_says_what_a_start_needs_and_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["train", str(RUN), f"data.train={ROWS}", f"save.folder={folder}", "--dry-run"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.output.endswith("this run can start\n")
    for check in ("launch", "port", "trackers", "run folder", "model", "plan", "host memory", "disk", "template",
                  "supervised tokens", "context"):  # fmt: skip
        assert f"\n{check}" in f"\n{done.output}", check
    assert not folder.exists()
    gone = [*words, "data.train=gone.jsonl", "lora.targets=[q_proj]", "log.trackers=[nobody]"]
    gone.append("model.attention=flash_attention_2")
    done = CliRunner().invoke(app, gone)
    assert done.exit_code == 8, done.output
    for what in ("nobody", "q_proj", "flash_attention_2", "gone.jsonl"):
        assert what in done.output
    assert "4 of these would end the run" in done.output


def test_a_folder_in_which_another_process_trains(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(overwrite=False)
    cfg = run(tmp_path)
    (held,) = (one for one in this_rank.look(cfg, overwrite=True, resume=False).findings if one.check == "run folder")
    assert (held.level, held.code, f"process {os.getpid()} trains in here" in held.what) == ("bad", 7, True)
    folder._release()
    looked = this_rank.look(cfg, overwrite=True, resume=False)
    assert states(list(looked.findings))["run folder"] == "ok"


def test_rows_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_0:
        monkeypatch.delenv(name, raising=False)
    learned = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 40}]}
    asked = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(learned) + "\n")
    looked = this_rank.look(run(tmp_path, f"data.train={rows}"), overwrite=False, resume=False)
    assert (states(list(looked.findings))["supervised tokens"], looked.device) == ("ok", "cpu")
    rows.write_text(json.dumps(asked) + "\n")
    looked = this_rank.look(run(tmp_path, f"data.train={rows}"), overwrite=False, resume=False)
    assert states(list(looked.findings))["supervised tokens"] == "bad"
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 5000}]}
    rows.write_text(json.dumps(long) + "\n")
    cfg = run(tmp_path, f"data.train={rows}", "data.pack_length=8192")
    (context,) = (one for one in this_rank.look(cfg, overwrite=False, resume=False).findings if one.check == "context")
    assert (context.level, "window 4,096: rows reach beyond" in context.what) == ("warn", True)


def test_the_longest_row_and_longropes_factors(tmp_path: Path) -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10000.0}
    scaling["original_max_position_embeddings"] = 64
    base = Phi3Config(hidden_size=64, num_attention_heads=4, max_position_embeddings=256,
                      original_max_position_embeddings=64, rope_parameters=scaling,
                      pad_token_id=0)  # fmt: skip
    for longest, longrope, level, says in (
        (60, "auto", "ok", "one longer row turns the whole run"),
        (100, "auto", "ok", "LongRoPE's long factors"),
        (100, "short", "warn", "longer than the short factors serve"),
        (300, "auto", "warn", "beyond what the model was trained for"),
    ):
        found = context_finding(run(tmp_path, f"model.longrope={longrope}"), base, longest)
        assert (found.level, says in found.what) == (level, True), found


def test_half_a_launch_is_a_row_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    looked = this_rank.look(run(tmp_path), overwrite=False, resume=False)
    assert looked.launch is None
    assert states(list(looked.findings))["launch"] == "bad"
    assert states(list(looked.findings))["model"] == "ok", "the rest is looked at all the same"
