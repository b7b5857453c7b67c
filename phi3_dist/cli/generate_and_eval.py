"""Verbs for a trained model: its answers to a file, a conversation with it, how good it is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi3_dist.cli.app import app
from phi3_dist.errors import ConfigError, Problem, plain

if TYPE_CHECKING:
    from rich.table import Table

    from phi3_dist.evaluation.evaluate import Evaluation

Target = Annotated[
    str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run, an adapter, a checkpoint or a base.", show_default=False)
]
BaseModel = Annotated[
    str | None, typer.Option("--base-model", help="Folder or hub id of the base, if not the one the adapter names.")
]
Precision = Annotated[str, typer.Option(help="auto (as the run had it), bf16 or fp32.")]
Quantization = Annotated[str | None, typer.Option(help="none, nf4 or int8; by default as the run had it.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one.")]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows that are answered at a time.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: the likeliest token each time; above it, sampled.")]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", min=0.001, max=1, help="Sample from the likeliest tokens, up to this sum of probabilities."
    ),
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sample from the N likeliest tokens; 0: from all.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of sampled answers.")]


@app.command()
def generate(
    target: Target,
    rows: Annotated[
        Path | None, typer.Argument(help="Prompts: rows of any form, with or without answers.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Answers, one JSON line each; continues where it stopped.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="One prompt; its answer is printed.")] = None,
    system: Annotated[str, typer.Option(help="System message of --prompt.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of answers; no other file.")] = False,
    max_new_tokens: MaxNew = 256,
    batch_size: BatchSize = 16,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    base_model: BaseModel = None,
    precision: Precision = "auto",
    quantization: Quantization = None,
    device: Device = None,
) -> None:
    """Answer a prompt, or every row of a file into another one; killed and started again, it continues."""
    if (prompt is None) == (rows is None) or (rows is not None and out is None):
        fix = "give --prompt TEXT, or a file of rows and --output FILE"
        raise ConfigError(Problem("phi3-dist generate", "takes one prompt, or rows and a file for the answers", fix))
    from phi3_dist.inference.answers_file import How, answer_all, answer_file, check_output
    from phi3_dist.inference.engine import Sampling
    from phi3_dist.inference.open_model import Options, open_model
    from phi3_dist.inference.prompts import Prompt, read_prompts

    how = How(max_new_tokens, batch_size, Sampling(temperature, top_p, top_k, seed))
    if out is not None:
        check_output(out, rows, overwrite=overwrite)
    prompts = [Prompt.of(prompt, system)] if prompt is not None else read_prompts(rows) if rows else []
    opened = open_model(target, Options(base_model, None, precision, quantization, device))
    if out is None:
        typer.echo(plain(answer_all(opened, prompts, how)[0]))
        return
    from phi3_dist.cli.progress import progress_line

    with progress_line() as show_progress:
        answered, total = answer_file(
            opened,
            prompts,
            out,
            how,
            overwrite=overwrite,
            progress=lambda done, of: show_progress(f"answers of {of:,}", done),
        )
    before = f", {total - answered:,} of them by an earlier call" if answered < total else ""
    typer.echo(f"written: {out}, {total:,} answers{before}")


@app.command()
def chat(
    target: Target,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    base_model: BaseModel = None,
    precision: Precision = "auto",
    quantization: Quantization = None,
    device: Device = None,
) -> None:
    """Talk to a trained model, on a terminal or with one message a line over a pipe. /help lists commands."""
    from phi3_dist.inference.answers_file import How
    from phi3_dist.inference.conversation import Conversation
    from phi3_dist.inference.conversation import chat as talk
    from phi3_dist.inference.engine import Sampling
    from phi3_dist.inference.open_model import Options, open_model

    opened = open_model(target, Options(base_model, None, precision, quantization, device))
    how = How(max_new_tokens, 1, Sampling(temperature, top_p, top_k, seed))
    talk(Conversation(opened, how, system))


@app.command("eval")
def evaluate(
    target: Target,
    data: Annotated[str | None, typer.Argument(help="Rows; by default those held out by the run.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Evaluate the base too, without the adapter.")] = False,
    against: Annotated[str | None, typer.Option(help="Another run, adapter or base to compare with.")] = None,
    rows: Annotated[int, typer.Option("--generate", min=0, help="Rows whose answers are scored; 0: none.")] = 100,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="exact_match, rouge_l, chrf, regex:PATTERN or module:function; may be repeated."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="A task of lm-eval; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task.")] = None,
    split: Annotated[str, typer.Option(help="Split of DATA, where it has several.")] = "test",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for evaluation.json.")] = None,
    max_new_tokens: MaxNew = 256,
    batch_size: BatchSize = 16,
    base_model: BaseModel = None,
    precision: Precision = "auto",
    quantization: Quantization = None,
    device: Device = None,
) -> None:
    """Measure held-out loss and answers, beside the base or another one; on one process or a launcher's several."""
    from phi3_dist.api import evaluate as measure
    from phi3_dist.evaluation.evaluate import check_folder
    from phi3_dist.inference.open_model import run_folder_of

    folder = output or run_folder_of(target)
    if folder is not None:
        check_folder(folder)
    found = measure(
        target,
        data,
        base=base,
        against=against,
        generate=rows,
        metrics=metric or (),
        tasks=task or (),
        limit=limit,
        split=split,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        base_model=base_model,
        precision=precision,
        quantization=quantization,
        device=device,
    )
    if os.environ.get("RANK", "0") == "0":
        _show(found, folder)


def _show(found: Evaluation, folder: Path | None) -> None:
    from rich.console import Console

    for notice in found.notices:
        typer.echo(f"note: {plain(notice)}")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(_table(found))
    for row in found.asked[:3]:
        typer.echo(plain(f"worst: {json.dumps({k: v for k, v in row.items() if k != 'prompt'}, ensure_ascii=False)}"))
    if folder is not None:
        typer.echo(f"written: {found.write(folder)}, and {len(found.asked):,} answers beside it, the worst first")


def _table(found: Evaluation) -> Table:
    from rich.table import Table

    table = Table(title=f"{found.target} on {found.data}", title_justify="left", box=None, padding=(0, 3, 0, 0))
    two = len(found.sides) > 1
    for column in ("", *(side.name for side in found.sides), *(("difference", "95 %") if two else ())):
        table.add_column(column, justify="right" if column else "left")
    for name in found.sides[0].numbers:
        cells = [f"{side.numbers[name]:,.4f}" if name != "supervised_tokens" else f"{side.numbers[name]:,}"
                 for side in found.sides]  # fmt: skip
        of = found.differences.get(name)
        more = [f"{of.value:+.4f}", f"{of.low:+.4f} to {of.high:+.4f}"] if of else ["", ""] if two else []
        table.add_row(name, *cells, *more)
    return table
