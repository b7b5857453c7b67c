"""ZeRO's fields as `accelerate config` writes them into its own config, and shipped DeepSpeed files from any folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phi3_dist.errors import PlanError
from phi3_dist.machine.launch_request import LaunchRequest
from phi3_dist.machine.probe import launch_facts

RANKS = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
ZERO = {**RANKS, "ACCELERATE_USE_DEEPSPEED": "true"}
REQUEST = LaunchRequest(2, "a test")


def test_shipped_files_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs/deepspeed/zero3.json", "/somewhere/else/configs/deepspeed/zero2_offload.json"):
        found = launch_facts({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": name}, request=REQUEST)
        assert found.strategy == Path(name).stem
    with pytest.raises(PlanError, match="cannot be read"):
        launch_facts({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/mine.json"}, request=REQUEST)
    (tmp_path / "configs" / "deepspeed").mkdir(parents=True)
    (tmp_path / "configs/deepspeed/zero3.json").write_text('{"zero_optimization": {"stage": 2}}')
    ours = {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero3.json"}
    assert launch_facts(ours, request=REQUEST).strategy == "zero2"  # a file that is there counts


def test_fields_inline_start_as_they_are_planned() -> None:
    environ = {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
    assert launch_facts(environ, request=REQUEST).strategy == "zero3_offload"


def test_the_launchers_list_of_fields_is_taken_away_before_accelerate_compares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accelerate 1.15 raises where the list names a field that its DeepSpeed plugin is given otherwise."""
    from phi3_dist.training.runtime import forget_launchers_settings

    for name in ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.setenv(name, "zero_stage,mixed_precision")
    forget_launchers_settings()
    assert "ACCELERATE_CONFIG_DS_FIELDS" not in os.environ
    assert "ACCELERATE_DEEPSPEED_ZERO_STAGE" not in os.environ
    assert "ACCELERATE_USE_DEEPSPEED" in os.environ


def test_a_file_of_ones_own_is_found_beside_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` hands on a relative path as it is, and libraries look in the present folder alone."""
    from phi3_dist.machine import launch_request

    config, zero = tmp_path / "configs/accelerate/mine.yaml", tmp_path / "configs/deepspeed/zero2.json"
    for file in (config, zero):
        file.parent.mkdir(parents=True)
    config.write_text(
        "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: configs/deepspeed/zero2.json\n"
    )
    zero.write_text('{"zero_optimization": {"stage": 1}}')  # edited: not the shipped one of that name
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    command = ["accelerate", "launch", "--config_file", "../configs/accelerate/mine.yaml", "-m", "phi3_dist", "train"]
    monkeypatch.setattr(launch_request, "_ancestors", lambda: iter([(["bash", "-c", "x"], away), (command, away)]))
    environ = {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero2.json"}
    assert launch_facts(environ, request=REQUEST).strategy == "zero1"
    config.write_text("distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: my_zero.json\n")
    (config.parent / "my_zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = "my_zero.json"
    assert launch_facts(environ, request=REQUEST).strategy == "zero3"
    (config.parent / "my_zero.json").unlink()
    with pytest.raises(PlanError, match=r"my_zero\.json: cannot be read") as caught:
        launch_facts(environ, request=REQUEST)
    assert len(caught.value.problems) == 1
