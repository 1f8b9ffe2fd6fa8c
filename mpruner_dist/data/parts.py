"""The parts of a run's data as files: calibration, train, validation, test."""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from mpruner_dist.data.blocks import Blocks
from mpruner_dist.data.images import LabelledImages
from mpruner_dist.data.labelled import LabelledTexts
from mpruner_dist.data.pairs import Pairs
from mpruner_dist.data.speech import Speech
from mpruner_dist.errors import UserError
from mpruner_dist.runs.commit import write_file

DTYPES = {"uint8": "U8", "int32": "I32", "float32": "F32"}
"""What safetensors calls the number types of parts."""


class Part(Protocol):
    """Sequences, images or recordings in their order."""

    def __len__(self) -> int:
        """How many there are."""

    def rows(self, rows: Iterable[int]) -> Self:
        """The given ones, in the given order."""

    def masks(self) -> list[npt.NDArray[np.int64]]:
        """1 for what may be a sample of the calibration, 0 for padding.

        A mask for each of the places that a model's states lie at: of an encoder and a decoder there are two.
        """

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What is written to disk, by the names of the class's fields."""


def save_part(path: Path, part: Part) -> None:
    """Write a part as safetensors, whole or not at all.

    Not by that library, which holds two copies of it in memory; images may be as large as half of that is.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in part.tensors().items()}
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))  # so that all are aligned
    header, end = {}, 0
    for name, value in arrays.items():
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": DTYPES[value.dtype.name], "shape": value.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    contents = (value.reshape(-1).view(np.uint8).data for value in arrays.values())
    write_file(path, chain([len(text).to_bytes(8, "little"), text], contents))


def load_part(path: Path) -> Any:
    """Read a part that `save_part` wrote; pixels and spectra stay in the file until rows of them are asked for.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "numpy") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names if name not in ("pixels", "features")}
        if "pixels" in names:
            return LabelledImages(_mapped(path, "pixels", np.uint8), **tensors)
        if "features" in names:
            return Speech(_mapped(path, "features", np.float32), **tensors)
        kind = LabelledTexts if "labels" in tensors else Pairs if "target_ids" in tensors else Blocks
        return kind(tensors.pop("input_ids"), **tensors)
    except Exception as error:
        raise UserError(f"cannot read {path}, which the stage data made: {error}") from error


def _mapped(path: Path, name: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """A tensor in a safetensors file: 8 bytes that give the length of a header of JSON, the header, the data.

    All workers of a node share its pages.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        info = json.loads(file.read(length))[name]
    offset = 8 + length + info["data_offsets"][0]
    return np.memmap(path, dtype, "c", offset, tuple(info["shape"]))
