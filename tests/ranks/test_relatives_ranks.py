"""LoRA's relatives under every strategy: one process's numbers, and a resume bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks.launcher import run_ranks
from tests.ranks.test_resume import SAVES, TWO, interrupted, same_bits
from tests.ranks.test_strategies import compare, launch, rows, tiny_base

pytestmark = pytest.mark.ranks

VARIANTS = {
    "dora": ("lora.dora=true",),
    "head": ("lora.modules_to_save=[lm_head]",),
    "rslora": ("lora.rslora=true", "lora.targets=[qkv_proj,down_proj]"),
    "patterns": ("lora.rank_pattern={down_proj: 4}", "lora.alpha_pattern={'layers.1.*': 8}", "lora.layers=[1]"),
    "plus": ("lora.plus_ratio=8",),
    "frozen": ("lora.freeze_a=true",),
    "pissa": ("lora.init=pissa",),
    "pissa_head": ("lora.init=pissa", "lora.modules_to_save=[lm_head]"),
    "pissa_niter": ("lora.init=pissa_niter_8",),
    "eva": ("lora.init=eva", "lora.freeze_a=true"),
    "tokens": ("model.new_tokens=['<|tool|>']",),
    "rows": ("model.new_tokens=[LATTE]",),
    "rows_tied": ("model.new_tokens=[LATTE, small, '<|tool|>']",),
    "rows_nf4": ("model.new_tokens=[LATTE]", "model.quantization=nf4"),
    "rows_int8": ("model.new_tokens=[LATTE]", "model.quantization=int8"),
    "loftq": ("lora.init=loftq", "model.quantization=nf4"),
}
"""LATTE and small stand in the rows as text. With `rows` the base has no row to spare: see `base`."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The base of a variant. With 270 rows and one or three new tokens, two ranks share an odd number of rows."""

    @functools.cache
    def made(vocab_size: int, tied: bool) -> Path:
        return tiny_base(tmp_path_factory.mktemp("tiny") / "base", tied=tied, vocab_size=vocab_size)

    return lambda name: made(270 if name.startswith("rows") else 320, name.endswith("tied"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base: Callable[[str], Path]) -> Callable[[str], Path]:
    """One process's run of a variant, made once."""

    @functools.cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "run"
        done = launch(None, folder, f"model.source={base(name)}", *VARIANTS[name])
        assert done.returncode == 0, done.stderr
        assert rows(folder)[-1]["loss"] < rows(folder)[0]["loss"] - 0.02, "nothing was learned"
        return folder

    return made


EVERYWHERE = ("cpu_2", "zero2", "zero3", "fsdp2")
REFUSED = {("dora", "zero3"), ("eva", "zero3"), ("eva", "fsdp2"), ("rows_int8", "zero3"), ("rows_int8", "fsdp2")}
BESIDE = (("rows", "zero1"), ("rows", "zero2_offload"), ("rows", "zero3_offload"))


def cells(*in_make_test: tuple[str, str]) -> list[object]:
    found = [(name, config) for name in VARIANTS for config in EVERYWHERE if (name, config) not in REFUSED]
    found += BESIDE
    return [pytest.param(*cell, marks=() if cell in in_make_test else pytest.mark.full) for cell in found]


@pytest.mark.usefixtures("deepspeed_ops")
@pytest.mark.parametrize(
    ("name", "config"),
    cells(
        ("pissa_head", "fsdp2"),  # a computed start, and a module that trains as a whole
        ("dora", "zero2"),  # two groups of parameters, whose moments DeepSpeed must link
        ("rows", "fsdp2"),
    ),
)
def test_two_processes_give_one_process_numbers(
    name: str, config: str, alone: Callable[[str], Path], base: Callable[[str], Path], tmp_path: Path
) -> None:
    done = launch(config, tmp_path / "run", f"model.source={base(name)}", *VARIANTS[name], options=TWO)
    assert done.returncode == 0, done.stderr
    compare(tmp_path / "run", alone(name))


@pytest.mark.parametrize(("name", "config"), cells())
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    name: str, config: str, base: Callable[[str], Path], tmp_path: Path, deepspeed_ops: Path
) -> None:
    overrides = (*SAVES, "lora.dropout=0.1", f"model.source={base(name)}", *VARIANTS[name])
    done = launch(config, tmp_path / "whole", *overrides, options=TWO)
    assert done.returncode == 0, done.stderr
    again = interrupted(tmp_path / "whole", tmp_path / "again")
    done = launch(config, again, *overrides, "--resume", options=TWO)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 14 of 20" in done.stdout
    same_bits(again, tmp_path / "whole")


@pytest.mark.full
@pytest.mark.parametrize("name", ["rows", "rows_tied"])
def test_zero3_shards_the_tables_of_new_tokens_and_their_rows(
    name: str, base: Callable[[str], Path], deepspeed_ops: Path
) -> None:
    """Under ZeRO-3 a parameter that is a shard has no values: both the tables and the rows that train, after a step."""
    args = {"folder": str(base(name)), "ids": [270, 271], "steps": 3}
    for found in run_ranks("tests.ranks.load_bodies:taught", 2, args=args, deepspeed=True, timeout_s=150):
        assert len(found) == (2 if name == "rows_tied" else 4)
        for parameter, seen in found.items():
            assert seen == [[0, "trainable_tokens_delta" in parameter]] * 3, parameter


@pytest.mark.parametrize(
    ("overrides", "config", "said"),
    [
        (("lora.init=eva",), "fsdp2", "lora.init: is eva: EVA passes rows"),
        (("lora.dora=true",), "zero3", "lora.dora: is true: DoRA reads each base weight"),
        (("lora.init=loftq",), None, "lora.init: is loftq: LoftQ makes up for what NF4 loses"),
    ],
)
def test_what_does_not_run_is_refused_with_the_nearest_that_does(
    overrides: tuple[str, ...], config: str | None, said: str, tmp_path: Path
) -> None:
    done = launch(config, tmp_path / "run", *overrides, options=TWO if config else ())
    assert done.returncode == (5 if config is None else 1)
    assert said in done.stderr
    assert "nearest: " in done.stderr
