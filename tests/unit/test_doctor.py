"""Findings of the doctor, and the locks that killed builds leave behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

import phi3_dist
from phi3_dist.adapters import model_card as card
from phi3_dist.cli import app
from phi3_dist.machine import doctor
from phi3_dist.machine import doctor_on_ranks as examination
from phi3_dist.machine.doctor import diagnose, extensions_root, stale_extension_locks
from phi3_dist.machine.findings import Finding, as_json, as_table, exit_code, merged
from phi3_dist.machine.nodes import NodeFacts, NodeView, clock_findings, differing
from phi3_dist.planning.facts import MachineFacts
from phi3_dist.training import run_folder as folder

GPU = MachineFacts("cuda", "a GPU", 2, 80.0, 512.0, 64, True, "tensor cores", {"deepspeed": "0.19.8"})


def make_lock(root: Path, *parts: str, age_s: float) -> Path:
    lock = root.joinpath(*parts, "lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    then = time.time() - age_s
    os.utime(lock, (then, then))
    return lock


def test_old_locks_without_a_build_are_stale(tmp_path: Path) -> None:
    below = make_lock(tmp_path, "cpu_adam", age_s=3600)
    deeper = make_lock(tmp_path, "py311_cpu", "shm_comm", age_s=3600)
    make_lock(tmp_path, "young", age_s=1)
    (tmp_path / "folder" / "lock").mkdir(parents=True)
    assert stale_extension_locks(tmp_path) == [below, deeper]
    assert stale_extension_locks(tmp_path / "absent") == []


def test_a_lock_under_a_live_build_is_not_stale(tmp_path: Path) -> None:
    building = make_lock(tmp_path, "cpu_adam", age_s=3600)
    left = make_lock(tmp_path, "shm_comm", age_s=3600)
    program = tmp_path / "ninja"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    with subprocess.Popen([program, "60"], cwd=building.parent) as build:
        try:
            assert stale_extension_locks(tmp_path) == [left]
        finally:
            build.kill()
    assert stale_extension_locks(tmp_path) == [building, left]


def test_where_torch_compiles(tmp_path: Path) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    assert extensions_root({"TORCH_EXTENSIONS_DIR": str(tmp_path)}) == tmp_path
    assert extensions_root({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "torch_extensions"
    assert extensions_root({key: os.environ[key] for key in ("XDG_CACHE_HOME",) if key in os.environ}) == Path(
        get_default_build_root()
    )


def test_the_doctor_names_lock_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert any(finding.level == "ok" and "no stale lock" in finding.what for finding in diagnose())
    lock = make_lock(tmp_path, "cpu_adam", age_s=3600)
    (bad,) = (finding for finding in diagnose() if finding.what.endswith(str(lock)))
    assert (bad.level, bad.fix) == ("bad", f"rm '{lock}'")


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = diagnose()
    text = "\n".join(f"{finding.what} {finding.fix}" for finding in found)
    assert "HF_HUB_OFFLINE is set" in text
    assert "hf_secret" not in text
    assert "load_tokenizer" in text
    assert [finding for finding in found if finding.what.startswith("precision auto is")]


def test_flash_attention_is_optional_with_its_command() -> None:
    (finding,) = doctor._flash(GPU)
    assert (finding.level, finding.fix) == ("warn", "pip install flash-attn --no-build-isolation")
    assert "attention auto is sdpa" in finding.what
    (finding,) = doctor._flash(dataclasses.replace(GPU, packages={"torch": "2.13.0"}, capability=(9, 0)))
    assert (finding.level, finding.fix) == ("ok", "")
    assert "attention auto is varlen" in finding.what


def test_missing_build_tools_are_bad_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    on_cpu = MachineFacts("cpu", "a CPU", 1, 8.0, 8.0, 2, False, "", {"deepspeed": "0.19.8"})
    cpu, gpu = (
        next(finding for finding in doctor._deepspeed(machine) if finding.what.startswith("g++"))
        for machine in (on_cpu, GPU)
    )
    assert (cpu.level, gpu.level) == ("bad", "warn")
    assert cpu.fix == "apt install g++"


def test_package_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = ["pydantic>=99", "not-a-real-package>=1", "pyyaml>=6", "only-an-extra; extra == 'x'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requires)
    bad = [finding for finding in doctor._packages({}) if finding.level == "bad"]
    assert len(bad) == 2
    assert "pydantic" in bad[0].what
    assert bad[1].what == "not-a-real-package is not installed"


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a checkout is on the path and nothing was installed."""
    found = metadata.Distribution.from_name.__func__  # type: ignore[attr-defined]

    def from_name(cls: type[metadata.Distribution], name: str) -> metadata.Distribution:
        if name.replace("_", "-") == "phi3-dist":
            raise metadata.PackageNotFoundError(name)
        return found(cls, name)  # type: ignore[no-any-return]

    monkeypatch.setattr(metadata.Distribution, "from_name", classmethod(from_name))
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("phi3-dist")


@pytest.mark.usefixtures("not_installed")
def test_a_checkout_on_the_path_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder.versions()["phi3_dist"] == card._installed()["phi3-dist"] == phi3_dist.__version__
    assert "torch" in {Requirement(line).name for line in doctor._wanted()}
    assert not [finding for finding in doctor._packages({}) if "phi3-dist itself" in finding.what]
    monkeypatch.setattr(doctor.tomllib, "loads", lambda text: {"project": {"dependencies": ["pydantic>=99"]}})
    assert [finding.fix for finding in doctor._packages({}) if finding.level == "bad"] == ["pip install 'pydantic>=99'"]


def test_findings_as_a_table_and_as_json() -> None:
    findings = [
        Finding("ok", "a compiler", check="tools"),
        Finding("warn", "ninja", check="tools"),
        Finding("bad", "no room at https://me:secret@host", "make [room]", "disk", 8),
    ]
    table = as_table(findings).splitlines()
    assert table[0].split() == ["check", "state", "found"]
    assert table[1].split() == ["tools", "ok", "a", "compiler"]
    assert table[2].split() == ["warn", "ninja"], "a check is named once"
    assert table[3].split() == ["disk", "bad", "no", "room", "at", "https://***@host"]
    assert table[4].split() == ["fix:", "make", "[room]"]
    assert json.loads(as_json(findings))[2] == {
        "check": "disk",
        "state": "bad",
        "found": "no room at https://***@host",
        "fix": "make [room]",
    }
    assert (exit_code(findings), exit_code(findings[:2])) == (8, 0)


def facts(rank: int, node: int, **values: str) -> NodeFacts:
    return NodeFacts(rank, node, f"host-{node}", {"package torch": "2.13", "host memory": "64 GiB", **values})


def test_the_node_that_differs_is_named_and_not_each_rank() -> None:
    same = [facts(rank, rank // 2) for rank in range(6)]
    (ok,) = differing(same)
    assert (ok.level, ok.what) == ("ok", "6 ranks on 3 nodes: the same 2 facts")
    other = {"package torch": "2.12", "host memory": "32 GiB"}
    odd = [*same[:2], facts(2, 1, **other), facts(3, 1, **other), *same[4:]]
    assert [(one.level, one.what) for one in differing(odd)] == [
        ("bad", "node 1 (host-1), rank 2, 3: package torch is 2.12, and on the others 2.13"),
        ("warn", "node 1 (host-1), rank 2, 3: host memory is 32 GiB, and on the others 64 GiB"),
    ]
    first = [facts(0, 0, **other), facts(1, 1), facts(2, 2)]
    assert {one.what.partition(",")[0] for one in differing(first)} == {"node 0 (host-0)"}, "rank 0 can be the odd one"


def test_clocks_of_nodes() -> None:
    def views(*seconds: float) -> list[NodeView]:
        return [NodeView(node, f"host-{node}", 1000.0 + apart) for node, apart in enumerate(seconds)]

    assert [one.level for one in clock_findings(views(0, 0.5, -0.5))] == ["ok"]
    assert list(clock_findings(views(0))) == []
    (late,) = clock_findings(views(0, 0.5, -90))
    assert (late.level, late.what) == ("warn", "node 2 (host-2) is 90 s behind rank 0's (host-0)")
    assert "chronyd" in late.fix


def test_what_other_ranks_find_is_said_once() -> None:
    fine, bad = Finding("ok", "a"), Finding("bad", "no room", code=8)
    assert merged([[fine], [fine, bad], [bad]]) == [fine, dataclasses.replace(bad, what="rank 1: no room")]
    assert merged([[bad], [bad]]) == [bad]


def test_a_leftover_of_a_launch_and_a_torch_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> MachineFacts:
        raise OSError("libcudart.so.13: cannot open shared object file")

    assert exit_code(diagnose()) == 0
    monkeypatch.setattr(doctor, "probe", broken)
    monkeypatch.setenv("RANK", "3")
    bad = [finding for finding in diagnose() if finding.level == "bad"]
    assert [finding.check for finding in bad] == ["launch", "torch"]
    assert "RANK=3, and WORLD_SIZE and LOCAL_RANK" in bad[0].what
    assert "libcudart" in bad[1].what
    assert not examination.examine().findings[0].fix


def test_a_card_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = MachineFacts("cpu", "a CPU", 1, 8.0, 8.0, 2, False, "", {"torch": "2.13.0+cpu"})
    monkeypatch.setattr(doctor, "own_cards", lambda: (("NVIDIA H200", 141.0),))
    assert [one.what for one in doctor._device(on_cpu) if "the driver lists 1 × NVIDIA H200" in one.what]


def test_the_verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    assert {"python", "launch", "packages", "device", "cache"} <= {row["check"] for row in json.loads(done.stdout)}
    make_lock(tmp_path, "torch_extensions", "cpu_adam", age_s=3600)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 8
    assert "locks " in done.stdout
