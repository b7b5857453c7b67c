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


AS_ACCELERATE_CONFIG_WRITES = """compute_environment: LOCAL_MACHINE
debug: false
deepspeed_config:
  gradient_accumulation_steps: 4
  gradient_clipping: 1.0
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  zero3_save_16bit_model: true
  zero_stage: 3
distributed_type: DEEPSPEED
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_process_port: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
BESIDE_A_FILE = """compute_environment: LOCAL_MACHINE
deepspeed_config:
  deepspeed_config_file: mine.json
  gradient_accumulation_steps: 4
  zero_stage: {stage}
distributed_type: DEEPSPEED
machine_rank: 0
main_process_port: 0
mixed_precision: bf16
num_machines: 1
num_processes: 2
use_cpu: false
"""


def handed_on(config: Path) -> dict[str, str]:
    """What Accelerate's launcher sets for a rank, of its config, as its `launch_command` does."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    words = ["--config_file", str(config), "-m", "phi3_dist", "train"]
    options, defaults, mixed = _validate_launch_command(launch_command_parser().parse_args(words))
    fields = [*defaults.deepspeed_config, *(["mixed_precision"] if mixed else [])]
    options.deepspeed_fields_from_accelerate_config = ",".join(fields)
    _, environ = prepare_deepspeed_cmd_env(options)
    return {name: value for name, value in environ.items() if name.startswith("ACCELERATE_")}


def test_both_forms_of_an_accelerate_config_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, Accelerate's plugin raised over the fields that stay in the environment."""
    from accelerate.utils import DeepSpeedPlugin

    from phi3_dist.training.runtime import forget_launchers_settings

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 3}}')
    texts = {"inline": AS_ACCELERATE_CONFIG_WRITES, "file": BESIDE_A_FILE.format(stage=3)}
    for name, text in texts.items():
        config = tmp_path / f"{name}.yaml"
        config.write_text(text)
        for variable, value in handed_on(config).items():
            monkeypatch.setenv(variable, value)
        assert launch_facts({**os.environ, **RANKS}, request=REQUEST).strategy == "zero3"
        whole = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
        with pytest.raises(ValueError, match="will be ignored"):
            DeepSpeedPlugin(hf_ds_config=whole, zero3_init_flag=False)
        forget_launchers_settings()
        DeepSpeedPlugin(hf_ds_config=whole, zero3_init_flag=False)
        for variable in [variable for variable in os.environ if variable.startswith("ACCELERATE_")]:
            monkeypatch.delenv(variable)


def test_fields_that_contradict_the_file_beside_them_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi3_dist.training.preflight.launcher_settings import refuse_contradictions

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}')
    (tmp_path / "two.yaml").write_text(BESIDE_A_FILE.format(stage=2) + "")
    environ = {**RANKS, **handed_on(tmp_path / "two.yaml")}
    launch = launch_facts(environ, request=REQUEST)
    with pytest.raises(PlanError) as raised:
        refuse_contradictions({**environ, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}, launch)
    assert [(problem.where, problem.what) for problem in raised.value.problems] == [
        ("Accelerate config: zero_stage", "is 2, and mine.json beside it says 3"),
        ("Accelerate config: offload_param_device", "is none, and mine.json beside it says cpu"),
    ]
    refuse_contradictions({**environ, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, launch)


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
