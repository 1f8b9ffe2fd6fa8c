"""The configuration of a model with fewer layers: which fields go with the blocks."""

import copy
import re
from typing import Any

from mpruner_dist.models.stacks import DepthField

INDEX_LISTS = (
    "mlp_only_layers", "moe_layers", "hybrid_layer_ids", "cross_attention_layers", "full_attn_idxs",
    "deepstack_visual_indexes", "attn_layer_indices", "global_attention_layers", "kv_source_layers",
    "fullatt_block_indexes",
)  # fmt: skip
"""Lists and tables that name layers by their index."""
ENTRY_LISTS = ("intermediate_size", "activation_sparsity_pattern", "no_rope_layers")
"""Lists with one entry a layer whose names do not say so; of the others, those with `layer` in the name have one."""
STATE_LISTS = ("intermediate_layers_indices",)
"""Lists of hidden states that are handed on, counted from what goes into the first layer."""
STATES_OF_VISION = ("vision_feature_layer", "vision_feature_layers")
"""Beside the configuration of a vision stack: the hidden state, or states, that go into the language model."""
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
    _renumber_states(changed, fields, depth, kept)
    for period, listed in PERIODS.items():
        if period in changed and changed.get(listed):
            del changed[period]
    return changed


def moved_state(state: int, depth: int, kept: list[int]) -> int:
    """The hidden state at the same place between the kept layers; one counted from the end stays counted so."""
    moved = sum(layer < state % (depth + 1) for layer in kept)
    return moved - len(kept) - 1 if state < 0 else moved


def _name_sparse_layers(changed: dict[str, Any], fields: dict[str, Any], depth: int, kept: list[int]) -> None:
    """Qwen's mixtures: every `decoder_sparse_step`-th layer has experts, unless it is in `mlp_only_layers`."""
    step = fields.get("decoder_sparse_step")
    if not isinstance(step, int) or step <= 1 or "mlp_only_layers" not in fields:  # Switch has only the step
        return
    dense = {*(fields.get("mlp_only_layers") or ()), *(i for i in range(depth) if (i + 1) % step)}
    changed["decoder_sparse_step"] = 1
    changed["mlp_only_layers"] = [new for new, old in enumerate(kept) if old in dense]


def _renumber_states(changed: dict[str, Any], fields: dict[str, Any], depth: int, kept: list[int]) -> None:
    """A vision model that serves others: stage k is what comes out of layer k - 1, stage 0 what goes in."""
    for name in STATE_LISTS:
        if fields.get(name):
            changed[name] = [moved_state(state, depth, kept) for state in fields[name]]
    if len(fields.get("stage_names") or ()) != depth + 1:
        return
    changed["stage_names"] = fields["stage_names"][: len(kept) + 1]
    indices = fields.get("out_indices") or ()
    moved = [moved_state(index % (depth + 1), depth, kept) for index in indices]
    changed["out_indices"] = sorted(set(moved))
    changed["out_features"] = [changed["stage_names"][index] for index in changed["out_indices"]]


def renumber_names(content: Any, prefix: str, depth: int, kept: list[int], keep_next: bool = True) -> Any:
    """Modules named in a quantisation's settings, such as those left in 16 bits, for the kept layers.

    Args:
        content: the settings; names stand in lists, or as keys.
        prefix: of the layers' names.
        depth: how many there were.
        kept: layers, ascending.
        keep_next: whether layers behind the last, which predict further tokens, stay too.
    """
    pattern = re.compile(rf"((?:model\.)?{re.escape(prefix)}\.)(\d+)(?=\.|$)")

    def renamed(name: Any) -> list[Any]:
        match = pattern.match(name) if isinstance(name, str) else None
        if match is None:
            return [renumber_names(name, prefix, depth, kept, keep_next)]
        layer = int(match[2])
        if layer >= depth and keep_next:
            return [f"{match[1]}{len(kept) + layer - depth}{name[match.end() :]}"]
        return [f"{match[1]}{kept.index(layer)}{name[match.end() :]}"] if layer in kept else []

    if isinstance(content, dict):
        return {
            new: renumber_names(value, prefix, depth, kept, keep_next)
            for key, value in content.items()
            for new in renamed(key)
        }
    return [new for item in content for new in renamed(item)] if isinstance(content, list) else content
