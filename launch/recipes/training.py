"""What all recipes share: records in a file, folders that are whole or not there, transformers' own Trainer."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fetching import PrepareError

SEED = 0


def write_records(target: Path, records: list[dict[str, str]]) -> None:
    """Write one record a line, in an order that is random but always the same."""
    random.Random(SEED).shuffle(records)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(target)


def read_records(file: Path, share: float) -> list[dict[str, str]]:
    """The first `share` of the records."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: round(len(lines) * share)]]


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that gets the name of `target` at the end, when it is complete."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    print(f"{target}: made")


def is_there(model: Path) -> bool:
    """Tell, here and on the screen, whether a model needs no training any more."""
    there = (model / "model.safetensors").is_file()
    if there:
        print(f"{model}: there already")
    return there


def fit(model: Any, data: Any, folder: Path, collator: Any = None, **options: Any) -> None:
    """Train with the defaults of transformers' Trainer but for `options`, and save the model into `folder`.

    Args:
        model: one that returns a loss.
        data: a data set of its arguments.
        folder: there already.
        collator: makes a batch of several; without it they are stacked.
        options: of TrainingArguments.

    Raises:
        PrepareError: the model could not be saved.
    """
    import safetensors
    import transformers

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), save_strategy="no", logging_steps=50, report_to=[], seed=SEED, **options
    )
    collator = collator or transformers.default_data_collator
    transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()
    try:
        model.save_pretrained(folder)
    except safetensors.SafetensorError as error:  # which is no OSError, though a full disk is
        raise PrepareError(f"{folder}: {error}") from error
