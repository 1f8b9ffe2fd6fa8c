"""Commands on a checkpoint alone."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mpruner_dist.errors import UserError

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
    str | None,
    typer.Option(help="Fill files up to this size, such as 5GB; else they are split as in SOURCE, or at 5GB."),
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


def rewrite(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id; a checkpoint of DeepSpeed or torch.")],
    target: Annotated[Path, typer.Argument(help="A new folder, or an earlier rewrite, which is replaced.")],
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

    Example: mpruner rewrite build/demo/SmolLM2-135M-Instruct smaller --keep 0-11,20-29
    """
    from mpruner_dist.checkpoints.formats import open_checkpoint
    from mpruner_dist.checkpoints.source import resolve_source
    from mpruner_dist.exchange import foreign_form, read_any_plan
    from mpruner_dist.plan import parse_keep
    from mpruner_dist.rewriting.finished import Request, clear_beside, is_finished
    from mpruner_dist.rewriting.layout import parse_size

    if (plan_file is None) == (not keep):
        raise UserError("give --plan plan.json or --keep 0-11,20-31, and just one of them")
    if universal and (max_shard_size or drop_mtp):
        raise UserError("--universal writes no shards: leave out --max-shard-size and --drop-mtp")
    if export:
        foreign_form(export)  # before anything is fetched
    kept = read_any_plan(plan_file) if plan_file else parse_keep(keep or [])
    size = parse_size(max_shard_size) if max_shard_size else None
    given: dict[str, Any] = {"config_folder": config_folder, "preserve_pattern": preserve_pattern}
    given["trust_remote_code"] = trust_remote_code
    folder = resolve_source(source, None)
    layers: list[int] = []
    if export:
        from mpruner_dist.rewriting.export import require_one_stack

        layers = require_one_stack(folder, kept, export, config_folder, trust_remote_code)  # before the work
    request = Request(open_checkpoint(folder, config_folder), kept, size, drop_mtp, preserve_pattern)
    if not universal and is_finished(request, target):  # before the seconds that torch takes to start
        clear_beside(target)
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

        export_plan(folder, layers, export, config_folder, trust_remote_code)
        typer.echo(f"{export}: the plan for {foreign_form(export)}")


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face folder of safetensors files.")],
    against: Annotated[
        Path | None,
        typer.Option(help="The original: run both, one after the other whole in memory, and compare their logits."),
    ] = None,
    trust_remote_code: Remote = False,
) -> None:
    """Check that a checkpoint is whole, has the tensors that its configuration asks for, and where it can be served."""
    from mpruner_dist.data.model_folder import read_config
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
