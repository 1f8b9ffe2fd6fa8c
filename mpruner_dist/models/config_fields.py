"""The configuration of a model with fewer layers: which fields go with the blocks."""

from typing import Any

from mpruner_dist.errors import UserError
from mpruner_dist.models.blocks import num_layers

INDEX_LISTS = ("mlp_only_layers", "moe_layers", "hybrid_layer_ids", "cross_attention_layers")
"""Fields that name layers by their index. Any other list as long as the model is deep has one entry a layer."""


def prune_config(stored: dict[str, Any], config: Any, kept: list[int]) -> dict[str, Any]:
    """`stored` (the config.json) for the kept layers.

    Lists are taken from `config`, where the model's own class has completed them: a list that the file leaves out would
    be computed anew from the new depth, and wrongly. Whether the result is right is then proven on the model itself.

    Raises:
        UserError: the layers are described in a nested configuration.
    """
    depth = num_layers(config)
    field = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if field not in stored and "text_config" in stored:
        raise UserError(f"{config.model_type!r} keeps its layers in text_config: only plain decoders are supported")
    pruned = dict(stored)
    pruned[field] = len(kept)
    if field != "num_hidden_layers":
        pruned.pop("num_hidden_layers", None)  # where both are given transformers believes the alias
    for name, value in config.to_dict().items():
        if name in INDEX_LISTS and value:
            pruned[name] = [kept.index(layer) for layer in value if layer in kept]
        elif isinstance(value, list | tuple) and len(value) == depth and "layer" in name:
            pruned[name] = [value[layer] for layer in kept]
    return pruned
