"""Configuration and skeleton of a model without some of its layers, proven layer by layer before a byte is copied."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpruner_dist.data.model_folder import CONFIG_ERRORS
from mpruner_dist.errors import NoneFits, UserError
from mpruner_dist.models.config_fields import STATES_OF_VISION, moved_state, shrink_fields
from mpruner_dist.models.loading import empty_model
from mpruner_dist.models.signature import Signature, differences, signatures
from mpruner_dist.models.stacks import DepthField, Stack, config_at, find_stacks, run_stacks
from mpruner_dist.plan import format_layers, nearest_matching
from mpruner_dist.runs.digest import digest

Kept = dict[Stack, list[int]]
CACHED = "decoder_layers"
"""Where transformers looks for the number of layers that a decoder caches."""
NEAREST_TRIES = 8  # one model on the meta device each


@dataclass(frozen=True)
class Skeleton:
    """A model without weights: what config.json says, as its own class completes it, and the modules that makes."""

    stored: dict[str, Any]
    config: Any
    model: Any


def shrink(whole: Skeleton, kept: Kept, trust_remote_code: bool = False) -> Skeleton:
    """The skeleton of the kept layers.

    Every block must be what its original was, everything else what it was.

    Raises:
        NoneFits: the configuration cannot say so; with what is wrong, and the nearest layers that could be kept.
    """
    try:
        return _shrink(whole, kept, trust_remote_code)
    except UserError as error:
        nearest = _nearest(whole, kept, trust_remote_code)
        raise NoneFits(f"{error}{nearest}") from None


def _shrink(whole: Skeleton, kept: Kept, trust_remote_code: bool) -> Skeleton:
    small = whole
    for stack, layers in kept.items():
        small = _shrink_stack(whole, small, stack, layers, trust_remote_code)
    _require_same(whole.model, small.model, kept)
    return _with_cache(small)


def _shrink_stack(
    whole: Skeleton, before: Skeleton, stack: Stack, layers: list[int], trust_remote_code: bool
) -> Skeleton:
    """One stack shorter: of the fields that may say its depth, the one that changes this stack and no other."""
    wanted = {other.name: len(before.model.get_submodule(other.name)) for other in find_stacks(whole.model)}
    wanted[stack.name] = len(layers)
    reasons = []
    for field in stack.fields:
        try:
            stored, config = _shrink_config(before, stack, field, layers)
            model = empty_model(config, trust_remote_code)
        except (UserError, *CONFIG_ERRORS) as error:
            reasons.append(f"{field.name}: {' '.join(str(error).split())}")
            continue
        found = {name: len(model.get_submodule(name)) for name in wanted}
        if found == wanted:
            return Skeleton(stored, config, model)
        reasons.append(f"{field.name} changes {', '.join(n for n in wanted if found[n] != wanted[n])} too")
    raise UserError(f"the configuration cannot say that {stack.name} keeps layers {layers}: {'; '.join(reasons)}")


def _shrink_config(before: Skeleton, stack: Stack, field: DepthField, layers: list[int]) -> tuple[dict[str, Any], Any]:
    """config.json for the kept layers, and what its class makes of it."""
    own = config_at(before.config, stack.config_path)
    full = own.to_dict()
    wanted = shrink_fields(full, stack.depth, field, layers)
    stored = copy.deepcopy(before.stored)
    node = stored
    for part in stack.config_path:
        node = node.setdefault(part, {})
    for name in [name for name in node if name in full and name not in wanted]:
        del node[name]
    node |= {name: value for name, value in wanted.items() if value != full[name]}
    for alias, name in own.attribute_map.items():
        if name == field.name and alias in node:  # where both are given transformers believes the alias
            node[alias] = len(layers)
    if stack.config_path[-1:] == ("vision_config",):
        _move_states_of_vision(stored, before.config, stack, layers)
    # What the class would now compute differently, because the file leaves it out, is written as the original had it.
    for _ in range(2):
        config = type(before.config).from_dict(copy.deepcopy(stored))
        made = config_at(config, stack.config_path).to_dict()
        lost = {name: value for name, value in wanted.items() if made.get(name) != value}
        if not lost:
            break
        node |= lost
    else:
        raise ValueError(f"it has no place for {', '.join(f'{name} = {value}' for name, value in lost.items())}")
    return stored, config


def _move_states_of_vision(stored: dict[str, Any], config: Any, stack: Stack, layers: list[int]) -> None:
    """Write into config.json which states of the shorter vision stack the language model is given."""
    above = config_at(config, stack.config_path[:-1])
    for part in stack.config_path[:-1]:
        stored = stored.setdefault(part, {})
    for name in STATES_OF_VISION:
        states = getattr(above, name, None)
        if isinstance(states, int):
            stored[name] = moved_state(states, stack.depth, layers)
        elif isinstance(states, list | tuple):
            stored[name] = [moved_state(state, stack.depth, layers) for state in states]


def _require_same(whole: Any, small: Any, kept: Kept) -> None:
    """Every block is what it was, and so is all that lies outside the stacks."""
    problems = []
    stacks = find_stacks(whole)
    for stack in stacks:
        layers = kept.get(stack, list(range(stack.depth)))
        around = whole.get_submodule(stack.name.rpartition(".")[0])
        if layers[0] != 0 and getattr(around, "conv", None) is not None:  # DeBERTa-v2 of its larger sizes
            problems.append(f"layer 0 of {stack.name} is the one behind which a convolution of its input is added")
        new_index = {old: new for new, old in enumerate(layers)}
        old, new = _signatures(whole, stack, new_index.get), _signatures(small, stack, lambda layer: layer)
        for layer, found in zip(layers, new, strict=True):
            wrong = differences(found, old[layer])
            if wrong:
                problems.append(f"layer {layer} of {stack.name} would become another: {'; '.join(wrong[:3])}")
    was, found = (
        {n: tuple(p.shape) for n, p in m.state_dict().items() if not _inside(n, stacks)} for m in (whole, small)
    )
    problems += [
        f"{name} would be {list(found.get(name, ()))}, is {list(was.get(name, ()))}"
        for name in sorted(was.keys() | found.keys())
        if was.get(name) != found.get(name)
    ]
    if problems:
        raise UserError(f"these layers cannot be left out by renaming: {' | '.join(problems[:3])}")


def _with_cache(small: Skeleton) -> Skeleton:
    """The same with room for every layer of a decoder in the cache of generation.

    transformers takes their number from a field that T5's family calls otherwise, and else from the encoder.

    Raises:
        UserError: it does not heed the field.
    """
    decoders = [stack for stack in find_stacks(small.model) if "decoder" in stack.name.split(".")]
    if not small.config.is_encoder_decoder or not decoders:
        return small
    depth = decoders[0].depth
    if _cached(small.config) == depth or (_cached(small.config) > depth and CACHED not in small.stored):
        return small
    stored = small.stored | {CACHED: depth}
    try:
        config = type(small.config).from_dict(copy.deepcopy(stored))
    except CONFIG_ERRORS as error:
        raise UserError(f"the configuration cannot say that generation caches {depth} layers: {error}") from error
    if _cached(config) != depth:
        raise UserError(
            f"transformers would cache {_cached(config)} layers in generation where {decoders[0].name} has {depth}: "
            "keep as many layers of the encoder as of the decoder"
        )
    return Skeleton(stored, config, small.model)


def _cached(config: Any) -> int:
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def _inside(name: str, stacks: list[Stack]) -> bool:
    return any(name.startswith(f"{stack.name}.") for stack in stacks)


def _signatures(model: Any, stack: Stack, renumbered: Callable[[int], int | None]) -> list[Signature]:
    return signatures(model.get_submodule(stack.name), renumbered)


def pattern_of_places(whole: Skeleton, trust_remote_code: bool = False) -> tuple[list[str], list[str]] | None:
    """The kind of each layer, and the kind that its class makes of each place; None where a layer keeps its kind.

    So it is with Swin, every second block of which shifts its windows: a layer that moves by one becomes another.
    """
    have: list[str] = []
    moves = False
    for stack in run_stacks(whole.model):
        kinds = [digest(facts) for facts in _signatures(whole.model, stack, lambda _: 0)]
        have += kinds
        if len(set(kinds)) == 1:
            continue
        small = _shrink_stack(whole, whole, stack, list(range(1, stack.depth)), trust_remote_code)
        moved = [digest(facts) for facts in _signatures(small.model, stack, lambda _: 0)]
        moves = moves or moved != kinds[1:]
    return (have, have) if moves else None


def _nearest(whole: Skeleton, kept: Kept, trust_remote_code: bool) -> str:
    """The layers nearest to those asked for that can be kept, in words; tried, not guessed."""
    if len(kept) != 1:
        return ""
    [(stack, layers)] = kept.items()
    have = [digest(facts) for facts in _signatures(whole.model, stack, lambda _: 0)]
    for count in range(len(layers), min(len(layers) + NEAREST_TRIES, stack.depth)):
        some = sorted([*layers, *[layer for layer in range(stack.depth) if layer not in layers]][:count])
        try:
            small = _shrink_stack(whole, whole, stack, some, trust_remote_code)
            need = [digest(facts) for facts in _signatures(small.model, stack, lambda _: 0)]
            found = nearest_matching(have, need, layers)
            if found is not None and found != layers:
                _shrink(whole, {stack: found}, trust_remote_code)
                return f". The nearest that can be kept: {format_layers(found)}"
        except UserError:
            continue
    return ""
