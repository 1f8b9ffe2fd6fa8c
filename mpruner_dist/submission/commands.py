"""`mpruner submit ...`: the same run, started elsewhere by a batch system."""

import sys
from typing import Annotated

import typer

from mpruner_dist.errors import UserError
from mpruner_dist.options import ConfigFile, RunDir, Set

app = typer.Typer(no_args_is_help=True, help="Start a run elsewhere, by a batch system.")

Address = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, such as http://HEAD:8265.")
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="As `mpruner submit ray` said it.")]


@app.command()
def slurm(
    config: ConfigFile,
    run_dir: RunDir = None,
    override: Set = None,
    nodes: Annotated[str, typer.Option(help="How many, or the least and the most: 2-4.")] = "1",
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="A worker on each. Without it, workers as in CONFIG, on CPUs.")
    ] = None,
    cpus_per_gpu: Annotated[
        int | None, typer.Option(min=1, help="Slurm may give as little as one CPU a node without it.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Where to run.")] = None,
    account: Annotated[str | None, typer.Option(help="Who pays.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Limit of a start, such as 8:00:00; what is not done then goes on in the next.")
    ] = None,
    then: Annotated[
        str | None, typer.Option(metavar="retrain", help="Retrain and evaluate in a second job, of another shape.")
    ] = None,
    then_nodes: Annotated[str | None, typer.Option(help="Nodes of the second job; else as of the first.")] = None,
    then_gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs a node of the second job; else as of the first.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="KEY=V1,V2", help="Collect once, then run with each value as an array.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands, what Slurm says to them, and the script.")
    ] = False,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- SBATCH OPTIONS]", help="Anything else for sbatch.")
    ] = None,
) -> None:
    """Run a configuration as a job of Slurm that goes back into the queue when it is preempted or out of time.

    Example: mpruner submit slurm CONFIG --nodes 2 --gpus-per-node 8 --cpus-per-gpu 8 --time 8:00:00 -- --qos=long
    """
    from mpruner_dist.submission.slurm import Shape, describe, plan_submissions, require_time, submit

    if then not in (None, "retrain"):
        raise UserError(f"--then {then}: only `retrain` can follow")
    if then is None and (then_nodes or then_gpus_per_node):
        raise UserError("--then-nodes and --then-gpus-per-node go with --then retrain")
    if time is not None:
        require_time(time)
    named = {"partition": partition, "account": account, "time": time}
    given = [f"--{name}={value}" for name, value in named.items() if value is not None]
    first = Shape(nodes, gpus_per_node, cpus_per_gpu)
    second = Shape(then_nodes or nodes, then_gpus_per_node or gpus_per_node, cpus_per_gpu) if then else None
    jobs = plan_submissions(
        config, run_dir, override or [], first, [*given, *(options or [])], then=second, sweep=sweep
    )
    if dry_run:
        typer.echo(describe(jobs))
        return
    for number, job in zip(submit(jobs), jobs, strict=True):
        task = "_TASK" if any(option.startswith("--array") for option in job.options) else ""
        is_own = not any(option.startswith(("--output", "-o")) for option in job.options)
        log = f", log mpruner-{number}{task}.log" if is_own else ""
        typer.echo(f"job {number}{log}; squeue -j {number}, scancel {number}")


@app.command()
def ray(
    config: ConfigFile,
    address: Address,
    run_dir: RunDir = None,
    override: Set = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=value", help="Set a variable for the job and its workers; repeatable."),
    ] = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Submit, and do not wait for the end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted.")] = False,
) -> None:
    """Run a configuration as a job of a Ray cluster; follow its log and exit as it does.

    The run folder and every path in the configuration must lie on storage that all nodes share. Ctrl-C stops following;
    the job goes on.

    Example: mpruner submit ray configs/hub/llama_8b.yaml --address http://head:8265 --run-dir /shared/runs/llama
    """
    from mpruner_dist.submission.ray_jobs import submit_job

    sys.exit(submit_job(config, address, run_dir, override or [], env or [], follow=not no_follow, dry_run=dry_run))


@app.command()
def status(job: Job, address: Address) -> None:
    """Say how far a job of a Ray cluster is."""
    from mpruner_dist.submission.ray_jobs import job_status

    typer.echo(job_status(job, address))


@app.command()
def stop(job: Job, address: Address) -> None:
    """Ask a job of a Ray cluster to save and end; the same submission again goes on."""
    from mpruner_dist.submission.ray_jobs import stop_job

    typer.echo(stop_job(job, address))
