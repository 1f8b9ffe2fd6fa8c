"""Names of tensors: which of them belong to a layer. Needs no model."""

import re

from mpruner_dist.checkpoints.folder import CheckpointFolder


def layer_of(name: str, prefix: str) -> int | None:
    """The layer that a tensor belongs to, or None outside the blocks."""
    match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    return int(match[1]) if match else None


def layer_parameters(checkpoint: CheckpointFolder, layers: list[str]) -> list[int]:
    """Parameters of each layer, given by names such as `model.layers.0`."""
    sizes = dict.fromkeys(layers, 0)
    for name, info in checkpoint.tensors.items():
        parts = name.split(".")
        for end in (index + 1 for index, part in enumerate(parts) if part.isdigit()):
            if (layer := ".".join(parts[:end])) in sizes:
                sizes[layer] += info.num_elements
    return list(sizes.values())
