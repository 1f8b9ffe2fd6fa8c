"""How well a language model predicts text: summed over all tokens on all workers, then divided once.

Shape suffixes: B sequences, T tokens, V words of the vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpruner_dist.cluster.worker import Worker
from mpruner_dist.data.blocks import Blocks, batch_rows, num_batches, share_of_batches
from mpruner_dist.errors import Fruitless

IGNORED = -100
"""In the place of a token that nothing must predict."""


@dataclass(frozen=True)
class TextScore:
    """What a text scores: means over its tokens."""

    nll: float
    """Negative log-likelihood, nats a token."""
    accuracy: float
    """Share of the tokens that were the likeliest."""
    tokens: int
    seconds: float
    """Of the slowest worker."""


def model_inputs(blocks: Blocks, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a decoder's forward for these blocks: ids and mask [B, T], int64."""
    return {
        "input_ids": torch.from_numpy(blocks.ids).long().to(device),
        "attention_mask": torch.from_numpy(blocks.mask()).to(device),
        "use_cache": False,
    }


def next_token_nll(logits_BTV: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Summed negative log-likelihood, float32, of every token after the first that is no padding; nothing waits for it.

    The last position is not cut off: of the logits that would be a copy, and another on the way back.
    """
    return torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), _targets(inputs).flatten(), ignore_index=IGNORED, reduction="sum"
    )


def token_nll(logits_BTV: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, int]:
    """`next_token_nll`, and the number of these tokens."""
    return next_token_nll(logits_BTV, inputs), int((_targets(inputs) != IGNORED).sum())


def token_hits(logits_BTV: Tensor, inputs: dict[str, Any]) -> int:
    """How many of the tokens that `token_nll` counts were the likeliest."""
    return int((logits_BTV.argmax(-1) == _targets(inputs)).sum())


def _targets(inputs: dict[str, Any]) -> Tensor:
    """The token after each [B, T], IGNORED where that is padding or there is none."""
    targets_BT: Tensor = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)[:, 1:]
    return torch.nn.functional.pad(targets_BT, (0, 1), value=IGNORED)


def score_text(
    worker: Worker, engine: Any, blocks: Blocks, batch_size: int, tell: Callable[[int], None] = lambda _: None
) -> TextScore:
    """Score blocks on all workers; the same on every worker. `tell` hears how many batches are done.

    Raises:
        Fruitless: the likelihood is not finite.
    """
    batches = num_batches(len(blocks), batch_size)
    mine, turns = share_of_batches(list(range(batches)), worker.rank, worker.world_size)
    sums = torch.zeros(3, dtype=torch.float64, device=worker.device)
    forward(worker, engine, blocks.rows([0]))  # warm-up, outside the time
    worker.barrier()
    begun = time.monotonic()
    for turn in range(turns):
        counted = turn < len(mine)  # else a turn taken only because ZeRO stage 3 needs everyone
        rows = blocks.rows(batch_rows(mine[turn] if counted else 0, batch_size, len(blocks)))
        logits, inputs = forward(worker, engine, rows)
        nll, tokens = token_nll(logits, inputs)
        if counted:
            score = [float(nll), float(tokens), float(token_hits(logits, inputs))]
            sums += torch.tensor(score, dtype=torch.float64, device=worker.device)
        tell(min((turn + 1) * worker.world_size, batches))
    worker.barrier()
    seconds = time.monotonic() - begun
    nll_sum, token_sum, hits = worker.sum_over_workers(sums).tolist()
    if not nll_sum < float("inf"):
        raise Fruitless("the model's loss on the text is not finite: try model.dtype float32 or bfloat16")
    return TextScore(nll_sum / token_sum, hits / token_sum, int(token_sum), seconds)


def forward(worker: Worker, engine: Any, blocks: Blocks) -> tuple[Tensor, dict[str, Any]]:
    """Logits [B, T, V] of these blocks, on this worker, and the inputs that they follow from."""
    inputs = model_inputs(blocks, worker.device)
    with torch.no_grad():
        return engine(**inputs).logits, inputs
