"""The mergeable statistic: HSIC of all pairs of layers, per batch. No torch, no processes.

Merging is a union of batches, and every reduction adds them in the order of their ids: whoever computed which batch,
and however often the work was interrupted, the result is the same to the last bit.

Shape suffixes: L layers, B batches.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.runs.commit import write_bytes

Floats = npt.NDArray[np.float64]


@dataclass
class HsicSums:
    """Per batch: the unbiased HSIC [L, L] in float64, and how many samples it was made of."""

    hsic: dict[int, Floats] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)

    def update(self, batch: int, hsic_LL: Floats, num_samples: int) -> None:
        """Add a batch.

        Raises:
            ValueError: it is there already.
        """
        if batch in self.hsic:
            raise ValueError(f"batch {batch} is counted already")
        self.hsic[batch] = np.asarray(hsic_LL, np.float64)
        self.samples[batch] = num_samples

    def merge(self, other: Self) -> None:
        """Add the batches of another.

        Raises:
            ValueError: a batch is in both.
        """
        for batch, hsic_LL in other.hsic.items():
            self.update(batch, hsic_LL, other.samples[batch])

    def stacked(self) -> Floats:
        """HSIC [B, L, L] in the order of the batch ids."""
        return np.stack([self.hsic[batch] for batch in sorted(self.hsic)])

    def total(self) -> Floats:
        """Sum [L, L] over the batches, added one after another in the order of their ids."""
        stacked_BLL = self.stacked()
        total_LL: Floats = np.zeros_like(stacked_BLL[0])
        for hsic_LL in stacked_BLL:
            total_LL += hsic_LL
        return total_LL

    def cka(self) -> Floats:
        """Minibatch CKA [L, L]: Nguyen, Raghu & Kornblith 2021 (arXiv 2010.15327), equation 3.

        Raises:
            StageFailure: the HSIC of some layer with itself is not positive.
        """
        return cka_of(self.total())

    def stderr(self) -> Floats:
        """Jackknife standard error [L, L] of the CKA over batches; zeros for a single batch, which has no spread."""
        stacked_BLL = self.stacked()
        count = len(stacked_BLL)
        if count < 2:
            return np.zeros_like(stacked_BLL[0])
        try:
            without_BLL = np.stack([cka_of(rest_LL) for rest_LL in self.total() - stacked_BLL])
        except StageFailure as error:
            raise StageFailure(f"too few batches for standard errors; with one of them left out {error}") from error
        spread_BLL = without_BLL - without_BLL.mean(0)
        return np.asarray(np.sqrt((count - 1) / count * (spread_BLL**2).sum(0)))

    def save(self, folder: Path) -> None:
        """Write to a file of its own, named by its first batch: no two files of a folder hold the same batch."""
        batches = sorted(self.hsic)
        tensors = {
            "batches": np.array(batches, np.int64),
            "samples": np.array([self.samples[batch] for batch in batches], np.int64),
            "hsic": self.stacked(),
        }
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
                for batch, num_samples, hsic_LL in zip(
                    tensors["batches"], tensors["samples"], tensors["hsic"], strict=True
                ):
                    sums.update(int(batch), hsic_LL, int(num_samples))
            except Exception as error:
                raise UserError(
                    f"the saved sums {path} are damaged ({error}): delete that file and run again"
                ) from error
        return sums


def cka_of(hsic_LL: Floats) -> Floats:
    """CKA [L, L] of summed HSIC [L, L].

    Raises:
        StageFailure: the HSIC of some layer with itself is not positive.
    """
    scale_L = np.diagonal(hsic_LL)
    bad = [layer for layer in range(len(scale_L)) if not scale_L[layer] > 0]
    if bad:
        raise StageFailure(
            f"the HSIC of layer {bad[0]} with itself is {scale_L[bad[0]]:.3g}, it must be positive: its features "
            "hardly vary over the samples; raise collect.samples or collect.num_batches"
        )
    root_L = np.sqrt(scale_L)
    cka_LL: Floats = hsic_LL / root_L[:, None] / root_L[None, :]
    np.fill_diagonal(cka_LL, 1.0)
    return (cka_LL + cka_LL.T) / 2
