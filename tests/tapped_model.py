"""A small model whose blocks are tapped, samples of it, and what a tap makes of them.

Shape suffixes: N samples, D features, S states.
"""

from typing import Any

import torch
from torch import Tensor

from mpruner_dist.config import CollectConfig
from mpruner_dist.similarity.samples import Samples, draw_samples
from mpruner_dist.similarity.sums import Terms
from mpruner_dist.similarity.tap import BatchStatistics, LayerTap

WIDTH, LAYERS, SEQUENCES, TOKENS = 6, 4, 3, 20


def config(**changes: Any) -> CollectConfig:
    return CollectConfig(**{"samples": 16, "skip_tokens": 1, "outlier_norm": 10.0, "normalize": True} | changes)


class Block(torch.nn.Module):
    """A residual block that may spoil one token, may work in place, and may return a tuple as older families do."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.in_tuple = in_tuple
        self.spoil: tuple[int, float] | None = None

    def forward(self, hidden: Tensor) -> Any:
        hidden += self.linear(hidden).tanh()  # in place: what the block was given is gone afterwards
        if self.spoil is not None:
            token, factor = self.spoil
            hidden = hidden.clone()
            hidden.view(-1, WIDTH)[token] *= factor
        return (hidden, "cache") if self.in_tuple else hidden


class Model(torch.nn.Module):
    def __init__(self, in_tuple: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Block(in_tuple) for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """The S states."""
        states = [hidden.clone()]
        for layer in self.layers:
            hidden = states[-1].clone()
            made = layer(hidden)
            made = made[0] if isinstance(made, tuple) else made
            # what a block spoils stays its own: the next one goes on from clean states
            states.append(made.clone() if layer.spoil is None else hidden.clone())
        return states


def inputs(sequences: int = SEQUENCES) -> Tensor:
    return torch.randn(sequences, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


def at(positions: list[int]) -> Samples:
    """Tokens chosen by hand."""
    return Samples("token", torch.tensor(positions), torch.ones(SEQUENCES, TOKENS, dtype=torch.bool), 0)


def drawn(settings: CollectConfig) -> Samples:
    return draw_samples(torch.ones(SEQUENCES, TOKENS), settings, 5)


def tapped(model: Model, settings: CollectConfig, samples: Samples) -> Terms:
    tap = LayerTap(model.layers)
    statistics = BatchStatistics(5, samples, settings, LAYERS)
    tap.begin([statistics])
    with torch.no_grad():
        model(inputs())
    tap.close()
    return {name: value.numpy() for name, value in statistics.terms().items()}


def by_hand(model: Model, tokens: Tensor) -> list[Tensor]:
    """The vectors [N, D] of these tokens in each of the S states, float64, without any hook."""
    with torch.no_grad():
        return [state.reshape(-1, WIDTH)[tokens].double() for state in model(inputs())]


def unit_size(vectors: Tensor) -> Tensor:
    return vectors / (vectors**2).mean(1, keepdim=True).sqrt()
