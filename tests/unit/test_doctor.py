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

import phi3_dist
from phi3_dist.adapters import card
from phi3_dist.machine import doctor
from phi3_dist.machine.doctor import Finding, as_text, diagnose, extensions_root, stale_extension_locks
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


def test_findings_as_text_and_as_json() -> None:
    findings = [Finding("ok", "a compiler"), Finding("bad", "no room", "make room")]
    assert as_text(findings) == "ok    a compiler\nbad   no room\n      fix: make room"
    assert json.loads(as_text(findings, as_json=True)) == [
        {"state": "ok", "check": "a compiler", "fix": ""},
        {"state": "bad", "check": "no room", "fix": "make room"},
    ]
