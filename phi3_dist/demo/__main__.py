"""The whole road on real input, without hub and GPU: `python -m phi3_dist.demo [--folder demo] [--steps N]`.

Builds a trained base out of an installed package, makes a data set, trains a LoRA with `accelerate launch` on two
processes and shows held-out answers before and after. It is a check as well: it exits with 1 unless perplexity at
least halves and exact match rises by at least 50 points.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phi3_dist.config.schema import DataConfig
from phi3_dist.config.shipped_files import shipped_file
from phi3_dist.demo.chats import write_chats
from phi3_dist.errors import Phi3DistError, Problem, RunFolderError, TrainingError
from phi3_dist.machine.print_encoding import print_in_any_encoding
from phi3_dist.machine.probe import cpu_count

if TYPE_CHECKING:
    from phi3_dist.data.read.row_formats import Chat
    from phi3_dist.demo.score import Score

LAUNCH_CONFIG, RUN_FILE = Path("configs/accelerate/cpu_2.yaml"), Path("configs/run/demo.yaml")
PROCESSES = 2
STAGES = 5
MAX_NEW_TOKENS = 32  # the longest held-out ticket has 25 tokens with its end
WANTED_GAIN = 0.5  # share of answers, and of the perplexity that must go

console = Console(highlight=False, soft_wrap=False)


def main() -> int:
    """Run the demo; returns the exit code of its error, or 0."""
    print_in_any_encoding()
    try:
        typer.run(demo)
    except Phi3DistError as error:
        console.print(Text(f"{type(error).__name__}: {error}", "bold red"))
        return error.exit_code
    return 0


def demo(
    folder: Annotated[Path, typer.Option(help="Where base, chats and run go.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps in place of the run file's.")] = None,
) -> None:
    """Train a LoRA on a real base with two CPU processes, and show what it learned."""
    start_s = time.perf_counter()
    _quiet()
    _refuse_others(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(Problem(str(folder), f"cannot be made: {error.strerror}", "--folder")) from error
    config, run_file = _shipped(LAUNCH_CONFIG), _shipped(RUN_FILE)
    from phi3_dist.demo.base import build_base

    with _stage(1, "base model: SmolLM2-135M-Instruct as Phi3ForCausalLM"):
        base = build_base(folder / "base", lambda line: console.print(f"  {line}"))
    with _stage(2, "chats: spoken café orders and the till's tickets"):
        paths = write_chats(folder / "chats", keep_others=True)
        chats = _read(paths["validation"])
        _show_chats(paths, chats)
    with _stage(3, f"the base answers {len(chats)} held-out prompts"):
        with console.status("answering"):
            before = _score(base, None, chats)
        console.print(f"  perplexity {before.perplexity:.2f}, exact match {before.exact_match:.0%}")
    run = folder / "run"
    with _stage(4, f"LoRA on {PROCESSES} processes"):
        overrides = [
            f"model.source={base}",
            f"data.train={paths['train']}",
            f"data.validation={paths['validation']}",
            f"save.folder={run}",
            *([f"train.max_steps={steps}"] if steps is not None else []),
        ]
        _train(config, run_file, overrides)
    adapter, curves = run / "adapter", run / "curves.png"
    with _stage(5, "base and adapter, loaded with plain PEFT, answer the same prompts"):
        with console.status("answering"):
            after = _score(base, adapter, chats)
        console.print(f"  perplexity {after.perplexity:.2f}, exact match {after.exact_match:.0%}")
    page = _page(run, chats, before, after)
    _result(before, after, chats, time.perf_counter() - start_s)
    console.print(f"adapter  {adapter}\ncurves   {curves}\npage     {page}  (open it in a browser)", soft_wrap=True)
    _check(before, after, _trainers_perplexity(run), curves)


def _refuse_others(folder: Path) -> None:
    """Raises RunFolderError where a run stands that is not the demo's, which a new one would replace."""
    from phi3_dist.report.run_files import run_name

    run = folder / "run"
    if (run / "config.yaml").exists() and (name := run_name(run)) != RUN_FILE.stem:
        what = f"holds the run {name!r}, and not the demo's: nothing is replaced"
        raise RunFolderError(Problem(str(run), what, "another --folder, or move it elsewhere"))


def _quiet() -> None:
    """Keep the libraries' notices, none of which is about this run, off the screen."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # peft asks transformers for a property that transformers 5 renamed
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _shipped(name: Path) -> Path:
    """A file that comes with the package, by its short name where the working directory is the repository."""
    return name if name.is_file() else shipped_file(name.as_posix())


@contextmanager
def _stage(number: int, title: str) -> Iterator[None]:
    start_s = time.perf_counter()
    console.print(Text(f"[{number}/{STAGES}] {title}", "bold cyan"))
    yield
    console.print(Text(f"  {time.perf_counter() - start_s:.1f} s\n", "dim"))


def _read(path: Path) -> list[Chat]:
    from phi3_dist.data.blocks import read_chats

    return read_chats(DataConfig(train=str(path), validation_share=0)).train


def _show_chats(paths: dict[str, Path], chats: Sequence[Chat]) -> None:
    rows = len(_read(paths["train"]))
    console.print(f"  {rows} rows to train on, {len(chats)} held out with no prompt, name or drinks in common")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    longest = max(chats[:20], key=lambda chat: len(chat.messages))
    for message in longest.messages:
        table.add_row(f"  {message.role}", Text(message.content))
    console.print(table)


def _score(base: Path, adapter: Path | None, chats: Sequence[Chat]) -> Score:
    """Score the base, or the base with the adapter, in fp32 on the CPU."""
    import torch
    from transformers import Phi3ForCausalLM

    from phi3_dist.demo.score import score
    from phi3_dist.modeling.tokenizer import load_tokenizer

    model: Any = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return score(model.eval(), load_tokenizer(str(base)), chats, MAX_NEW_TOKENS)


def _train(config: Path, run_file: Path, overrides: Sequence[str]) -> None:
    """Start the command a user would type, with its output passed through. Raises TrainingError when it fails."""
    arguments = ["launch", "--config_file", str(config), "-m", "phi3_dist", "train", str(run_file), *overrides]
    arguments.append("--overwrite")
    console.print(Text(f"  accelerate {shlex.join(arguments)}", "dim"), soft_wrap=True)
    threads = max(1, cpu_count() // PROCESSES)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "HF_HUB_OFFLINE": "1"}
    sys.stdout.flush()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments]
    code = subprocess.run(command, env=environment, check=False).returncode
    if code != 0:
        raise TrainingError(Problem("training", f"ended with exit code {code}", "its own message is above"))


def _result(before: Score, after: Score, chats: Sequence[Chat], seconds: float) -> None:
    from phi3_dist.demo.score import samples, side_by_side

    console.print(samples(chats, {"before": before, "after": after}))
    console.print()
    console.print(side_by_side(before, after))
    console.print(f"\nall of it in {seconds:.0f} s")


def _page(run: Path, chats: Sequence[Chat], before: Score, after: Score) -> Path:
    """Write what the answers were worth beside the run, and its page anew with them in it."""
    from phi3_dist.demo.score import wanted
    from phi3_dist.report.page import write_page
    from phi3_dist.report.run_files import written

    samples = [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in chat.messages[:-1]],
            "wanted": right,
            "before": was,
            "after": now,
        }
        for chat, right, was, now in zip(chats, wanted(chats), before.answers, after.answers, strict=True)
    ]
    samples.sort(key=lambda row: row["after"] == row["wanted"])  # people read the worst first
    scores = {
        name: {"perplexity": score.perplexity, "exact_match": score.exact_match}
        for name, score in (("before", before), ("after", after))
    }
    # as `phi3-dist eval` names them, which may then replace this file
    counts = {"evaluated": str(run), "rows": len(chats), "answers": len(samples)}
    with written(run / "evaluation.json") as partial:
        partial.write_text(json.dumps({**counts, **scores, "samples": samples}, indent=1), encoding="utf-8")
    return write_page(run)


def _trainers_perplexity(run: Path) -> float:
    """The last held-out perplexity that the training run wrote down."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return float([row["heldout_perplexity"] for row in rows if row["kind"] == "eval"][-1])


def _check(before: Score, after: Score, trainers_perplexity: float, curves: Path) -> None:
    """Raises TrainingError unless the run did what the demo promises."""
    problems = []
    if not math.isclose(after.perplexity, trainers_perplexity, rel_tol=1e-3):
        what = f"{after.perplexity:.4f} with the saved adapter, {trainers_perplexity:.4f} at the end of training"
        problems.append(Problem("adapter", what))
    if not after.perplexity <= WANTED_GAIN * before.perplexity:
        what = f"{before.perplexity:.2f} before, {after.perplexity:.2f} after: it should at least halve"
        problems.append(Problem("perplexity", what))
    if not after.exact_match >= before.exact_match + WANTED_GAIN:
        what = f"{before.exact_match:.0%} before, {after.exact_match:.0%} after: it should rise by at least 50 points"
        problems.append(Problem("exact match", what, "more steps (--steps)" if after.exact_match < 1 else ""))
    if not curves.is_file():
        problems.append(Problem(str(curves), "was not drawn"))
    if problems:
        raise TrainingError(*problems)


if __name__ == "__main__":
    sys.exit(main())
