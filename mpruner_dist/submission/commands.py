"""`mpruner submit ...`: the same run, started elsewhere by a batch system."""

import sys
from typing import Annotated

import typer

from mpruner_dist.options import ConfigFile, RunDir, Set

app = typer.Typer(no_args_is_help=True, help="Start a run elsewhere, by a batch system.")

Address = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, such as http://HEAD:8265.")
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="As `mpruner submit ray` said it.")]


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

    Example: mpruner submit ray configs/hub.yaml --address http://head:8265 --run-dir /shared/runs/hub
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
