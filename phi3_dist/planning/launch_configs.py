"""The text of the shipped Accelerate and DeepSpeed configs. They hold topology and ZeRO, and nothing of the experiment.

Batch, accumulation, clipping and precision are `auto` or absent there: the run file says them, and the runtime fills
them in and shows them. `SHIPPED` is what stands in `configs/`; a test holds each file equal to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_dist.planning.support import STRATEGIES

__all__ = ["accelerate_yaml", "deepspeed_json", "SHIPPED", "write_shipped"]

_ZERO = tuple(strategy for strategy in STRATEGIES if strategy.startswith("zero"))
_BUCKET = 10_000_000
"""Values in a reduce bucket, which DeepSpeed allocates whole (twice where it overlaps): 19 MiB in bf16. A rank-16
adapter of Phi-3-mini goes in three; DeepSpeed's default would take 0.93 GiB."""
ZERO3_LIVE = 300_000_000
"""Parameters under ZeRO-3 up to which the next ones are gathered ahead: two layers and a half of Phi-3-mini, the
largest linear of Phi-4 beside the one before it. DeepSpeed's default of 1e9 keeps 1.86 GiB in bf16, and with its reuse
distance of 1e9 all of a small model from forward to backward, whose memory is what ZeRO-3 is chosen for."""

_LOOKED_UP = """\
# deepspeed_config_file: first from the folder the command runs in, then from the folder above configs/, where it lies.
# The second is this toolkit's doing; for another script pass --deepspeed_config_file."""


def deepspeed_json(strategy: str) -> str:
    """The DeepSpeed config of a ZeRO strategy, as JSON text.

    `stage3_param_persistence_threshold` is 0 because DeepSpeed's default (100,000 values) leaves small LoRA matrices
    unsharded on each rank. Raises `ValueError` for a strategy without DeepSpeed.
    """
    if strategy not in _ZERO:
        raise ValueError(f"{strategy} does not use DeepSpeed; the strategies that do are {', '.join(_ZERO)}")
    stage = int(strategy[4])
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "reduce_bucket_size": _BUCKET}
    if stage < 3:
        zero["allgather_bucket_size"] = _BUCKET
    if strategy.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
        zero["stage3_max_live_parameters"] = ZERO3_LIVE
        zero["stage3_max_reuse_distance"] = 0
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    return json.dumps(config, indent=2) + "\n"


def _header(strategy: str, num_processes: int, num_machines: int, cpu: bool) -> list[str]:
    nodes = f" on {num_machines} nodes" if num_machines > 1 else ""
    process = "process" if num_processes == 1 else "processes"
    lines = [
        f"{strategy}: {num_processes} {process}{nodes}. Written by phi3_dist/planning/launch_configs.py; topology only."
    ]
    if strategy == "single":
        lines.append("One process; it takes the GPU where there is one.")
    elif num_machines > 1:
        lines += [
            "Run once on each node, with what differs from node to node on the command line:",
            "  accelerate launch --config_file FILE --machine_rank R --main_process_ip HEAD --main_process_port PORT …",
            "--num_processes counts the processes of all nodes together.",
        ]
    else:
        lines.append("Another number of processes: accelerate launch --config_file FILE --num_processes N …")
    if cpu and strategy == "ddp":
        lines.append("MULTI_GPU with use_cpu is meant: MULTI_CPU and `--cpu` silently start one process.")
    return lines


def _deepspeed_section(strategy: str, num_machines: int, file: str) -> dict[str, Any]:
    section: dict[str, Any] = {"deepspeed_config_file": file}
    if strategy.startswith("zero3"):
        section["zero3_init_flag"] = True
    if num_machines > 1:
        section["deepspeed_multinode_launcher"] = "standard"
    return {"deepspeed_config": section}


def _fsdp_section(strategy: str) -> dict[str, Any]:
    """FSDP2 that shards each decoder layer. Weights go into their shards as they're read, so nothing is broadcast."""
    return {
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": "Phi3DecoderLayer",
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": strategy.endswith("_offload"),
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_activation_checkpointing": False,
        }
    }


def _yaml_lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """Plain YAML of text, numbers, booleans and sections, in the order given."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_yaml_lines(value, f"{indent}  ")]
        else:
            text = json.dumps(value) if isinstance(value, bool) or value == "NO" else _plain_or_quoted(str(value))
            lines.append(f"{indent}{key}: {text}")
    return lines


def _plain_or_quoted(text: str) -> str:
    return text if all(char.isalnum() or char in "/._-" for char in text) else "'" + text.replace("'", "''") + "'"


def accelerate_yaml(
    strategy: str,
    *,
    num_processes: int,
    num_machines: int = 1,
    cpu: bool = False,
    deepspeed_file: str | None = None,
) -> str:
    """The Accelerate config of a strategy, as YAML text with a comment that says how to run it.

    `num_processes` counts all nodes' processes. `cpu` sets `use_cpu` for DDP; DeepSpeed and FSDP2 find a CPU by
    themselves, and would be replaced by plain DDP if Accelerate were told of it. `deepspeed_file` is the path of the
    DeepSpeed config, `configs/deepspeed/STRATEGY.json` where none is given. Raises `ValueError` for an unknown
    strategy, for a number of processes that does not spread evenly, and for `single` with more than one process.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"there is no strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    if num_machines < 1 or num_processes < 1 or num_processes % num_machines:
        raise ValueError(f"{num_processes} processes do not spread evenly over {num_machines} nodes")
    if strategy == "single" and num_processes > 1:
        raise ValueError(f"strategy single has one process, and {num_processes} were asked for")
    kind = {"single": "NO", "ddp": "MULTI_GPU"}.get(strategy, "DEEPSPEED" if strategy in _ZERO else "FSDP")
    values: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "num_machines": num_machines,
        "num_processes": num_processes,
        "machine_rank": 0,
        "use_cpu": cpu and strategy in ("single", "ddp"),
    }
    if num_machines > 1:
        values |= {"rdzv_backend": "static", "same_network": True}
    elif num_processes > 1:
        values["main_process_port"] = 0  # a free port, so that two runs on one machine don't meet
    if strategy in _ZERO:
        values |= _deepspeed_section(strategy, num_machines, deepspeed_file or f"configs/deepspeed/{strategy}.json")
    elif strategy.startswith("fsdp2"):
        values |= _fsdp_section(strategy)
    comments = [f"# {line}" for line in _header(strategy, num_processes, num_machines, cpu)]
    if strategy in _ZERO and deepspeed_file is None:
        comments.append(_LOOKED_UP)
    return "\n".join([*comments, *_yaml_lines(values)]) + "\n"


def _shipped() -> dict[str, str]:
    files = {
        "configs/accelerate/single_gpu.yaml": accelerate_yaml("single", num_processes=1),
        "configs/accelerate/cpu_2.yaml": accelerate_yaml("ddp", num_processes=2, cpu=True),
    }
    for strategy in STRATEGIES[1:]:
        files[f"configs/accelerate/{strategy}.yaml"] = accelerate_yaml(strategy, num_processes=8)
        files[f"configs/accelerate/{strategy}_multinode.yaml"] = accelerate_yaml(
            strategy, num_processes=16, num_machines=2
        )
    for strategy in _ZERO:
        files[f"configs/deepspeed/{strategy}.json"] = deepspeed_json(strategy)
    return files


SHIPPED: dict[str, str] = _shipped()
"""Each shipped file's text, by its path in the repository."""


def write_shipped(root: Path) -> None:
    """Write every shipped file below `root`, a repository's folder: what to run after a change here."""
    for name, text in SHIPPED.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
