"""`phi3-dist adapter`: what a checkpoint holds, as the run itself would have written it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Phi3ForCausalLM
from typer.testing import CliRunner

from phi3_dist.adapters.reading import read_adapter, read_metadata
from phi3_dist.cli import app
from phi3_dist.errors import AdapterError, RunFolderError
from phi3_dist.exports.from_checkpoint import adapter_of_checkpoint, choose_checkpoint
from phi3_dist.modeling.tokenizer import load_tokenizer
from tests.unit.test_folder_runs import train

KINDS = {
    "default": ("lora.rslora=true", "train.eval_every=1", "save.keep=9"),
    "pissa": ("lora.init=pissa", "model.new_tokens=[<|a|>]", "data.validation_share=0"),
    "frozen_a": ("lora.freeze_a=true", "lora.init=eva", "data.validation_share=0"),
    "dora": ("lora.dora=true", "lora.modules_to_save=[lm_head]"),
}


class Runs(dict[str, Path]):
    """Trained when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        train(self.folder / name, *KINDS[name])
        self[name] = self.folder / name
        return self[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    "kind", ["default", "pissa", *(pytest.param(k, marks=pytest.mark.full) for k in ("frozen_a", "dora"))]
)
def test_the_last_checkpoints_adapter_is_the_runs_own(kind: str, runs: Runs, tmp_path: Path) -> None:
    receipt, checkpoint = adapter_of_checkpoint(runs[kind], tmp_path / "adapter")
    assert checkpoint.step == 4
    ours, config = read_adapter(tmp_path / "adapter")
    theirs, wanted = read_adapter(runs[kind] / "adapter")
    assert config == wanted
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert read_metadata(tmp_path / "adapter") == read_metadata(runs[kind] / "adapter")
    assert receipt.tensors == len(theirs)
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {p.name for p in (runs[kind] / "adapter").iterdir()}


def test_a_step_and_the_best_are_chosen_by_the_command_line(runs: Runs, tmp_path: Path) -> None:
    run = runs["default"]
    done = CliRunner().invoke(app, ["adapter", str(run), str(tmp_path / "two"), "--step", "2"])
    assert done.exit_code == 0, done.output
    assert "(step 2, held-out loss " in done.output
    assert "optimizer steps | 2 |" in (tmp_path / "two" / "README.md").read_text()
    assert not torch.equal(*(next(iter(read_adapter(f)[0].values())) for f in (tmp_path / "two", run / "adapter")))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["heldout_loss"] for row in rows if row["kind"] == "eval" and row["step"]}
    assert choose_checkpoint(run, best=True).step == min(losses, key=losses.__getitem__)


def test_what_is_not_there_is_told_with_what_is(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunFolderError, match=r"step 7 can't be used: manifest\.json is missing") as refused:
        adapter_of_checkpoint(runs["default"], out, step=7)
    assert refused.value.problems[0].fix == "--step N: those of step 1, 2, 3, 4 are there"
    with pytest.raises(RunFolderError, match="no held-out loss"):
        adapter_of_checkpoint(runs["pissa"], out, best=True)
    with pytest.raises(RunFolderError, match="is not a run's folder"):
        adapter_of_checkpoint(tmp_path, out)
    run = Path(shutil.copytree(runs["pissa"], tmp_path / "run"))
    (run / "start.safetensors").unlink()
    with pytest.raises(RunFolderError, match="needs what training started from"):
        adapter_of_checkpoint(run, out)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunFolderError, match="has no checkpoint that verifies"):
        adapter_of_checkpoint(run, out)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(AdapterError, match="out: exists"):
        adapter_of_checkpoint(runs["default"], out)


def test_a_runs_adapter_is_merged_and_compared_on_its_held_out_rows(runs: Runs, tmp_path: Path) -> None:
    """The base is `tiny-random`, which lies in no folder."""
    words = ["export", str(runs["default"]), str(tmp_path / "merged"), "--as", "merged"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "held-out rows of the run" in done.output
    assert "trained on the base as it is" in done.output
    assert Phi3ForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 320
    assert load_tokenizer(str(tmp_path / "merged")).chat_template
