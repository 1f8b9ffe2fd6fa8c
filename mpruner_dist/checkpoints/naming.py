"""Names of tensors: which of them belong to a layer. Needs no model."""

import re

from mpruner_dist.checkpoints.folder import CheckpointFolder


def layer_of(name: str, prefix: str) -> int | None:
    """The layer that a tensor belongs to, or None outside the blocks."""
    match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    return int(match[1]) if match else None


def layer_parameters(checkpoint: CheckpointFolder, prefix: str, depth: int) -> list[int]:
    """Parameters of each layer."""
    sizes = [0] * depth
    for name, info in checkpoint.tensors.items():
        layer = layer_of(name, prefix)
        if layer is not None:
            sizes[layer] += info.num_elements
    return sizes
