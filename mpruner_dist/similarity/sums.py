"""The mergeable statistic: named terms of every batch, all of them additive. No torch, no processes.

Merging is a union of batches, and every reduction adds them in the order of their ids: whoever computed which batch,
and however often the work was interrupted, the result is the same to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.runs.commit import write_bytes

Floats = npt.NDArray[np.float64]
Terms = dict[str, Floats]
Value = TypeVar("Value")
BATCH_IDS = "batches"  # the one tensor of a file that is not a term


def join_series(series: list[dict[str, Value]]) -> dict[str, Value]:
    """The terms of several series of blocks, each compared within itself only, under names that tell them apart.

    Those of a single series keep their names.
    """
    if len(series) == 1:
        return series[0]
    return {f"{number}.{name}": value for number, terms in enumerate(series) for name, value in terms.items()}


def split_series(terms: Terms) -> list[Terms]:
    """The terms of each series, as before `join_series`."""
    split: dict[str, Terms] = {}
    for name, value in terms.items():
        number, _, rest = name.partition(".")
        if number.isdecimal():
            split.setdefault(number, {})[rest] = value
    return [split[number] for number in sorted(split, key=int)] or [terms]


@dataclass
class BatchSums:
    """Per batch: its terms by name, float64. Every batch has the same names and shapes."""

    terms: dict[int, Terms] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.terms)

    def update(self, batch: int, terms: Terms) -> None:
        """Add a batch.

        Raises:
            ValueError: it is there already, or a term is not finite.
        """
        if batch in self.terms:
            raise ValueError(f"batch {batch} is counted already")
        strange = [name for name, value in terms.items() if not np.isfinite(value).all()]
        if strange:
            raise ValueError(f"batch {batch}: {strange[0]} is not finite")
        self.terms[batch] = {name: np.asarray(value, np.float64) for name, value in terms.items()}

    def merge(self, other: Self) -> None:
        """Add the batches of another.

        Raises:
            ValueError: a batch is in both.
        """
        for batch, terms in other.terms.items():
            self.update(batch, terms)

    def before(self, end: int) -> Self:
        """The batches with ids below `end`."""
        return type(self)({batch: terms for batch, terms in self.terms.items() if batch < end})

    def total(self) -> Terms:
        """Sums over the batches, added one after another in the order of their ids."""
        total: Terms = {}
        for batch in sorted(self.terms):
            for name, value in self.terms[batch].items():
                total[name] = total[name] + value if name in total else value.copy()
        return total

    def jackknife(self, function: Callable[[Terms], Floats]) -> Floats | None:
        """Standard error of `function(total)` from leaving out one batch after another; None for a single batch.

        Tukey's delete-one jackknife: sqrt((B - 1) / B sum_b (f_b - mean f)^2).

        Raises:
            StageFailure: the function has no value without one of the batches.
        """
        count = len(self.terms)
        if count < 2:
            return None
        total = self.total()
        try:
            left_out = [
                function({name: total[name] - value for name, value in self.terms[batch].items()})
                for batch in sorted(self.terms)
            ]
        except StageFailure as error:
            raise StageFailure(f"too few batches for standard errors; with one of them left out {error}") from error
        spread = np.stack(left_out) - np.mean(left_out, 0)
        return np.asarray(np.sqrt((count - 1) / count * (spread**2).sum(0)))

    def save(self, folder: Path) -> None:
        """Write to a file of its own, named by its first batch: no two files of a folder hold the same batch."""
        batches = sorted(self.terms)
        names = self.terms[batches[0]]
        tensors = {name: np.stack([self.terms[batch][name] for batch in batches]) for name in names}
        tensors[BATCH_IDS] = np.array(batches, np.int64)
        write_bytes(folder / f"from-{batches[0]:08d}.safetensors", save(tensors))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Merge all files of a folder; empty if there are none.

        Raises:
            UserError: a file is damaged or repeats a batch.
        """
        sums = cls()
        for path in sorted(folder.glob("from-*.safetensors")):
            try:
                tensors = load_file(path)
                for index, batch in enumerate(tensors.pop(BATCH_IDS)):
                    sums.update(int(batch), {name: stacked[index] for name, stacked in tensors.items()})
            except Exception as error:
                raise UserError(
                    f"the saved sums {path} are damaged ({error}): delete that file and run again"
                ) from error
        return sums
