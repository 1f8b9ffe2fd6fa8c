"""What should be said of something, as a row of tokens a record; and texts with such a row of each."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from mpruner_dist.data.blocks import TOKENIZE_AT_ONCE, Blocks, Ints, mask_of, padded


class Targets:
    """What should be said: token ids [records, tokens], int32, padded, and the length of each row, [records].

    A row begins with the token that a decoder begins with: what it is given is all but the last of a row, and what it
    should say all but the first.
    """

    target_ids: Ints
    target_lengths: Ints

    @property
    def prompt(self) -> int:
        """With so many tokens each row begins alike; they are given, never predicted."""
        return 1

    def target_mask(self) -> npt.NDArray[np.int64]:
        """1 for what the decoder is given of each row, 0 for padding."""
        return mask_of(self.target_lengths - 1, self.target_ids.shape[1] - 1)

    def target_rows(self, rows: list[int]) -> tuple[Ints, Ints]:
        """The given rows, padded only to the longest of them, and their lengths."""
        lengths = self.target_lengths[rows]
        return self.target_ids[rows, : int(lengths.max(initial=1))], lengths

    def target_tensors(self) -> dict[str, Ints]:
        """What is written to disk."""
        return {"target_ids": self.target_ids, "target_lengths": self.target_lengths}


@dataclass(frozen=True)
class Pairs(Blocks, Targets):
    """Token ids and lengths of what is read, as in Blocks, and the same of what should be said."""

    target_ids: Ints
    target_lengths: Ints

    def rows(self, rows: Iterable[int]) -> "Pairs":
        """The given pairs, in the given order, padded only to the longest of them."""
        chosen = list(rows)
        longest = int(self.lengths[chosen].max(initial=1))
        return Pairs(self.ids[chosen, :longest], self.lengths[chosen], *self.target_rows(chosen))

    def masks(self) -> list[npt.NDArray[np.int64]]:
        """Of the encoder's positions and the decoder's."""
        return [self.mask(), self.target_mask()]

    def tensors(self) -> dict[str, Ints]:
        """What is written to disk."""
        return super().tensors() | self.target_tensors()


def make_pairs(
    records: Iterable[tuple[str, str]],
    tokenizer: Any,
    longest: tuple[int, int],
    limit: int | None,
    pad: int,
    start: int,
) -> Pairs:
    """Tokenise at most `limit` pairs, with the special tokens of the model; what is too long is cut.

    Args:
        records: what is read, and what should be said.
        tokenizer: of the model.
        longest: tokens of either.
        limit: None takes all.
        pad: token that fills rows.
        start: token that a decoder begins with.
    """
    chosen = islice(records, limit)
    sources: list[list[int]] = []
    targets: list[list[int]] = []
    while some := list(islice(chosen, TOKENIZE_AT_ONCE)):
        options: dict[str, Any] = {"truncation": True, "verbose": False}
        sources += tokenizer([text for text, _ in some], max_length=longest[0], **options)["input_ids"]
        said = tokenizer(text_target=[text for _, text in some], max_length=longest[1], **options)["input_ids"]
        targets += [[start, *tokens] for tokens in said]
    ids, lengths = padded(sources, max(map(len, sources), default=1), pad)
    return Pairs(ids, lengths, *padded(targets, max(map(len, targets), default=1), pad))
