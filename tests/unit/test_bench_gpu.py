"""The GPU benchmark's worker, on a CPU and a small shape; its table; and that it says so where there is no GPU."""

from __future__ import annotations

import os
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from phi3_dist.bench import gpu, sweep
from phi3_dist.bench.throughput_sides import SHAPE, Round, save_base
from phi3_dist.family.variants import FAMILIES, Shape
from tests.dying_worker import dies
from tests.unit.test_fp8 import needs_fp8

SMALL = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 32064}


def test_the_shape_is_minis() -> None:
    assert Shape.of(gpu.MINI) == FAMILIES[0].shape
    assert gpu.MINI["sliding_window"] == FAMILIES[0].sliding_window


def _saved(folder: Path) -> None:
    here, there = Pipe()
    here.send("go on")
    save_base(there, folder, {"": SMALL})


@pytest.mark.parametrize("name", ["LoRA", pytest.param("LoRA, FP8 base", marks=needs_fp8)])
def test_a_case_runs_and_tells_its_rate_memory_and_flops(name: str, tmp_path: Path) -> None:
    _saved(tmp_path / "base")
    here, there = Pipe()
    found: list[Any] = []

    def ask() -> None:
        found.append(here.recv())
        for _ in range(2):
            here.send("round")
            found.append(here.recv())
        here.send("stop")

    asking = Thread(target=ask)
    asking.start()
    gpu.serve(there, tmp_path / "base", SMALL, name, 256, cpu=True)
    asking.join()
    facts, *rounds = found
    assert [one.tokens for one in rounds] == [256, 256]
    assert facts["flops_per_s"] > 1e6
    assert facts["flops"] > 1e6
    case = gpu.Case(name, 256, rounds, **facts)
    assert case.tokens_per_s > 0
    assert facts["weights_mib"] * 2**20 > 2 * 32064 * 64 * 4


def test_a_case_that_cannot_run_costs_only_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_serve", dies)
    failed = gpu.run_case(tmp_path / "base", "QLoRA (nf4)", 2048, 1)
    assert isinstance(failed, gpu.NotRun)
    ran = gpu.Case("LoRA", 2048, [Round(2048, 10, 0.5, 1500.0)], 1e12, 4e12, 7300.0, "a card")
    lines = gpu.lines_of([failed, ran])
    assert lines[0] == "a card:"
    assert lines[-2] == "| QLoRA (nf4) | 2,048 | not run: ImportError: no module for QLoRA (nf4) | | | |"
    assert lines[-1].startswith("| LoRA | 2,048 | ")


def test_memory_is_counted_from_what_is_allocated_and_not_from_an_older_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3_dist.bench.throughput_sides import Meter

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 900 * 2**20)
    assert Meter(cuda=True).before_mib == 3


def test_the_table_is_markdown_with_the_cards_name() -> None:
    case = gpu.Case("LoRA", 4096, [Round(4096, 10, 0.5, 1500.0)], 1e12, 4e12, 7300.0, "a card")
    lines = gpu.lines_of([case])
    assert lines[0] == "a card:"
    assert lines[-1] == "| LoRA | 4,096 | 8,192 | 50% | 7,300 | 1,500 |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.main([])
    assert caught.value.code == 1
    assert "no CUDA device" in capsys.readouterr().out


def test_losses_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []

    def loss(name: str) -> Any:
        def call(hidden_SH: Tensor, weight_VH: Tensor, bias_V: None, target_S: Tensor) -> Tensor:
            assert (hidden_SH.shape, weight_VH.shape, target_S.shape) == ((6, 64), (32064, 64), (6,))
            calls.append(name)
            return (hidden_SH @ weight_VH.T).gather(1, target_S[:, None]).sum()

        return call

    found = gpu.time_losses({name: loss(name) for name in ("chunked", "liger")}, 6, SMALL, 2, cpu=True)
    assert calls == ["chunked", "liger", "liger", "chunked", "chunked", "liger"]
    assert {name: len(done) for name, done in found.items()} == {"chunked": 2, "liger": 2}
    ours, theirs, ratio = gpu.loss_lines(6, {"chunked": [(2.0, 5.0), (4.0, 6.0)], "liger": [(1.0, 7.0), (4.0, 8.0)]})
    assert ours == "model.loss=chunked, 6 rows: 3.00 ms, peak 6 MiB"
    assert theirs == "model.loss=liger, 6 rows: 2.50 ms, peak 8 MiB"
    assert ratio == "chunked / liger: 1.50 (1.00 … 2.00)"


def test_what_cannot_run_is_not_timed_and_told() -> None:
    here, there = Pipe()
    here.send("stop")
    gpu.serve_losses(there, Path(), SMALL, 5, 1, cpu=True)
    found = here.recv()
    assert list(found) == ["chunked"]
    lines = gpu.loss_lines(5, found)
    assert len(lines) == 2
    assert lines[1].startswith("model.loss=liger was not timed")


def test_a_sweeps_memory_on_a_gpu_is_what_rises_in_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    asked = tmp_path / "asked"
    smi.write_text(  # the command that is measured lists the cards with it, too
        f'#!/bin/sh\ncase "$*" in *name*) exit 1;; esac\necho x >> {asked}\nexpr 1000 + 10 \\* $(wc -l < {asked})\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    seconds, mib = sweep._run(["--version"], 1, gpu=True)
    times = len(asked.read_text().splitlines())
    assert times >= 2, "once before, and while it runs"
    assert mib == 10 * (times - 1)
    assert seconds > 0.1
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as ended:
        sweep.main(["--gpu"])
    assert ended.value.code == 2
