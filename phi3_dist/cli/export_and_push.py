"""Verbs after training: an adapter of any checkpoint, other forms of it, what a server will do with it, the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3_dist.cli.app import app
from phi3_dist.errors import AdapterError, ConfigError, Problem

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
    step: Annotated[int | None, typer.Option(min=1, help="The checkpoint after N steps; by default the last.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint with the least held-out loss.")] = False,
) -> None:
    """Write the adapter that a checkpoint of a run holds, as a folder that PEFT loads."""
    from phi3_dist.api import adapter_of_checkpoint

    taken = adapter_of_checkpoint(run, out, step=step, best=best)
    said = f", held-out loss {taken.held_out_loss:.5f}" if taken.held_out_loss is not None else ""
    typer.echo(f"written: {taken.folder} (step {taken.step}{said}; {taken.tensors} tensors)")


@app.command()
def export(
    source: Source,
    out: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    form: Annotated[str, typer.Option("--as", help="merged, split, one-rank, gguf, gguf-merged or combine.")],
    base: Base = None,
    into: Annotated[
        str | None, typer.Option(help="merged: base or nf4 weights; by default what it was trained on.")
    ] = None,
    stored: Annotated[
        str | None, typer.Option("--dtype", help="gguf-merged: f32, f16 or bf16; by default the base's.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows to compare on; by default the run's held-out ones.")] = None,
    others: Annotated[
        list[Path] | None, typer.Option("--with", help="combine: another adapter; may be repeated.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="combine: 0.7,0.3; by default equal shares.")] = None,
    method: Annotated[str, typer.Option(help="combine: PEFT's method (cat, svd, linear, ties, …).")] = "cat",
    density: Annotated[float | None, typer.Option(help="combine: share of values that TIES and DARE keep.")] = None,
) -> None:
    """Write an adapter in another form, checked against the live model's logits: a merged model, llama.cpp's, …"""
    from phi3_dist.api import export as run_export

    shares = _numbers(weights)
    done = run_export(
        source,
        out,
        form,  # type: ignore[arg-type]  # looked at in there, as the next two
        base=base,
        into=into,  # type: ignore[arg-type]
        stored=stored,  # type: ignore[arg-type]
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
        raise ConfigError(Problem("--weights", f"{text!r} is not a list of numbers", "--weights 0.7,0.3")) from error


@app.command()
def check(
    source: Source,
    server: Annotated[str, typer.Option("--for", help="vllm, llama.cpp, transformers or peft.")],
    base: Base = None,
    run: Annotated[bool, typer.Option("--run", help="Start the server, and compare its answers.")] = False,
    server_python: Annotated[
        str | None, typer.Option(help="Python of the server's environment; by default this one.")
    ] = None,
    server_base: Annotated[str | None, typer.Option(help="The base for the server: for llama.cpp a GGUF file.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to ask; by default the run's held-out ones.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Say whether a server loads an adapter and answers as trained, and with which flags. Exits with 6 if not."""
    from phi3_dist.api import check as run_check
    from phi3_dist.exports.checking import as_json as json_of
    from phi3_dist.exports.checking import report_lines

    found = run_check(
        source,
        server,  # type: ignore[arg-type]  # looked at in there
        base=base,
        run=run,
        server_python=server_python,
        server_base=server_base,
        data=data,
    )
    typer.echo(json_of(found.verdict, found.trial) if as_json else "\n".join(report_lines(found.verdict)))
    if found.trial is not None and not as_json:
        typer.echo(f"\nasked: {found.trial}")
    if not found.right:
        raise typer.Exit(AdapterError.exit_code)


@app.command()
def push(
    source: Source,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="Hub id of the base, where the adapter names a folder.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the base on the hub.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, such as mit; none is guessed.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="For the card, such as en; may be repeated.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="For the card, a hub id; may be repeated.")] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that everybody can read.")] = False,
    upload: Annotated[
        bool, typer.Option("--upload", help="Upload; without it, only show what would be uploaded.")
    ] = False,
) -> None:
    """Show what would be uploaded to the hub; with --upload, upload it to a private repository."""
    from phi3_dist.api import push as run_push

    done = run_push(
        source,
        repo,
        base=base,
        revision=revision,
        license=license,
        languages=language or (),
        datasets=dataset or (),
        public=public,
        upload=upload,
    )
    for name, size in done.files:
        typer.echo(f"  {size:>12,}  {name}")
    for name in done.left_out:
        typer.echo(f"  {'left out':>12}  {name}")
    for note in done.notes:
        typer.echo(f"note: {note}")
    kind = "private" if done.private else "public"
    if done.url:
        typer.echo(f"uploaded: {done.url} ({kind})")
    else:
        typer.echo(f"nothing was uploaded: --upload sends these {len(done.files)} files to {repo} ({kind})")
