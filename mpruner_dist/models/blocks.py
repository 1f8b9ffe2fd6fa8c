"""What goes into and comes out of the blocks of a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D


def normalisations(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Batch normalisations: while they train, they gather running means and variances of what they see."""
    return [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]


def hidden_states_of(output: Any) -> torch.Tensor:
    """The hidden states [batch, tokens, width] in a block's output: some families return them in a tuple."""
    hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hidden


def input_states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states [batch, tokens, width] that a block was called with."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def projections(block: torch.nn.Module) -> list[str]:
    """Names of a block's matrices that multiply the states: linear layers, GPT-2's transposed ones too."""
    return [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]


def activations_per_token(block: torch.nn.Module) -> int:
    """Numbers that a forward pass of the block makes of one token: the widths of all its matrices, and the states.

    An upper bound where not all lie in memory at once, and of a mixture of experts by far; attention without a score
    matrix in memory.
    """
    shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in block.parameters()]
    widths = [max(shape) for shape in shapes if len(shape) > 1]
    return sum(widths) + 4 * max(widths, default=0)


def plain_blocks(blocks: torch.nn.ModuleList, forward: Callable[[], Any]) -> set[int]:
    """Blocks that return nothing but hidden states: learnt from what they return in one forward pass."""
    plain: set[int] = set()

    def look(layer: int) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, torch.Tensor):
                plain.add(layer)

        return hook

    hooks = [block.register_forward_hook(look(layer)) for layer, block in enumerate(blocks)]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return plain


@contextmanager
def skipped(blocks: torch.nn.ModuleList, layers: list[int], plain: set[int] | None = None) -> Iterator[None]:
    """Inside, the given blocks pass their input on as if they were not there.

    Those in `plain` are not computed. Every other still computes, so that this holds for any family whatever its block
    returns besides the hidden states.
    """

    def pass_on(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = input_states_of(args, kwargs)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    def hand_on(*args: Any, **kwargs: Any) -> torch.Tensor:
        return input_states_of(args, kwargs)

    without = [layer for layer in layers if layer in (plain or set())]
    hooks = [blocks[layer].register_forward_hook(pass_on, with_kwargs=True) for layer in layers if layer not in without]
    for layer in without:
        blocks[layer].forward = hand_on  # in the place of its class's
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in without:
            del blocks[layer].forward
