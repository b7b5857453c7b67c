"""The fields that are `auto`, settled for a whole run: the same on every rank, and as they were when it is resumed.

Each rank first settles them for its own device, since the packs come before the process group. Then the ranks tell each
other: what rank 0's run folder holds counts first, else the smallest device. A rank that had settled otherwise does it
again; its tokens are in the cache by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from phi3_dist.config.schema import RunConfig
from phi3_dist.config.yaml_text import YamlFault, read_yaml_file
from phi3_dist.data.cache.length_notes import note_lengths
from phi3_dist.data.prepare import row_lengths
from phi3_dist.planning.auto_fields import RowLengths, auto_fields, is_auto, plan_with_auto
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.plan import RunPlan
from phi3_dist.training.inputs import RunInputs, prepare_rows
from phi3_dist.training.runtime import Runtime, with_plan

__all__ = ["AutoValues", "kept_values"]


def kept_values(folder: Path, cfg: RunConfig) -> dict[str, Any]:
    """What the run in `folder` has in the place of the fields that are `auto` in `cfg`; nothing of a new run."""
    try:
        values = read_yaml_file(folder / "config.yaml")
    except (OSError, YamlFault):
        return {}
    found = {}
    for path in auto_fields(cfg):
        section, _, key = path.partition(".")
        inner = values.get(section) if isinstance(values, dict) else None
        value = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(value, int):  # true and false are, too
            found[path] = value
    return found


class AutoValues:
    """Settles the fields of one run on this rank, and with the others."""

    def __init__(
        self,
        cfg: RunConfig,
        machine: MachineFacts,
        launch: LaunchFacts,
        model: Mapping[str, Any],
        *,
        resumed: Path | None,
    ) -> None:
        """`model`: the base's config.json. `resumed`: the folder to go on in, None for a new run."""
        self.asked, self.machine, self.launch, self.model = cfg, machine, launch, model
        self._resumed = {} if resumed is None else kept_values(resumed, cfg)
        self._rows: RowLengths | None = None

    def count_rows(self, tokenizer: Any, cache: Path) -> None:
        """Tokenize where the length of packs follows from the rows."""
        if is_auto(self.asked.data.pack_length):
            self._rows = row_lengths(self.asked.data, tokenizer, cache)
            note_lengths(cache, self.asked, self._rows)

    def plan(self) -> tuple[RunConfig, RunPlan]:
        """The run with a value in each field, and its plan. Raises PlanError as `make_plan` does."""
        return plan_with_auto(self.asked, self.machine, self.launch, self.model, rows=self._rows, resumed=self._resumed)

    def agree(self, inputs: RunInputs, runtime: Runtime, cache: Path) -> tuple[RunInputs, Runtime]:
        """The same values on every rank. Collective."""
        if not auto_fields(self.asked) or runtime.world == 1:
            return inputs, runtime
        mine = (self.machine.device_memory_gib, self.machine.host_memory_gib, self._resumed)
        gathered: list[Any] = [None] * runtime.world
        torch.distributed.all_gather_object(gathered, mine)
        smallest = {
            "device_memory_gib": min(device for device, _, _ in gathered),
            "host_memory_gib": min(host for _, host, _ in gathered),
        }
        self.machine, self._resumed = replace(self.machine, **smallest), gathered[0][2]
        cfg, plan = self.plan()
        if cfg == inputs.cfg:
            return inputs, runtime
        if cfg.data != inputs.cfg.data:
            inputs = replace(inputs, prepared=prepare_rows(cfg, inputs.tokenizer, cache))
        return replace(inputs, cfg=cfg), with_plan(runtime, plan)
