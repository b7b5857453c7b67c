"""The rehearsal: the support matrix on fake CUDA tensors, a layer's launches and bytes, and that each fault is seen."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from phi3_dist.planning.support import PRECISIONS, QUANTIZATIONS, STRATEGIES, support
from tests import warm
from tests.rehearsal_bodies import PROBES

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(Version(version("torch")) < Version("2.13"), reason="fake devices as torch 2.13 has them"),
]
ROOT = Path(__file__).parents[2]


def _run(which: str) -> dict[str, Any]:
    command = [warm.python(), "-m", "tests.rehearsal_bodies", which]
    done = subprocess.run(
        command, cwd=ROOT, env=warm.environment(), capture_output=True, text=True, check=False, timeout=880
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return _run("short")


def _outcome(found: dict[str, Any], *names: str) -> dict[str, Any]:
    keys = ("strategy", "quantization", "precision", "device")
    return next(one for one in found["cells"] if tuple(one["cell"][key] for key in keys) == names)


# --- the matrix -------------------------------------------------------------------------------------------------------


def _check_cells(found: dict[str, Any]) -> None:
    for one in found["cells"]:
        cell = one["cell"]
        names = (cell["strategy"], cell["quantization"], cell["device"], cell["precision"])
        wanted = "ran" if support(*names) else "refused"
        assert (names, one["verdict"], one["why"] if wanted == "ran" else "") == (names, wanted, "")
        assert (names, one["faults"], one["waits"]) == (names, [], [])
        assert one["not_rehearsed"], names


def test_cells_run_or_are_refused_as_the_support_matrix_says(found: dict[str, Any]) -> None:
    _check_cells(found)
    seen = {(one["cell"]["strategy"], one["verdict"]) for one in found["cells"]}
    assert seen >= {(strategy, "ran") for strategy in STRATEGIES}
    assert seen >= {("zero3", "refused"), ("fsdp2", "refused")}


@pytest.mark.full
def test_every_cell_of_the_support_matrix() -> None:
    everything = _run("full")
    _check_cells(everything)
    on_cuda = {tuple(one["cell"].values())[:3] for one in everything["cells"] if one["cell"]["device"] == "cuda"}
    assert on_cuda == set(product(STRATEGIES, QUANTIZATIONS, PRECISIONS))


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if not s.endswith("_offload")])
def test_what_trains_lies_on_the_device(found: dict[str, Any], strategy: str) -> None:
    held = _outcome(found, strategy, "none", "bf16", "cuda")["held"]
    assert held.startswith("weights on cuda, ")
    assert "exp_avg on cuda" in held
    assert "cpu" not in held


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s.endswith("_offload")])
def test_what_is_offloaded_lies_on_the_host(found: dict[str, Any], strategy: str) -> None:
    held = _outcome(found, strategy, "none", "bf16", "cuda")["held"]
    assert "exp_avg on cpu, exp_avg_sq on cpu" in held
    assert "step on cpu" in held


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_base_for_the_host_is_not_put_on_the_gpu_beside(found: dict[str, Any], quantization: str) -> None:
    assert _outcome(found, "single", quantization, "fp32", "cpu")["held"] == "weights on cpu"


WAITS_BY_DESIGN = {
    "single": 0,
    "ddp": 0,
    "zero1": 4,
    "zero2": 5,
    "zero2_offload": 21,
    "zero3": 4,
    "zero3_offload": 36,
    "fsdp2": 0,
    "fsdp2_offload": 16,
}
"""Waits of one rank in a step of two layers, by the libraries' own design: see `by_design` in bench/cells.py."""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategy_waits_more_often_than_its_library_must(found: dict[str, Any], strategy: str) -> None:
    waits = _outcome(found, strategy, "none", "bf16", "cuda")["by_design"]
    assert sum(waits.values()) == WAITS_BY_DESIGN[strategy], waits


# --- one layer of Phi-3-mini ------------------------------------------------------------------------------------------

LAYER = {
    ("bf16", "layer forward"): (62, 1927, 1379),
    ("bf16", "layer backward"): (72, 2767, 1351),
    ("nf4", "layer forward"): (74, 1996, 1608),
    ("nf4", "layer backward"): (81, 2819, 1523),
    ("recomputed", "layer forward"): (62, 1927, 1379),
    ("recomputed", "layer backward"): (147, 5312, 3113),
    ("fp8", "layer forward"): (94, 3247, 2535),
    ("fp8", "layer backward"): (105, 4967, 3280),
}
"""Launches, MiB read and MiB written by one decoder layer of Phi-3-mini: 4,096 tokens in four documents, LoRA r=16 with
dropout on every linear. Who makes these smaller writes the new numbers here (`python -m tests.rehearsal_bodies table`
prints them); who makes them greater says why."""


@pytest.mark.parametrize(("kind", "part"), LAYER)
def test_launches_and_bytes_of_a_layer(found: dict[str, Any], kind: str, part: str) -> None:
    kernels = found["layers"][kind]["kernels"][part]
    sizes = (kernels["read_bytes"] // 2**20, kernels["written_bytes"] // 2**20)
    assert (kernels["launches"], *sizes) == LAYER[kind, part], kernels["ops"]


def test_the_peak_by_kind(found: dict[str, Any]) -> None:
    """Three layers of Phi-3-mini and its tables: weights and adapter are exact, activations no more than they were."""
    bf16, nf4 = (found["layers"][kind]["peak_gib"]["cuda"] for kind in ("bf16", "nf4"))
    linear, tables = 3 * 113_246_208, 2 * 32_064 * 3072
    adapter = 3 * 16 * (3072 + 9216 + 3072 + 3072 + 3072 + 16384 + 8192 + 3072)
    assert bf16["base weights"] * 2**30 == pytest.approx(2 * (linear + tables), rel=1e-3)
    assert bf16["adapter"] * 2**30 == pytest.approx(4 * adapter)
    assert bf16["optimizer"] * 2**30 == pytest.approx(8 * adapter, rel=1e-3)
    assert nf4["base weights"] * 2**30 == pytest.approx(linear / 2 + 2 * tables, rel=1e-2)
    recomputed = found["layers"]["recomputed"]["peak_gib"]["cuda"]
    assert recomputed["activations"] < bf16["activations"] / 1.5


# --- that it sees what it is for --------------------------------------------------------------------------------------

_HOST = "a copy from host to device, "
WAITS = {
    "a number": ["a number is read"],
    "a condition": ["a number is read"],
    "nonzero": ["nonzero: the result's size depends on values"],
    "a list": [f"{_HOST}memory that is not pinned: int64 (3,)"],
    "pageable to device": [f"{_HOST}memory that is not pinned: float32 (3,)"],
    "pageable, not blocking": [f"{_HOST}memory that is not pinned: float32 (3,)"],
    "pinned, blocking": [f"{_HOST}pinned memory, blocking: float32 (3,)"],
    "to host": ["a copy from device to host, memory that is not pinned: float32 (3,)"],
    "synchronize": ["torch.cuda.synchronize"],
}


@pytest.mark.parametrize("name", [name for name in PROBES if name != "two devices"])
def test_waits_are_seen_and_nothing_else_is_one(found: dict[str, Any], name: str) -> None:
    assert found["probes"][name]["waits"] == WAITS.get(name, [])


def test_devices_do_not_mix(found: dict[str, Any]) -> None:
    assert found["probes"]["two devices"] == {"error": "FakeTensorDeviceMismatchError"}
    assert found["probes"]["Adam's step on the host"]["faults"] == ["_fused_adamw_: 1 of 5 tensors are on the host"]
    assert found["probes"]["Adam's step on the device"]["faults"] == []


def test_the_backward_of_a_view_costs_nothing_or_is_a_fault(found: dict[str, Any]) -> None:
    assert found["probes"]["select"]["faults"] == ["select_backward: zeros and a copy for the gradient of a view"]
    assert found["probes"]["squeeze"]["faults"] == []


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("product", [1, 4 * (4 * 8 + 8 * 16), 4 * 4 * 16]),
        ("in place", [1, 4 * 16, 4 * 8]),
        ("copy", [1, 4 * 8, 4 * 8]),
        ("expanded", [1, 4 * 9, 4 * 8]),
        ("views", [0, 0, 0]),
        ("rows of a table", [2, 4 * 2 + 4 * 16 + 8 * 2, 8 * 2 + 4 * 16]),
        ("on the host", [0, 0, 0]),
    ],
)
def test_launches_and_bytes_are_counted(found: dict[str, Any], name: str, moved: list[int]) -> None:
    assert found["probes"][name]["moved"] == moved


def test_the_peak_counts_what_lives_at_once(found: dict[str, Any]) -> None:
    assert sum(found["probes"]["peak"]["peak"].values()) == 2 * 4096


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_run_file_or_the_matrix_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    from phi3_dist.bench.rehearse import main

    with pytest.raises(SystemExit):
        main([])
    assert "give a run file, or --matrix" in capsys.readouterr().err


def test_a_source_without_a_known_shape_is_named() -> None:
    from phi3_dist.bench.rehearse import config_of_source
    from phi3_dist.errors import ConfigError

    with pytest.raises(ConfigError, match="a hub id whose shape is known"):
        config_of_source("someone/else")


@pytest.mark.parametrize("layers", [32, 2])
def test_the_lines_for_a_person(layers: int) -> None:
    from phi3_dist.bench.rehearse import report_lines

    found = {
        "strategy": "single",
        "world_size": 1,
        "precision": "bf16",
        "attention": "varlen",
        "kernels": {"forward": {"launches": 56 * layers, "read_bytes": 2**30, "written_bytes": 2**29, "ops": {}}},
        "collectives": {},
        "peak_gib": {"cuda": {"base weights": 7.1, "other": 0.001}},
        "held": "weights on cuda",
        "waits": [
            {"phase": "update", "what": "a number is read", "where": "x.py:1", "count": 2, "by_design": "as asked"}
        ],
        "faults": [],
    }
    lines = report_lines(found)
    assert lines[2].split() == ["forward", f"{56 * layers:,}", "1.00", "0.50"]
    assert "peak on cuda: 7.10 GiB: base weights 7.10" in lines
    assert lines[-1] == "WAITS in update: 2 × a number is read at x.py:1 (as asked)"
