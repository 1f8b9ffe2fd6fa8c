"""The command line. Imports neither torch nor ray nor transformers before a command needs them."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mpruner_dist.config import Config
from mpruner_dist.config_file import load_config
from mpruner_dist.errors import MPrunerError, UserError
from mpruner_dist.logs import set_up_logging
from mpruner_dist.options import ConfigFile, RunDir, Set
from mpruner_dist.submission.commands import app as submit

app = typer.Typer(
    help="Prune whole layers of large models: global CKA on Ray and DeepSpeed, sharded rewriting, retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(submit, name="submit")

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print what would happen, do nothing.")]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="A plan.json, a DeepSpeed layer_reduction JSON, or a mergekit YAML.")
]
Keep = Annotated[
    list[str] | None,
    typer.Option(help="Layers, counted from 0, ends included: 0-11,20-31. Of several stacks: decoder=0-5, repeatable."),
]
ConfigFolder = Annotated[
    Path | None, typer.Option("--config", help="Where config.json and the tokenizer lie, if not in SOURCE.")
]
MaxShardSize = Annotated[
    str | None, typer.Option(help="Fill files up to this size, such as 5GB; else they are split as in SOURCE.")
]
PreservePattern = Annotated[
    bool, typer.Option("--preserve-pattern", help="Refuse what would break a pattern that serving engines hard-code.")
]
Universal = Annotated[
    bool, typer.Option("--universal", help="From a DeepSpeed checkpoint that you trust, a universal one, with moments.")
]
Export = Annotated[
    Path | None, typer.Option(help="Write the plan too: .yaml for mergekit, .json for DeepSpeed layer_reduction.")
]
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
    model outdated; the next `mpruner run` makes them again.
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
    """Write report.html and the model cards anew."""
    _walk(load_config(config, override or []), config, run_dir, "report", again=True)


@app.command()
def rewrite(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id; a checkpoint of DeepSpeed or torch.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    plan_file: PlanFile = None,
    keep: Keep = None,
    config_folder: ConfigFolder = None,
    max_shard_size: MaxShardSize = None,
    preserve_pattern: PreservePattern = False,
    drop_mtp: Annotated[bool, typer.Option("--drop-mtp", help="Leave out layers that predict further tokens.")] = False,
    universal: Universal = False,
    export: Export = None,
    trust_remote_code: Remote = False,
) -> None:
    """Write a checkpoint without some of its layers. Needs no run and no Ray.

    Example: mpruner rewrite SmolLM2-135M SmolLM2-smaller --keep 0-11,20-29
    """
    from mpruner_dist.checkpoints.formats import open_checkpoint
    from mpruner_dist.checkpoints.source import resolve_source
    from mpruner_dist.exchange import foreign_form, read_any_plan
    from mpruner_dist.plan import parse_keep
    from mpruner_dist.rewriting.finished import Request, is_finished
    from mpruner_dist.rewriting.layout import parse_size

    if (plan_file is None) == (not keep):
        raise UserError("give --plan plan.json or --keep 0-11,20-31, and just one of them")
    if universal and (max_shard_size or drop_mtp):
        raise UserError("--universal writes no shards: leave out --max-shard-size and --drop-mtp")
    if export:
        foreign_form(export)  # before the work
    kept = read_any_plan(plan_file) if plan_file else parse_keep(keep or [])
    size = parse_size(max_shard_size) if max_shard_size else None
    given: dict[str, Any] = {"config_folder": config_folder, "preserve_pattern": preserve_pattern}
    given["trust_remote_code"] = trust_remote_code
    folder = resolve_source(source, None)
    request = Request(open_checkpoint(folder, config_folder).fingerprint(), kept, size, drop_mtp, preserve_pattern)
    if is_finished(request, target) and not export:  # before the seconds that torch takes to start
        typer.echo(f"{target}: done before")
    elif universal:
        from mpruner_dist.rewriting.universal import rewrite_universal

        rewrite_universal(folder, target, kept, **given)
        typer.echo(f"{target}: universal checkpoint of the kept layers; resume with checkpoint.load_universal")
    else:
        from mpruner_dist.rewriting.rewrite import rewrite_checkpoint

        rewrite_checkpoint(folder, target, kept, max_shard_bytes=size, drop_next_token=drop_mtp, **given)
        typer.echo(f"{target}: proven to be {source} without the other layers")
    if export:
        from mpruner_dist.rewriting.export import export_plan

        export_plan(folder, kept, export, config_folder, trust_remote_code)
        typer.echo(f"{export}: the plan for {foreign_form(export)}")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face folder of safetensors files.")],
    against: Annotated[
        Path | None,
        typer.Option(help="The original: run both, one after the other whole in memory, and compare their logits."),
    ] = None,
    trust_remote_code: Remote = False,
) -> None:
    """Check that a checkpoint is whole, has the tensors that its configuration asks for, and where it can be served."""
    from mpruner_dist.models.loading import read_config
    from mpruner_dist.models.serving import portability
    from mpruner_dist.rewriting.proof import compare_logits, verify_checkpoint

    found = verify_checkpoint(checkpoint, trust_remote_code)
    if against is not None:
        error = compare_logits(checkpoint, against, trust_remote_code)
        typer.echo(f"logits differ by {error:.1e} of the largest from those of {against} with the other layers skipped")
    for line in portability(read_config(checkpoint, trust_remote_code)):
        typer.echo(line)
    typer.echo(
        f"{checkpoint}: {len(found.shards)} file(s), {len(found.tensors)} tensors, "
        f"{found.num_parameters:,} parameters, {found.num_bytes / 1e6:.1f} MB: whole, and as its configuration asks"
    )


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


def _walk(settings: Config, config: Path, run_dir: Path | None, last: str, again: bool = False) -> None:
    from mpruner_dist import pipeline
    from mpruner_dist.cluster.preemption import stop_on_signals

    with stop_on_signals():
        folder = pipeline.run(settings, run_dir or Path("runs") / config.stem, last=last, again=again)
    if last in ("evaluate", "report"):
        from mpruner_dist.reporting.table import print_evaluation

        print_evaluation(folder / "evaluation.json")
        if settings.rounds is not None:
            from mpruner_dist.reporting.rounds import print_rounds

            print_rounds(folder / "rounds.json")
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
