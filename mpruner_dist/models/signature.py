"""What a block is, apart from its weights: two blocks of one signature compute the same from the same tensors.

A renumbered block may become another: with a window, without positions, with experts, with a scale of its own. All
that a block was made with lies in its modules: their classes, plain attributes, shapes and buffers.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from mpruner_dist.runs.digest import digest

TRAINING_ONLY = re.compile(r"training$|dropout|drop_prob|drop_path|gradient_checkpointing|layerdrop")
INDEX = re.compile(r"(layer|block)_?(idx|id|index|number)$")
"""Attributes that hold the index of a layer: the block's own, or of one that it takes something from."""
FIRST_ONLY = re.compile(r"relative_attention_bias")
"""What the first block of a stack has for all of them (T5): it moves to the block that is first afterwards."""

Signature = dict[str, Any]


def signature(block: torch.nn.Module, renumbered: Callable[[int], int | None] = lambda layer: layer) -> Signature:
    """Everything that tells one block from another, by name.

    Args:
        block: its parameters may lie on the meta device.
        renumbered: what a layer is called afterwards; None if it is gone.
    """
    facts: Signature = {}
    for path, module in block.named_modules():
        if FIRST_ONLY.search(path) or TRAINING_ONLY.search(path):
            continue
        where = f"{path}." if path else ""
        facts[f"{where}class"] = type(module).__name__
        for name, value in vars(module).items():
            if name.startswith("_") or TRAINING_ONLY.search(name) or FIRST_ONLY.search(name) or not _is_plain(value):
                continue
            is_index = INDEX.search(name) and type(value) is int
            facts[f"{where}{name}"] = renumbered(value) if is_index else value
        for name, parameter in module.named_parameters(recurse=False):
            facts[f"{where}{name}"] = f"{parameter.dtype} {list(parameter.shape)}"
        for name, buffer in module.named_buffers(recurse=False):
            facts[f"{where}{name}"] = _buffer(buffer)
    return facts


def differences(found: Signature, asked: Signature) -> list[str]:
    """In words; empty for equal signatures."""
    return [
        f"{name} would be {found.get(name, 'absent')}, was {asked.get(name, 'absent')}"
        for name in sorted(found.keys() | asked.keys(), key=lambda name: (name.count("."), name))
        if found.get(name) != asked.get(name)
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _buffer(buffer: torch.Tensor) -> str:
    shape = f"{buffer.dtype} {list(buffer.shape)}"
    return shape if buffer.is_meta else f"{shape} {digest(buffer.double().flatten().tolist())[:8]}"
