"""The support matrix answers for every combination, and the table is made of its answers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from phi3_dist.planning.support import (
    ADAPTERS,
    DEVICES,
    PRECISIONS,
    QUANTIZATIONS,
    STRATEGIES,
    No,
    Yes,
    matrix_markdown,
    support,
    support_adapter,
    support_optimizer,
)


def test_every_refusal_names_a_nearest_choice_that_works() -> None:
    for combination in itertools.product(STRATEGIES, QUANTIZATIONS, DEVICES, PRECISIONS):
        answer = support(*combination)
        if isinstance(answer, No):
            assert answer.reason
            assert answer.nearest in STRATEGIES
            nearest = (answer.nearest, *combination[1:])
            while isinstance(again := support(*nearest), No):  # fsdp2_offload with nf4 on a CPU needs two steps
                nearest = (again.nearest, *combination[1:])


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "zero2"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quantised_weights_where_they_are_replicated(strategy: str, quantization: str, device: str) -> None:
    assert support(strategy, quantization, device, "fp32")


@pytest.mark.parametrize(
    ("strategy", "quantization", "nearest"),
    [
        ("zero2_offload", "nf4", "zero2"),
        ("zero3", "int8", "zero2"),
        ("fsdp2", "int8", "zero2"),
    ],
)
def test_quantised_weights_are_refused_where_they_are_not_proven(
    strategy: str, quantization: str, nearest: str
) -> None:
    answer = support(strategy, quantization, "cuda", "bf16")
    assert isinstance(answer, No)
    assert answer.nearest == nearest
    assert support(nearest, quantization, "cuda", "bf16")


@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload", "fsdp2"])
def test_strategies_that_shard_4_bit_weights(strategy: str) -> None:
    answer = support(strategy, "nf4", "cpu", "fp32")
    assert isinstance(answer, Yes)
    assert "keeps its part" in answer.note


def test_packages_devices_and_names() -> None:
    assert "DeepSpeed is not installed" in refusal("zero2", "none", "cpu", packages={"torch": "2.13"})
    assert support("zero2", "none", "cpu", "fp32", packages={"deepspeed": "0.19.8"})
    assert "bitsandbytes is not installed" in refusal("ddp", "nf4", "cpu", packages={})
    assert "nothing to offload" in refusal("fsdp2_offload", "none", "cpu")
    assert "no strategy 'zero4'" in refusal("zero4", "none", "cpu")
    assert "not a device" in refusal("ddp", "none", "mps")


def refusal(strategy: str, quantization: str, device: str, packages: dict[str, str] | None = None) -> str:
    answer = support(strategy, quantization, device, "fp32", packages=packages)
    assert isinstance(answer, No)
    return answer.reason


def test_slow_bf16_is_allowed_with_a_note() -> None:
    slow = support("ddp", "none", "cpu", "bf16", fast_bf16=False)
    assert isinstance(slow, Yes)
    assert "slower than fp32" in slow.note
    assert support("ddp", "none", "cpu", "bf16") == Yes()


@pytest.mark.parametrize(
    ("name", "strategy", "device", "works"),
    [
        ("adamw", "zero3_offload", "cpu", True),
        ("adamw_8bit", "ddp", "cuda", True),
        ("adamw_8bit", "single", "cpu", True),
        ("adamw_8bit", "zero2", "cpu", False),
        ("paged_adamw_32bit", "zero2", "cuda", False),
        ("paged_adamw_32bit", "ddp", "cuda", True),
        ("paged_adamw_8bit", "single", "cpu", False),
        ("adamw_8bit", "zero2_offload", "cuda", False),
        ("adamw_8bit", "fsdp2", "cuda", False),
    ],
)
def test_optimizers(name: str, strategy: str, device: str, works: bool) -> None:
    assert bool(support_optimizer(name, strategy, device)) is works


def test_the_table_is_the_function() -> None:
    lines = matrix_markdown().split("Starts and kinds")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0][2:] == [f"{device} {precision}" for device, precision in itertools.product(DEVICES, PRECISIONS)]
    assert len(rows) == 2 + len(STRATEGIES) * len(QUANTIZATIONS)
    for strategy, quantization, *cells in rows[2:]:
        for cell, (device, precision) in zip(cells, itertools.product(DEVICES, PRECISIONS), strict=True):
            answer = support(strategy, quantization, device, precision)
            assert cell == "yes" if answer else cell.startswith("no [")
            if isinstance(answer, No):
                note = lines[lines.index("") + int(cell[4:-1])]
                assert answer.reason in note
                assert answer.nearest in note


def test_kinds_of_lora_are_refused_with_a_choice_that_runs() -> None:
    table = matrix_markdown().split("Starts and kinds")[1]
    for kind, strategy, quantization in itertools.product(ADAPTERS, STRATEGIES, QUANTIZATIONS):
        answer = support_adapter(kind, strategy, quantization)
        if isinstance(answer, No) and support(strategy, quantization):
            assert f"{answer.reason}; nearest: {answer.nearest}" in table
        if isinstance(answer, No) and answer.nearest in STRATEGIES:
            assert support_adapter(kind, answer.nearest, quantization)
    assert not support_adapter("dora", "zero3")
    assert not support_adapter("pissa", "ddp", "nf4")
    assert not support_adapter("loftq", "ddp")
    assert not support_adapter("eva", "fsdp2")
    assert all(support_adapter(kind, "zero2") for kind in ("dora", "pissa", "eva"))


def test_the_table_in_the_docs_is_the_generated_one() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/strategies.md").read_text(encoding="utf-8")
    shown = page.split("<!-- generated: strategies -->")[1].split("<!-- end -->")[0]
    assert shown.strip() == matrix_markdown().strip(), "write it anew: python -m docs.generated"
