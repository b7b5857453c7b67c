"""The planner's answers as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from phi3_dist.errors import PlanError, Problem
from phi3_dist.planning.advice import Advice, Cluster, Option
from phi3_dist.planning.fitted_overheads import RESERVE
from phi3_dist.planning.memory import GIB, total_gib

__all__ = ["advice_table", "find_option", "seconds", "why_table"]


def seconds(value: float) -> str:
    """A duration with one unit or two: `148 ms`, `3.2 s`, `2 h 05 min`."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    return f"{value // 3600:.0f} h {value % 3600 / 60:02.0f} min"


def advice_table(advice: Advice, cluster: Cluster) -> Table:
    """One row an option, the recommended first; what does not run last, with why."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    heads = ["strategy", "weights", "peak GiB", "host GiB", "network GiB", "step", "binds", "tokens/s", "run"]
    heads += ["cost"] if cluster.price is not None else []
    settled = any(one.settled for one in advice.options)
    heads += ["auto"] if settled else []
    for name in heads:
        right = name not in {"strategy", "weights", "binds", "auto"}
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    table.add_column("", overflow="fold")
    for number, one in enumerate(advice.options):
        note = "recommended" if number == 0 and one.state == "fits" else one.why
        if one.time is None or one.traffic is None:
            table.add_row(one.strategy, one.quantization, *[""] * (len(heads) - 2), f"{one.state}: {note}")
            continue
        cells = [one.strategy, one.quantization, f"{one.peak_gib:.1f}", f"{one.host_gib:.0f}"]
        cells += [f"{one.traffic.network / GIB:.2f}", seconds(one.time.total_s), one.time.binds, f"{one.tokens_s:,.0f}"]
        cells.append("" if one.run_s is None else seconds(one.run_s))
        if cluster.price is not None:
            cells.append("" if one.cost is None else f"{one.cost:,.2f}")
        if settled:
            cells.append(_settled(one))
        table.add_row(*cells, note if one.state == "fits" else f"{one.state}: {note}")
    return table


def _settled(option: Option) -> str:
    """What `auto` became, in a few words: `4 × 4,096, recomputing`."""
    found = option.settled
    micro, length = found.get("train.micro_batch"), found.get("data.pack_length")
    both = " × ".join(f"{number:,}" for number in (micro, length) if number is not None)
    again = {True: "recomputing", False: "not recomputing", None: ""}[found.get("model.activation_checkpointing")]
    return ", ".join(part for part in (both, again) if part)


def find_option(advice: Advice, name: str) -> Option:
    """The option that `--why` or `--strategy` names, such as `zero3` or `zero3 nf4`. Raises PlanError for another."""
    wanted = " ".join(name.replace("/", " ").replace("+", " ").split())
    found = next((one for one in advice.options if wanted in {one.name, f"{one.strategy} {one.quantization}"}), None)
    if found is None:
        names = ", ".join(one.name for one in advice.options)
        raise PlanError(Problem("--why", f"there is no {name[:60]!r} here", f"one of {names}"))
    if found.state == "refused":
        raise PlanError(Problem("--why", f"{found.name} does not run: {found.why}"))
    return found


def _kept_free(option: Option, cluster: Cluster) -> tuple[str, str]:
    learned = cluster.overheads
    if learned is not None and learned.context_gib is not None and learned.allocator is not None:
        return f"{learned.context_gib + learned.allocator * option.peak_gib:.1f} GiB", learned.words
    why = "a tenth: the CUDA context, communication buffers, kernels' workspace, the allocator's rounding"
    return f"{cluster.memory_gib * RESERVE:.1f} GiB", f"{why} (not measured; plan --learn)"


def why_table(option: Option, cluster: Cluster) -> Table:
    """Every term of one option: memory, what a step's time goes to, and what is moved."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=option.name, title_justify="left")
    for name in ("what", "value", "how"):
        table.add_column(name, overflow="fold")
    for reason in option.reasons:
        table.add_row(f"auto: {reason.name}", reason.value, reason.why)
    for term in option.terms:
        table.add_row(f"{term.name} ({term.place})", f"{term.gib:.3f} GiB", term.formula)
    table.add_row("peak of the worst rank", f"{option.peak_gib:.2f} GiB", "the sum of what is on the device")
    table.add_row("kept free", *_kept_free(option, cluster))
    offloaded = total_gib(option.terms, "host") * cluster.gpus_per_node
    processes = option.host_gib - offloaded
    table.add_row(
        "a node's host", f"{option.host_gib:.1f} GiB", f"{offloaded:.1f} offloaded, {processes:.0f} of processes"
    )
    if option.traffic is not None and option.time is not None:
        moved, time = option.traffic, option.time
        table.add_row(
            "gathered weights", f"{moved.gathered / GIB:.3f} GiB", "received by a rank in a step, beside computing"
        )
        table.add_row("gradients", f"{moved.reduced / GIB:.3f} GiB", "sent by a rank at a step's end")
        if moved.exchanged:
            words = "sent by a rank in a step, of heads and tokens of shared packs; computing waits"
            table.add_row("attention's exchanges", f"{moved.exchanged / GIB:.3f} GiB", words)
        table.add_row("between host and device", f"{moved.host / GIB:.3f} GiB", "a rank, a step")
        for name in ("arithmetic", "memory", "launches", "network", "host"):
            table.add_row(
                f"time: {name}",
                seconds(getattr(time, f"{name}_s")),
                cluster.rates.source if name == "arithmetic" else "",
            )
        table.add_row("step", seconds(time.total_s), f"{time.binds} binds; an estimate")
    return table
