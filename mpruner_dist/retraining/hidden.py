"""Hidden states after the blocks of a model, taken while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from mpruner_dist.models.blocks import hidden_states_of


class HiddenStates:
    """Hooks on blocks; what they return is kept while `recording`.

    Outside it they keep nothing: activation checkpointing runs blocks again on the way back.
    """

    def __init__(self, blocks: torch.nn.ModuleList, layers: list[int]) -> None:
        self.layers = layers
        self._states: dict[int, torch.Tensor] | None = None
        for layer in layers:
            blocks[layer].register_forward_hook(partial(self._keep, layer))

    def _keep(self, layer: int, _: torch.nn.Module, args: Any, output: Any) -> None:
        if self._states is not None:
            states = hidden_states_of(output)
            # convolutions have the width before the places
            self._states[layer] = states.flatten(2).transpose(1, 2) if states.dim() == 4 else states

    @contextmanager
    def recording(self) -> Iterator[list[torch.Tensor]]:
        """A list that is filled when the block ends: the states after each layer, [batch, tokens, width]."""
        taken: list[torch.Tensor] = []
        self._states = {}
        try:
            yield taken
            taken += [self._states[layer] for layer in self.layers]
        finally:
            self._states = None


def logits_and_states(
    engine: Any, inputs: dict[str, Any], hidden: HiddenStates | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [batch, tokens, vocabulary] of an engine, and the hidden states if any are wanted."""
    if hidden is None:
        return engine(**inputs).logits, []
    with hidden.recording() as states:
        logits = engine(**inputs).logits
    return logits, states
