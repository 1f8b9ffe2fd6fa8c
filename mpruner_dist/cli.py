"""The command line. Imports neither torch nor ray nor transformers before a command needs them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mpruner_dist.commands import checkpoint, machine
from mpruner_dist.config import Config
from mpruner_dist.config_file import load_config
from mpruner_dist.errors import MPrunerError, UserError
from mpruner_dist.logs import set_up_logging
from mpruner_dist.options import ConfigFile, RunDir, Set
from mpruner_dist.submission.commands import app as submit

app = typer.Typer(
    help="Prune whole layers of large models: global CKA on Ray and DeepSpeed, sharded rewriting, retraining. A "
    "command for one stage first makes what is missing of the stages before it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(submit, name="submit")

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check configuration, model and data, and print what would happen; GPUs, free memory and disk are not "
        "looked at. From a hub, model and data are fetched.",
    ),
]


@app.command()
def run(
    config: ConfigFile,
    run_dir: RunDir = None,
    override: Set = None,
    until: Annotated[
        str, typer.Option(help="Stop after this stage: data, collect, plan, rewrite, retrain, evaluate or report.")
    ] = "report",
    collected: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Take the similarities over from another run folder.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Prune, retrain, evaluate and report. The same command again goes on where it was stopped.

    Example: mpruner run configs/demo.yaml --run-dir runs/demo-24 --set plan.keep_layers=24
    """
    settings = load_config(config, override or [])
    if dry_run:
        from mpruner_dist.dry_run import describe
        from mpruner_dist.pipeline import require_way

        require_way(settings, until, collected)
        rows = describe(settings)
        if collected is not None:
            rows.append(("similarities", f"those of {collected}, if they were made from the same inputs"))
        if until != "report":
            rows.append(("the end", f"after the stage {until}; the rest is what the same command without --until does"))
        _print_rows("What would happen", rows)
        return
    _walk(settings, config, run_dir, until, collected=collected)


@app.command()
def collect(config: ConfigFile, run_dir: RunDir = None, override: Set = None) -> None:
    """Measure the similarity of all pairs of layers, and stop there."""
    _walk(load_config(config, override or []), config, run_dir, "collect", again=True)


@app.command()
def plan(
    config: ConfigFile,
    run_dir: RunDir = None,
    override: Set = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare all planners at equal depth; the run's plan stays as it is.")
    ] = False,
    depths: Annotated[
        str | None, typer.Option(help="With --compare: how many layers to remove, such as 2,4,6.")
    ] = None,
) -> None:
    """Decide which layers go, from similarities that are saved: instant, but for methods greedy and search.

    Those measure the loss of plans on validation text, on the workers. A new plan makes the pruned and the retrained
    model outdated; the next `mpruner run` with the same --set makes them again.
    """
    settings = load_config(config, override or [])
    if depths is not None and not compare:
        raise UserError("--depths goes with --compare; a plan's own depth is plan.keep_layers")
    if not compare:
        _walk(settings, config, run_dir, "plan", again=True)
        return
    from mpruner_dist import pipeline
    from mpruner_dist.cluster.preemption import stop_on_signals
    from mpruner_dist.plan import parse_layers
    from mpruner_dist.reporting.comparison import print_comparison

    wanted = None if depths is None else parse_layers(depths)
    with stop_on_signals():
        folder = pipeline.compare_plans(settings, run_dir or Path("runs") / config.stem, wanted)
    print_comparison(folder / "compare.json")
    typer.echo(str(folder / "figures/plans.svg"))


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
    """Write report.html and the model cards, where they are missing or outdated."""
    _walk(load_config(config, override or []), config, run_dir, "report", again=True)


app.command()(checkpoint.rewrite)
app.command()(checkpoint.verify)


@app.command()
def status(run_dir: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Say what is done in a run folder, what is next, and how long each stage took."""
    from mpruner_dist.pipeline import stages_of
    from mpruner_dist.reporting.status import status_of_rounds, status_rows

    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run_dir} is no run folder: it holds no config.yaml")
    settings = load_config(config_file, [])
    rows = status_rows(run_dir, stages_of(settings)) if settings.rounds is None else status_of_rounds(run_dir)
    _print_rows(str(run_dir), rows)


app.command()(machine.env)
app.command()(machine.doctor)


def _walk(
    settings: Config,
    config: Path,
    run_dir: Path | None,
    last: str,
    again: bool = False,
    collected: Path | None = None,
) -> None:
    from mpruner_dist import pipeline
    from mpruner_dist.cluster.preemption import stop_on_signals

    with stop_on_signals():
        folder = pipeline.run(
            settings, run_dir or Path("runs") / config.stem, last=last, again=again, collected=collected
        )
    if last in ("evaluate", "report"):
        from mpruner_dist.reporting.table import print_evaluation

        print_evaluation(folder / "evaluation.json")
        if settings.rounds is not None:
            from mpruner_dist.reporting.rounds import print_rounds

            print_rounds(folder / "rounds.json")
    artefact = {
        "data": "data",
        "collect": "cka.json",
        "plan": "plan.json",
        "rewrite": "pruned",
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
    Console(markup=False, emoji=False).print(table)


def main() -> None:
    """Run a command; turn every failure that has a message for the user into that message and an exit code."""
    set_up_logging()
    try:
        app()
    except MPrunerError as error:
        typer.echo(f"mpruner: {error}", err=True)
        sys.exit(error.exit_code)
