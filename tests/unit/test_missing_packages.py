"""What needs a package says so in one message, and what does not need it does without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_dist.cli import main
from tests.ranks.launcher import REPO
from tests.ranks.test_strategies import RUN, SAME, clean_environment

# A checkout on the path of a machine with torch, transformers and PEFT, and nothing that reads tables or draws.
BARE = """
import sys
from importlib import metadata

for name in ("datasets", "pyarrow", "pandas", "matplotlib", "tensorboard"):
    sys.modules[name] = None

class Finder(metadata.DistributionFinder):
    def find_spec(self, *words):
        return None

    def find_distributions(self, context=metadata.DistributionFinder.Context()):
        if (context.name or "").replace("_", "-") == "phi3-dist":
            raise metadata.PackageNotFoundError(context.name)
        return iter(())

sys.meta_path.insert(0, Finder())
from phi3_dist.cli import main
main()
"""


def test_a_checkout_trains_without_being_installed_and_without_what_draws(tmp_path: Path) -> None:
    words = ["train", RUN, *SAME, "train.max_steps=1", "log.trackers=[]", f"save.folder={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *words], cwd=REPO, env=clean_environment(), text=True, capture_output=True,
        timeout=220, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "its report was not drawn: matplotlib is not installed (pip install matplotlib)" in done.stdout
    assert f"later: phi3-dist report {tmp_path / 'run'}" in done.stdout
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "Traceback" not in done.stderr


def fails(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["phi3-dist", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_missing_package_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": 1.0}) + "\n")
    monkeypatch.delitem(sys.modules, "phi3_dist.report.curves_png", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)  # type: ignore[arg-type]
    assert fails(["report", str(tmp_path)], monkeypatch) == 8
    said = capsys.readouterr().err
    assert "MachineError:\n  matplotlib: is needed here and is not installed\n    fix: pip install matplotlib" in said
    assert "Traceback" not in said


def test_a_module_that_an_installed_package_lacks_is_no_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is a bug, or another version: it keeps its traceback."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": 1.0}) + "\n")
    monkeypatch.delitem(sys.modules, "phi3_dist.report.curves_png", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["phi3-dist", "report", str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib\.axes"):
        main()
