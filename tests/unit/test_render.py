"""Shipped configs: equal to what is rendered, and read by Accelerate's and DeepSpeed's own code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from phi3_dist.machine.launch_request import read_command_line
from phi3_dist.planning.launch_configs import SHIPPED, accelerate_yaml, deepspeed_json, write_shipped
from phi3_dist.planning.support import STRATEGIES

REPO = Path(__file__).resolve().parents[2]
YAMLS = sorted(name for name in SHIPPED if name.endswith(".yaml"))
JSONS = sorted(name for name in SHIPPED if name.endswith(".json"))


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_file_equals_what_is_rendered(name: str) -> None:
    assert (REPO / name).read_text(encoding="utf-8") == SHIPPED[name]


def test_writing_them_anew_gives_the_same_files(tmp_path: Path) -> None:
    write_shipped(tmp_path)
    written = {str(path.relative_to(tmp_path)): path.read_text("utf-8") for path in tmp_path.rglob("*.*")}
    assert written == SHIPPED


def test_no_other_file_lies_there() -> None:
    there = {
        str(path.relative_to(REPO))
        for folder in ("accelerate", "deepspeed")
        for path in (REPO / "configs" / folder).iterdir()
    }
    assert there == set(SHIPPED)


def test_every_strategy_is_shipped_in_both_forms() -> None:
    for strategy in STRATEGIES[1:]:
        assert {f"configs/accelerate/{strategy}.yaml", f"configs/accelerate/{strategy}_multinode.yaml"} <= set(SHIPPED)


@pytest.mark.parametrize("name", YAMLS)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(REPO / name))
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision is None
    kinds = {"zero": "DEEPSPEED", "fsdp": "FSDP", "ddp_": "MULTI_GPU", "ddp.": "MULTI_GPU", "cpu_": "MULTI_GPU"}
    assert config.distributed_type.value == kinds.get(Path(name).name[:4], "NO")
    assert config.use_cpu is (Path(name).name == "cpu_2.yaml")
    assert config.num_machines == (2 if "multinode" in name else 1)
    request = read_command_line(["accelerate", "launch", "--config_file", name, "-m", "x"], REPO, {})
    assert request is not None
    assert request.asked_world_size == config.num_processes
    if config.deepspeed_config:
        assert config.deepspeed_config["deepspeed_config_file"] in SHIPPED
        refused = ("gradient_accumulation_steps", "gradient_clipping", "zero_stage", "mixed_precision")
        assert not set(refused) & set(config.deepspeed_config)  # Accelerate raises on these beside a file
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_offload_params"] is ("offload" in name)


@pytest.mark.parametrize("name", JSONS)
def test_json_holds_zero_alone(name: str) -> None:
    config = json.loads(SHIPPED[name])
    zero = config.pop("zero_optimization")
    assert config.pop("zero_allow_untested_optimizer") is True
    assert config.pop("bf16") == {"enabled": "auto"}
    assert set(config.values()) == {"auto"}
    assert zero["stage"] == int(Path(name).stem[4])
    assert ("offload_optimizer" in zero) is ("offload" in name)
    if zero["stage"] == 3:
        assert zero["stage3_param_persistence_threshold"] == 0


@pytest.mark.parametrize("name", JSONS)
def test_deepspeed_reads_it_once_the_autos_are_filled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
    zero = json.loads(SHIPPED[name])["zero_optimization"]
    parsed = zero_config.DeepSpeedZeroConfig(**zero)
    assert parsed.stage == zero["stage"]
    assert set(zero) <= set(type(parsed).model_fields) | {
        field.alias for field in type(parsed).model_fields.values() if field.alias
    }


def test_what_cannot_be_rendered() -> None:
    with pytest.raises(ValueError, match="does not use DeepSpeed"):
        deepspeed_json("ddp")
    with pytest.raises(ValueError, match="no strategy"):
        accelerate_yaml("zero4", num_processes=2)
    with pytest.raises(ValueError, match="evenly"):
        accelerate_yaml("ddp", num_processes=3, num_machines=2)
    with pytest.raises(ValueError, match="has one process"):
        accelerate_yaml("single", num_processes=2)


def test_only_ddp_is_told_of_a_cpu() -> None:
    assert "use_cpu: true" in accelerate_yaml("ddp", num_processes=2, cpu=True)
    assert "use_cpu: true" not in accelerate_yaml("zero2", num_processes=2, cpu=True)
