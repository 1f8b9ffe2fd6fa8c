"""Fashion-MNIST, and the networks that are trained on it from nothing."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from fetching import from_debian

from recipes.training import SEED, fit, is_there, new_folder

INSTALLED_IMAGES = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
MEAN, SPREAD = 0.2860, 0.3530  # of all pixels of the 60,000, from 0 to 1
TRAIN_SHARE = 0.9  # the rest of the 60,000 is for validation; the configurations take their parts accordingly
NAMES = {"id2label": dict(enumerate(CLOTHES)), "label2id": {name: number for number, name in enumerate(CLOTHES)}}


def fashion_mnist(folder: Path) -> Path:
    """The images: there already, or copied from the package of Debian."""
    images = folder / "fashion-mnist"
    if not images.is_dir():
        source = from_debian("dataset-fashion-mnist", INSTALLED_IMAGES, folder / "download")
        with new_folder(images) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)
    return images


def resnet() -> Any:
    """A residual network of 24 basic blocks in three stages, untrained."""
    import transformers

    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[8, 8, 8], layer_type="basic", **NAMES
    )
    return transformers.ResNetForImageClassification(config)


def vit() -> Any:
    """A vision transformer of 12 blocks over the 49 patches of 4 x 4 pixels, untrained."""
    import transformers

    config = transformers.ViTConfig(
        num_channels=1, image_size=28, patch_size=4, hidden_size=64, intermediate_size=256, num_attention_heads=4,
        num_hidden_layers=12, **NAMES,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def train_images(images: Path, make: Any, target: Path, **options: Any) -> None:
    """Train what `make` returns, and save it with the scaling of its pixels."""
    import numpy as np
    import torch
    import transformers

    def idx(name: str, skip: int) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(gzip.decompress((images / name).read_bytes()), np.uint8)[skip:].copy())

    pixels = idx("train-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28)
    labels = idx("train-labels-idx1-ubyte.gz", 8).long()

    class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return round(len(labels) * TRAIN_SHARE)

        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            return {"pixel_values": (pixels[row].float() / 255 - MEAN) / SPREAD, "labels": labels[row]}

    print(f"training on {len(Images())} images", flush=True)
    transformers.set_seed(SEED)
    scaling = {"image_mean": [MEAN], "image_std": [SPREAD], "size": {"height": 28, "width": 28}}
    with new_folder(target) as partial:
        (partial / "preprocessor_config.json").write_text(json.dumps(scaling))
        fit(make(), Images(), partial, per_device_train_batch_size=128, weight_decay=0.01, **options)


def prepare_fashion(folder: Path) -> None:
    """Images and the network of `configs/resnet_fashion.yaml`."""
    images, model = fashion_mnist(folder), folder / "resnet-fashion"
    if not is_there(model):
        train_images(images, resnet, model, num_train_epochs=3, learning_rate=2e-3, warmup_steps=50)


def prepare_vit(folder: Path) -> None:
    """Images and the transformer of `configs/vit_fashion.yaml`."""
    images, model = fashion_mnist(folder), folder / "vit-fashion"
    if not is_there(model):
        train_images(images, vit, model, num_train_epochs=5, learning_rate=1e-3, warmup_steps=100)
