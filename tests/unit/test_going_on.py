"""`--resume` of a run that has finished, and of one that is not the same any more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from phi3_dist.adapters.reading import read_adapter
from phi3_dist.cli import app
from phi3_dist.config.load import load_run
from phi3_dist.config.schema import OptimConfig
from phi3_dist.errors import TrainingError
from phi3_dist.modeling.base import find_base
from phi3_dist.training.checkpoints.compatibility import _base_identity, changed_keys, identity
from phi3_dist.training.checkpoints.files import find_checkpoint
from phi3_dist.training.learning_rate import learning_rate
from tests.ranks.launcher import REPO
from tests.ranks.test_resume import interrupted, same_bits
from tests.ranks.test_strategies import rows, tiny_base
from tests.unit.test_relatives_runs import COMMON, STEPS, train

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in a folder that tests copy."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train((f"model.source={base}",), folder)
    return folder


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def again(base: Path, finished: Path) -> Callable[..., None]:
    """`--resume` of the copy, with overrides; the caches are another one's than the first run's."""

    def resumed(*overrides: str, allow: tuple[str, ...] = ()) -> None:
        train((f"model.source={base}", *overrides), finished, resume=True, allow=allow)

    return resumed


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def state(folder: Path) -> str:
    return str(json.loads((folder / "exit.json").read_text())["state"])


def held_out(path: Path, first: int, last: int) -> str:
    """The override that measures the loss of some of the debug chats, none of which is trained on."""
    chats = (REPO / "configs" / "run" / "debug_chats.jsonl").read_text().splitlines()
    path.write_text("\n".join(chats[12 + first : 12 + last]) + "\n")
    return f"data.validation={path}"


# --- finished -------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is(finished: Path, again: Callable[..., None]) -> None:
    before = content(finished)
    again("train.eval_every=3", "log.every=7")  # what makes no number may differ
    assert content(finished) == before


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("optim.lr=1e-3",), "optim.lr: was 0.01"),
        (("train.max_steps=3",), "steps: was 4 when the run was made, is 3 now"),
        (("data.max_rows=11",), "data: was "),
        (("lora.r=4", "train.max_steps=9"), "lora.r: was 8"),
    ],
)
def test_a_finished_run_with_other_settings_is_refused(
    overrides: tuple[str, ...], named: str, finished: Path, again: Callable[..., None]
) -> None:
    before = content(finished)
    with pytest.raises(TrainingError) as caught:
        again(*overrides)
    assert named in str(caught.value) or "are 3, and step_000004 has made 4" in str(caught.value)
    assert content(finished) == before
    assert state(finished) == "finished"


def test_a_refusal_names_the_other_way_on(finished: Path, again: Callable[..., None]) -> None:
    with pytest.raises(TrainingError, match=rf"model\.adapter={finished}/adapter"):
        again("optim.lr=1e-3")


def test_more_steps_extend_a_finished_run(
    finished: Path, whole: Path, again: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    again("train.max_steps=6")
    output, optim = capsys.readouterr().out, OptimConfig(lr=1e-2)
    assert "steps: 4 were planned and 4 are made, 6 are asked for now; the learning rate follows cosine" in output
    assert (
        f"it was {learning_rate(3, 4, optim):.3g} in step 4, and is {learning_rate(4, 6, optim):.3g} in step 5"
        in output
    )
    assert [row["step"] for row in rows(finished)] == [1, 2, 3, 4, 5, 6]
    assert rows(finished)[:STEPS] == rows(whole)
    assert [row["lr"] for row in rows(finished)[STEPS:]] == [learning_rate(step, 6, optim) for step in (4, 5)]
    assert rows(finished, "changed") == [{"kind": "changed", "step": 4, "keys": ["steps"]}]
    assert state(finished) == "finished"
    assert (finished / "adapter" / WEIGHTS).read_bytes() != (whole / "adapter" / WEIGHTS).read_bytes()
    # what was extended is a run of six steps: interrupted, it goes on
    cut = interrupted(finished, finished.parent / "cut", step=5 - 1)
    shutil.rmtree(finished)
    shutil.copytree(cut, finished)
    again("train.max_steps=6")
    assert "6 are asked for now" in capsys.readouterr().out


def test_epochs_extend_a_run_as_steps_do(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, common = tmp_path / "run", (f"model.source={base}", "train.max_steps=null")
    train((*common, "train.epochs=1"), folder)
    steps = len(rows(folder))
    train((*common, "train.epochs=null"), folder, resume=True)  # one epoch is what is taken without a word
    assert len(rows(folder)) == steps
    train((*common, "train.epochs=2"), folder, resume=True)
    assert f"{steps} were planned" in capsys.readouterr().out
    assert len(rows(folder)) == 2 * steps


def test_more_steps_for_an_interrupted_run_have_to_be_meant(
    whole: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = interrupted(whole, tmp_path / "cut", step=2)
    overrides = (f"model.source={base}", "train.max_steps=6")
    with pytest.raises(TrainingError, match="steps: was 4"):
        train(overrides, cut, resume=True)
    train(overrides, cut, resume=True, allow=("steps",))
    assert "steps: 4 were planned and 2 are made, 6 are asked for now" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["empty", "bit", "gone", "config"])
def test_a_damaged_adapter_is_written_again_from_the_last_checkpoint(
    damage: str, finished: Path, whole: Path, again: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = finished / "adapter" / WEIGHTS
    raw = bytearray(weights.read_bytes())
    raw[-9] ^= 1
    if damage == "gone":
        shutil.rmtree(finished / "adapter")
    elif damage == "config":
        (finished / "adapter" / "adapter_config.json").write_text("{")
    else:
        weights.write_bytes(b"" if damage == "empty" else raw)
    again()
    if damage != "gone":
        assert "the adapter is damaged and made again from step_000004" in capsys.readouterr().out
    read_adapter(finished / "adapter")
    assert weights.read_bytes() == (whole / "adapter" / WEIGHTS).read_bytes()
    assert rows(finished) == rows(whole)
    assert [row["step"] for row in rows(finished, "eval")] == [row["step"] for row in rows(whole, "eval")]
    assert state(finished) == "finished"


def test_a_finished_run_without_checkpoints(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, common = tmp_path / "run", (f"model.source={base}", "save.every=0")
    train(common, folder)
    before = content(folder)
    train(common, folder, resume=True)
    assert content(folder) == before
    with pytest.raises(TrainingError, match=r"optim\.lr: was 0\.01"):
        train((*common, "optim.lr=1e-3"), folder, resume=True)
    with pytest.raises(TrainingError, match=r"keeps no checkpoint [\s\S]*model\.adapter="):
        train((*common, "train.max_steps=9"), folder, resume=True)
    assert content(folder) == before
    (folder / "adapter" / WEIGHTS).write_bytes(b"")
    train(common, folder, resume=True)
    assert "made again from the first step on, as there is no checkpoint" in capsys.readouterr().out
    assert (folder / "adapter" / WEIGHTS).read_bytes() == before[f"adapter/{WEIGHTS}"]
    assert len(rows(folder)) == STEPS


def test_a_missing_report_is_drawn_and_both_ways_on_are_named(
    finished: Path, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = [*COMMON, f"model.source={base}", f"save.folder={finished}", "--resume"]
    for missing in (("curves.png", "report.html"), ("report.html",), ()):
        for name in missing:
            (finished / name).unlink(missing_ok=True)
        done = CliRunner().invoke(app, ["train", str(REPO / "configs" / "run" / "debug.yaml"), *words])
        assert done.exit_code == 0, done.output
        assert (
            "has finished already: a larger train.max_steps or train.epochs extends it, model.adapter=" in done.output
        )
        assert ("page: " in done.output) == bool(missing)
        assert (finished / "curves.png").is_file()
        assert (finished / "report.html").is_file()


# --- what makes the numbers -----------------------------------------------------------------------------------------


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}


def change_config(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rms_norm_eps": 1e-4}, "base config.rms_norm_eps: was 1e-05 when the run was made, is 0.0001 now"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "base config.rope_parameters.rope_theta"),
        ({"sliding_window": 16}, "base config.sliding_window: was None"),
        ({"hidden_act": "gelu"}, "base config.hidden_act: was 'silu'"),
        ({"rope_parameters": LONG}, "base config.rope_parameters.rope_type: was 'default'"),
    ],
)
def test_another_config_beside_the_same_weights_is_another_base(
    changes: dict[str, Any], named: str, base: Path, whole: Path, tmp_path: Path
) -> None:
    cut = interrupted(whole, tmp_path / "cut", step=2)
    moved = Path(shutil.copytree(base, tmp_path / "base"))
    change_config(moved, **changes)
    with pytest.raises(TrainingError) as caught:
        train((f"model.source={moved}",), cut, resume=True)
    assert named in str(caught.value)


def test_what_makes_no_number_of_a_base_may_differ(base: Path, whole: Path, tmp_path: Path) -> None:
    cut = interrupted(whole, tmp_path / "cut", step=2)
    moved = Path(shutil.copytree(base, tmp_path / "base"))
    idle = {"transformers_version": "4.40.0", "use_cache": False, "architectures": [], "_name_or_path": "elsewhere"}
    change_config(moved, **idle)
    train((f"model.source={moved}",), cut, resume=True)
    same_bits(cut, whole)


def test_long_lists_of_factors_are_compared_by_their_hash(base: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(base, tmp_path / "base"))
    found = []
    for last in (8.0, 9.0):
        change_config(moved, rope_parameters={**LONG, "long_factor": [*range(1, 8), last]})
        facts = _base_identity(find_base(str(moved)))
        found.append(facts)
    (key,) = [key for key in found[0] if found[0][key] != found[1][key]]
    assert key == "base config.rope_parameters.long_factor"
    assert found[0][key].startswith("8 values, SHA-256 ")


def test_the_factors_of_longrope_are_part_of_the_run_when_the_longest_row_decides(base: Path, tmp_path: Path) -> None:
    """Rows that are held out can be longer than those trained on, and a new set of them would change every loss."""
    moved = Path(shutil.copytree(base, tmp_path / "base"))
    change_config(moved, rope_parameters=LONG, original_max_position_embeddings=4096)
    train((f"model.source={moved}",), tmp_path / "run")
    found, _ = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.trainer["identity"]["LongRoPE factors"] == "short"
    with pytest.raises(TrainingError, match="LongRoPE factors: was 'short'"):
        train((f"model.source={moved}", "model.longrope=long"), tmp_path / "run", resume=True)


def test_precision_is_compared_by_what_auto_became() -> None:
    """On another machine `auto` can become another one."""
    prepared: Any = SimpleNamespace(fingerprint="data", train=SimpleNamespace(packs=[0]), held_out=None)

    def facts(asked: str, became: str, kernels: str = "torch", dropout: float = 0.1) -> dict[str, Any]:
        overrides = [f"model.precision={asked}", f"lora.dropout={dropout}"]
        cfg = load_run(REPO / "configs" / "run" / "debug.yaml", overrides)
        return identity(cfg, prepared, find_base("tiny-random"), weights="", precision=became, kernels=kernels)

    assert facts("auto", "fp32") == facts("fp32", "fp32")
    assert changed_keys(facts("auto", "fp32"), facts("auto", "bf16")) == ("precision",)
    # Triton's kernels draw other dropout masks than torch; without dropout they change no more than rounding
    assert changed_keys(facts("auto", "bf16"), facts("auto", "bf16", "triton")) == ("dropout masks",)
    assert changed_keys(facts("auto", "bf16", dropout=0), facts("auto", "bf16", "triton", dropout=0)) == ()


def test_other_held_out_rows_are_refused_or_marked(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_of_both = (f"model.source={base}", "data.validation_share=0.0", "train.eval_every=1")
    run = tmp_path / "first"
    train((*rows_of_both, held_out(tmp_path / "some.jsonl", 4, 8)), run)
    cut = interrupted(run, tmp_path / "cut", step=2)
    with pytest.raises(TrainingError, match="held-out data: was "):
        train((*rows_of_both, held_out(tmp_path / "others.jsonl", 6, 10)), cut, resume=True)
    train((*rows_of_both, held_out(tmp_path / "others.jsonl", 6, 10)), cut, resume=True, allow=("held-out data",))
    assert "the held-out rows differ after step 2" in capsys.readouterr().out
    assert rows(cut, "changed") == [{"kind": "changed", "step": 2, "keys": ["held-out data"]}]
    found, _ = find_checkpoint(cut / "checkpoints")
    assert found is not None
    assert found.trainer["best"][1] > 2, "a loss over other rows is not the best one"
    same_bits(cut, run)
