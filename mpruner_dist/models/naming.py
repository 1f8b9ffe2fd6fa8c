"""What a checkpoint calls the blocks of its model."""

from typing import Any

from mpruner_dist.checkpoints.folder import CheckpointFolder
from mpruner_dist.checkpoints.naming import layer_of
from mpruner_dist.errors import UserError
from mpruner_dist.models.blocks import find_blocks, num_layers
from mpruner_dist.models.loading import empty_model


def block_prefix(checkpoint: CheckpointFolder, config: Any, trust_remote_code: bool = False) -> str:
    """What the names of the blocks' tensors begin with in this checkpoint, such as `model.layers`.

    Raises:
        UserError: the checkpoint's names do not have every block of the model.
    """
    model = empty_model(config, trust_remote_code)
    depth = num_layers(config)
    prefix, _ = find_blocks(model, depth)
    short = prefix.removeprefix(f"{model.base_model_prefix}.")  # older checkpoints leave out the model's own name
    for candidate in dict.fromkeys((prefix, short)):
        layers = {layer for name in checkpoint.tensors if (layer := layer_of(name, candidate)) is not None}
        if layers == set(range(depth)):
            return candidate
        if layers:
            raise UserError(
                f"{checkpoint.path}: the configuration asks for {depth} layers, the tensors {candidate}.N.* have "
                f"{sorted(layers ^ set(range(depth)))} too many or too few"
            )
    raise UserError(f"{checkpoint.path}: no tensor is named {prefix}.N.*, where a {config.model_type} has its blocks")
