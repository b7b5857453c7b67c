"""A start that compiles for minutes says so beforehand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phi3_dist.training.monitor import start_clock as startup
from phi3_dist.training.monitor.start_clock import CPU_OPERATOR, compile_notice


def plan(strategy: str, device: str = "cpu") -> Any:
    return SimpleNamespace(strategy=strategy, device=device)


@pytest.fixture(autouse=True)
def not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(startup, "_installed", lambda: tmp_path / "ops")
    return tmp_path / "ops"


def test_the_first_deepspeed_start_says_what_it_compiles_and_where(tmp_path: Path) -> None:
    (line,) = compile_notice(plan("zero3"), {"TORCH_EXTENSIONS_DIR": str(tmp_path / "there")})
    assert CPU_OPERATOR in line
    assert "once" in line
    assert str(tmp_path / "there") in line
    (line,) = compile_notice(plan("zero1"), {"XDG_CACHE_HOME": str(tmp_path)})
    assert str(tmp_path / "torch_extensions") in line


@pytest.mark.parametrize("folder", [CPU_OPERATOR, f"py311_cu130/{CPU_OPERATOR}"])
def test_a_later_start_says_nothing(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    environ = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert compile_notice(plan("zero2"), environ), "begun, not built"
    (tmp_path / folder / f"{CPU_OPERATOR}.so").touch()
    assert compile_notice(plan("zero2"), environ) == []


def test_nothing_is_said_where_nothing_is_compiled(not_installed: Path, tmp_path: Path) -> None:
    environ = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    assert compile_notice(plan("single"), environ) == compile_notice(plan("fsdp2"), environ) == []
    assert compile_notice(plan("zero3", "cuda"), environ) == []
    not_installed.mkdir()
    (not_installed / f"{CPU_OPERATOR}_op.cpython-311-x86_64-linux-gnu.so").touch()
    assert compile_notice(plan("zero3"), environ) == []
