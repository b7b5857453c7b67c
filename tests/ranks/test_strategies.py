"""Every shipped Accelerate config is started for real on two CPU processes, and gives one process's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Phi3ForCausalLM

from phi3_dist.modeling.base import tiny_config
from phi3_dist.modeling.tokenizer import tiny_tokenizer
from tests import warm
from tests.ranks.launcher import NOT_INHERITED, REPO
from tests.ranks.processes import lives, ranks_below

pytestmark = pytest.mark.ranks

RUN = "configs/run/debug.yaml"
SAME = ("model.precision=fp32", "lora.dropout=0.0", "train.micro_batch=1", "train.max_steps=20", "optim.lr=0.001")
ENDLESS = ("train.max_steps=100000", "model.compile=false")  # by itself so long a run would be compiled
FUSED, NOT_FUSED = "LoRA linear: fused (8 layers)", "ran as PEFT's after all"
DEEPSPEED = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


def clean_environment() -> dict[str, str]:
    """A user's shell without what an outer launcher may have left; one thread a rank, as two ranks share two cores."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PATH": path}


def launch(
    config: str | None,
    folder: Path,
    *overrides: str,
    options: tuple[str, ...] = (),
    more: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """One run through `accelerate launch` with a shipped config, or without a launcher."""
    launcher = [warm.python(), "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    start = [warm.python()] if config is None else [*launcher, f"configs/accelerate/{config}.yaml", *options]
    again = () if "--resume" in overrides else ("--overwrite",)
    command = [*start, "-m", "phi3_dist", "train", RUN, *SAME, f"save.folder={folder}", *again, *overrides]
    return subprocess.run(
        command,
        cwd=REPO,
        env={**clean_environment(), **(more or {})},
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )


def rows(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def compare(folder: Path, reference: Path, tolerance: float = 1e-4, *, steps: int = 20) -> None:
    """Losses, gradient norms, held-out losses and the saved adapters of two runs, relative to the reference."""
    ours, theirs = rows(folder), rows(reference)
    assert len(ours) == len(theirs) == steps
    for our, their in zip(ours, theirs, strict=True):
        assert our["lr"] == their["lr"]
        assert our["supervised_tokens"] == their["supervised_tokens"]
        for key in ("loss", "grad_norm"):
            assert our[key] == pytest.approx(their[key], rel=tolerance), (our["step"], key)
    assert rows(folder, "eval")[-1]["heldout_loss"] == pytest.approx(
        rows(reference, "eval")[-1]["heldout_loss"], rel=tolerance
    )
    ours_saved, theirs_saved = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, reference))
    assert set(ours_saved) == set(theirs_saved)
    for name, tensor in ours_saved.items():
        torch.testing.assert_close(tensor, theirs_saved[name], atol=tolerance * 0.1, rtol=tolerance)


def tiny_base(folder: Path, *, tied: bool = False, vocab_size: int = 320) -> Path:
    """A saved tiny Phi-3 with its tokenizer, which has 270 tokens, as a user's local folder would be."""
    torch.manual_seed(1)
    config = tiny_config()
    config.tie_word_embeddings, config.vocab_size = tied, vocab_size
    Phi3ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    done = launch(None, folder)
    assert done.returncode == 0, done.stderr
    first, last = rows(folder)[0]["loss"], rows(folder)[-1]["loss"]
    assert last < first - 0.05, "the reference run learned nothing"
    return folder


@pytest.mark.parametrize("config", ["cpu_2", pytest.param("ddp", marks=pytest.mark.full), "fsdp2"])
def test_two_processes_give_one_process_numbers(config: str, reference: Path, tmp_path: Path) -> None:
    done = launch(config, tmp_path / "run", options=("--num_processes", "2"))
    assert done.returncode == 0, done.stderr
    assert FUSED in done.stdout
    assert NOT_FUSED not in done.stdout
    compare(tmp_path / "run", reference)


@pytest.mark.parametrize("config", DEEPSPEED)
def test_deepspeed_gives_one_process_numbers(config: str, reference: Path, tmp_path: Path, deepspeed_ops: Path) -> None:
    done = launch(config, tmp_path / "run", options=("--num_processes", "2"))
    assert done.returncode == 0, done.stderr
    assert f"strategy: {config}" in done.stdout
    assert FUSED in done.stdout
    assert NOT_FUSED not in done.stdout
    compare(tmp_path / "run", reference)


def test_four_processes_give_one_process_numbers(reference: Path, tmp_path: Path) -> None:
    done = launch("ddp", tmp_path / "run", options=("--num_processes", "4"))
    assert done.returncode == 0, done.stderr
    compare(tmp_path / "run", reference)


@pytest.mark.parametrize("config", ["zero3", pytest.param("fsdp2", marks=pytest.mark.full)])
def test_tied_embeddings_survive_sharding(config: str, tmp_path: Path, deepspeed_ops: Path) -> None:
    source = f"model.source={tiny_base(tmp_path / 'base', tied=True)}"
    for name, kind, options in (("one", None, ()), ("two", config, ("--num_processes", "2"))):
        done = launch(kind, tmp_path / name, source, "train.max_steps=8", options=options)
        assert done.returncode == 0, done.stderr
    compare(tmp_path / "two", tmp_path / "one", steps=8)


@pytest.mark.parametrize(
    ("quantization", "config"),
    [
        pytest.param("nf4", "cpu_2", marks=pytest.mark.full),
        pytest.param("nf4", "zero2", marks=pytest.mark.full),
        pytest.param("nf4", "zero3", marks=pytest.mark.full),
        ("nf4", "fsdp2"),
        pytest.param("nf4", "zero3_offload", marks=pytest.mark.full),
        pytest.param("nf4", "zero1", marks=pytest.mark.full),
        pytest.param("int8", "cpu_2", marks=pytest.mark.full),
        pytest.param("int8", "zero2", marks=pytest.mark.full),
    ],
)
def test_a_quantised_base_on_two_processes_gives_one_process_numbers(
    quantization: str, config: str, tmp_path: Path, deepspeed_ops: Path
) -> None:
    overrides = (f"model.source={tiny_base(tmp_path / 'base')}", f"model.quantization={quantization}")
    for name, kind, options in (("one", None, ()), ("two", config, ("--num_processes", "2"))):
        done = launch(kind, tmp_path / name, *overrides, options=options)
        assert done.returncode == 0, done.stderr
        assert (FUSED in done.stdout) == (quantization == "nf4")
        assert NOT_FUSED not in done.stdout
    assert rows(tmp_path / "one")[-1]["loss"] < rows(tmp_path / "one")[0]["loss"] - 0.05
    compare(tmp_path / "two", tmp_path / "one")


def test_dropout_is_the_same_whatever_the_world_size(tmp_path: Path) -> None:
    for name, kind, options in (("one", None, ()), ("two", "cpu_2", ())):
        done = launch(kind, tmp_path / name, "lora.dropout=0.3", options=options)
        assert done.returncode == 0, done.stderr
    compare(tmp_path / "two", tmp_path / "one")


def test_activation_checkpointing_changes_no_number(reference: Path, tmp_path: Path) -> None:
    done = launch(None, tmp_path / "run", "model.activation_checkpointing=true")
    assert done.returncode == 0, done.stderr
    compare(tmp_path / "run", reference, tolerance=1e-6)


@pytest.mark.parametrize("dropout", ["0.0", "0.3"])
def test_what_is_fused_gives_the_libraries_numbers_and_leaves_no_trace(dropout: str, tmp_path: Path) -> None:
    for name in ("true", "false"):
        # with dropout the fused last layer, which sees fewer rows, draws other masks
        layers = name if dropout == "0.0" else "false"
        done = launch(
            None, tmp_path / name, f"model.fused_lora={name}", f"model.fused_layers={layers}", f"lora.dropout={dropout}"
        )
        assert done.returncode == 0, done.stderr
        assert (FUSED in done.stdout) == (name == "true")
    compare(tmp_path / "true", tmp_path / "false", tolerance=1e-5)
    configs = [(tmp_path / name / "adapter" / "adapter_config.json").read_bytes() for name in ("true", "false")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("config", ["fsdp2", *(pytest.param(name, marks=pytest.mark.full) for name in (None, "zero3"))])
def test_training_on_from_an_adapter_starts_where_it_ended(
    config: str | None, reference: Path, tmp_path: Path, deepspeed_ops: Path
) -> None:
    overrides = (f"model.adapter={reference / 'adapter'}", "optim.lr=1e-12")
    done = launch(config, tmp_path / "run", *overrides, options=("--num_processes", "2") if config else ())
    assert done.returncode == 0, done.stderr
    ended, again = (rows(folder, "eval")[-1]["heldout_loss"] for folder in (reference, tmp_path / "run"))
    assert again == pytest.approx(ended, rel=1e-5)


def test_an_adapter_of_another_scale_is_refused(reference: Path, tmp_path: Path) -> None:
    done = launch(None, tmp_path / "run", f"model.adapter={reference / 'adapter'}", "lora.alpha=64")
    assert done.returncode == 4
    assert "lora.alpha: is 64.0, and the adapter in" in done.stderr


@pytest.mark.full  # test_launch_request.py has each form of a command line without its processes
def test_two_processes_that_came_up_as_one_are_refused_with_both_numbers(tmp_path: Path) -> None:
    """The known silent failure: `--cpu --num_processes 2` starts one process, and says nothing.

    In a real interpreter: it is found by the command line of the parent process.
    """
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, "-m", "phi3_dist", "train", RUN, f"save.folder={tmp_path / 'run'}"],
        cwd=REPO,
        env=clean_environment(),
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "2 processes were asked for" in done.stderr
    assert "one of 1" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_lock_of_a_killed_build_is_named_and_not_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    more = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = launch("zero2", tmp_path / "run", options=("--num_processes", "2"), more=more)
    assert done.returncode != 0
    assert f"{lock}: a killed build left this lock" in done.stderr
    assert f"rm {lock}" in done.stderr


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_rank_that_dies_ends_the_others_and_leaves_no_process(real: bool, tmp_path: Path) -> None:
    command = [sys.executable if real else warm.python(), "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", "configs/accelerate/cpu_2.yaml", "-m", "phi3_dist", "train", RUN]
    process = subprocess.Popen(
        [*command, *SAME, *ENDLESS, f"save.folder={tmp_path / 'run'}"],
        cwd=REPO,
        env=clean_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    trainers = ranks_below(process.pid)
    assert len(trainers) == 2
    os.kill(trainers[1], 9)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "SIGKILL" in output or "Signal 9" in output
    assert not any(map(lives, trainers))
