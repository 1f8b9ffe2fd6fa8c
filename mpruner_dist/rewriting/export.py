"""The plan of a rewrite for other tools."""

from pathlib import Path

from mpruner_dist.checkpoints.formats import open_checkpoint
from mpruner_dist.data.model_folder import read_config
from mpruner_dist.errors import UserError
from mpruner_dist.exchange import foreign_form, layer_reduction, mergekit_plan, yaml_text
from mpruner_dist.models.loading import empty_model
from mpruner_dist.models.naming import block_prefix
from mpruner_dist.models.stacks import run_stacks
from mpruner_dist.plan import Keep, Plan
from mpruner_dist.runs.commit import write_json, write_text


def require_one_stack(
    source: Path, kept: Keep, file: Path, config_folder: Path | None = None, trust_remote_code: bool = False
) -> list[int]:
    """The layers to keep; refuse, before a checkpoint is rewritten, what neither mergekit nor DeepSpeed can say.

    Raises:
        UserError: several stacks, or a file of another kind.
    """
    foreign_form(file)
    if isinstance(kept, dict):
        raise UserError(f"--export {file}: neither mergekit nor DeepSpeed knows plans for stacks by name")
    config = read_config(open_checkpoint(source, config_folder).companions, trust_remote_code)
    stacks = run_stacks(empty_model(config, trust_remote_code))
    if len(stacks) > 1:
        raise UserError(
            f"--export {file}: neither mergekit nor DeepSpeed knows plans for several stacks, and a model of type "
            f"{config.model_type!r} has {', '.join(stack.name for stack in stacks)}"
        )
    return kept.kept if isinstance(kept, Plan) else kept


def export_plan(
    source: Path, layers: list[int], file: Path, config_folder: Path | None = None, trust_remote_code: bool = False
) -> None:
    """Write which layers of a checkpoint's only stack stay, as mergekit (.yaml) or DeepSpeed (.json) has it."""
    form = foreign_form(file)
    checkpoint = open_checkpoint(source, config_folder)
    config = read_config(checkpoint.companions, trust_remote_code)
    if form == "mergekit":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
        write_text(file, yaml_text(mergekit_plan(layers, str(source.absolute()), dtype)))
    else:
        names = list(checkpoint.tensors)
        write_json(file, layer_reduction(layers, names, block_prefix(names, config, trust_remote_code)))
