"""Verbs after training: an adapter of any checkpoint, other forms of it, what a server will do with it, the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3_dist.cli.app import app
from phi3_dist.errors import ConfigError, Problem

Source = Annotated[
    Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or an adapter's.", show_default=False)
]
Base = Annotated[
    str | None, typer.Option(help="The base, a folder or a hub id; by default the one that the adapter names.")
]


@app.command()
def adapter(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(min=1, help="The checkpoint after so many steps; by default the last.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint with the least held-out loss.")] = False,
) -> None:
    """Write the adapter that a checkpoint of a run holds, as a folder that PEFT loads."""
    if best and step is not None:
        raise ConfigError(Problem("--best --step", "exclude each other", "give one of them"))
    from phi3_dist.export.from_checkpoint import adapter_of_checkpoint

    receipt, checkpoint = adapter_of_checkpoint(run, out, step=step, best=best)
    loss = checkpoint.trainer.get("heldout_loss")
    said = f", held-out loss {loss:.5f}" if loss is not None else ""
    typer.echo(f"written: {out} (step {checkpoint.step}{said}; {receipt.tensors} tensors)")


@app.command()
def export(
    source: Source,
    out: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    form: Annotated[str, typer.Option("--as", help="merged, split, one-rank, gguf or combine.")],
    base: Base = None,
    into: Annotated[
        str | None, typer.Option(help="merged: base or nf4 weights; by default what it was trained on.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows to compare on; by default the run's held-out ones.")] = None,
    others: Annotated[
        list[Path] | None, typer.Option("--with", help="combine: another adapter; may be repeated.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="combine: 0.7,0.3; by default equal shares.")] = None,
    method: Annotated[str, typer.Option(help="combine: PEFT's method (cat, svd, linear, ties, …).")] = "cat",
    density: Annotated[float | None, typer.Option(help="combine: share of values that TIES and DARE keep.")] = None,
) -> None:
    """Write an adapter in another form, once its logits are the live model's: a merged model, llama.cpp's adapter, …"""
    from phi3_dist.export.exporting import KINDS
    from phi3_dist.export.exporting import export as run_export

    if form not in KINDS:
        raise ConfigError(Problem("--as", f"{form!r} is no form", f"one of {', '.join(KINDS)}"))
    if into not in (None, "base", "nf4"):
        raise ConfigError(Problem("--into", f"{into!r} is neither base nor nf4", "base or nf4"))
    shares = _numbers(weights)
    done = run_export(
        source,
        out,
        form,
        base=base,
        into=into,  # type: ignore[arg-type]
        data=data,
        others=others or (),
        weights=shares,
        method=method,
        density=density,
    )
    typer.echo(f"written: {done.folder} ({done.what})")
    typer.echo(f"compared: {done.drift}")


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ConfigError(Problem("--weights", f"{text!r} is no list of numbers", "--weights 0.7,0.3")) from error
