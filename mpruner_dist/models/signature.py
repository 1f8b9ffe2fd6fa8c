"""What a block is, apart from its weights: two blocks of one signature compute the same from the same tensors.

A renumbered block may become another: with a window, without positions, with experts, with a scale of its own. All
that a block was made with lies in its modules: their classes, plain attributes, shapes and buffers.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

TRAINING_ONLY = re.compile(r"training$|dropout|drop_prob|drop_path|gradient_checkpointing|layerdrop")
INDEX = re.compile(r"(layer|block)_?(idx|id|index|number)$")
"""Attributes that hold the index of a layer: the block's own, or of one that it takes something from."""
FIRST_ONLY = re.compile(r"relative_attention_bias")
"""What the first block of a stack has for all of them (T5): it moves to the block that is first afterwards."""

Signature = dict[str, Any]


def signatures(
    blocks: Sequence[torch.nn.Module], renumbered: Callable[[int], int | None] = lambda layer: layer
) -> list[Signature]:
    """The signature of every block of a stack; see `signature`."""
    return [signature(block, len(blocks), renumbered) for block in blocks]


def signature(block: torch.nn.Module, depth: int, renumbered: Callable[[int], int | None]) -> Signature:
    """Everything that tells one block from another, by name.

    Args:
        block: its parameters may lie on the meta device.
        depth: of its stack: a list as long is one of the kinds of all layers, which some families keep in each.
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
            if isinstance(value, list | tuple) and len(value) == depth and "layer" in name:
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
        f"{name} would be {_short(found.get(name, 'absent'))}, was {_short(asked.get(name, 'absent'))}"
        for name in sorted(found.keys() | asked.keys(), key=lambda name: (name.count("."), name))
        if found.get(name) != asked.get(name)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:76]} ..."


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _buffer(buffer: torch.Tensor) -> str:
    shape = f"{buffer.dtype} {list(buffer.shape)}"
    if buffer.is_meta:
        return shape
    values = buffer.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{shape} {hashlib.sha256(values).hexdigest()[:16]}"
