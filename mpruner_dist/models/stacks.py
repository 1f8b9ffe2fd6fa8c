"""Where the stacks of blocks of any model live: by rule, from the model on the meta device and its configuration."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mpruner_dist.errors import UserError

DEPTH_NAME = re.compile(r"layer|depth|block")
Containers = (torch.nn.ModuleList, torch.nn.Sequential)


@dataclass(frozen=True)
class DepthField:
    """A field of a configuration that may say how deep a stack is: a number, or one entry of a list of stages."""

    name: str
    entry: int | None = None


@dataclass(frozen=True)
class Stack:
    """Blocks that stand one after another: the list `name` of a model, such as `model.decoder.layers`."""

    name: str
    depth: int
    config_path: tuple[str, ...]
    """Where in the model's configuration its own lies: empty, or such as ("text_config",)."""
    fields: tuple[DepthField, ...]
    """Fields with just its depth. Which of them is meant, only the model can tell."""


def find_stacks(model: Any) -> list[Stack]:
    """All stacks of a model, in the order of its modules.

    A stack is an outermost list of modules as long as a number that its configuration calls layers, blocks or depth;
    in a model of stages, whose configuration has one list of depths, the longest such list inside each stage.
    """
    stacks: list[Stack] = []
    stages: list[str] = []
    for name, module in model.named_modules():
        inside = [f"{stack.name}." for stack in stacks] + stages
        if not isinstance(module, Containers) or not len(module) or name.startswith(tuple(inside)):
            continue
        path, config = _config_of(model, name)
        fields = config.to_dict()
        by_stage = _stages(name, module, path, fields)
        if by_stage:
            stacks += by_stage
            stages.append(f"{name}.")
            continue
        same = tuple(
            DepthField(field)
            for field, value in fields.items()
            if type(value) is int and value == len(module) and DEPTH_NAME.search(field)
        )
        if same:
            stacks.append(Stack(name, len(module), path, same))
    return stacks


def choose_stacks(stacks: list[Stack], config: Any, keep: list[int] | dict[str, list[int]]) -> dict[Stack, list[int]]:
    """Which stack each list of kept layers is meant for.

    Args:
        stacks: all stacks of the model.
        config: the model's configuration.
        keep: layers of the only stack, or of the language model inside; or of several, by name or part of a name.

    Raises:
        UserError: a name that fits none or several, or no name where one is needed.
    """
    if not stacks:
        raise UserError(
            f"a model of type {config.model_type!r} has no list of blocks as long as its configuration says"
        )
    known = ", ".join(f"{stack.name} ({stack.depth})" for stack in stacks)
    if not isinstance(keep, dict):
        language = [s for s in stacks if s.config_path and s.config_path == _path_to(config, config.get_text_config())]
        depth = DepthField(config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
        plain = [s for s in stacks if not s.config_path and not config.is_encoder_decoder and depth in s.fields]
        main = next((found for found in (stacks, language, plain) if len(found) == 1), [])
        if len(main) != 1:
            raise UserError(
                f"a model of type {config.model_type!r} has several stacks: {known}; say which, such as "
                f"{stacks[0].name}=0-1"
            )
        return {main[0]: keep}
    chosen: dict[Stack, list[int]] = {}
    for name, layers in keep.items():
        exact = [stack for stack in stacks if stack.name == name]
        fits = exact or [stack for stack in stacks if f".{name}." in f".{stack.name}."]
        if len(fits) != 1:
            found = f"fits {', '.join(stack.name for stack in fits)}" if fits else "fits none"
            raise UserError(f"{name!r} {found}; the stacks are: {known}")
        if fits[0] in chosen:
            raise UserError(f"{fits[0].name} is given twice")
        chosen[fits[0]] = layers
    return chosen


def run_stacks(model: Any) -> list[Stack]:
    """The stacks whose layers a run counts from first to last, in the order in which they run.

    The only one; all stages of a vision model; an encoder and its decoder.

    Raises:
        UserError: several of another kind, such as a text and a vision model side by side.
    """
    stacks = find_stacks(model)
    of_stages = all(field.entry is not None for stack in stacks for field in stack.fields)
    if len(stacks) > 1 and (of_stages or _is_encoder_and_decoder(model, stacks)):
        return stacks
    return list(choose_stacks(stacks, model.config, []))


def run_blocks(model: Any) -> torch.nn.ModuleList:
    """The blocks of these stacks, one after another."""
    return torch.nn.ModuleList(block for stack in run_stacks(model) for block in model.get_submodule(stack.name))


def series_of_blocks(model: Any) -> list[torch.nn.ModuleList]:
    """The same in series, each with states at places of its own: those of an encoder, and those of a decoder.

    Of any other model all blocks are one series.
    """
    stacks = run_stacks(model)
    if _is_encoder_and_decoder(model, stacks):
        return [torch.nn.ModuleList(model.get_submodule(stack.name)) for stack in stacks]
    return [run_blocks(model)]


def config_at(config: Any, path: tuple[str, ...]) -> Any:
    """The configuration that lies at `path` in another."""
    for part in path:
        config = getattr(config, part)
    return config


def _is_encoder_and_decoder(model: Any, stacks: list[Stack]) -> bool:
    return bool(model.config.is_encoder_decoder) and len(stacks) == 2


def _config_of(model: Any, name: str) -> tuple[tuple[str, ...], Any]:
    """The configuration that made a module, and where it lies: that of the nearest model around it."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if config is not None and hasattr(config, "to_dict"):
            path = _path_to(model.config, config)
            if path is not None:
                return path, config_at(model.config, path)
    return (), model.config


def _path_to(config: Any, wanted: Any) -> tuple[str, ...] | None:
    """Where `wanted` lies in a configuration, or else, for it may be a copy, the first of its class."""
    path = _find(config, lambda other: other is wanted)
    return _find(config, lambda other: type(other) is type(wanted)) if path is None else path


def _find(config: Any, is_wanted: Callable[[Any], bool]) -> tuple[str, ...] | None:
    if is_wanted(config):
        return ()
    for part in getattr(config, "sub_configs", {}):
        below = getattr(config, part, None)
        found = None if below is None else _find(below, is_wanted)
        if found is not None:
            return (part, *found)
    return None


def _stages(name: str, module: Any, path: tuple[str, ...], fields: dict[str, Any]) -> list[Stack]:
    """The stacks inside the stages of a vision model, one for each."""
    for field, depths in fields.items():
        if not (field.startswith("depth") and isinstance(depths, list | tuple) and len(depths) == len(module)):
            continue
        stacks = []
        for entry, (depth, stage) in enumerate(zip(depths, module, strict=True)):
            lists = [
                (inner, child)
                for inner, child in stage.named_modules()
                if inner and isinstance(child, Containers) and len(child) == depth
            ]
            if lists:
                inner, _ = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
                stacks.append(Stack(f"{name}.{entry}.{inner}", depth, path, (DepthField(field, entry),)))
        return stacks
    return []
