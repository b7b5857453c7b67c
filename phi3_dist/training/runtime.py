"""The one place that builds an Accelerator, and the proof that what came up is what was planned."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, ProjectConfiguration

from phi3_dist.errors import MachineError, Problem
from phi3_dist.machine.doctor import stale_extension_locks
from phi3_dist.machine.storage import shared_memory_bytes, shared_memory_problem
from phi3_dist.planning.plan import RunPlan, check_reality
from phi3_dist.training.process_state import keep_group_until_exit
from phi3_dist.training.sequence_parallel import Cut, join_group

__all__ = [
    "Runtime",
    "deepspeed_config",
    "forget_launchers_settings",
    "is_deepspeed",
    "is_fsdp",
    "start_runtime",
    "with_plan",
]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def is_deepspeed(strategy: str) -> bool:
    return strategy.startswith("zero")


def is_fsdp(strategy: str) -> bool:
    return strategy.startswith("fsdp2")


@dataclass(frozen=True)
class Runtime:
    """Who this process is among the others, and where it computes."""

    accelerator: Accelerator
    plan: RunPlan
    ds_config: Mapping[str, Any] | None
    cut: Cut | None = None
    """This rank's part of each pack, where ranks share them."""

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that share their packs: as many as ranks, where none does."""
        return self.world // (self.cut.degree if self.cut else 1)

    @property
    def data_rank(self) -> int:
        """The number of this rank's group."""
        return self.rank // (self.cut.degree if self.cut else 1)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        # Accelerate says cpu:0, and torch copies a tensor from cpu to cpu:0: the mapped base would be copied
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def zero3(self) -> Any:
        """transformers' HfDeepSpeedConfig where ZeRO-3 is on, else None."""
        third = self.plan.strategy.startswith("zero3")
        return self.accelerator.state.deepspeed_plugin.dschf if third else None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.plan.precision]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on every rank. Collective."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def broadcast(self, value: str) -> str:
        """Rank 0's value on every rank. Collective."""
        held = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(held)
        return held[0]

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def release(self, *, keep_group: bool = False) -> None:
        """Free the wrapped model before the process group goes, at once or with the process. Collective.

        DDP's reducer holds the group. Freed after it, its destructor joins gloo's thread while holding the lock of the
        interpreter that this thread waits for: the rank never exits (torch 2.13, seen on two nodes of two ranks).
        """
        self.accelerator.free_memory()
        gc.collect()
        self.barrier()
        if keep_group:
            keep_group_until_exit()
        else:
            self.accelerator.end_training()


def deepspeed_config(plan: RunPlan, zero: Mapping[str, Any], max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration: ZeRO from the JSON file, everything else from the run file's plan."""
    return {
        **zero,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        # DeepSpeed counts each rank's micro batches, also where several ranks share one
        "train_batch_size": plan.micro_batch * plan.accumulation * plan.world_size,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": plan.precision == "bf16"},
        # as the other strategies: micro batches are added up, and ranks, in float32
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        # the trained weights are few: torch's AdamW on the CPU costs nothing, and no C++ build is needed
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def with_plan(runtime: Runtime, plan: RunPlan) -> Runtime:
    """The runtime for a plan that differs in its micro batches alone, before anything is wrapped."""
    if runtime.ds_config is not None:
        plugin: Any = runtime.accelerator.state.deepspeed_plugin
        sizes = {
            "train_micro_batch_size_per_gpu": plan.micro_batch,
            "gradient_accumulation_steps": plan.accumulation,
        }
        plugin.deepspeed_config.update(sizes)
        runtime.accelerator.gradient_accumulation_steps = plan.accumulation
        return replace(runtime, plan=plan, ds_config={**runtime.ds_config, **sizes})
    return replace(runtime, plan=plan)


def _quiet(rank: int) -> None:
    """Libraries' own chatter: warnings and above on rank 0, errors elsewhere."""
    level = logging.WARNING if rank == 0 else logging.ERROR
    for name in ("DeepSpeed", "accelerate", "transformers", "torch.distributed", "peft"):
        logging.getLogger(name).setLevel(level)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _refuse_stale_locks() -> None:
    """A lock left by a killed build makes DeepSpeed wait for ever, without a word: name it instead."""
    stale = stale_extension_locks()
    if stale:
        raise MachineError(
            *(
                Problem(str(lock), "a killed build left this lock: DeepSpeed waits for it", f"rm {lock}")
                for lock in stale
            )
        )


def _refuse_small_shared_memory(plan: RunPlan) -> None:
    problem = shared_memory_problem(plan.world_size // plan.nodes, shared_memory_bytes())
    if problem is not None:
        raise MachineError(problem)


def _start_both_backends() -> None:
    """NCCL for tensors on a GPU and gloo for those on the host: FSDP2's offload has shards there, and a norm of them.

    Accelerate would start NCCL alone; a process group that exists already it takes as it is.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cuda:nccl,cpu:gloo", device_id=device)


def forget_launchers_settings() -> None:
    """Take the launcher's copy of the settings out of the environment: the plan is the only source.

    With them goes the list of the Accelerate config's own fields (`accelerate config` writes ZeRO's and
    `mixed_precision` there), over which Accelerate's plugin would raise.
    """
    for key in [k for k in os.environ if k.startswith(("ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS"))]:
        del os.environ[key]


def start_runtime(
    plan: RunPlan, zero: Mapping[str, Any], *, max_grad_norm: float, trackers: tuple[str, ...], folder: Path
) -> Runtime:
    """Build the Accelerator that the plan asks for, and refuse to go on where reality differs.

    On a CPU each library needs telling: DeepSpeed its accelerator before it is imported, Accelerate that several
    CPU processes are one world. FSDP2 is not left to Accelerate, which shards nothing on a CPU; see engines/fsdp2.py.
    Raises PlanError.
    """
    on_cpu = plan.device == "cpu"
    rank = int(os.environ.get("RANK", "0"))
    _quiet(rank)
    kwargs: list[Any] = []
    options: dict[str, Any] = {}
    ds_config = None
    if is_deepspeed(plan.strategy):
        _refuse_stale_locks()
        if on_cpu:
            _refuse_small_shared_memory(plan)
        # torch compiles DeepSpeed's operators with the ninja on the path; another one's build is made anew each time
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
            kwargs.append(InitProcessGroupKwargs(backend="gloo"))
        ds_config = deepspeed_config(plan, zero, max_grad_norm)
        forget_launchers_settings()
        options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=ds_config, zero3_init_flag=False)
    else:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        options["cpu"] = on_cpu
    if not on_cpu and not is_deepspeed(plan.strategy) and "RANK" in os.environ:
        _start_both_backends()
    mixed = "bf16" if plan.precision == "bf16" and not is_fsdp(plan.strategy) else "no"
    accelerator = Accelerator(
        mixed_precision=mixed,
        gradient_accumulation_steps=plan.accumulation if ds_config else 1,
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        kwargs_handlers=kwargs,
        step_scheduler_with_optimizer=False,
        **options,
    )
    found = "deepspeed" if accelerator.distributed_type.value == "DEEPSPEED" else "other"
    check_reality(
        plan,
        world_size=accelerator.num_processes,
        strategy=plan.strategy if (found == "deepspeed") == is_deepspeed(plan.strategy) else found,
        device=accelerator.device.type,
    )
    cut = join_group(accelerator.process_index, accelerator.num_processes, plan.sequence_parallel)
    return Runtime(accelerator, plan, ds_config, cut)
