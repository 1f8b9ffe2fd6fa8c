"""The plan of a rewrite for other tools."""

from pathlib import Path

from mpruner_dist.checkpoints.formats import open_checkpoint
from mpruner_dist.errors import UserError
from mpruner_dist.exchange import write_foreign_plan
from mpruner_dist.models.loading import read_config
from mpruner_dist.models.naming import block_prefix
from mpruner_dist.plan import Keep, Plan


def export_plan(
    source: Path, kept: Keep, file: Path, config_folder: Path | None = None, trust_remote_code: bool = False
) -> None:
    """Write the plan for a checkpoint as mergekit (.yaml) or DeepSpeed (.json) has it.

    Raises:
        UserError: several stacks, which neither knows, or a file of another kind.
    """
    if isinstance(kept, dict):
        raise UserError(f"--export {file}: neither mergekit nor DeepSpeed knows plans for stacks by name")
    layers = kept.kept if isinstance(kept, Plan) else kept
    checkpoint = open_checkpoint(source, config_folder)
    config = read_config(checkpoint.companions, trust_remote_code)
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    names = list(checkpoint.tensors)
    prefix = block_prefix(names, config, trust_remote_code)
    write_foreign_plan(file, layers, source.absolute(), dtype, names, prefix)
