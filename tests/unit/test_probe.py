"""The launch as the environment tells it, and the facts of this machine."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from phi3_dist.errors import PlanError
from phi3_dist.machine.launch_request import LaunchRequest
from phi3_dist.machine.probe import launch_facts, no_compiler, probe
from phi3_dist.planning.launch_configs import SHIPPED

MEETING = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TWO = {**MEETING, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "RANK": "1"}
DEEPSPEED = {**TWO, "ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},  # as some images have it
        {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},  # as job scripts export it
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {"PMI_SIZE": "", "SLURM_STEP_NUM_TASKS": "x" * 100},
    ],
)
def test_what_says_that_this_process_is_alone_is_no_launch(environ: dict[str, str]) -> None:
    assert launch_facts(environ).world_size == 1


def test_a_launchers_rank_below_mpi_is_the_launchers() -> None:
    assert launch_facts({**TWO, "PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}).world_size == 2


def test_without_a_launcher() -> None:
    facts = launch_facts({})
    assert (facts.world_size, facts.nodes, facts.rank, facts.strategy) == (1, 1, 0, "single")
    assert facts.zero_settings == {}


def test_ddp_and_nodes() -> None:
    facts = launch_facts(TWO, request=LaunchRequest(2, "cpu_2.yaml: num_processes"))
    assert (facts.strategy, facts.world_size, facts.rank, facts.nodes) == ("ddp", 2, 1, 1)
    assert (facts.asked_world_size, facts.asked_by) == (2, "cpu_2.yaml: num_processes")
    assert launch_facts({**MEETING, "RANK": "8", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}).nodes == 2
    assert launch_facts({**TWO, "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}).nodes == 2


@pytest.mark.parametrize("name", sorted(name for name in SHIPPED if name.endswith(".json")))
def test_each_shipped_deepspeed_file_gives_its_strategy(name: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(SHIPPED[name])
    facts = launch_facts({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert facts.strategy == Path(name).stem
    assert facts.zero_settings == json.loads(SHIPPED[name])


@pytest.mark.parametrize(
    ("fields", "strategy"),
    [
        ({}, "zero2"),
        ({"ZERO_STAGE": "1"}, "zero1"),
        ({"ZERO_STAGE": "3", "OFFLOAD_PARAM_DEVICE": "none"}, "zero3"),
        ({"ZERO_STAGE": "2", "OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "zero2_offload"),
        ({"ZERO_STAGE": "3", "OFFLOAD_PARAM_DEVICE": "cpu"}, "zero3_offload"),
    ],
)
def test_accelerates_own_deepspeed_fields(fields: dict[str, str], strategy: str) -> None:
    environ = {**DEEPSPEED, **{f"ACCELERATE_DEEPSPEED_{key}": value for key, value in fields.items()}}
    facts = launch_facts(environ)
    assert facts.strategy == strategy
    assert facts.zero_settings["zero_optimization"]["stage"] == int(strategy[4])


def test_fsdp() -> None:
    assert launch_facts(FSDP).strategy == "fsdp2"
    assert launch_facts({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}).strategy == "fsdp2_offload"


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, "configs/accelerate/fsdp2.yaml"),
        ({**TWO, "ACCELERATE_USE_FSDP": "true"}, "configs/accelerate/fsdp2.yaml"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "use stage 1, 2 or 3"),
        (
            {
                **DEEPSPEED,
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
                "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
            },
            "zero2_offload.yaml",
        ),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "needs stage 3"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "only host memory"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "absent.json"}, "absent.json: cannot be read"),
        ({**DEEPSPEED, "ACCELERATE_USE_CPU": "true"}, "unset it"),
        ({**TWO, "ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({**TWO, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ({**TWO, "WORLD_SIZE": "two"}, "not a whole number"),
        ({**TWO, "WORLD_SIZE": "9" * 5000}, "not a whole number"),
        ({**TWO, "RANK": "２"}, "not a whole number"),
        ({**TWO, "RANK": "2"}, "rank 2 (on its node 0) of a world of 2, which cannot be"),
        ({**TWO, "MASTER_PORT": "70000"}, "ports end at 65535"),
        # left over in a shell, or set by a scheduler: all that is missing is named, and what to unset
        ({"RANK": "1"}, "RANK=1, and WORLD_SIZE and LOCAL_RANK and MASTER_ADDR and MASTER_PORT not"),
        ({"LOCAL_RANK": "0"}, "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "and LOCAL_RANK not"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun (Open MPI) has started this process 4"),
        ({"PMI_SIZE": "2"}, "each would train alone"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun has started this process 8 times"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "a\0b"}, "cannot be read"),
    ],
)
def test_launches_that_are_refused(environ: dict[str, str], part: str) -> None:
    with pytest.raises(PlanError) as caught:
        launch_facts(environ)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"), [("{", "is not JSON"), ("{}", "zero_optimization"), ("[]", "zero_optimization")]
)
def test_broken_deepspeed_files(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(PlanError, match=part):
        launch_facts({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


def test_this_machine_on_its_cpu() -> None:
    facts = probe(use_cpu=True)
    assert facts.device == "cpu"
    assert facts.devices_per_node == 1
    assert facts.device_memory_gib == facts.host_memory_gib > 0
    assert facts.cpu_count >= 1
    assert facts.fast_bf16 is not ("neither" in facts.fast_bf16_reason)
    assert facts.packages["torch"]


def test_fast_bf16_is_what_the_cpu_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for has, fast in (({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        assert probe(use_cpu=True).fast_bf16 is fast


def test_what_keeps_torch_from_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CXX", "g++")
    assert no_compiler(cuda=False) == "there is no compiler (g++)"
    assert no_compiler(cuda=True) == "there is no compiler (gcc or clang)"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert "Python.h" in no_compiler(cuda=False)
    (tmp_path / "Python.h").touch()
    assert no_compiler(cuda=False) == ""
    monkeypatch.setenv("CC", "g++")
    assert no_compiler(cuda=True) == ("" if find_spec("triton") else "Triton is not installed")
