"""Images that each belong to a class: pixels as they are stored, the number of the class, and how pixels are scaled."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpruner_dist.errors import UserError
from mpruner_dist.runs.json_files import read_json

Bytes = npt.NDArray[np.uint8]
IDX_DTYPE = 0x08
"""Code of unsigned bytes in an IDX file, as MNIST has them: 0, 0, code, number of dimensions; their sizes; bytes."""


@dataclass(frozen=True)
class LabelledImages:
    """Pixels [images, channels, height, width], the class of each image, and per channel what scales the pixels."""

    pixels: Bytes
    labels: npt.NDArray[np.int32]
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    """Of pixels from 0 to 1."""

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, rows: Iterable[int]) -> "LabelledImages":
        """The given images, in the given order."""
        chosen = list(rows)
        return LabelledImages(self.pixels[chosen], self.labels[chosen], self.mean, self.std)

    def masks(self) -> list[npt.NDArray[np.int64]]:
        """An image is one sample, and all of it counts."""
        return [np.ones((len(self), 1), np.int64)]

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What is written to disk."""
        return {"pixels": self.pixels, "labels": self.labels, "mean": self.mean, "std": self.std}


@dataclass(frozen=True)
class PixelFormat:
    """What a model takes: its channels, its size if it asks for one, and how pixels are scaled."""

    channels: int
    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def fit(self, image: Bytes, where: str) -> Bytes:
        """An image [height, width] or [height, width, channels] as [channels, height, width] in the model's size.

        Grey is repeated where the model takes colours; what has another size is scaled, bilinear with antialiasing.

        Raises:
            UserError: a number of channels that cannot be made the model's.
        """
        pixels = torch.from_numpy(np.array(image if image.ndim == 3 else image[:, :, None])).permute(2, 0, 1)
        if len(pixels) == 4 and self.channels == 3:  # the fourth is transparency
            pixels = pixels[:3]
        if len(pixels) not in (1, self.channels):
            raise UserError(f"{where} has {len(pixels)} channels, the model takes {self.channels}")
        if self.size is not None and pixels.shape[1:] != self.size:
            scaled = torch.nn.functional.interpolate(
                pixels[None].float(), self.size, mode="bilinear", antialias=True, align_corners=False
            )
            pixels = scaled[0].round().clamp(0, 255).byte()
        return pixels.expand(self.channels, -1, -1).numpy()


def pixel_format(model_folder: Path) -> PixelFormat:
    """What config.json and preprocessor_config.json or processor_config.json say; without, pixels go from -1 to 1.

    Raises:
        UserError: one of them is no JSON object, gives a mean or spread for another number of channels, or asks for
            what is not known here.
    """
    config = read_json(model_folder / "config.json")
    file, processor = model_folder / "preprocessor_config.json", {}
    if file.is_file():
        processor = read_json(file)
    elif (file := model_folder / "processor_config.json").is_file():
        processor = read_json(file).get("image_processor", {})
    for name in ("do_flip_channel_order", "rescale_offset"):
        if processor.get(name):
            raise UserError(f"{file} asks for {name}, which is not known here: the model would see other colours")
    vision = config | (config.get("vision_config") or {})
    channels = int(vision.get("num_channels", 3))
    crop = processor.get("crop_size") if processor.get("do_center_crop", True) else None
    asked = crop or processor.get("size")  # of a model that takes any, the size of its training
    if isinstance(asked, dict):
        asked = [asked["height"], asked["width"]] if "height" in asked else asked.get("shortest_edge")
    size = asked or vision.get("image_size")
    given = (processor.get(name) or 0.5 for name in ("image_mean", "image_std"))
    mean, std = (value if isinstance(value, list) else [value] * channels for value in given)
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * channels, [1.0] * channels
    if len(mean) != channels or len(std) != channels:
        raise UserError(
            f"{file} scales {len(mean)} channels, the model has {channels}: correct image_mean and image_std"
        )
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    highest = round(255 * factor, 6)  # of the pixels that mean and std are for
    return PixelFormat(
        channels, None if size is None else tuple(size) if isinstance(size, list | tuple) else (size, size),
        tuple(value / highest for value in mean), tuple(value / highest for value in std),
    )  # fmt: skip


def make_images(records: Iterable[tuple[Bytes, int]], form: PixelFormat, source: str, number: int) -> LabelledImages:
    """At most `number` images in the model's format; there is memory for so many, once.

    Raises:
        UserError: images of several sizes for a model that takes any.
    """
    pixels = np.zeros((0, form.channels, 1, 1), np.uint8)
    labels: list[int] = []
    for row, (image, label) in enumerate(islice(records, number)):
        fitted = form.fit(image, f"image {row} of {source}")
        if row == 0:
            pixels = np.empty((number, *fitted.shape), np.uint8)
        if fitted.shape != pixels.shape[1:]:
            raise UserError(
                f"{source} has images of several sizes, such as {pixels.shape[1:]} and {fitted.shape}, and the model's "
                "folder names none: give it a preprocessor_config.json with size"
            )
        pixels[row] = fitted
        labels.append(label)
    return LabelledImages(
        pixels[: len(labels)],
        np.array(labels, np.int32),
        np.array(form.mean, np.float32),
        np.array(form.std, np.float32),
    )


def read_idx(path: Path) -> Bytes:
    """The bytes of an IDX file, gzipped or not.

    Raises:
        UserError: it is none, or cut.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        kind, dimensions = content[2], content[3]
        shape = tuple(np.frombuffer(content, ">u4", dimensions, 4).tolist())
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        if content[:2] != b"\0\0" or kind != IDX_DTYPE or values.size != np.prod(shape):
            raise ValueError("its header and its size do not agree")
        return values.reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"{path} is no whole IDX file of bytes: {error}") from error


def idx_records(folder: Path, split: str, rows: tuple[float, float]) -> tuple[Iterator[tuple[Bytes, int]], int] | None:
    """Images and their numbers of a folder of IDX files such as Fashion-MNIST's; None if it is no such folder.

    Args:
        folder: has train-images-idx3-ubyte and train-labels-idx1-ubyte, t10k-... for the test, gzipped or not.
        split: train or test.
        rows: which share of them.

    Raises:
        UserError: a damaged file, or as many labels as there are not images.
    """
    prefix = {"train": "train", "test": "t10k"}.get(split, split)
    images, labels = (sorted(folder.glob(f"{prefix}-{kind}-ubyte*")) for kind in ("images-idx3", "labels-idx1"))
    if not images or not labels:
        return None
    pixels, numbers = read_idx(images[0]), read_idx(labels[0])
    if len(pixels) != len(numbers):
        raise UserError(f"{images[0]} has {len(pixels)} images, {labels[0]} {len(numbers)} labels")
    first, last = (round(len(pixels) * share) for share in rows)
    chosen = range(first, last)
    return ((pixels[row], int(numbers[row])) for row in chosen), len(chosen)
