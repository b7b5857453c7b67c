"""The plan of a run: what will run and why, computed from the run file and the facts of machine and launch.

No process group, no device and no environment is looked at here; `machine.probe` collects those facts as values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import PlanError, Problem
from phi3_dist.family.variants import Family, Shape
from phi3_dist.planning.attention_choice import backends, choose_backend, choose_deterministic
from phi3_dist.planning.facts import Choice, LaunchFacts, MachineFacts
from phi3_dist.planning.larger_than_lora import larger_than_lora
from phi3_dist.planning.launch_rules import CPU_LAUNCH, launch_problems, zero_file_problems
from phi3_dist.planning.layer_passes import choose_compile, choose_kernels, why_not_triton
from phi3_dist.planning.loss import choose_loss, why_not_liger
from phi3_dist.planning.memory import Term, fits, total_gib
from phi3_dist.planning.sequence_parallel import sharing_choice, sharing_problems, why_not_kernels
from phi3_dist.planning.support import No, Yes, support, support_adapter, support_fp8, support_optimizer
from phi3_dist.planning.workload import account

__all__ = [
    "RunPlan",
    "batch_problems",
    "make_plan",
    "check_reality",
]


@dataclass(frozen=True)
class RunPlan:
    """What will run. Batches in packs; `steps` are optimizer steps, None until the data is counted.

    Passes are compiled in runs of `compile_from` tokens a rank or more; None: in none. The last `kept_layers` layers
    keep their dequantised weights for backward. `kernels` is what computes the layers' passes: `torch` or `triton`.
    `deterministic`: the same run gives the same bits. `sequence_parallel` neighbouring ranks share each pack.
    """

    strategy: str
    world_size: int
    nodes: int
    device: str
    precision: str
    attention: str
    micro_batch: int
    accumulation: int
    global_batch: int
    steps: int | None
    choices: tuple[Choice, ...]
    memory: tuple[Term, ...] | None = None
    compile_from: int | None = None
    kept_layers: int = 0
    loss: str = "chunked"
    deterministic: bool = True
    kernels: str = "torch"
    sequence_parallel: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, ready for JSON."""
        out = asdict(self)
        out["choices"] = [asdict(choice) for choice in self.choices]
        out["memory"] = None if self.memory is None else [asdict(term) for term in self.memory]
        return out


def make_plan(
    cfg: RunConfig,
    machine: MachineFacts,
    launch: LaunchFacts,
    *,
    family_or_shape: Family | Shape | Mapping[str, Any] | None = None,
) -> RunPlan:
    """Plan the run; raises `PlanError` with every problem.

    The shape may also be given as a Hugging Face `config.json`; without one there is no account of memory.
    """
    problems = [*launch_problems(machine, launch), *zero_file_problems(launch)]
    precision = _precision(cfg, machine)
    attention = _attention(cfg, machine, precision.value, family_or_shape, problems)
    strategy = _strategy_choice(launch, cfg.model.quantization, machine.device, precision.value)
    kernels = _kernels(cfg, machine, problems)
    compiling, compile_from = _compile(cfg, machine, launch, family_or_shape, problems)
    loss = _loss(cfg, machine, problems)
    same_bits, why = choose_deterministic(cfg.train.deterministic, machine.device, attention.value)
    deterministic = Choice("deterministic", "yes" if same_bits else "no", why)
    choices = [precision, attention, deterministic, loss, strategy, _optimizer_choice(cfg, machine, launch)]
    choices += [kernels, compiling]
    problems += _support_problems(cfg, machine, launch, precision.value)
    shape = None if family_or_shape is None else _shape(family_or_shape)
    problems += sharing_problems(cfg, launch, family_or_shape, shape)
    data_ranks = max(1, launch.world_size // cfg.train.sequence_parallel)
    accumulation = cfg.train.global_batch // (cfg.train.micro_batch * data_ranks)
    problems += batch_problems(cfg, launch.world_size)
    memory, kept_layers = None, 0
    if shape is not None:
        load, memory, why = account(cfg, machine, launch, shape, precision=precision.value, kernels=kernels.value)
        kept_layers = load.kept_layers
        if why:
            why += larger_than_lora(cfg, machine, launch, shape, terms=memory, load=load)
            choices.append(Choice("weights for backward", f"{kept_layers} of {shape.layers} layers keep theirs", why))
        choices.append(_memory_choice(memory, machine, launch, problems))
    if problems:
        raise PlanError(*problems)
    choices += _batch_choices(cfg, launch, data_ranks, accumulation)
    return RunPlan(
        strategy=launch.strategy,
        world_size=launch.world_size,
        nodes=launch.nodes,
        device=machine.device,
        precision=precision.value,
        attention=attention.value,
        loss=loss.value,
        kernels=kernels.value,
        micro_batch=cfg.train.micro_batch,
        accumulation=accumulation,
        global_batch=cfg.train.global_batch,
        steps=cfg.train.max_steps,
        choices=tuple(choices),
        memory=memory,
        compile_from=compile_from,
        kept_layers=kept_layers,
        sequence_parallel=cfg.train.sequence_parallel,
        deterministic=deterministic.value == "yes",
    )


def _shape(given: Family | Shape | Mapping[str, Any]) -> Shape:
    if isinstance(given, Shape):
        return given
    return given.shape if isinstance(given, Family) else Shape.of(given)


def _precision(cfg: RunConfig, machine: MachineFacts) -> Choice:
    asked = cfg.model.precision
    if asked == "auto":
        return Choice("precision", "bf16" if machine.fast_bf16 else "fp32", machine.fast_bf16_reason)
    slow = asked == "bf16" and not machine.fast_bf16
    return Choice("precision", asked, "as the run file says" + (f"; slow: {machine.fast_bf16_reason}" if slow else ""))


def _attention(
    cfg: RunConfig,
    machine: MachineFacts,
    precision: str,
    model: Family | Shape | Mapping[str, Any] | None,
    problems: list[Problem],
) -> Choice:
    head_dim = None if model is None else _shape(model).head_dim
    window = model.get("sliding_window") if isinstance(model, Mapping) else getattr(model, "sliding_window", None)
    found = backends(
        machine.device,
        head_dim,
        precision,
        window,
        machine.packages,
        capability=machine.capability,
        varlen_arguments=machine.varlen_arguments,
    )
    asked = cfg.model.attention
    chosen = choose_backend(asked, found)
    if not chosen.available:
        problems.append(Problem("model.attention", f"is {asked}: {chosen.reason}", chosen.fix))
    return Choice("attention", chosen.name, chosen.reason if asked == "auto" else "as the run file says")


def _loss(cfg: RunConfig, machine: MachineFacts, problems: list[Problem]) -> Choice:
    targets = () if cfg.lora.targets == "all-linear" else cfg.lora.targets  # PEFT leaves the head out of all linears
    saved, taught = cfg.lora.modules_to_save, bool(cfg.model.new_tokens)
    found = why_not_liger(machine.device, machine.packages, targets=targets, saved=saved, new_tokens=taught)
    if cfg.model.loss == "liger" and found[0]:
        problems.append(Problem("model.loss", f"is liger: {found[0]}", found[1]))
    return Choice("loss kernel", *choose_loss(cfg.model.loss, found[0]))


def _kernels(cfg: RunConfig, machine: MachineFacts, problems: list[Problem]) -> Choice:
    fused = cfg.model.fused_layers and cfg.model.fused_lora and cfg.model.compile is not True
    found = why_not_triton(machine.device, machine.packages, capability=machine.capability, fused=fused)
    if not found[0] and (shared := why_not_kernels(cfg)):
        found = (shared, "model.kernels=torch")
    if cfg.model.kernels == "triton" and found[0]:
        problems.append(Problem("model.kernels", f"is triton: {found[0]}", found[1]))
    return Choice("kernels", *choose_kernels(cfg.model.kernels, found[0], machine.measured))


def _compile(
    cfg: RunConfig,
    machine: MachineFacts,
    launch: LaunchFacts,
    model: Family | Shape | Mapping[str, Any] | None,
    problems: list[Problem],
) -> tuple[Choice, int | None]:
    configured, steps, why_not = cfg.model.compile, cfg.train.max_steps, machine.no_compiler
    if configured is True and why_not:
        problems.append(Problem("model.compile", f"is true: {why_not}", "install it, or model.compile=auto"))
    from_tokens, why = choose_compile(
        configured,
        machine.device,
        no_compiler=why_not,
        fused=cfg.model.fused_layers,
        shape=None if model is None else _shape(model),
        tokens=None if steps is None else steps * cfg.train.global_batch * cfg.data.pack_length // launch.world_size,
        threads=max(1, machine.cpu_count // launch.ranks_per_node),
        measured=machine.measured,
    )
    words = "no" if from_tokens is None else "in a long run" if from_tokens else "yes"
    return Choice("compile", words, why), from_tokens


def _strategy_choice(launch: LaunchFacts, quantization: str, device: str, precision: str) -> Choice:
    why = {
        "single": "one process",
        "ddp": f"{launch.world_size} processes without DeepSpeed or FSDP in the Accelerate config",
    }
    words = why.get(launch.strategy, "as the Accelerate config says")
    answer = support(launch.strategy, quantization, device, precision)
    note = f"; {answer.note}" if isinstance(answer, Yes) and answer.note else ""
    return Choice("strategy", launch.strategy, words + note)


def _optimizer_choice(cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts) -> Choice:
    if cfg.optim.name != "adamw":
        return Choice("optimizer", cfg.optim.name, "as the run file says; bitsandbytes'")
    if launch.strategy.startswith("zero") and launch.strategy.endswith("_offload"):
        return Choice("optimizer", "AdamW", "torch's, stepping the offloaded states on the host")
    return Choice("optimizer", "AdamW", f"torch's, fused where {machine.device} has it")


def _support_problems(cfg: RunConfig, machine: MachineFacts, launch: LaunchFacts, precision: str) -> list[Problem]:
    problems = []
    answer = support(
        launch.strategy,
        cfg.model.quantization,
        machine.device,
        precision,
        fast_bf16=machine.fast_bf16,
        packages=machine.packages,
    )
    if isinstance(answer, No):
        what = f"{launch.strategy} with quantization {cfg.model.quantization} on {machine.device}: {answer.reason}"
        problems.append(Problem("strategy", what, f"nearest: {answer.nearest}"))
    optimizer = support_optimizer(cfg.optim.name, launch.strategy, machine.device)
    if isinstance(optimizer, No):
        problems.append(
            Problem("optim.name", f"is {cfg.optim.name}: {optimizer.reason}", f"nearest: {optimizer.nearest}")
        )
    if cfg.optim.name != "adamw" and "bitsandbytes" not in machine.packages:
        problems.append(Problem("optim.name", f"is {cfg.optim.name}, and bitsandbytes is not installed", "use adamw"))
    torch = machine.packages.get("torch", "0.0")
    fp8 = support_fp8(launch.strategy, cfg.model.quantization, machine.device, machine.capability, torch)
    if cfg.model.fp8 and isinstance(fp8, No):
        problems.append(Problem("model.fp8", f"is true: {fp8.reason}", f"nearest: {fp8.nearest}"))
    kinds = {"dora": "lora.dora"} if cfg.lora.dora else {}
    if cfg.lora.init != "default":
        kinds[cfg.lora.init.partition("_")[0]] = "lora.init"
    if cfg.model.new_tokens:
        kinds["new tokens"] = "model.new_tokens"
    for kind, key in kinds.items():
        kind_answer = support_adapter(kind, launch.strategy, "fp8" if cfg.model.fp8 else cfg.model.quantization)
        if isinstance(kind_answer, No):
            value = {"dora": "true", "new tokens": list(cfg.model.new_tokens)}.get(kind, cfg.lora.init)
            problems.append(Problem(key, f"is {value}: {kind_answer.reason}", f"nearest: {kind_answer.nearest}"))
    return problems


def _batch_choices(cfg: RunConfig, launch: LaunchFacts, data_ranks: int, accumulation: int) -> list[Choice]:
    """How packs are shared by ranks, where they are, and the accumulation that follows."""
    sharing = sharing_choice(cfg, launch)
    ranks = f"{launch.world_size} rank{'s' * (launch.world_size != 1)}"
    if sharing:
        ranks = f"{data_ranks} groups of {cfg.train.sequence_parallel} ranks"
    why = f"global_batch {cfg.train.global_batch} / (micro_batch {cfg.train.micro_batch} × {ranks})"
    return [*([sharing] if sharing else []), Choice("accumulation", str(accumulation), why)]


def batch_problems(cfg: RunConfig, world: int) -> list[Problem]:
    """A global batch that doesn't divide into the micro batches of so many ranks; those that share packs are one."""
    batch, micro, world = cfg.train.global_batch, cfg.train.micro_batch, max(1, world // cfg.train.sequence_parallel)
    if str(micro) == "auto":
        return []
    at_once = micro * world
    if batch % at_once == 0:
        return []
    below = batch // at_once * at_once
    near = f"{below} or {below + at_once}" if below else str(at_once)
    divisors = [size for size in range(1, micro + 1) if batch % (size * world) == 0]
    other = f", or train.micro_batch={divisors[-1]}" if divisors else ""
    what = f"is {batch}, which is not a multiple of micro_batch × ranks = {micro} × {world} = {at_once}"
    return [Problem("train.global_batch", what, f"nearest: train.global_batch={near}{other}")]


def _memory_choice(
    terms: tuple[Term, ...], machine: MachineFacts, launch: LaunchFacts, problems: list[Problem]
) -> Choice:
    """Refuse what cannot fit whatever the activations turn out to be; warn where the estimate says so."""
    per_node = launch.ranks_per_node
    host_gib = per_node * total_gib(terms, "host")
    if machine.device == "cpu":
        ranks = "1 rank" if per_node == 1 else f"{per_node} ranks"
        why = f"estimated for {ranks}, on a host with {machine.host_memory_gib:.1f} GiB"
        return Choice("memory", f"{host_gib:.1f} GiB", why)
    have = machine.device_memory_gib
    certain = total_gib(term for term in terms if not term.estimated)
    if certain > have:
        what = f"weights, gradients and optimizer take {certain:.1f} GiB of a device with {have:.1f} GiB"
        fix = "use more ranks with zero3 or fsdp2, or model.quantization=nf4"
        problems.append(Problem("memory", what, fix))
    if host_gib > machine.host_memory_gib:
        what = f"{per_node} ranks offload {host_gib:.1f} GiB to a host with {machine.host_memory_gib:.1f} GiB"
        problems.append(Problem("memory", what, "use more nodes, or the strategy without offload"))
    whole = total_gib(terms)
    if not fits(terms, have):
        return Choice("memory", "may not fit", f"{whole:.1f} GiB estimated of {have:.1f} GiB, a tenth kept free")
    return Choice("memory", f"{whole:.1f} GiB", f"estimated for each rank's device, of {have:.1f} GiB")


def check_reality(plan: RunPlan, *, world_size: int, strategy: str, device: str) -> None:
    """Raise `PlanError` where the process group, strategy or device that came up is not the planned one."""
    pairs = (
        ("world size", plan.world_size, world_size),
        ("strategy", plan.strategy, strategy),
        ("device", plan.device, device),
    )
    fix = f"on a CPU start with {CPU_LAUNCH}" if plan.device == "cpu" else "compare the Accelerate config with the plan"
    problems = [
        Problem(name, f"{planned} was planned, and {real} came up", fix)
        for name, planned, real in pairs
        if planned != real
    ]
    if problems:
        raise PlanError(*problems)
