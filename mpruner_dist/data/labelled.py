"""Texts that each belong to a class: one row of tokens a text, and the number of its class."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mpruner_dist.data.blocks import TOKENIZE_AT_ONCE, Blocks, Ints, padded
from mpruner_dist.errors import UserError
from mpruner_dist.runs.json_files import read_json


@dataclass(frozen=True)
class LabelledTexts(Blocks):
    """Token ids and lengths as in Blocks, and the class of each text, int32 [texts]."""

    labels: Ints

    def rows(self, rows: Iterable[int]) -> "LabelledTexts":
        """The given texts, in the given order, padded only to the longest of them."""
        chosen = list(rows)
        longest = int(self.lengths[chosen].max(initial=1))
        return LabelledTexts(self.ids[chosen, :longest], self.lengths[chosen], self.labels[chosen])

    def tensors(self) -> dict[str, Ints]:
        """What is written to disk."""
        return super().tensors() | {"labels": self.labels}


def label_names(model_folder: Path) -> list[str]:
    """The classes of a model by their numbers, from its config.json; without names there, LABEL_0, LABEL_1, ...

    Raises:
        UserError: numbers with gaps.
    """
    content = read_json(model_folder / "config.json")
    names = content.get("id2label") or {str(number): f"LABEL_{number}" for number in range(2)}  # as transformers does
    numbers = sorted(int(number) for number in names)
    if numbers != list(range(len(numbers))):
        raise UserError(f"id2label in {model_folder}/config.json has the numbers {numbers}: number them from 0 on")
    return [str(names[str(number)]) for number in numbers]


def numbered_alike(names: list[str], labels: list[str]) -> bool:
    """Whether a source and a model name their classes alike, number by number, but for a few other spellings.

    ImageNet is such a case: two of its classes are called crane, which `datasets` does not allow, so that there the
    second is crane2.

    Args:
        names: the source's, by number.
        labels: the model's, by number.
    """
    same = sum(name == label for name, label in zip(names, labels, strict=False))
    elsewhere = any(name in labels and labels[number] != name for number, name in enumerate(names[: len(labels)]))
    return len(names) == len(labels) and 2 * same > len(labels) and not elsewhere


def label_number(label: Any, labels: list[str], where: str) -> int:
    """The number of a label, which is a name or the number itself.

    Args:
        label: as it stands in the data.
        labels: the model's, by number.
        where: of the label, for the message.

    Raises:
        UserError: the model has no such class.
    """
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    if isinstance(label, str) and label.strip().isdecimal():  # in a CSV file all is text
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return label
    known = ", ".join(f"{number} {name}" for number, name in enumerate(labels[:8])) + (", ..." * (len(labels) > 8))
    raise UserError(
        f"{where} is {label!r}, which is no class of the model; these are: {known}. Correct the data, label_field, or "
        "id2label in the model's config.json"
    )


def make_labelled(
    records: Iterable[tuple[str, int]], tokenizer: Any, longest: int, limit: int | None, pad: int
) -> LabelledTexts:
    """Tokenise at most `limit` texts, with the special tokens of the model; what is longer than `longest` is cut."""
    chosen = islice(records, limit)
    rows: list[list[int]] = []
    labels: list[int] = []
    while some := list(islice(chosen, TOKENIZE_AT_ONCE)):
        encoded = tokenizer([text for text, _ in some], truncation=True, max_length=longest, verbose=False)
        rows += encoded["input_ids"]
        labels += [label for _, label in some]
    ids, lengths = padded(rows, max(map(len, rows), default=1), pad)
    return LabelledTexts(ids, lengths, np.array(labels, np.int32))
