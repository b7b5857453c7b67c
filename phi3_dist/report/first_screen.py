"""What a reader looks for first: model, data, LoRA, hardware, memory, result, and what to do with it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from phi3_dist.config.load import flatten
from phi3_dist.report.page_charts import matrix_rate, total_s
from phi3_dist.report.plain_values import count, finite, printable
from phi3_dist.report.run_files import Row, of_kind
from phi3_dist.report.runs import RunRow
from phi3_dist.report.words import duration, gib, many, shown

__all__ = ["Fact", "Group", "Way", "first_screen", "headline", "memory_gib", "recipe", "ways_on"]

_STEPS_OF_SPEED = 20
_WITH_AN_ADAPTER = (
    ("Talk to it", "phi3-dist chat {run}", "phi3_dist.inference"),
    ("Judge it beside its base, with an interval", "phi3-dist eval {run} --base", "phi3_dist.evaluation"),
    (
        "Know whether a server will load it, and with which flags",
        "phi3-dist check {run} --for vllm",
        "phi3_dist.serving",
    ),
    ("Make one model of base and adapter", "phi3-dist export {run} {run}-merged --as merged", "phi3_dist.exports"),
    (
        "Hand the adapter on: a copy without a path of this machine",
        "phi3-dist publish {run}/adapter {run}-published --base HUB_ID",
        "",
    ),
)
"""What to do with a trained adapter: in words, the command, and the package, looked for, whose verb it is."""


@dataclass(frozen=True)
class Fact:
    """A label and its value; `note` is what stands small beside it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Group:
    title: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Way:
    """Something to do with the run: in words, and the command."""

    what: str
    command: str


def _group(title: str, *facts: tuple[str, str] | tuple[str, str, str]) -> Group | None:
    kept = tuple(Fact(*fact) for fact in facts if fact[1])
    return Group(title, kept) if kept else None


def first_screen(
    rows: Sequence[Row], config: Mapping[str, Any], plan: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> list[Group]:
    """Groups of facts; what the run's files do not tell is left out."""
    flat = flatten(config)
    groups = (
        _result(rows, evaluation),
        _model(flat, plan),
        _data(flat, plan),
        _lora(flat, plan),
        _hardware(plan),
        _memory(rows, plan),
        _time(rows, plan),
        _first_step(plan),
    )
    return [group for group in groups if group is not None]


def headline(row: RunRow, rows: Sequence[Row]) -> str:
    """How far the run is, in a line."""
    of = f" of {row.steps:,}" if row.steps else ""
    text = f"step {row.step:,}{of}"
    train = of_kind(rows, "train")[-_STEPS_OF_SPEED:]
    times = sorted(value for r in train if (value := finite(r.get("step_s"))) is not None)
    if row.state == "running" and row.steps and times:
        left = (row.steps - row.step) * times[len(times) // 2]
        text += f", about {duration(left)} left" if left > 0 else ", at its end"
    return text


def _result(rows: Sequence[Row], evaluation: Mapping[str, Any]) -> Group | None:
    train, held_out = of_kind(rows, "train"), of_kind(rows, "eval")
    facts: list[tuple[str, str, str]] = []
    for label, key in (("held-out loss", "heldout_loss"), ("held-out perplexity", "heldout_perplexity")):
        if held_out:
            first, last = held_out[0], held_out[-1]
            first_value = f"from {shown(first.get(key))} at step {first['step']:,}"
            note = first_value if len(held_out) > 1 else f"at step {last['step']:,}"
            facts.append((label, shown(last.get(key)), note))
    if train:
        facts.append(("training loss", shown(train[-1].get("loss")), f"step {train[-1]['step']:,}"))
    facts += _scores(evaluation)
    return _group("Result", *facts)


def _scores(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the trained model scores; beside it the base, and how sure the difference is."""
    groups = {key: value for key, value in evaluation.items() if isinstance(value, dict)}
    ours: dict[str, Any] = next((groups[key] for key in ("after", "adapter") if key in groups), {})
    name = next((key for key in ("before", "base", "against") if key in groups), "")
    theirs, low, high = (groups.get(key, {}) for key in (name, "from (95 %)", "to (95 %)"))
    facts = []
    for key, value in ours.items():
        if "loss" in key or "perplexity" in key or "tokens" in key or finite(value) is None:
            continue
        note = f"{_score(key, theirs[key])} {name}" if key in theirs else ""
        if finite(low.get(key)) is not None and finite(high.get(key)) is not None:
            note += f", difference {low[key]:+.3g} to {high[key]:+.3g} (95 %)"
        facts.append((key.replace("_", " "), _score(key, value), note))
    return facts[:6]


def _score(key: str, value: object) -> str:
    share = finite(value)
    is_share = share is not None and 0 <= share <= 1 and ("match" in key or "accuracy" in key)
    return f"{share:.0%}" if is_share else shown(value)


def _model(flat: Mapping[str, Any], plan: Mapping[str, Any]) -> Group | None:
    quantization = flat.get("model.quantization")
    source = str(flat.get("model.source") or "")
    return _group(
        "Model",
        ("base", printable(_short(source)), printable(source) if _short(source) != source else ""),
        ("revision", printable(flat.get("model.revision") or "")),
        ("parameters", many(_of(plan, "parameters", "total"))),
        ("precision", shown(plan.get("precision") or flat.get("model.precision"))),
        ("quantisation", shown(quantization) if quantization not in (None, "none") else ""),
        ("attention", shown(plan.get("attention"))),
    )


def _short(source: str) -> str:
    """The last two names of a long path."""
    parts = Path(source).parts
    return "/".join(("…", *parts[-2:])) if len(parts) > 2 and len(source) > 32 else source


def _of(plan: Mapping[str, Any], *path: str) -> Any:
    found: Any = plan
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _data(flat: Mapping[str, Any], plan: Mapping[str, Any]) -> Group | None:
    train = _of(plan, "lengths", "train")
    rows = packs = length = ""
    tokens, supervised = finite(_of(plan, "lengths", "train", "tokens")), None
    if isinstance(train, dict):
        rows, packs, length = (many(train.get(key)) for key in ("rows", "packs", "pack_length"))
        supervised = finite(train.get("supervised_tokens"))
    share = f"{supervised / tokens:.0%} of them supervised" if supervised is not None and tokens else ""
    source = shown(flat.get("data.train"))
    return _group(
        "Data",
        ("rows from", printable(_short(source)), printable(source) if _short(source) != source else ""),
        ("rows", rows, f"in {packs} packs of {length} tokens" if packs else ""),
        ("tokens", many(tokens), share),
        ("held-out rows", many(_of(plan, "lengths", "held_out", "rows"))),
    )


def _lora(flat: Mapping[str, Any], plan: Mapping[str, Any]) -> Group | None:
    kind = [name for key, name in (("rslora", "rsLoRA"), ("dora", "DoRA")) if flat.get(f"lora.{key}") is True]
    init = flat.get("lora.init")
    trainable, total = finite(_of(plan, "parameters", "trainable")), finite(_of(plan, "parameters", "total"))
    return _group(
        "LoRA",
        ("rank, alpha", f"{shown(flat['lora.r'])}, {shown(flat.get('lora.alpha'))}" if "lora.r" in flat else ""),
        ("kind", ", ".join(kind)),
        ("start", shown(init) if init not in (None, "default") else ""),
        ("targets", shown(flat.get("lora.targets"))),
        ("dropout", shown(flat.get("lora.dropout"))),
        ("trained", many(trainable), f"{trainable / total:.2%} of the model" if trainable and total else ""),
        ("learning rate", f"{rate:g}" if (rate := finite(flat.get("optim.lr"))) is not None else ""),
    )


def _hardware(plan: Mapping[str, Any]) -> Group | None:
    world, nodes = count(plan.get("world_size")), count(plan.get("nodes"))
    ranks = f"{world} process{'es' if world != 1 else ''}" if world else ""
    device, cores = _of(plan, "hardware", "device"), count(_of(plan, "hardware", "cores"))
    host = gib(_of(plan, "hardware", "host_memory_gib"))
    each = gib(_of(plan, "hardware", "device_memory_gib")) if plan.get("device") == "cuda" else ""
    return _group(
        "Hardware",
        ("device", printable(device or plan.get("device") or ""), f"{each} each" if each else ""),
        ("processes", ranks, f"on {nodes} nodes" if nodes and nodes > 1 else ""),
        ("strategy", shown(plan.get("strategy"))),
        ("host", f"{cores} cores, {host}" if cores and host else host),
    )


def memory_gib(plan: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """GiB that the plan expects in the place that fills (the device, or the host of a CPU run), and GiB there are."""
    place = "host" if plan.get("device") == "cpu" else "device"
    terms = plan.get("memory")
    sizes = [
        size
        for term in (terms if isinstance(terms, list) else [])
        if isinstance(term, dict) and term.get("place") == place and (size := finite(term.get("gib"))) is not None
    ]
    have = finite(_of(plan, "hardware", "device_memory_gib"))
    return (sum(sizes) if sizes else None), have


def _memory(rows: Sequence[Row], plan: Mapping[str, Any]) -> Group | None:
    planned, have = memory_gib(plan)
    peaks = [peak for row in rows if (peak := finite(row.get("peak_gib"))) is not None]
    whole = "the whole process, libraries too" if plan.get("device") == "cpu" else "torch's tensors"
    each = "of each rank's device" if plan.get("device") == "cuda" else "of each rank"
    return _group(
        "Memory",
        ("planned", gib(planned), each),
        ("measured, most", gib(max(peaks)) if peaks else "", whole),
        ("there is", gib(have), "" if plan.get("device") == "cuda" else "on the host"),
    )


def _first_step(plan: Mapping[str, Any]) -> Group | None:
    """What the proof at the first step found, and how far the plan was off; nothing of a run from before it."""
    first = plan.get("first_step")
    if not isinstance(first, dict):
        return None
    tensors = {key: count(_of(first, "tensors", key)) or 0 for key in ("trained", "moved", "waiting")}
    waiting = f"{tensors['waiting']} wait for the second: their partner starts at zero" if tensors["waiting"] else ""
    errors = {key: finite(first.get(key)) for key in ("memory_error", "time_error")}
    planned_s, step_s = finite(first.get("planned_step_s")), finite(first.get("step_s"))

    def against(planned: str, error: float | None) -> str:
        return f"{planned} planned, {error:+.0%}" if planned and error is not None else ""

    process = first.get("measures") == "process"
    whole = "of the whole process, where the plan counts tensors" if process else ""
    return _group(
        "First step",
        ("with a gradient", f"{tensors['trained']} tensors" if tensors["trained"] else "", "and no frozen one"),
        ("moved", f"{tensors['moved']} tensors" if tensors["trained"] else "", waiting),
        (
            "memory",
            gib(first.get("measured_gib")),
            whole or against(gib(first.get("planned_gib")), errors["memory_error"]),
        ),
        (
            "a step",
            duration(step_s) if step_s else "",
            against(duration(planned_s) if planned_s else "", errors["time_error"]),
        ),
    )


def _time(rows: Sequence[Row], plan: Mapping[str, Any]) -> Group | None:
    train = of_kind(rows, "train")
    medians: list[float | None] = []
    for key in ("tokens_per_s", "supervised_tokens_per_s"):
        values = sorted(value for row in train if (value := finite(row.get(key))) is not None)
        medians.append(values[len(values) // 2] if values else None)
    seconds, (every, supervised) = total_s(rows), medians
    flops, rate = matrix_rate(plan, finite(_of(plan, "parameters", "trainable")) or 0.0)
    share = note = ""
    if every is not None and flops and rate:
        share, note = f"{every * flops / rate:.0%}", "of the matrix rate measured on such a card, at least"
    elif every is not None and plan.get("device") == "cuda":
        share, note = "unknown", "make card measures this card's matrix rate"
    return _group(
        "Time",
        ("training", duration(seconds) if seconds else ""),
        ("tokens/s, median", many(every), f"{many(supervised)} supervised" if supervised is not None else ""),
        ("share of the limit", share, note),
    )


def ways_on(run_folder: Path, state: str, command: Sequence[str]) -> list[Way]:
    """What to do with the run, in the order in which people do it."""
    folder = shlex.quote(printable(run_folder))
    if state in {"running", "starting"}:
        return [
            Way("Watch it here, while it trains", f"phi3-dist board {folder}"),
            Way("See what it prints", f"phi3-dist logs {folder} --follow"),
        ]
    ways = []
    if state != "finished" and (again := _again(command)):
        ways.append(Way("Continue from its newest checkpoint", again))
    if state in {"failed", "lost", "interrupted", "preempted"}:
        ways.append(Way("See what it printed last", f"phi3-dist logs {folder}"))
    if (run_folder / "adapter" / "adapter_model.safetensors").is_file():
        ways += [
            Way(what, command.format(run=folder))
            for what, command, room in _WITH_AN_ADAPTER
            if not room or find_spec(room) is not None
        ]
    ways.append(Way("Compare it with another run", f"phi3-dist report {folder} OTHER_RUN"))
    return ways


def _again(command: Sequence[str]) -> str:
    """The command that started the run, with `--resume`; empty where it is no `train`."""
    words = [printable(word) for word in command if isinstance(word, str)]
    if "train" not in words[1:]:
        return ""
    after = [word for word in words[words.index("train", 1) :] if word not in {"--overwrite", "--resume"}]
    return shlex.join(["phi3-dist", *after, "--resume"])


def recipe(run_folder: Path) -> list[tuple[str, str]]:
    """The sections "How to …" of the adapter's card, as titles and code."""
    try:
        text = (run_folder / "adapter" / "README.md").read_text(encoding="utf-8", errors="replace")[:200_000]
    except OSError:
        return []
    found = []
    for title, body in re.findall(r"^## (How to [^\n]*)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL):
        code = re.findall(r"^```[^\n]*\n(.*?)^```", body, flags=re.MULTILINE | re.DOTALL)
        found += [(title.strip(), block.strip("\n")) for block in code[:6]]
    return found
