"""A teacher's likeliest words of every training block, on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from mpruner_dist.cluster.worker import Worker
from mpruner_dist.data.blocks import Blocks, turns_of
from mpruner_dist.retraining.losses import Answer, LikelyWords
from mpruner_dist.runs.commit import disk_errors, write_bytes
from mpruner_dist.tasks import Task

CHUNK = 32
"""Blocks in a file: with 2048 tokens a block and 64 words, 34 MB."""


class WordsOnDisk:
    """Files of a folder, each with `CHUNK` of the blocks that training will use; there whole, or not there."""

    def __init__(self, folder: Path, blocks: list[int]) -> None:
        """`blocks`: training blocks, ascending: the same for as long as the folder is used."""
        self.folder, self.blocks = folder, blocks
        self._place = {block: divmod(index, CHUNK) for index, block in enumerate(blocks)}

    @property
    def chunks(self) -> int:
        """How many files there are once all are written."""
        return -(-len(self.blocks) // CHUNK)

    def rows(self, chunk: int) -> list[int]:
        """Training blocks in a file."""
        return self.blocks[chunk * CHUNK : (chunk + 1) * CHUNK]

    def is_missing(self, chunk: int) -> bool:
        """Whether no earlier attempt has written this file."""
        return not self._path(chunk).exists()

    def write(self, chunk: int, likely: LikelyWords) -> None:
        """Write a file whole or not at all.

        Raises:
            StageFailure: the disk is full.
        """
        tensors = {"words": likely.words_BTK.int(), "log_probs": likely.log_probs_BTK1.float()}
        with disk_errors(self.folder):
            write_bytes(self._path(chunk), save({name: value.cpu().contiguous() for name, value in tensors.items()}))

    def read(self, rows: list[int], device: torch.device) -> LikelyWords:
        """Those of training blocks, [blocks, tokens, ...]."""
        found: dict[str, list[torch.Tensor]] = {"words": [], "log_probs": []}
        for row in rows:
            chunk, index = self._place[row]
            with safe_open(self._path(chunk), "pt") as file:
                for name, values in found.items():
                    values.append(file.get_slice(name)[index : index + 1])
        words, log_probs = (torch.cat(values).to(device) for values in found.values())
        return LikelyWords(words.long(), log_probs)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"words-{chunk:06d}.safetensors"


def write_likely_words(
    worker: Worker,
    teacher: Callable[[list[int], dict[str, Any]], Answer],
    task: Task[Any],
    blocks: Blocks,
    words: WordsOnDisk,
    missing: list[int],
    at_once: int,
) -> None:
    """Ask the teacher for all missing files; the workers divide them among themselves.

    Args:
        worker: this one.
        teacher: answers with likely words; under ZeRO-3 all workers must ask equally often.
        task: that both do.
        blocks: all training blocks.
        words: where the answers go.
        missing: files to write, the same on all workers.
        at_once: blocks in a forward pass.
    """
    passes = -(-min(CHUNK, len(words.blocks)) // at_once)
    worker.begin_progress("teacher", "files", words.chunks, words.chunks - len(missing))
    for turn, (chunk, counts) in enumerate(turns_of(missing, worker.rank, worker.world_size)):
        rows = words.rows(chunk)
        answers = []
        for index in range(passes):
            some = rows[index * at_once : (index + 1) * at_once]
            asked = some or rows[:1]  # the last file is shorter than the others
            likely = teacher(asked, task.batch(blocks.rows(asked), worker.device).inputs).likely
            if some and likely is not None:
                answers.append(likely)
        if counts:
            words.write(chunk, LikelyWords(
                torch.cat([answer.words_BTK.cpu() for answer in answers]),
                torch.cat([answer.log_probs_BTK1.cpu() for answer in answers]),
            ))  # fmt: skip
        worker.tell(min(words.chunks - len(missing) + (turn + 1) * worker.world_size, words.chunks))
        if worker.must_stop():
            worker.stop("what the teacher said so far is saved")
    worker.barrier()  # everyone has written
