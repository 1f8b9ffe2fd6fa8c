"""Records to blocks of tokens, and blocks to batches with global ids."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Item = TypeVar("Item")
TOKENIZE_AT_ONCE = 256  # records handed to the tokenizer together


@dataclass(frozen=True)
class Blocks:
    """Token ids [blocks, tokens], int32, and how many of each block are text, [blocks]. The rest is padding."""

    ids: Ints
    lengths: Ints

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, rows: Iterable[int]) -> "Blocks":
        """The given blocks, in the given order."""
        chosen = list(rows)
        return Blocks(self.ids[chosen], self.lengths[chosen])

    def mask(self) -> npt.NDArray[np.int64]:
        """Attention mask [blocks, tokens]: 1 for text, 0 for padding."""
        return mask_of(self.lengths, self.ids.shape[1])

    def masks(self) -> list[npt.NDArray[np.int64]]:
        """The one mask."""
        return [self.mask()]

    def tensors(self) -> dict[str, Ints]:
        """What is written to disk."""
        return {"input_ids": self.ids, "lengths": self.lengths}


def mask_of(lengths: Ints, width: int) -> npt.NDArray[np.int64]:
    """1 for the first so many of `width` places of each row, 0 for the others."""
    return (np.arange(width) < lengths[:, None]).astype(np.int64)


def make_blocks(
    records: Iterable[str],
    tokenizer: Any,
    block_size: int,
    pack: bool,
    separator: str | None,
    limit: int | None,
) -> Blocks:
    """Tokenise records into at most `limit` blocks of `block_size`; reads no more records than it needs.

    Packed, the records run on, and the last, unfilled block is left out. Not packed, each record is cut to one block
    and padded on the right. Where the tokenizer begins a text with a token of its own, each block begins with it: some
    models, such as Gemma, are lost without.
    """
    first = _first(tokenizer)
    room = block_size - len(first)
    rows = _token_rows(records, tokenizer, separator if pack else "")
    if pack:
        made = islice(_packed(rows, room), limit)
    else:
        made = islice((tokens[:room] for tokens in rows if len(tokens) >= 2), limit)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    return Blocks(*padded([np.concatenate([first, tokens]) for tokens in made], block_size, pad))


def _first(tokenizer: Any) -> Ints:
    """The tokens before every text, of one or none."""
    begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return np.array([tokenizer.bos_token_id] if begins else [], np.int32)


def padded(rows: Sequence[list[int] | Ints], width: int, pad: int) -> tuple[Ints, Ints]:
    """Token ids [rows, width], padded on the right, and the length of each row."""
    ids = np.full((len(rows), width), pad, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids, np.array([len(tokens) for tokens in rows], np.int32)


def _token_rows(records: Iterable[str], tokenizer: Any, separator: str | None) -> Iterator[Ints]:
    end = [tokenizer.eos_token_id] if separator is None and tokenizer.eos_token_id is not None else []
    iterator = iter(records)
    while texts := list(islice(iterator, TOKENIZE_AT_ONCE)):
        encoded = tokenizer([text + (separator or "") for text in texts], add_special_tokens=False, verbose=False)
        for tokens in encoded["input_ids"]:
            yield np.array(tokens + end, np.int32)


def _packed(rows: Iterable[Ints], block_size: int) -> Iterator[Ints]:
    rest = np.array([], np.int32)
    for tokens in rows:
        run = np.concatenate([rest, tokens])
        whole = len(run) - len(run) % block_size
        yield from run[:whole].reshape(-1, block_size)
        rest = run[whole:]


def batch_rows(batch: int, batch_size: int, num_blocks: int) -> range:
    """Blocks of the batch with this global id: fixed by the data alone, whoever computes it."""
    return range(batch * batch_size, min((batch + 1) * batch_size, num_blocks))


def num_batches(num_blocks: int, batch_size: int) -> int:
    """Batches that cover so many blocks; the last may be smaller."""
    return -(-num_blocks // batch_size)


def turns_of(items: Sequence[Item], rank: int, world_size: int) -> Iterator[tuple[Item, bool]]:
    """A worker's items, each with whether it counts: under ZeRO stage 3 all workers must take equally many turns.

    One with fewer items than turns takes the first of all once more, and leaves the result out.
    """
    for first in range(0, len(items), world_size):
        counts = first + rank < len(items)
        yield items[first + rank if counts else 0], counts
