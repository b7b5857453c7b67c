"""`auto` for packs, micro batches and recomputing: the most that fits and gains, its reason, the same everywhere."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from phi3_dist.cli import app
from phi3_dist.config.load import json_schema, load_run
from phi3_dist.config.schema import RunConfig
from phi3_dist.data.cache.length_notes import note_lengths, noted_lengths
from phi3_dist.errors import ConfigError
from phi3_dist.family.variants import FAMILIES
from phi3_dist.planning.advice import Cluster, advise, launch_on, machine_of
from phi3_dist.planning.advice_table import find_option
from phi3_dist.planning.auto_fields import AUTO, RowLengths, auto_fields, settle
from phi3_dist.planning.facts import LaunchFacts
from phi3_dist.planning.gpus import find_gpu
from phi3_dist.planning.memory import total_gib
from phi3_dist.planning.plan import make_plan
from phi3_dist.planning.preview import assumed_machine
from phi3_dist.planning.timing import rates_of_gpu
from phi3_dist.sweep.file import load_sweep

REPO = Path(__file__).parents[2]
MINI = next(family for family in FAMILIES if family.name == "mini-4k")
PHI4 = next(family for family in FAMILIES if family.name == "Phi-4")
PACKAGES = {"torch": "2.13.0", "deepspeed": "0.19.8", "bitsandbytes": "0.50.2", "triton": "3.6.0"}
USUAL = RowLengths(1312, 900_000, 2000)
ALL = ("auto", "auto", "auto")
PACK, AGAIN, MICRO = AUTO


def run(fields: tuple[Any, Any, Any] = ALL, *, batch: int = 16, on_long_row: str = "error") -> RunConfig:
    length, again, micro = fields
    return RunConfig.model_validate(
        {
            "model": {"source": "x", "activation_checkpointing": again},
            "data": {"train": "rows.jsonl", "pack_length": length, "on_long_row": on_long_row},
            "train": {"global_batch": batch, "micro_batch": micro, "max_steps": 100},
        }
    )


def cluster(gpu: str, ranks: int = 2) -> Cluster:
    card = find_gpu(gpu)
    return Cluster(1, ranks, card.memory_gib, 1024.0, rates_of_gpu(card), card)


def settled(
    cfg: RunConfig, gpu: str, rows: RowLengths | None = USUAL, *, model: Any = MINI, **resumed: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    place = cluster(gpu)
    found, choices = settle(cfg, machine_of(place, PACKAGES), launch_on(place, "ddp"), model, rows=rows, **resumed)
    assert auto_fields(found) == ()
    values = {PACK: found.data.pack_length, AGAIN: found.model.activation_checkpointing, MICRO: found.train.micro_batch}
    return values, {choice.name: choice.why for choice in choices}


def test_the_largest_that_fits_and_gains_on_each_card() -> None:
    values, why = settled(run(), "h100-80gb")
    assert values == {PACK: 4096, AGAIN: False, MICRO: 4}
    assert why[PACK].startswith("holds the longest of 2,000 rows, 1,312 tokens")
    assert why[AGAIN].endswith("a tenth kept free, and it would take a fifth more time")
    assert why[MICRO].endswith("passes of more than 16,384 tokens are not expected to be faster")
    values, why = settled(run(), "a100-40gb")
    assert values == {PACK: 4096, AGAIN: False, MICRO: 1}
    assert "; 2 would take " in why[MICRO]
    values, why = settled(run(), "l4")
    assert values[AGAIN] is True
    assert why[AGAIN].startswith("without it 2")


def test_what_is_taken_fits_and_the_next_size_does_not() -> None:
    """By the same account as the plan's."""
    place, launch = cluster("a100-40gb"), launch_on(cluster("a100-40gb"), "ddp")
    for fields in ((2048, False, "auto"), (512, False, "auto"), (4096, True, "auto")):
        found, _ = settle(run(fields, batch=64), machine_of(place, PACKAGES), launch, MINI)
        micro = found.train.micro_batch
        option = find_option(advise(found, place, MINI, PACKAGES), "ddp")
        assert option.state == "fits"
        assert micro * found.data.pack_length == 16384 or _too_large(fields, micro * 2, place)


def _too_large(fields: tuple[Any, ...], micro: int, place: Cluster) -> bool:
    larger = run((*fields[:2], micro), batch=64)
    return find_option(advise(larger, place, MINI, PACKAGES), "ddp").state == "too large"


@pytest.mark.parametrize(
    ("rows", "on_long_row", "length", "said"),
    [
        (RowLengths(180, 7_000, 40), "error", 256, "longer packs would be fewer than the 16 of a step"),
        (RowLengths(180, 9_000_000, 40_000), "error", 4096, "long enough to keep a device busy"),
        (RowLengths(5_000, 9_000_000, 4_000), "error", 8192, "the longest of 4,000 rows, 5,000 tokens"),
        (RowLengths(40_000, 9_000_000, 4_000), "error", 16384, "the model has 16,384 positions"),
        (None, "error", 4096, "the rows are not counted yet"),
    ],
)
def test_packs_hold_the_longest_row(rows: RowLengths | None, on_long_row: str, length: int, said: str) -> None:
    values, why = settled(run(on_long_row=on_long_row), "h200", rows, model=PHI4)
    assert values[PACK] == length
    assert said in why[PACK]


def test_packs_get_shorter_where_memory_ends_but_not_below_the_longest_row() -> None:
    rows = RowLengths(5_000, 9_000_000, 4_000)
    cfg = run(("auto", False, 1))
    values, why = settled(cfg, "h100-80gb", rows, model=PHI4)
    assert values[PACK] == 5056
    assert "; 8,192 would take 92" in why[PACK]
    values, _ = settled(run(("auto", False, 1), on_long_row="drop"), "a100-40gb", rows, model=PHI4)
    assert 512 <= values[PACK] < 5000
    values, why = settled(cfg, "l4", rows, model=PHI4)
    assert values[PACK] == 5056
    assert why[PACK].startswith("nothing fits, and this takes the least")


def test_fields_with_a_value_are_kept_and_the_others_follow_them() -> None:
    values, why = settled(run((1024, True, "auto")), "h100-80gb")
    assert values == {PACK: 1024, AGAIN: True, MICRO: 8}
    assert set(why) == {MICRO}
    assert settle(run((1024, True, 2)), machine_of(cluster("t4"), PACKAGES), LaunchFacts(), MINI)[1] == ()


def test_micro_batches_divide_a_ranks_share() -> None:
    values, _ = settled(run((512, False, "auto"), batch=12), "h200")
    assert values[MICRO] == 6
    values, _ = settled(run((512, False, "auto"), batch=14), "h200")
    assert values[MICRO] == 7


def test_a_host_counts_all_of_its_ranks_and_keeps_half() -> None:
    machine = assumed_machine("cpu", 2, 80.0, PACKAGES)
    found = {}
    for gib in (96.0, 512.0):
        cfg, choices = settle(run(), replace(machine, host_memory_gib=gib), LaunchFacts(2, 1, "ddp"), MINI, rows=USUAL)
        found[gib] = (cfg.data.pack_length, cfg.model.activation_checkpointing, cfg.train.micro_batch)
        assert "half kept free" in choices[-1].why
    assert found == {96.0: (2048, True, 4), 512.0: (2048, False, 4)}


def test_a_resumed_run_keeps_its_values_on_another_card() -> None:
    resumed = {PACK: 512, AGAIN: True, MICRO: 2}
    values, why = settled(run(), "h200", resumed=resumed)
    assert values == resumed
    assert set(why.values()) == {"as the run began with"}
    values, _ = settled(run(), "h200", resumed={**resumed, MICRO: 16})
    assert values[MICRO] == 8, "16 packs on two ranks: what the run had does not divide them"


def test_a_thousand_gpus_are_planned_in_a_second_and_each_way_has_values_of_its_own() -> None:
    begun = time.process_time()
    advice = advise(run(batch=4096), replace(cluster("a100-40gb", 8), nodes=128), MINI, PACKAGES)
    assert time.process_time() - begun < 1
    values = {one.name: dict(one.settled) for one in advice.options if one.state == "fits"}
    assert values["ddp"][MICRO] < values["zero3"][MICRO]
    assert not any("nf4" in note for note in advice.notes), "more packs at a time are no fault of NF4's"


def _plan(*words: str) -> str:
    done = CliRunner().invoke(app, ["plan", str(REPO / "configs/run/debug.yaml"), *words])
    assert done.exit_code == 0, done.output or done.exception
    return done.output


def test_the_verb_says_the_values_and_writes_them(tmp_path: Path) -> None:
    asked = [f"{path}=auto" for path in AUTO]
    card = ("--gpus-per-node", "2", "--gpu", "a100-40gb")
    words = ["model.source=microsoft/Phi-3-mini-4k-instruct", "train.global_batch=8", *asked, *card]
    rows = f"data.train={REPO / 'configs/run/debug_chats.jsonl'}"
    told = _plan(*words, rows, f"data.cache={tmp_path / 'cache'}", "--write", str(tmp_path / "out"))
    assert "auto: data.pack_length=4,096: " in told
    assert "1 × 4,096, not recomputing" in told
    launch = (tmp_path / "out" / "launch.sh").read_text()
    assert "=auto" not in launch
    for value in ("data.pack_length=4096", "model.activation_checkpointing=false", "train.micro_batch=1"):
        assert value in launch
        assert value in (tmp_path / "out" / "job.sbatch").read_text()
    why = _plan(*words, rows, "--why", "zero3")
    assert "auto: train.micro_batch" in why


def test_what_prepare_counted_is_known_to_the_plan_until_the_rows_change(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    cfg = run().model_copy(update={"data": run().data.model_copy(update={"train": str(rows)})})
    cache = tmp_path / "cache"
    assert noted_lengths(cache, cfg) is None
    note_lengths(cache, cfg, USUAL)
    assert noted_lengths(cache, cfg) == USUAL
    rows.write_text('{"messages": [1]}\n')
    assert noted_lengths(cache, cfg) is None
    note_lengths(cache, cfg, USUAL)
    for note in (cache / "row-lengths").glob("*.json"):
        note.write_text("[")
    assert noted_lengths(cache, cfg) is None


def test_a_sweep_and_what_is_no_auto_are_refused(tmp_path: Path) -> None:
    text = (REPO / "configs/run/debug.yaml").read_text()
    file = tmp_path / "sweep.yaml"
    file.write_text(text + "sweep:\n  axes: {optim.lr: [0.001, 0.002]}\n")
    with pytest.raises(ConfigError, match="a sweep trains several"):
        load_sweep(file, ["train.micro_batch=auto"])
    for wrong in ("data.pack_length=max", "train.micro_batch=0", "model.activation_checkpointing=maybe"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            load_run(REPO / "configs/run/debug.yaml", [wrong])
    length = json_schema()["$defs"]["DataConfig"]["properties"]["pack_length"]
    assert {"const": "auto", "type": "string"} in length["anyOf"]


@pytest.mark.parametrize(("layers", "said"), [("auto", False), (0, False), (4, False), (32, True)])
def test_an_nf4_run_that_takes_more_than_lora_is_told_the_key(layers: Any, said: bool) -> None:
    place = cluster("h100-80gb", 1)
    model = {"source": "x", "quantization": "nf4", "dequantized_layers": layers}
    cfg = run((4096, False, 1)).model_copy(
        update={"model": RunConfig.model_validate({"model": model, "data": {"train": "x"}}).model}
    )
    plan = make_plan(cfg, machine_of(place, PACKAGES), launch_on(place, "single"), family_or_shape=MINI)
    why = next(choice.why for choice in plan.choices if choice.name == "weights for backward")
    assert ("LoRA without it 21." in why and "model.dequantized_layers=0 keeps none" in why) == said
    whole = cfg.model_copy(update={"model": cfg.model.model_copy(update={"quantization": "none"})})
    lora = make_plan(whole, machine_of(place, PACKAGES), launch_on(place, "single"), family_or_shape=MINI)
    assert (total_gib(plan.memory or ()) > total_gib(lora.memory or ())) == said
