"""Sweeps: each candidate as its own run would be, whatever trains beside it; who ends early; what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from phi3_dist.bench.counting import RealWatch
from phi3_dist.bench.load import write_base
from phi3_dist.cli import app
from phi3_dist.errors import ConfigError, PlanError
from phi3_dist.machine.probe import launch_facts, probe
from phi3_dist.planning.memory import Term
from phi3_dist.planning.plan import make_plan
from phi3_dist.planning.preview import shape_of_source
from phi3_dist.sweep import loop as sweep_loop
from phi3_dist.sweep import step as sweep_step
from phi3_dist.sweep.early import Decision, decide, rung_step
from phi3_dist.sweep.file import EarlyConfig, Sweep, load_sweep
from phi3_dist.sweep.forecast import forecast, plans_of
from phi3_dist.sweep.loop import SweepResult, run_sweep
from phi3_dist.sweep.memory import candidates_a_pass, candidates_at_once, size_sweep
from phi3_dist.training.whole_run import train
from tests.unit.test_fp8 import needs_fp8

REPO = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "model": {"source": "tiny-random", "precision": "fp32"},
    "data": {"train": str(REPO / "configs/run/debug_chats.jsonl"), "validation_share": 0.1, "pack_length": 320},
    "lora": {"r": 8, "alpha": 16, "dropout": 0.1},
    "optim": {"lr": 1e-2},
    "train": {"max_steps": 4, "global_batch": 4, "micro_batch": 2, "eval_every": 2},
    "save": {"every": 2},
    "log": {"trackers": []},
}


def sweep_of(folder: Path, section: dict[str, Any], **changes: Any) -> Sweep:
    values = {name: {**RUN.get(name, {}), **changes.get(name, {})} for name in {*RUN, *changes}}
    values["save"]["folder"] = str(folder / "runs")
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({**values, "sweep": {"pass_tokens": 10**6, **section}}))
    return load_sweep(file)


def run(sweep: Sweep, **options: Any) -> SweepResult:
    return run_sweep(sweep, probe(use_cpu=True), launch_facts({}), **options)


def rows(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def numbers(folder: Path) -> list[Any]:
    keys = ("step", "loss", "lr", "grad_norm", "supervised_tokens", "tokens", "heldout_loss")
    return [[row.get(key) for key in keys] for kind in ("train", "eval") for row in rows(folder, kind)]


def same_bits(ours: Path, theirs: Path) -> None:
    assert numbers(ours) == numbers(theirs)
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def alone(sweep: Sweep, folder: Path) -> None:
    """Each candidate once more, as a run of its own."""
    for one in sweep.candidates:
        save = one.cfg.save.model_copy(update={"folder": str(folder / one.name)})
        train(one.cfg.model_copy(update={"save": save}), probe(use_cpu=True), launch_facts({}), overwrite=True)


MANY = [
    {"name": "as_it_is"},
    {"name": "narrow", "lora.targets": ["qkv_proj"], "lora.dropout": 0.0, "train.seed": 3, "optim.lr": 0.02},
    {"name": "short", "train.max_steps": 3, "optim.schedule": "linear"},
    {"name": "twice_the_batch", "train.global_batch": 8},
    {"name": "rs_plus", "lora.rslora": True, "lora.plus_ratio": 4.0, "lora.r": 4},
    {"name": "frozen_a", "lora.freeze_a": True, "optim.weight_decay": 0.1},
    {"name": "one_layer", "lora.layers": [1], "data.supervise": "all"},
    {"name": "dora", "lora.dora": True},
    {"name": "dora_dry", "lora.dora": True, "lora.dropout": 0.0, "lora.targets": ["qkv_proj", "down_proj"]},
    {"name": "eva", "lora.init": "eva", "train.max_steps": 2},
    {"name": "pattern", "lora.rank_pattern": {"down_proj": 2}, "optim.max_grad_norm": 0.01},
]


def test_each_candidate_is_its_own_run_to_the_bit(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"candidates": MANY})
    result = run(sweep)
    assert set(result.states.values()) == {"finished"}
    alone(sweep, tmp_path / "alone")
    for one in sweep.candidates:
        same_bits(Path(one.cfg.save.folder), tmp_path / "alone" / one.name)
    said = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    losses = [one["heldout_loss"] for one in said["candidates"]]
    assert losses == sorted(losses)
    assert result.best == said["candidates"][0]["name"]
    best, winner = tmp_path / "runs" / "best", tmp_path / "runs" / result.best / "adapter"
    assert (best / "adapter_model.safetensors").read_bytes() == (winner / "adapter_model.safetensors").read_bytes()


def test_checkpointed_layers_draw_their_masks_again(tmp_path: Path) -> None:
    section = {"axes": {"lora.r": [8, 4, 2]}, "pass_tokens": 1280}  # two in a pass, and one
    sweep = sweep_of(tmp_path, section, model={"activation_checkpointing": True}, train={"max_steps": 2})
    run(sweep)
    alone(sweep, tmp_path / "alone")
    for one in sweep.candidates:
        same_bits(Path(one.cfg.save.folder), tmp_path / "alone" / one.name)


def test_a_candidate_whose_numbers_go_wrong_touches_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of(tmp_path, {"axes": {"optim.lr": [1e-2, 1e-3]}}, train={"max_bad_steps": 2})
    make: Callable[..., Any] = sweep_step.to_device

    def poisoned(packs: Any, which: Any, device: Any) -> Any:
        for update in (updates or [None])[:1]:
            if update is not None:
                with torch.no_grad():
                    update.a_RI.fill_(float("nan"))
        return make(packs, which, device)

    updates: list[Any] = []
    from phi3_dist.sweep import candidate

    built = candidate.updates_of

    def noted(adapter: Any) -> Any:
        found = built(adapter)
        updates.extend(list(found.values())[:1])
        return found

    monkeypatch.setattr(candidate, "updates_of", noted)
    monkeypatch.setattr(sweep_step, "to_device", poisoned)
    result = run(sweep)
    monkeypatch.undo()
    first, second = sweep.candidates
    assert result.states == {first.name: "failed", second.name: "finished"}
    assert result.exit_code == 1
    alone(sweep, tmp_path / "alone")
    same_bits(Path(second.cfg.save.folder), tmp_path / "alone" / second.name)


def test_halving_ends_the_worst_and_a_revived_one_goes_on_as_if_it_never_had(tmp_path: Path) -> None:
    section = {"axes": {"optim.lr": [1e-2, 1e-3, 1e-4]}, "early": "halving"}
    sweep = sweep_of(tmp_path, section)
    result = run(sweep)
    said = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    assert [decision["step"] for decision in said["early"]] == [2, 4][: len(said["early"])]
    assert said["early"][0]["ended"] == ["lr=0.0001"]
    assert result.states["lr=0.0001"] == "ended early"
    assert "number 3 of 3, and 2 continue" in said["candidates"][-1]["why"]
    again = run(sweep, resume=True)
    assert again.states == result.states
    revived = run(sweep, resume=True, revive=["lr=0.0001"])
    assert revived.states["lr=0.0001"] == "finished"
    one = next(c for c in sweep.candidates if c.name == "lr=0.0001")
    save = one.cfg.save.model_copy(update={"folder": str(tmp_path / "alone")})
    train(one.cfg.model_copy(update={"save": save}), probe(use_cpu=True), launch_facts({}))
    assert numbers(Path(one.cfg.save.folder)) == numbers(tmp_path / "alone")


def test_a_sweep_goes_on_where_it_was_cut_and_takes_new_candidates(tmp_path: Path) -> None:
    whole = sweep_of(tmp_path, {"axes": {"optim.lr": [1e-2, 1e-3]}, "together": 1})
    run(whole)
    cut = tmp_path / "runs" / "lr=0.001"
    kept = shutil.copytree(cut, tmp_path / "kept")
    shutil.rmtree(cut / "checkpoints" / "step_000004")
    shutil.rmtree(cut / "adapter")
    (cut / "exit.json").unlink()
    more = sweep_of(tmp_path, {"axes": {"optim.lr": [1e-2, 1e-3, 1e-4]}})
    result = run(more, resume=True)
    assert set(result.states.values()) == {"finished"}
    same_bits(cut, kept)
    assert [row["step"] for row in rows(tmp_path / "runs" / "lr=0.0001")] == [1, 2, 3, 4]


def test_the_rule_is_a_function_of_the_losses() -> None:
    early = EarlyConfig(rule="halving", keep=0.5, first=2, floor=2)
    assert [rung_step(early, 10, rung) for rung in range(3)] == [20, 40, 80]
    names = ["a", "b", "c", "d", "e"]
    made = decide(early, 20, {"a": 2.0, "b": float("nan"), "c": 1.0, "d": 1.0, "e": 3.0}, names)
    assert made.kept == ("a", "c", "d")
    assert made.ended == ("b", "e")
    assert "number 5 of 5, and 3 continue" in made.why("b")
    assert Decision.from_dict(json.loads(json.dumps(made.to_dict()))).kept == made.kept
    assert decide(early, 40, {"a": 2.0, "c": 1.0}, names).kept == ("a", "c"), "the floor"
    one = decide(EarlyConfig(rule="halving", keep=0.2), 1, {"b": 1.0, "a": 1.0}, names)
    assert one.kept == ("a",), "equal losses: the order of the file"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"axes": {"model.precision": ["bf16"]}}, "model.precision: cannot differ between candidates"),
        ({"axes": {"data.pack_length": [64]}}, "packs of all candidates are joined"),
        ({"axes": {"optim.learning_rate": [1]}}, "optim.learning_rate"),
        ({"axes": {"lora.r": []}}, "sweep.axes.lora.r: has no value"),
        ({"axes": {"lora.r": [1, 2], "optim.lr": [1]}, "how": "zip"}, "lora.r has 2, optim.lr has 1"),
        ({"axes": {"lora.r": [8, 4]}, "candidates": [{"name": "x", "lora.r": 4}]}, "are the same run"),
        ({"candidates": [{"lora.r": 4}]}, "sweep.candidates[0].name: is missing"),
        ({"candidates": [{"name": "../x"}]}, "a folder is named after it"),
        ({"axes": {"lora.init": ["pissa", "eva"]}}, "lora.init: cannot be in a sweep: PiSSA takes"),
        ({"axes": {"lora.bias": ["all"]}}, "lora.bias: cannot be in a sweep"),
        *(({"candidates": [{"name": n}]}, "another word than best") for n in ("best", "sweep.json", "Sweep.HTML")),
        ({"axes": {"lora.r": [0]}}, "sweep candidate r=0"),
        ({}, "has neither axes nor candidates"),
        ({"axe": {}}, "sweep.axe"),
        ({"axes": {"train.seed": list(range(600))}}, "means 600 candidates"),
    ],
)
def test_what_cannot_be_a_sweep_is_one_message(section: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep_of(tmp_path, section)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"together": 0}, "is 0; expected auto or 1 or more\n    fix: leave it out for auto"),
        ({"togehter": 2}, "unknown key (value 2)\n    fix: did you mean together?"),
        ({"wide": 2}, "the keys of this section are axes, how,"),
        ({"how": "girds"}, "fix: did you mean grid?"),
    ],
)
def test_a_bad_key_of_the_section_is_one_problem_with_its_fix(
    section: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep_of(tmp_path, {"axes": {"lora.r": [8, 4]}, **section})
    (problem,) = caught.value.problems
    assert said in str(problem)


def test_early_ends_need_losses_to_compare(tmp_path: Path) -> None:
    section = {"axes": {"lora.r": [8, 4]}, "early": "halving"}
    with pytest.raises(ConfigError, match=r"set train\.eval_every"):
        sweep_of(tmp_path, section, train={"eval_every": 0})
    with pytest.raises(ConfigError, match=r"there is no data\.validation to measure on"):
        sweep_of(tmp_path, section, data={"validation_share": 0.0})


def test_the_shipped_sweep_file_is_read() -> None:
    sweep = load_sweep(REPO / "configs/sweep/lr_and_rank.yaml")
    assert len(sweep.candidates) == 9
    assert sweep.differing == ("optim.lr", "lora.r", "lora.targets")


def test_the_verbs_around_a_run_take_a_sweep_file(tmp_path: Path) -> None:
    one = {"axes": {"optim.lr": [1e-2, 1e-3]}, "early": "halving", "candidates": [{"name": "odd", "data.max_rows": 24}]}
    sweep = sweep_of(tmp_path, one)
    file = str(tmp_path / "sweep.yaml")

    def said(*words: str) -> str:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == 0, done.output
        return done.stdout

    (tmp_path / "shown.yaml").write_text(said("config", "show", file))
    again = load_sweep(tmp_path / "shown.yaml")
    assert [(c.name, c.cfg.data, c.cfg.optim) for c in again.candidates] == [
        (c.name, c.cfg.data, c.cfg.optim) for c in sweep.candidates
    ]
    assert (again.early, again.together, again.pass_tokens) == (sweep.early, sweep.together, sweep.pass_tokens)
    assert said("prepare", file).count("packs to train on") == 2
    said("slurm", file, "--processes-per-node", "1", "--script", str(tmp_path / "job.sbatch"))
    assert "\nVERB=sweep\n" in (tmp_path / "job.sbatch").read_text()
    train = CliRunner().invoke(app, ["train", file])
    assert "phi3-dist sweep trains a file with this section" in str(train.exception)


def test_a_run_file_without_candidates_is_told_how(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no section `sweep`"):
        load_sweep(REPO / "configs/run/debug.yaml")
    sweep = sweep_of(tmp_path, {"axes": {"lora.r": [8]}})
    with pytest.raises(ConfigError, match="nobody is not a candidate"):
        run(sweep, resume=True, revive=["nobody"])


@pytest.mark.full
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_candidates_share_a_quantised_base(quantization: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    write_base(tmp_path / "base", layers=2, hidden=128, shard="1GB")
    dora = {"name": "dora", "lora.dora": True} if quantization == "nf4" else {"name": "dry", "lora.dropout": 0.0}
    loftq = {"name": "loftq", "lora.init": "loftq"} if quantization == "nf4" else {"name": "seed", "train.seed": 3}
    model = {"source": str(tmp_path / "base"), "tokenizer": "tiny-random", "quantization": quantization}
    sweep = sweep_of(tmp_path, {"candidates": [{"name": "plain"}, dora, loftq]}, model=model, train={"max_steps": 2})
    run(sweep)
    alone(sweep, tmp_path / "alone")
    for one in sweep.candidates:
        ours, theirs = (rows(folder / one.name) for folder in (tmp_path / "runs", tmp_path / "alone"))
        for our, their in zip(ours, theirs, strict=True):
            for key in ("loss", "grad_norm"):
                assert our[key] == pytest.approx(their[key], rel=1e-5), (one.name, our["step"], key)


@needs_fp8
def test_an_fp8_base_is_shared_by_candidates_that_adapt_the_same_linears(tmp_path: Path) -> None:
    section: dict[str, Any] = {"axes": {"optim.lr": [1e-2, 1e-3], "lora.r": [8, 4]}, "how": "zip"}
    changes = {"model": {"fp8": True, "precision": "bf16"}, "train": {"max_steps": 2}}
    sweep = sweep_of(tmp_path, section, **changes)
    run(sweep)
    alone(sweep, tmp_path / "alone")
    for one in sweep.candidates:
        same_bits(Path(one.cfg.save.folder), tmp_path / "alone" / one.name)
    for key, value, why in (("lora.layers", [0], "candidates adapt others"), ("lora.dora", True, "DoRA reads")):
        with pytest.raises(ConfigError, match=why):
            sweep_of(tmp_path, {"candidates": [{"name": "a"}, {"name": "b", key: value}]}, **changes)


def test_what_no_sweep_runs_under_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"axes": {"lora.r": [8]}}, train={"sequence_parallel": 2})
    with pytest.raises(PlanError, match="candidates are joined over whole packs"):
        run_sweep(sweep, probe(use_cpu=True), replace(launch_facts({}), world_size=2, strategy="ddp"))
    assert not (tmp_path / "runs").exists()


def test_as_many_train_at_once_as_memory_holds(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"axes": {"train.seed": list(range(8))}})
    terms = (Term("base weights", 4.0, ""), Term("adapter", 0.5, ""), Term("activations (estimate)", 1.5, ""))
    machine = probe(use_cpu=True)
    card = type(machine)(**{**vars(machine), "device": "cuda", "device_memory_gib": 12.0})
    assert candidates_at_once("auto", len(sweep.candidates), terms, card, ranks=1, a_pass=100)[0] == 3
    assert candidates_at_once("auto", 2, terms, card, ranks=1, a_pass=100)[0] == 2
    assert candidates_at_once(5, 8, terms, card, ranks=1, a_pass=100) == (5, "as the sweep file says")
    # 4 + 1.5 of one in the pass, and 0.5 for each: 10 fit into 10.8 GiB
    assert candidates_at_once("auto", 20, terms, card, ranks=1, a_pass=1)[0] == 10


CARD_SWEEP = {
    "model": {"source": "microsoft/Phi-3-mini-4k-instruct", "precision": "bf16"},
    "data": {"pack_length": 2048},
    "lora": {"dropout": 0.0},
    "train": {"max_steps": 100, "global_batch": 8, "micro_batch": 1},
}


def test_a_plan_has_rounds_memory_and_time_of_the_largest_candidate(tmp_path: Path) -> None:
    section = {"axes": {"lora.r": [8, 256], "train.seed": list(range(10))}, "pass_tokens": "auto"}
    sweep_of(tmp_path, section, **CARD_SWEEP)
    words = ["plan", str(tmp_path / "sweep.yaml"), "--gpu", "h100-80gb"]
    said = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    room = next(one for one in said["rooms"] if one["place"] == "device")
    assert room["own"] == pytest.approx(16 * 402_653_184 / 2**30, rel=0.1), "rank 256, not the first candidate's 8"
    assert said["rounds"] == -(-20 // said["at_once"]) > 1
    needed = [room["shared"] + n * room["own"] + min(n, said["a_pass"]) * room["passing"] for n in range(21)]
    assert needed[said["at_once"]] <= 72 < needed[said["at_once"] + 1]
    lines = CliRunner().invoke(app, words).stdout
    assert f"in {said['rounds']} rounds" in lines
    assert f"{needed[said['at_once']]:.2f} of 80.0 GiB on the device with {said['at_once']} at once" in lines
    assert "for 2,000 steps of all candidates (h100-80gb's data sheet" in lines
    refused = CliRunner().invoke(app, [*words, "--write", "x", "--price", "2"])
    assert [problem.where for problem in refused.exception.problems] == ["--price", "--write"]  # type: ignore[union-attr]


def _peak_mib(folder: Path, count: int, pass_tokens: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Most bytes that live in the second joint step, and what the forecast says, in MiB."""
    folder.mkdir()
    write_base(folder / "base", layers=4, hidden=256, shard="1GB")
    changes = {
        "model": {"source": str(folder / "base"), "tokenizer": "tiny-random"},
        "data": {"pack_length": 512, "supervise": "all"},
        "lora": {"r": 32},
        "train": {"max_steps": 2, "global_batch": 2, "micro_batch": 1, "eval_every": 0},
    }
    sweep = sweep_of(folder, {"axes": {"train.seed": list(range(count))}, "pass_tokens": pass_tokens}, **changes)
    machine, launch = probe(use_cpu=True), launch_facts({})
    shape = shape_of_source(sweep.cfg)
    said = forecast(sweep, plans_of(sweep, machine, launch, shape), machine, launch, shape)
    step, peaks = sweep_loop.joint_step, []
    with RealWatch(resizes=False) as watch, monkeypatch.context() as patched:

        def watched(*arguments: Any) -> Any:
            watch.restart()
            made = step(*arguments)
            peaks.append(watch.live.peak["cpu"].total() / 2**20)
            return made

        patched.setattr(sweep_loop, "joint_step", watched)
        run_sweep(sweep, machine, launch)
    (room,) = said.rooms
    return peaks[1], 1024 * room.gib(said.at_once, said.a_pass)


@pytest.mark.full
def test_further_candidates_take_the_memory_that_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate its adapter, gradients and moments; one more in a pass also activations, planned for full packs."""
    one, planned = _peak_mib(tmp_path / "one", 1, 512, monkeypatch)
    four, planned_four = _peak_mib(tmp_path / "four", 4, 512, monkeypatch)
    in_pairs, planned_in_pairs = _peak_mib(tmp_path / "pairs", 4, 1024, monkeypatch)
    assert four - one == pytest.approx(planned_four - planned, rel=0.02)
    assert 1.0 <= (planned_in_pairs - planned_four) / (in_pairs - four) <= 1.3


def test_as_many_share_a_pass_as_its_tokens_hold() -> None:
    assert [candidates_a_pass("auto", pack, "cpu") for pack in (256, 300, 1024, 4096)] == [2, 1, 1, 1]
    assert candidates_a_pass("auto", 1024, "cuda") == 8
    assert candidates_a_pass(600, 256, "cuda") == 2
    assert candidates_a_pass(10**6, 256, "cuda", "int8") == 1


def test_a_sweep_file_of_hundreds_is_read_at_once(tmp_path: Path) -> None:
    start = time.process_time()
    assert len(sweep_of(tmp_path, {"axes": {"train.seed": list(range(100))}}).candidates) == 100
    assert time.process_time() - start < 20


def test_a_plan_says_how_many_train_at_once_and_imports_no_torch() -> None:
    code = (
        "import sys; from phi3_dist.cli import app; "
        "app(['plan', 'configs/sweep/lr_and_rank.yaml', '--device', 'cpu'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sweep: 9 candidates, 9 at once, in one round" in done.stdout


@pytest.mark.parametrize(
    ("strategy", "world", "gib", "a_pass"),
    [("ddp", 2, 80.0, 2), ("fsdp2", 2, 80.0, 8), ("zero3", 1, 80.0, 2), ("zero3", 2, 9.5, 4), ("zero3", 2, 80.0, 8)],
)
def test_a_pass_that_gathers_the_base_takes_all_that_memory_holds(
    strategy: str, world: int, gib: float, a_pass: int, tmp_path: Path
) -> None:
    section = {"axes": {"train.seed": list(range(8))}, "pass_tokens": "auto"}
    sweep = sweep_of(tmp_path, section, data={"pack_length": 256})
    machine = replace(probe(use_cpu=True), host_memory_gib=gib * world)
    terms = (Term("base weights", 4.0, ""), Term("adapter", 0.0625, ""), Term("activations (estimate)", 1.0, ""))
    plan = make_plan(sweep.candidates[0].cfg, machine, launch_facts({}))
    plan = replace(plan, strategy=strategy, world_size=world, micro_batch=1, memory=terms)
    plans = {one.name: plan for one in sweep.candidates}
    sizing = size_sweep(sweep, plans, 8, machine, world)
    assert (sizing.at_once, sizing.a_pass) == (8, a_pass)
    assert ("gathers the base" in sizing.why) == (a_pass > 2)
    whole = replace(
        sweep, cfg=sweep.cfg.model_copy(update={"model": sweep.cfg.model.model_copy(update={"quantization": "int8"})})
    )
    assert size_sweep(whole, plans, 8, machine, world).a_pass == 1
    assert size_sweep(replace(sweep, pass_tokens=512), plans, 8, machine, world).a_pass == 2
