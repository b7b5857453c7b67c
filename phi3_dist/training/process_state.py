"""What Accelerate, torch and transformers keep for a whole process, forgotten with the run that has made it.

Accelerate's states are shared by all Accelerators of a process, and the first one settles device, precision and
strategy: a second run with other ones would be refused, or train with the first one's.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, GradientState, is_initialized
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from phi3_dist.errors import PlanError, Problem

__all__ = ["keep_group_until_exit", "own_process_state"]

_LAUNCHERS = ("ACCELERATE_", "FSDP_", "DS_")
"""Variables in which a launcher describes the strategy, and which a run takes away once it has its plan."""


@contextmanager
def own_process_state() -> Iterator[None]:
    """A run in here begins with no state of Accelerate's, and leaves none to the next run of this process.

    After an error on several ranks all stays as it is: others may wait in a collective, and no rank can train again.
    An Accelerator that the caller has made stays too. Raises PlanError where its precision is another than the run's.
    """
    if is_initialized():
        yield from _beside_the_callers()
        return
    launched = {key: value for key, value in os.environ.items() if key.startswith(_LAUNCHERS)}
    try:
        yield
    except BaseException:
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            _forget(launched)
        raise
    _forget(launched)


def _beside_the_callers() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        what = "has made an Accelerator already, of another precision than the run's"
        raise PlanError(Problem("this process", what, "train before it, or in a process without one")) from error


def _forget(launched: dict[str, str]) -> None:
    for key in [key for key in os.environ if key.startswith(_LAUNCHERS)]:
        del os.environ[key]
    os.environ.update(launched)
    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate has no public word for it
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    gc.collect()  # DeepSpeed's configuration is known to transformers as long as anybody holds it


def keep_group_until_exit() -> None:
    """Leave the process group to the next run of these ranks.

    A second one can't be made through the same launcher: gloo finds the addresses of the first in the launcher's store
    (torch 2.13), and DeepSpeed holds groups of the first.
    """
    if torch.distributed.is_initialized():
        atexit.unregister(_destroy_group)
        atexit.register(_destroy_group)


def _destroy_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
