"""The verb that renders and submits sbatch scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3_dist.cli.app import Overrides, RunFile, app


@app.command()
def slurm(
    run_file: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", min=0, help="GPUs in each node, one process each; 0: a CPU job.")
    ] = 0,
    processes_per_node: Annotated[int | None, typer.Option(min=1, help="Processes on each node of a CPU job.")] = None,
    config: Annotated[str, typer.Option("--config_file", help="Accelerate config.")] = "configs/accelerate/ddp.yaml",
    time: Annotated[str | None, typer.Option(help="Time limit: 90m, 4h, 1d12h.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm's quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features that the nodes must have.")] = None,
    container_image: Annotated[str | None, typer.Option(help="Image for srun's pyxis plugin.")] = None,
    env_file: Annotated[str | None, typer.Option(help="Shell file that every node sources first.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE to export. May be repeated.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="CPUs of each node, for all its processes.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of each node, in Slurm's form: 64G.")] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Share the nodes with no other job.")] = False,
    master: Annotated[str | None, typer.Option(help="Address of the first node; by default it is looked up.")] = None,
    directive: Annotated[list[str] | None, typer.Option(help="One more #SBATCH line, as --name=value.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue after a time limit, a preemption or a lost node, as the same job."),
    ] = False,
    slack: Annotated[int, typer.Option(help="Seconds before the time limit at which to save and stop.")] = 180,
    max_requeues: Annotated[int, typer.Option(help="How often the job may start again, with --resume.")] = 3,
    array: Annotated[
        list[str] | None, typer.Option(help="Separate runs: key.path=value,value. May be repeated.")
    ] = None,
    chain: Annotated[
        int, typer.Option(help="Jobs in a chain, each continuing the one before, for runs beyond a time limit.")
    ] = 1,
    script: Annotated[Path | None, typer.Option(help="Where to write the script.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it to Slurm.")] = False,
) -> None:
    """Render an sbatch script from the run file and a topology, check it, and submit it if asked.

    Of a sweep file, a job that runs `phi3-dist sweep`.
    """
    from dataclasses import replace

    from phi3_dist.machine.slurm_cluster import slurm_command
    from phi3_dist.planning.sbatch_script import SlurmJob, SlurmTopology, parse_array, parse_env
    from phi3_dist.sweep.file import load_sweep_or_run

    arguments = [*(overrides or ()), *(["--resume"] if resume else [])]
    cfg, sweep = load_sweep_or_run(run_file, overrides or ())
    job = replace(SlurmJob.of(cfg, str(run_file), arguments), verb="sweep" if sweep else "train")
    topology = SlurmTopology(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=processes_per_node,
        config=config,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        container_image=container_image,
        env_file=env_file,
        env=parse_env(env or ()),
        cpus_per_task=cpus_per_task,
        mem=mem,
        exclusive=exclusive,
        master=master,
        slack_s=slack,
        max_requeues=max_requeues,
        directives=tuple(directive or ()),
    )
    job = replace(job, array=parse_array(array)) if array else job
    done = slurm_command(job, topology, script=script, submit=submit, chain=chain, print_line=typer.echo)
    for line in done.lines():
        typer.echo(line)
