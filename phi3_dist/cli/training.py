"""Verbs that train, and those around a run: its plan, its preparation, its report, its log."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from phi3_dist.cli.app import Overrides, RunFile, app
from phi3_dist.errors import ConfigError, Problem


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint that verifies, or start.")
    ] = False,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(help="With --resume: a setting that may differ from the checkpoint's; may be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check whether the run could start here, print a table, train nothing.")
    ] = False,
) -> None:
    """Train a LoRA adapter: on one device, or on every process of `accelerate launch … -m phi3_dist train`."""
    from phi3_dist.config.load import load_run

    cfg = load_run(run_file, overrides or ())
    import faulthandler

    from phi3_dist.training.monitor.transcript import Transcript
    from phi3_dist.training.preflight.before_torch import check_before_torch

    if not faulthandler.is_enabled():
        faulthandler.enable()  # "Bus error" and where: base weights are mapped, and may be cut short meanwhile

    if overwrite and resume:
        raise ConfigError(Problem("--overwrite --resume", "cannot be combined", "give one of them"))
    if dry_run:
        _dry_run(cfg, overwrite=overwrite, resume=resume)
        return
    check_before_torch(cfg, os.environ, overwrite=overwrite, resume=resume)
    with Transcript() as transcript:
        from phi3_dist.machine.probe import launch_facts, probe
        from phi3_dist.training.signals import finishing
        from phi3_dist.training.whole_run import train as run_training

        result = run_training(
            cfg,
            probe(),
            launch_facts(os.environ),
            overwrite=overwrite,
            resume=resume,
            allow_changed=allow_changed or (),
            transcript=transcript,
        )
        finishing()
        finished_before = result.steps == 0 and not result.exit_code and os.environ.get("RANK", "0") == "0"
        if finished_before:
            adapter = result.folder / "adapter"
            ways = f"a larger train.max_steps or train.epochs extends it, model.adapter={adapter} trains on from it"
            typer.echo(f"{result.folder} has finished already: {ways}")
        drawn = all((result.folder / name).is_file() for name in ("curves.png", "report.html"))
        if result.receipt is not None or (finished_before and not drawn):
            from phi3_dist.report.finished_report import draw_report

            typer.echo(draw_report(result.folder))
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _dry_run(cfg: Any, *, overwrite: bool, resume: bool) -> None:
    import sys

    from phi3_dist.machine.findings import as_table
    from phi3_dist.training.preflight.dry_run import dry_run

    done = dry_run(cfg, overwrite=overwrite, resume=resume)
    if done.speaks:
        typer.echo(as_table(done.findings, colour=sys.stdout.isatty()))
        bad = sum(one.level == "bad" for one in done.findings)
        typer.echo(f"{bad} of these would end the run" if bad else "this run can start")
    if done.code:
        raise typer.Exit(done.code)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def launch(context: typer.Context) -> None:
    """Run `accelerate launch` with the same options, and end with the exit code of the rank that failed first."""
    from phi3_dist.machine.launcher import launch as run_launcher

    ended = run_launcher(context.args)
    if ended.why:
        typer.echo(f"phi3-dist launch: {ended.why}", err=True)
    if ended.code:
        raise typer.Exit(ended.code)


@app.command("prepare")
def prepare_run(
    run_file: RunFile,
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that tokenize; by default one for each core, on two cores one for both."),
    ] = None,
) -> None:
    """Do what a run needs before a GPU is allocated: download the base, tokenize and pack the data, hash the weights.

    Killed and started again, it continues from what was finished. Of a sweep file, the rows of every candidate.
    """
    from phi3_dist.sweep.file import load_sweep_or_run

    cfg, sweep = load_sweep_or_run(run_file, overrides or ())
    from phi3_dist.cli.progress import progress_line
    from phi3_dist.data.cache.block_files import workers_for
    from phi3_dist.machine.probe import cpu_count
    from phi3_dist.machine.storage import cache_folder
    from phi3_dist.planning.auto_fields import is_auto
    from phi3_dist.training.checkpoints.compatibility import base_fingerprint
    from phi3_dist.training.inputs import count_rows, find_model, prepare_rows
    from phi3_dist.training.preflight.trackers_and_inputs import check_trackers

    cache = cache_folder(cfg.data.cache)
    check_trackers(cfg.log, rank=1)  # the key may lie on the node that trains
    base, tokenizer, _ = find_model(cfg)
    workers = workers or workers_for(cpu_count())
    typer.echo(f"base   {base.folder or base.source}")
    base_fingerprint(base, cache)
    if is_auto(cfg.data.pack_length):
        with progress_line() as show_progress:
            typer.echo(count_rows(cfg, tokenizer, cache, workers=workers, progress=show_progress))
        return
    for one in sweep.data_runs if sweep else (cfg,):
        with progress_line() as show_progress:
            data = prepare_rows(one, tokenizer, cache, workers=workers, progress=show_progress)
        for line in _of_rows(data, cache):
            typer.echo(line)


def _of_rows(data: Any, cache: Path) -> Iterator[str]:
    """What came of a preparation."""
    held_out = len(data.held_out.packs) if data.held_out else 0
    yield f"data   {len(data.train.packs)} packs to train on, {held_out} held out, in {cache}"
    if data.skipped or data.dropped:
        yield f"       {len(data.skipped):,} rows can't be used, {len(data.dropped):,} are longer than a pack"
    yield from (f"       {notice}" for notice in data.notices)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders.")] = Path("runs"),
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
) -> None:
    """List run folders, newest first: state, step, loss, tokens/s, last checkpoint, job and nodes."""
    from rich.console import Console

    from phi3_dist.report.runs import list_runs, runs_table, watch_runs

    console = Console()
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            watch_runs(folder, console)
    elif console.is_terminal:
        console.print(runs_table(list_runs(folder), base=folder, width=console.width))
    else:  # a file or a pipe has no width
        Console(width=10_000).print(runs_table(list_runs(folder), base=folder))


@app.command()
def logs(
    run_folder: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    rank: Annotated[int, typer.Option(min=0, help="Rank whose log to print.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until Ctrl-C.")] = False,
) -> None:
    """Print what one rank of a run has printed."""
    from phi3_dist.report.logs import find_log, follow_log

    with contextlib.suppress(KeyboardInterrupt):
        for piece in follow_log(find_log(run_folder, rank), follow=follow):
            typer.echo(piece, nl=False)
