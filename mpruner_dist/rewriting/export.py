"""The plan of a rewrite for other tools."""

from pathlib import Path

from mpruner_dist.checkpoints.formats import open_checkpoint
from mpruner_dist.errors import UserError
from mpruner_dist.exchange import foreign_form, layer_reduction, mergekit_plan, yaml_text
from mpruner_dist.models.loading import read_config
from mpruner_dist.models.naming import block_prefix
from mpruner_dist.plan import Keep, Plan
from mpruner_dist.runs.commit import write_json, write_text


def export_plan(
    source: Path, kept: Keep, file: Path, config_folder: Path | None = None, trust_remote_code: bool = False
) -> None:
    """Write the plan for a checkpoint as mergekit (.yaml) or DeepSpeed (.json) has it.

    Raises:
        UserError: several stacks, which neither knows, or a file of another kind.
    """
    form = foreign_form(file)
    if isinstance(kept, dict):
        raise UserError(f"--export {file}: neither mergekit nor DeepSpeed knows plans for stacks by name")
    layers = kept.kept if isinstance(kept, Plan) else kept
    checkpoint = open_checkpoint(source, config_folder)
    config = read_config(checkpoint.companions, trust_remote_code)
    if form == "mergekit":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
        write_text(file, yaml_text(mergekit_plan(layers, str(source.absolute()), dtype)))
    else:
        names = list(checkpoint.tensors)
        write_json(file, layer_reduction(layers, names, block_prefix(names, config, trust_remote_code)))
