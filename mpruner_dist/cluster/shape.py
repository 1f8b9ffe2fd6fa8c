"""How a model lies on the workers for forward passes: whole on each, in partitions, or in partitions in CPU memory."""

from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch

from mpruner_dist.cluster.control_group import memory_left
from mpruner_dist.errors import StageFailure

ROOM = 0.8
"""Share of the free memory that weights may take; the rest is for activations and what comes and goes."""
GATHERED_PARAMETERS = 1_000_000_000
"""At most so many are whole on a worker at once under ZeRO stage 3: DeepSpeed's own default."""


@dataclass(frozen=True)
class Shape:
    """A ZeRO stage for forward passes, whether partitions lie in CPU memory beside the GPU, and why."""

    stage: int
    offload: bool
    reason: str


def choose_shape(
    elements: Iterable[int], width: int, workers: int, free: int, free_beside: int | None, logits: int = 0
) -> Shape:
    """The quickest shape that fits.

    Args:
        elements: of each tensor of weights, how many it has.
        width: bytes of one.
        workers: their number.
        free: bytes of a worker's device that nobody uses, of the worker that has least.
        free_beside: bytes of CPU memory for a worker on a GPU; None for a worker on CPUs.
        logits: bytes that those of a batch take beside the weights.

    Raises:
        StageFailure: nothing fits.
    """
    elements = list(elements)
    weights = sum(elements) * width
    here, less = f"{_bytes(free)} are free for each worker", ""
    if logits:
        free -= logits
        here, less = f"{here}, {_bytes(logits)} of them for the logits of a batch", "a smaller evaluate.batch_size, "
    if weights <= ROOM * free and can_load(weights, workers, free_beside):
        return Shape(0, False, f"a replica on each worker: the weights take {_bytes(weights)}, {here}")
    part = -(-weights // workers)
    gathered = min(weights, GATHERED_PARAMETERS * width)
    needed = f"the weights take {_bytes(weights)}, a partition {_bytes(part)} and what is gathered {_bytes(gathered)}"
    if workers > 1 and part + gathered <= ROOM * free:
        return Shape(3, False, f"partitions (ZeRO stage 3): {needed}, {here}")
    # DeepSpeed pins each partition by itself, and torch rounds pinned memory up to a power of two
    pinned = sum(1 << (-(-number // workers) * width - 1).bit_length() for number in elements)
    if free_beside is not None and pinned <= ROOM * free_beside and gathered <= ROOM * free:
        needed += f"; pinned, a partition takes {_bytes(pinned)}"
        beside = f"{_bytes(free_beside)} of CPU memory"
        return Shape(3, True, f"partitions in CPU memory (ZeRO stage 3, offload_param): {needed}, {here} and {beside}")
    if free_beside is not None:
        here += f" and {_bytes(free_beside)} of CPU memory, where a partition would take {_bytes(pinned)}"
    raise StageFailure(
        f"the model does not fit: {needed}, {here}. Use {less}more workers or more memory, or name a DeepSpeed "
        "configuration with offload_param to nvme under cluster.deepspeed"
    )


def can_load(weights: int, workers: int, free_beside: int | None) -> bool:
    """Whether workers on GPUs have room for a replica each in the CPU memory through which they load it; see above."""
    return free_beside is None or workers == 1 or weights <= ROOM * free_beside


def require_room_to_load(weights: int, workers: int, free_beside: int | None) -> None:
    """Refuse replicas that would be killed while they are loaded.

    Raises:
        StageFailure: with the stage that loads each worker's part alone.
    """
    if not can_load(weights, workers, free_beside):
        raise StageFailure(
            f"each worker would load all weights, {_bytes(weights)}, through CPU memory, of which "
            f"{_bytes(free_beside or 0)} are free for it: set retrain.zero_stage 3, which divides them"
        )


def free_memory(device: torch.device, local_workers: int) -> tuple[int, int | None]:
    """Bytes free for this worker on its device; and for a GPU, in the machine's memory beside it."""
    free, left = int(psutil.virtual_memory().available), memory_left()
    beside = (free if left is None else min(free, left)) // local_workers
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], beside
    return beside, None


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
