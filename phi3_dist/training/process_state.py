"""What Accelerate, torch and transformers keep for a whole process, forgotten with the run that has made it.

Accelerate's states are shared by all Accelerators of a process, and the first one settles device, precision and
strategy: a second run with other ones would be refused, or train with the first one's.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, GradientState, is_initialized
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from phi3_dist.errors import PlanError, Problem

__all__ = ["own_process_state"]

_LAUNCHERS = ("ACCELERATE_", "FSDP_", "DS_")
"""Variables in which a launcher describes the strategy, and which a run takes away once it has its plan."""


@contextmanager
def own_process_state() -> Iterator[None]:
    """A run in here begins with no state of Accelerate's, and leaves none to the next run of this process.

    After an error on several ranks the process group stays: others may wait in it, and no rank can train again.
    Raises PlanError where the caller has an Accelerator of its own, whose settings the run would get.
    """
    if is_initialized():
        what = "has made an Accelerator already, whose device, precision and strategy a run here would get"
        raise PlanError(Problem("this process", what, "train in a process without one"))
    given = torch.distributed.is_initialized()
    launched = {key: value for key, value in os.environ.items() if key.startswith(_LAUNCHERS)}
    try:
        yield
    finally:
        for key in [key for key in os.environ if key.startswith(_LAUNCHERS)]:
            del os.environ[key]
        os.environ.update(launched)
        if not given and torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1:
            torch.distributed.destroy_process_group()
        if given or not torch.distributed.is_initialized():
            AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate has no public word for it
            GradientState._reset_state()
            unset_hf_deepspeed_config()
            gc.collect()  # DeepSpeed's configuration is known to transformers as long as anybody holds it
