"""LongRoPE's factors are one choice for a run: equal on every rank, at evaluation, and told with the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_dist.adapters.reading import read_metadata
from tests.ranks.test_strategies import compare, launch
from tests.small_models import longrope_base

pytestmark = pytest.mark.ranks
ORIGINAL = 128  # tokens; the debug chats have shorter and longer rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return longrope_base(tmp_path_factory.mktemp("longrope"), ORIGINAL)


def test_the_factors_are_one_choice_on_every_rank_and_stand_in_the_adapter(base: Path, tmp_path: Path) -> None:
    source = f"model.source={base}"
    one = launch(None, tmp_path / "one", source)
    assert one.returncode == 0, one.stderr
    assert "LongRoPE: long factors (for the whole run: the longest row has" in one.stdout
    two = launch("fsdp2", tmp_path / "two", source, options=("--num_processes", "2"))
    assert two.returncode == 0, two.stderr
    compare(tmp_path / "two", tmp_path / "one")
    for name in ("one", "two"):
        adapter = tmp_path / name / "adapter"
        assert read_metadata(adapter)["longrope"] == "long"
        assert (
            "| LongRoPE factors: serve it with these, whatever the length | long |"
            in (adapter / "README.md").read_text()
        )
    choices = {c["name"]: c["value"] for c in json.loads((tmp_path / "one" / "plan.json").read_text())["choices"]}
    assert choices["LongRoPE"] == "long factors"

    going_on = (source, f"model.adapter={tmp_path / 'one' / 'adapter'}", "train.max_steps=1")
    other = launch(None, tmp_path / "other", *going_on, "model.longrope=short")
    assert other.returncode == 4, other.stdout
    assert "was trained with the long ones" in other.stderr
    assert "fix: model.longrope=long" in other.stderr
    assert launch(None, tmp_path / "same", *going_on).returncode == 0
