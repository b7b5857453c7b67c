"""The proof at the first step: what learns is named, what does not is refused by name, and no number changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phi3_dist.config.load import load_run
from phi3_dist.config.schema import OptimConfig, RunConfig
from phi3_dist.errors import PlanError
from phi3_dist.machine.probe import launch_facts, probe
from phi3_dist.modeling.base import find_base, load_full
from phi3_dist.modeling.lora import add_lora, fill_adapter
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.planning.plan import RunPlan, make_plan
from phi3_dist.report.first_screen import first_screen
from phi3_dist.training import build as build_module
from phi3_dist.training import whole_run
from phi3_dist.training.engines.backward_and_update import TorchEngine
from phi3_dist.training.engines.optimizer import make_optimizer
from phi3_dist.training.first_step_proof import FirstStepProof, Seen, faults, meant_to_train, shard_faults
from phi3_dist.training.monitor.against_plan import AgainstPlan

REPO = Path(__file__).parents[2]
CPU = torch.device("cpu")
IDS = torch.arange(3, 40).reshape(1, -1)
PART = "layers.1.mlp.down_proj"


def _cfg(**lora: Any) -> RunConfig:
    values = {"model": {"source": "tiny-random"}, "data": {"train": "rows.jsonl"}, "lora": {"r": 4, **lora}}
    return RunConfig.model_validate(values)


def _plan(cfg: RunConfig) -> RunPlan:
    return make_plan(cfg, probe(use_cpu=True), LaunchFacts())


class Run:
    """A tiny model with its engine, and the proof over it; `said` is what a person is told."""

    def __init__(self, **lora: Any) -> None:
        self.cfg = _cfg(**lora)
        base = find_base("tiny-random")
        self.model: Any = add_lora(load_full(base, torch.float32, CPU), self.cfg.lora, "tiny-random")
        fill_adapter(self.model, seed=0)
        self.engine = TorchEngine(self.model, make_optimizer(self.model, OptimConfig(), CPU), 1, 1.0)
        self.said: list[str] = []
        runtime = SimpleNamespace(plan=_plan(self.cfg), world=1, is_main=True, device=CPU)
        metrics = SimpleNamespace(say=self.said.append)
        self.ctx: Any = SimpleNamespace(cfg=self.cfg, engine=self.engine, runtime=runtime, metrics=metrics)
        self.proof = FirstStepProof(self.ctx, alone=False)

    def part(self, name: str) -> Any:
        return next(module for full, module in self.model.named_modules() if full.endswith(name))

    def step(self, *, by: float = 1.0) -> None:
        with self.proof.watching() as engine:
            engine.start_micro_batch(last=True)
            engine.backward(self.model(input_ids=IDS, labels=IDS).loss * by)
            engine.update(1e-3)

    def trained(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


def test_b_moves_at_once_a_waits_for_it_and_the_second_step_is_the_engines_own() -> None:
    run = Run()
    run.step()
    (line,) = run.said
    assert line.startswith(
        "first step as planned: 1 rank of single; a gradient reached all 16 trained tensors, 8 moved"
    )
    assert "8 wait for the second step, since their partner starts at zero" in line
    with run.proof.watching() as engine:
        assert engine is run.engine
    assert run.said == [line]


def test_watching_changes_no_bit() -> None:
    watched, plain = Run(dropout=0.1), Run(dropout=0.1)
    for run in (watched, plain):
        torch.manual_seed(1)
        for _ in range(2):
            if run is watched:
                run.step()
            else:
                run.engine.backward(run.model(input_ids=IDS, labels=IDS).loss)
                run.engine.update(1e-3)
    ours, theirs = watched.trained(), plain.trained()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(hook for p in watched.model.parameters() for hook in (p._backward_hooks or {}))


def _refused(run: Run) -> PlanError:
    with pytest.raises(PlanError) as caught:
        run.step()
    assert not run.said
    return caught.value


def test_a_lora_module_that_the_loss_does_not_reach_is_named() -> None:
    run = Run()
    layer = run.part(PART)
    layer.forward = layer.base_layer.forward
    error = _refused(run)
    assert {p.where.split(PART)[1] for p in error.problems} == {".lora_A.default.weight", ".lora_B.default.weight"}
    assert error.problems[0].what == "no gradient reached it on rank 0 (2 tensors like it)"
    assert error.problems[0].fix.startswith("take its module out of lora.targets")


def test_a_lora_module_whose_update_counts_for_nothing_is_named() -> None:
    run = Run()
    run.part(PART).scaling["default"] = 0.0
    error = _refused(run)
    assert [p.where for p in error.problems] == [f"base_model.model.model.{PART}.lora_B.default.weight"]
    assert "zero everywhere" in error.problems[0].what


def test_a_base_weight_that_trains_and_a_lora_that_is_frozen_are_named() -> None:
    run = Run()
    layer = run.part(PART)
    layer.base_layer.weight.requires_grad_(True)
    layer.lora_A["default"].weight.requires_grad_(False)
    error = _refused(run)
    first, second, *_ = [(problem.where.split(PART)[1], problem.what) for problem in error.problems]
    assert first == (".base_layer.weight", "trains, and the run file freezes it (2 tensors like it)")
    assert second == (".lora_A.default.weight", "is frozen, and should train (2 tensors like it)")


def test_a_frozen_tensor_with_a_gradient_is_named() -> None:
    run = Run()
    weight = run.part(PART).base_layer.weight
    weight.grad = torch.zeros_like(weight)
    error = _refused(run)
    assert [(p.where.split(PART)[1], p.what) for p in error.problems] == [
        (".base_layer.weight", "is frozen, and has a gradient")
    ]


def test_a_tensor_that_the_optimizer_does_not_have_is_named() -> None:
    run = Run()
    dropped = run.part(PART).lora_B["default"].weight
    (group,) = run.engine.optimizer.param_groups
    group["params"] = [p for p in group["params"] if p is not dropped]
    error = _refused(run)
    assert [p.where for p in error.problems] == [f"base_model.model.model.{PART}.lora_B.default.weight"]
    assert "left it as it was" in error.problems[0].what


def test_a_step_without_a_finite_norm_proves_nothing_and_the_next_one_does() -> None:
    run = Run()
    run.step(by=float("nan"))
    assert not run.said
    run.step()
    assert len(run.said) == 1


@pytest.mark.parametrize(
    ("lora", "moved"),
    [
        ({"freeze_a": True}, 8),
        ({"dora": True}, 16),
        ({"modules_to_save": ["lm_head"]}, 9),
        ({"targets": ["o_proj"]}, 2),
    ],
)
def test_kinds_of_lora_are_as_planned(lora: dict[str, Any], moved: int) -> None:
    run = Run(**lora)
    run.step()
    assert f", {moved} moved" in run.said[0]


def test_an_update_below_what_float32_can_show_is_no_fault() -> None:
    """B's partner A does not train here: it would have a gradient of zero, which says nothing."""
    seen = Seen(lr=1e-9, micro_batches=1, frozen_with_gradient=())
    for name, moved in (("x.lora_A.default.weight", False), ("x.lora_B.default.weight", True)):
        seen.reached[name], seen.gradient[name], seen.weight[name], seen.moved[name] = True, 1.0, 0.5, moved
    problems, counts = faults([seen], _cfg(), 1.0, accumulation=1, scale=1.0)
    assert (problems, counts["too small"], counts["moved"]) == ([], 1, 1)
    seen.lr = 1e-3
    problems, _ = faults([seen], _cfg(), 1.0, accumulation=2, scale=1.0)
    assert [p.where for p in problems] == ["x.lora_A.default.weight", "accumulation"]


def test_one_rank_that_no_gradient_reached_is_named() -> None:
    ranks = []
    for reached in (True, False):
        seen = Seen(lr=1e-3, micro_batches=1, frozen_with_gradient=())
        seen.reached["w"], seen.gradient["w"], seen.weight["w"], seen.moved["w"] = reached, 1.0, 0.5, True
        ranks.append(seen)
    problems, _ = faults(ranks, _cfg(), 1.0, accumulation=1, scale=1.0)
    assert [p.what for p in problems] == ["no gradient reached it on rank 1"]


def test_another_world_size_and_another_share_are_named() -> None:
    run = Run(targets=["o_proj"])
    plan = run.ctx.runtime.plan
    assert list(shard_faults(run.engine, plan)) == []
    (found,) = shard_faults(run.engine, replace(plan, world_size=2, strategy="ddp"))
    assert (found.where, found.what) == ("world size", "2 was planned, and the engine has 1")
    (found,) = shard_faults(run.engine, replace(plan, strategy="fsdp2"))
    assert "is whole on each rank, and FSDP2 was to share it (" in found.what


def test_what_should_train_follows_from_the_name_and_the_run_file() -> None:
    of = "base_model.model.model.embed_tokens."
    assert meant_to_train(f"{of}token_adapter.trainable_tokens_delta.default", _cfg()) is True
    assert meant_to_train("base_model.model.lm_head.modules_to_save.default.weight", _cfg()) is True
    assert meant_to_train("base_model.model.lm_head.original_module.weight", _cfg()) is False
    assert meant_to_train("x.lora_A.default.weight", _cfg(freeze_a=True)) is False
    assert meant_to_train("x.bias", _cfg(bias="all")) is None


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _train(folder: Path, cache: Path, *overrides: str) -> Any:
    words = [f"data.train={REPO / 'configs/run/debug_chats.jsonl'}", "train.max_steps=2", "model.precision=fp32"]
    words += [f"save.folder={folder}", "log.trackers=[]", "save.every=1", *overrides]
    cfg = load_run(REPO / "configs/run/debug.yaml", words)
    return whole_run.train(cfg, probe(use_cpu=True), launch_facts({}), cache=cache)


def test_a_run_keeps_the_proof_beside_its_plan_and_the_page_shows_it(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _train(tmp_path / "run", cache)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    first = plan["first_step"]
    assert first["tensors"]["trained"] == 16
    assert first["tensors"]["moved"] == first["tensors"]["waiting"] == 8
    assert first["measures"] == "process"
    assert first["measured_gib"] > first["planned_gib"] > 0
    assert first["step_s"] > 0
    assert "memory_error" not in first
    assert plan["identity"]
    said = capsys.readouterr().out
    assert "first step as planned: 1 rank of single" in said
    assert "a process took" in said
    (group,) = (group for group in first_screen([], {}, plan, {}) if group.title == "First step")
    facts = {fact.label: (fact.value, fact.note) for fact in group.facts}
    assert facts["moved"] == ("8 tensors", "8 wait for the second: their partner starts at zero")
    assert facts["memory"][1] == "of the whole process, where the plan counts tensors"


def test_a_failed_proof_ends_the_run_before_its_first_checkpoint(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_one(model: Any, *args: Any, **kwargs: Any) -> Any:
        peft_model = build_fused(model, *args, **kwargs)
        layer = next(module for name, module in model.named_modules() if name.endswith(PART))
        layer.forward = layer.base_layer.forward
        return peft_model

    build_fused = build_module.install_fused
    monkeypatch.setattr(build_module, "install_fused", without_one)
    with pytest.raises(PlanError, match=r"down_proj\.lora_A.*no gradient reached it"):
        _train(tmp_path / "run", cache)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == PlanError.exit_code
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert "first_step" not in json.loads((tmp_path / "run" / "plan.json").read_text())


class _Clock:
    """What AgainstPlan reads of a run on a card of 80 GiB."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        (folder / "plan.json").write_text('{"identity": {}}')
        cfg = RunConfig.model_validate(
            {
                "model": {"source": "microsoft/Phi-3-mini-4k-instruct"},
                "data": {"train": "x"},
                "train": {"global_batch": 1, "max_steps": 9},
            }
        )
        self.cfg, self.total = cfg, 9
        self.engine = SimpleNamespace(model=nn.Module())
        self.engine.model.config = SimpleNamespace(num_hidden_layers=32, to_dict=_mini)
        self.metrics = SimpleNamespace(say=self.said.append)
        self.folder = SimpleNamespace(held=folder, write_json=lambda n, v: (folder / n).write_text(json.dumps(v)))
        self.time_left = SimpleNamespace(steps_s=(9.0, 0.2, 0.21, 0.22))


def _mini() -> dict[str, Any]:
    from phi3_dist.family.variants import FAMILIES
    from tests.unit.test_family_models import full_size_config

    return full_size_config(next(family for family in FAMILIES if family.name == "mini-4k"))


@pytest.fixture
def on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from phi3_dist.planning.preview import assumed_machine
    from phi3_dist.training.monitor import against_plan

    ctx: Any = _Clock(tmp_path)
    machine = replace(assumed_machine("cuda", 1, 80.0, {"torch": "2.13.0"}), device_name="NVIDIA H100 80GB HBM3")
    plan = make_plan(ctx.cfg, machine, LaunchFacts(), family_or_shape=_mini())
    ctx.runtime = SimpleNamespace(plan=plan, is_main=True, ds_config=None, device=torch.device("cuda"))
    monkeypatch.setattr(against_plan, "probe", lambda: machine)
    monkeypatch.setattr(against_plan, "peak_gib", lambda _: 10.0)
    return ctx


def test_memory_and_time_on_a_card_are_held_against_the_plan(on_a_card: Any, tmp_path: Path) -> None:
    against = AgainstPlan(on_a_card)
    against.next_step(0)
    ranks = [{"measured_gib": size, "before_gib": 9.0} for size in (14.0, 15.0)]
    against.record(ranks, {"trained": 1, "moved": 1})
    for step in range(1, 9):
        against.next_step(step)
    first = json.loads((tmp_path / "plan.json").read_text())["first_step"]
    assert first["measured_gib"] == 15.0
    assert first["memory_error"] == pytest.approx(15.0 / first["planned_gib"] - 1, abs=1e-3)
    assert (first["step_s"], first["timed_steps"]) == (0.21, 3)
    assert first["time_error"] == pytest.approx(0.21 / first["planned_step_s"] - 1, abs=1e-3)
    memory, time = on_a_card.said
    assert memory.startswith(
        f"memory: 15.00 GiB of tensors at the peak of the worst rank, {first['planned_gib']:.2f} GiB"
    )
    assert f"({first['time_error']:+.0%})" in time
    plan = {"first_step": first}
    (group,) = (group for group in first_screen([], {}, plan, {}) if group.title == "First step")
    assert {fact.label: fact.note for fact in group.facts}["memory"].endswith(f"planned, {first['memory_error']:+.0%}")
