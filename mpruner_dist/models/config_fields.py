"""The configuration of a model with fewer layers: which fields go with the blocks."""

import copy
import re
from typing import Any

from mpruner_dist.models.stacks import DepthField

INDEX_LISTS = (
    "mlp_only_layers", "moe_layers", "hybrid_layer_ids", "cross_attention_layers", "full_attn_idxs",
    "deepstack_visual_indexes", "attn_layer_indices", "global_attention_layers", "kv_source_layers",
)  # fmt: skip
"""Lists and tables that name layers by their index."""
ENTRY_LISTS = ("intermediate_size", "activation_sparsity_pattern", "no_rope_layers")
"""Lists with one entry a layer whose names do not say so; of the others, those with `layer` in the name have one."""
PREFIXES = ("first_k_dense_replace", "max_window_layers", "num_dense_layers", "n_dense_layers")
"""Numbers of layers, from the first, that are of another kind."""
SUFFIXES = ("num_kv_shared_layers",)
"""Numbers of layers, from the last, that are of another kind."""
PERIODS = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
}
"""Periods, and the list that says the same of each layer: with layers missing only the list is true."""
NEXT_TOKEN_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""How many layers for predicting further tokens follow the stack in the checkpoint."""


def shrink_fields(fields: dict[str, Any], depth: int, field: DepthField, kept: list[int]) -> dict[str, Any]:
    """Fields of a configuration, completed by its own class, for the kept layers of one stack.

    Args:
        fields: as the class completes them: a list that the file leaves out would be computed anew from the new depth.
        depth: of the stack.
        field: where the depth is written.
        kept: layers, ascending.
    """
    changed = copy.deepcopy(fields)
    if field.entry is not None:  # a model of stages: nothing else is told by the block
        changed[field.name] = [
            len(kept) if entry == field.entry else value for entry, value in enumerate(fields[field.name])
        ]
        return changed
    changed[field.name] = len(kept)
    for name, value in fields.items():
        if name in INDEX_LISTS and isinstance(value, list | tuple):
            changed[name] = [kept.index(layer) for layer in value if layer in kept]
        elif isinstance(value, list | tuple) and len(value) == depth and (name in ENTRY_LISTS or "layer" in name):
            changed[name] = [value[layer] for layer in kept]
        elif name in PREFIXES and type(value) is int:
            changed[name] = sum(layer < value for layer in kept)
        elif name in SUFFIXES and type(value) is int:
            changed[name] = sum(layer >= depth - value for layer in kept)
        elif name == "per_layer_config" and isinstance(value, dict):
            changed[name] = {str(kept.index(int(layer))): v for layer, v in value.items() if int(layer) in kept}
    _name_sparse_layers(changed, fields, depth, kept)
    _renumber_backbone(changed, fields, depth, kept)
    for period, listed in PERIODS.items():
        if period in changed and changed.get(listed):
            del changed[period]
    return changed


def _name_sparse_layers(changed: dict[str, Any], fields: dict[str, Any], depth: int, kept: list[int]) -> None:
    """Qwen's mixtures: every `decoder_sparse_step`-th layer has experts, unless it is in `mlp_only_layers`."""
    step = fields.get("decoder_sparse_step")
    if not isinstance(step, int) or step <= 1:
        return
    dense = {*(fields.get("mlp_only_layers") or ()), *(i for i in range(depth) if (i + 1) % step)}
    changed["decoder_sparse_step"] = 1
    changed["mlp_only_layers"] = [new for new, old in enumerate(kept) if old in dense]


def _renumber_backbone(changed: dict[str, Any], fields: dict[str, Any], depth: int, kept: list[int]) -> None:
    """A vision model that serves others: stage k is what comes out of layer k - 1, stage 0 what goes in."""
    if len(fields.get("stage_names") or ()) != depth + 1:
        return
    changed["stage_names"] = fields["stage_names"][: len(kept) + 1]
    indices = fields.get("out_indices") or ()
    moved = [sum(layer < index % (depth + 1) for layer in kept) for index in indices]
    changed["out_indices"] = sorted(set(moved))
    changed["out_features"] = [changed["stage_names"][index] for index in changed["out_indices"]]


def renumber_names(content: Any, prefix: str, kept: list[int]) -> Any:
    """Lists of modules in a quantisation's settings, such as those left in 16 bits, for the kept layers."""
    if isinstance(content, dict):
        return {key: renumber_names(value, prefix, kept) for key, value in content.items()}
    if not isinstance(content, list):
        return content
    pattern = re.compile(rf"((?:model\.)?{re.escape(prefix)}\.)(\d+)(?=\.|$)")
    renumbered = []
    for item in content:
        match = pattern.match(item) if isinstance(item, str) else None
        if match is None:
            renumbered.append(item)
        elif int(match[2]) in kept:
            renumbered.append(f"{match[1]}{kept.index(int(match[2]))}{item[match.end() :]}")
    return renumbered
