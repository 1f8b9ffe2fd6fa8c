"""Commands on the machine and the cluster."""

from pathlib import Path
from typing import Annotated

import typer

from mpruner_dist.config import ClusterConfig, Device


def env(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for machines.")] = False,
) -> None:
    """Say what a bug report needs: versions, hardware, Slurm, Ray, variables. Secrets and addresses are masked."""
    import json

    from mpruner_dist.machine.environment import as_text, describe_machine

    facts = describe_machine()
    typer.echo(json.dumps(facts, indent=2) if as_json else as_text(facts))


def doctor(
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="A folder on the storage that all nodes share; made if it is not there."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many; spread over the nodes.")] = 2,
    device: Annotated[Device, typer.Option(help="auto, cpu or cuda; auto as in a run.")] = "auto",
    address: Annotated[str | None, typer.Option(help="A Ray cluster. RAY_ADDRESS says the same.")] = None,
) -> None:
    """Try in a minute what a run needs: Ray, shared storage, a compiler, an all-reduce, a step of training.

    Exit code 0 if all of it works, else 1.
    """
    from mpruner_dist.machine.doctor import diagnose

    config = ClusterConfig(workers=workers, device=device, cpus_per_worker=1, address=address, max_restarts=0)
    states = []
    for check in diagnose(config, run_dir):
        typer.echo(f"{check.state:<7} {check.name}: {check.told}")
        states.append(check.state)
    if "failed" in states:
        raise typer.Exit(1)
