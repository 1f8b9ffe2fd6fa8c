"""What a checkpoint calls the blocks of its model."""

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from mpruner_dist.checkpoints.naming import layer_of
from mpruner_dist.errors import UserError
from mpruner_dist.models.loading import empty_model
from mpruner_dist.models.stacks import Stack, choose_stacks, find_stacks, run_stacks


def model_names(model: Any, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """For each tensor of a checkpoint the name that transformers gives it, and how it merges or splits it, if it does.

    Families rename, and older files leave out the model's own prefix or have it in excess.
    """
    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if change not in converters]
    state, renamed = model.state_dict(), {}
    for name in names:
        key, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state and name in state:  # saved under the name it has now
            key, converter = name, None
        renamed[name] = key, converter
    return renamed


def block_prefix(names: Iterable[str], config: Any, trust_remote_code: bool = False) -> str:
    """`stack_prefix` of a language model's only stack.

    Raises:
        UserError: several stacks, or names that have not all blocks.
    """
    model = empty_model(config, trust_remote_code)
    [stack] = choose_stacks(find_stacks(model), config, [])
    return stack_prefix(model, stack, names)


def layer_names(names: Iterable[str], config: Any, trust_remote_code: bool = False) -> dict[str, list[str]]:
    """What a checkpoint calls the layers that a run counts, such as `model.layers.0`, by the stack that they are in.

    Raises:
        UserError: as `run_stacks` and `stack_prefix`.
    """
    model, names = empty_model(config, trust_remote_code), list(names)
    found = {}
    for stack in run_stacks(model):
        prefix = stack_prefix(model, stack, names)
        found[stack.name] = [f"{prefix}.{layer}" for layer in range(stack.depth)]
    return found


def stack_prefix(model: Any, stack: Stack, names: Iterable[str]) -> str:
    """What the names of a stack's tensors begin with in a checkpoint, such as `model.layers`.

    Other stacks, whose names may look the same to a pattern, are told apart by the model itself.

    Raises:
        UserError: the names have not every block of the stack, or no prefix in common.
    """
    mapped = {name: key for name, (key, _) in model_names(model, names).items()}
    prefixes: set[str] | None = None
    for name, key in mapped.items():
        layer = layer_of(key, stack.name)
        if layer is None:
            continue
        parts = name.split(".")
        candidates = {".".join(parts[:i]) for i, part in enumerate(parts) if part == str(layer)}
        prefixes = candidates if prefixes is None else prefixes & candidates
    if not prefixes:
        raise UserError(
            f"no tensor of the checkpoint is named as {type(model).__name__} names its blocks, {stack.name}.N.*: "
            "where it was trained under other names, export it in Hugging Face's first"
        )
    # of a first stage of one block, `stages.0.layers.0.*`, the number of the stage would do as well
    outside = [name for name, key in mapped.items() if layer_of(key, stack.name) is None]
    strict = {prefix for prefix in prefixes if all(layer_of(name, prefix) is None for name in outside)}
    prefix = min(strict or prefixes, key=len)
    layers = {layer for name in mapped if (layer := layer_of(name, prefix)) is not None}
    if not layers >= set(range(stack.depth)):
        lacking = sorted(set(range(stack.depth)) - layers)
        raise UserError(
            f"the configuration asks for {stack.depth} layers, the tensors {prefix}.N.* lack layers {lacking}: "
            "fetch the checkpoint again, or correct the number in config.json"
        )
    return prefix
