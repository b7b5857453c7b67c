"""All that can be said of a start within a second, before torch is imported, in one report."""

from __future__ import annotations

from collections.abc import Mapping

from phi3_dist.config.schema import RunConfig
from phi3_dist.data.read.sources import located
from phi3_dist.errors import PlanError
from phi3_dist.machine.probe import launch_facts
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.planning.launch_rules import zero_file_problems
from phi3_dist.planning.plan import batch_problems
from phi3_dist.training.preflight.collect import Collected
from phi3_dist.training.preflight.launcher_settings import refuse_contradictions
from phi3_dist.training.preflight.trackers_and_inputs import check_folder, check_modules, check_trackers

__all__ = ["check_before_torch"]


def check_before_torch(cfg: RunConfig, environ: Mapping[str, str], *, overwrite: bool, resume: bool) -> LaunchFacts:
    """The launch; raises the first mistake's kind of error with every mistake. Writes nothing.

    Only rank 0 looks at the folder: it may hold it by now.
    """
    found = Collected()
    launch = found.ask(lambda: launch_facts(environ))
    first = environ.get("RANK", "0") == "0"
    found.ask(lambda: check_trackers(cfg.log, 0 if first else 1, environ))
    found.ask(lambda: check_modules(cfg.lora))
    if first:
        found.ask(lambda: check_folder(cfg, overwrite=overwrite, resume=resume))
    found.ask(lambda: located(cfg.data))
    if launch is not None:
        found.ask(lambda: refuse_contradictions(environ, launch))
        problems = [*zero_file_problems(launch), *batch_problems(cfg, launch.world_size)]
        if problems:
            found.add(PlanError(*problems))
    found.raise_all()
    assert launch is not None
    return launch
