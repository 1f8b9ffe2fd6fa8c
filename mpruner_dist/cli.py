"""The command line. Imports neither torch nor ray nor transformers before a command needs them."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from mpruner_dist.config import Config
from mpruner_dist.config_file import load_config
from mpruner_dist.errors import MPrunerError, UserError
from mpruner_dist.logs import set_up_logging

app = typer.Typer(
    help="Prune whole layers of large models: global CKA on Ray and DeepSpeed, sharded rewriting, retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")]
RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="Folder for everything that is made. Default: runs/NAME of the config."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Override one value; may be given many times."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print what would happen, do nothing.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that lies in the checkpoint.")]


@app.command()
def run(config: ConfigFile, run_dir: RunDir = None, override: Set = None, dry_run: DryRun = False) -> None:
    """Prune, retrain, evaluate and report. The same command again goes on where it was stopped.

    Example: mpruner run configs/demo.yaml --run-dir runs/demo --set plan.threshold=0.97
    """
    settings = load_config(config, override or [])
    if dry_run:
        from mpruner_dist.dry_run import describe

        _print_rows("What would happen", describe(settings))
        return
    _walk(settings, config, run_dir, "report")


@app.command()
def collect(config: ConfigFile, run_dir: RunDir = None, override: Set = None) -> None:
    """Measure the similarity of all pairs of layers, and stop there."""
    _walk(load_config(config, override or []), config, run_dir, "collect", again=True)


@app.command()
def plan(config: ConfigFile, run_dir: RunDir = None, override: Set = None) -> None:
    """Decide which layers go, from similarities that are saved: instant.

    A new plan makes the pruned and the retrained model outdated; the next `mpruner run` makes them again.
    """
    _walk(load_config(config, override or []), config, run_dir, "plan", again=True)


@app.command()
def retrain(config: ConfigFile, run_dir: RunDir = None, override: Set = None) -> None:
    """Retrain the pruned model, and stop there."""
    settings = load_config(config, override or [])
    if settings.retrain is None:
        raise UserError(f"{config} has no retrain section")
    _walk(settings, config, run_dir, "retrain", again=True)


@app.command()
def evaluate(config: ConfigFile, run_dir: RunDir = None, override: Set = None) -> None:
    """Measure quality, size and speed of each model."""
    _walk(load_config(config, override or []), config, run_dir, "evaluate", again=True)


@app.command()
def report(config: ConfigFile, run_dir: RunDir = None, override: Set = None) -> None:
    """Write report.html and the model cards anew."""
    _walk(load_config(config, override or []), config, run_dir, "report", again=True)


@app.command()
def rewrite(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder of safetensors files.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    plan_file: Annotated[Path | None, typer.Option("--plan", help="A plan.json.")] = None,
    keep: Annotated[str | None, typer.Option(help="Layers, counted from 0, ends included: 0-11,20-31")] = None,
    trust_remote_code: Remote = False,
) -> None:
    """Write a checkpoint without some of its layers. Needs no run and no Ray.

    Example: mpruner rewrite SmolLM2-135M SmolLM2-smaller --keep 0-11,20-29
    """
    from mpruner_dist.models.blocks import num_layers
    from mpruner_dist.models.loading import read_config
    from mpruner_dist.plan import parse_layers, read_plan
    from mpruner_dist.rewriting.rewrite import rewrite_checkpoint

    if (plan_file is None) == (keep is None):
        raise UserError("give --plan plan.json or --keep 0-11,20-31, and just one of them")
    if plan_file is not None:
        kept = read_plan(plan_file, num_layers(read_config(source, trust_remote_code))).kept
    else:
        kept = parse_layers(keep or "")
    rewrite_checkpoint(source, target, kept, trust_remote_code=trust_remote_code)
    typer.echo(f"{target}: {len(kept)} layers, proven equal to {source} with the others skipped")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face folder of safetensors files.")],
    trust_remote_code: Remote = False,
) -> None:
    """Check that a checkpoint is whole and has the tensors that its configuration asks for."""
    from mpruner_dist.rewriting.proof import verify_checkpoint

    found = verify_checkpoint(checkpoint, trust_remote_code)
    typer.echo(
        f"{checkpoint}: {len(found.shards)} file(s), {len(found.tensors)} tensors, "
        f"{found.num_parameters:,} parameters, {found.num_bytes / 1e6:.1f} MB: whole, and as its configuration asks"
    )


@app.command()
def status(run_dir: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Say what is done in a run folder, what is next, and how long each stage took."""
    from mpruner_dist.pipeline import stages_of
    from mpruner_dist.reporting.status import status_rows

    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run_dir} is no run folder: it holds no config.yaml")
    _print_rows(str(run_dir), status_rows(run_dir, stages_of(load_config(config_file, []))))


def _walk(settings: Config, config: Path, run_dir: Path | None, last: str, again: bool = False) -> None:
    from mpruner_dist import pipeline

    folder = pipeline.run(settings, run_dir or Path("runs") / config.stem, last=last, again=again)
    if last in ("evaluate", "report"):
        from mpruner_dist.reporting.table import print_evaluation

        print_evaluation(folder / "evaluation.json")
    artefact = {
        "collect": "cka.json",
        "plan": "plan.json",
        "retrain": "retrained",
        "evaluate": "evaluation.json",
    }
    typer.echo(str(folder / artefact.get(last, "report.html")))


def _print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """Run a command; turn every failure that has a message for the user into that message and an exit code."""
    set_up_logging()
    try:
        app()
    except MPrunerError as error:
        typer.echo(f"mpruner: {error}", err=True)
        logging.getLogger(__name__).debug("", exc_info=error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("mpruner: interrupted; the same command goes on where it was", err=True)
        sys.exit(130)
