"""Records of text, images and recordings from files or the `datasets` library."""

import csv
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from mpruner_dist.config import SourceConfig
from mpruner_dist.data.images import Bytes, idx_records
from mpruner_dist.data.labelled import label_number, numbered_alike
from mpruner_dist.errors import UserError, first_line

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def open_source(source: SourceConfig) -> tuple[Iterator[str], int, str | None]:
    """The records that a source takes, how many they are, and the text between two of them.

    A text file is one running text, whose paragraphs are its records: between them goes a blank line. Records of any
    other format are texts of their own: None, so that the tokenizer's end-of-text token goes between them.

    Raises:
        UserError: nothing there, an unknown format, no such field.
    """
    table, rows, separator = _open(source, "text_field")
    texts = (_text(table[row][source.text_field]) for row in rows)
    return (text for text in texts if text), len(rows), separator


def open_labelled(source: SourceConfig, labels: list[str]) -> tuple[Iterator[tuple[str, int]], int]:
    """The texts that a source takes, each with the number of its class, and how many they are.

    A label is a name or a number. Where the source names its numbers and the model its classes, the names count, unless
    both number them alike.

    Args:
        source: where they are.
        labels: the model's classes, by number.

    Raises:
        UserError: nothing there, an unknown format, no such field; while it is read, a class that the model has not.
    """
    table, rows, _ = _open(source, "text_field", "label_field")
    records = _labelled(table, rows, source, source.text_field, labels)
    texts = ((_text(text), label) for text, label in records)
    return ((text, label) for text, label in texts if text), len(rows)


def open_pairs(source: SourceConfig) -> tuple[Iterator[tuple[str, str]], int]:
    """The texts that a source takes, each with what should be said of it, and how many they are.

    Raises:
        UserError: nothing there, an unknown format, no such field.
    """
    table, rows, _ = _open(source, "text_field", "target_field")
    records = map(table.__getitem__, rows)
    pairs = ((_text(record[source.text_field]), _text(record[source.target_field])) for record in records)
    return ((text, target) for text, target in pairs if text and target), len(rows)


def open_images(source: SourceConfig, labels: list[str]) -> tuple[Iterator[tuple[Bytes, int]], int]:
    """The images that a source takes, [height, width] or [height, width, channels], each with the number of its class.

    Args and errors are those of `open_labelled`.
    """
    path = Path(source.path).expanduser()
    found = idx_records(path, source.split, source.take) if path.is_dir() else None
    if found is not None:
        records, number = found
        where = f"a label of {source.path}"
        return ((pixels, label_number(label, labels, where)) for pixels, label in records), number
    table, rows, _ = _open(source, "image_field", "label_field")
    if not isinstance(table.features[source.image_field], datasets.Image):
        raise UserError(f"{source.image_field} of {source.path} holds no images: set image_field, or save it as Image")
    decoded = _labelled(table, rows, source, source.image_field, labels)
    return ((_pixels(image, source), label) for image, label in decoded), len(rows)


def open_speech(source: SourceConfig) -> tuple[Iterator[tuple[bytes | Path, str, str]], int]:
    """The recordings that a source takes, with what is said in each and where it stands, and how many they are.

    A recording is what its file holds, or the file.

    Raises:
        UserError: nothing there, an unknown format, no such field; while it is read, what is no recording.
    """
    table, rows, _ = _open(source, "audio_field", "target_field")
    table = table.select_columns([source.audio_field, source.target_field])
    if isinstance(table.features[source.audio_field], datasets.Audio):
        table = table.cast_column(source.audio_field, datasets.Audio(decode=False))
    path = Path(source.path).expanduser()
    folder = path if path.is_dir() else path.parent

    def records() -> Iterator[tuple[bytes | Path, str, str]]:
        for row in rows:
            record = table[row]
            found, text = record[source.audio_field], record[source.target_field]
            where = f"{source.audio_field} of record {row} of {source.path}"
            if isinstance(found, dict):
                found = found.get("bytes") or found.get("path")
            if not isinstance(found, str | bytes):
                raise UserError(f"{where} is no recording: set audio_field, or write the paths of files there")
            if said := _text(text):
                yield (folder / found if isinstance(found, str) else found), said, where

    return records(), len(rows)


def recording_files(source: SourceConfig) -> list[Path]:
    """The files that a list of recordings names, and that are there.

    Raises:
        UserError: the list cannot be read.
    """
    path = Path(source.path).expanduser()
    table, rows, _ = _open(source, "audio_field")
    names = table.select_columns([source.audio_field])[rows.start : rows.stop][source.audio_field]
    files = {path.parent / name for name in names if isinstance(name, str)}
    return sorted(file for file in files if file.is_file())


def _pixels(image: Any, source: SourceConfig) -> Bytes:
    """Of a Pillow image: grey of 16 bits loses the lower ones, palettes and the like become colours."""
    if image.mode.startswith("I;16"):
        return (np.asarray(image) >> 8).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise UserError(f"{source.path} has an image of Pillow's mode {image.mode}, whose pixels have no known range")
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    return np.asarray(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB"))


def _labelled(
    table: Any, rows: range, source: SourceConfig, field: str, labels: list[str]
) -> Iterator[tuple[Any, int]]:
    names = getattr(table.features[source.label_field], "names", None)  # of a ClassLabel
    if labels[0] == "LABEL_0" or (names and numbered_alike(names, labels)):  # the model names none, or the same
        names = None
    for row in rows:
        where = f"{field} of record {row} of {source.path}"
        try:
            record = table[row]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises all of them
            raise UserError(f"{where} cannot be read: {error}{_file_of(table, row, field)}") from error
        if record[field] is None and field == source.image_field:
            raise UserError(f"{where} is missing: take the record out")
        label = record[source.label_field]
        if names and isinstance(label, int) and 0 <= label < len(names):
            label = names[label]
        yield record[field], label_number(label, labels, f"{source.label_field} of record {row} of {source.path}")


def _file_of(table: Any, row: int, field: str) -> str:
    """Of an image that cannot be read."""
    path = table.cast_column(field, datasets.Image(decode=False))[row][field]["path"]
    return f", in {path}" if path else ""


def _open(source: SourceConfig, *keys: str) -> tuple[Any, range, str | None]:
    """The table, the rows that are taken, and what goes between two texts; it must have the fields that `keys` name."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    table, separator = _load(source, images="image_field" in keys)
    for key in keys:
        if (field := getattr(source, key)) not in table.column_names:
            raise UserError(
                f"{source.path} has no field {field!r}: set {key} to one of " + ", ".join(table.column_names)
            )
    return table, range(*(round(len(table) * share) for share in source.take)), separator


def _text(value: Any) -> str:
    """What stands in a record, a number too, or nothing."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value) if math.isfinite(value) else ""
    return value if isinstance(value, str) and value.strip() else ""


def _load(source: SourceConfig, images: bool) -> tuple[Any, str | None]:
    path = Path(source.path).expanduser()
    try:
        if not path.exists():
            if source.path.startswith((".", "/", "~")) or path.suffix in FORMATS:
                raise UserError(f"there is no text at {source.path}")
            return datasets.load_dataset(source.path, source.name, split=source.split), None
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                return saved[source.split], None
            _require_one_split(source)
            return saved, None
        if images and path.is_dir() and any(file.suffix.lower() in IMAGES for file in path.rglob("*")):
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=source.split), None
        _require_one_split(source)
        files, kind = _files(path)
        options: dict[str, Any] = {"sample_by": "paragraph"} if kind == "text" else {}
        if kind == "csv":  # all of it is text: pandas would take "None" for nothing, and 007 for 7
            with files[0].open(newline="", encoding="utf-8-sig") as file:
                columns = next(csv.reader(file), [])
            strings = datasets.Features({name: datasets.Value("string") for name in columns})
            options = {"features": strings, "keep_default_na": False}
        table = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
        return table, "\n\n" if kind == "text" else None
    except (OSError, ValueError, KeyError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot read {source.path} (split {source.split}): {first_line(error)}") from error


def _require_one_split(source: SourceConfig) -> None:
    """Of data that has no splits: what asks for one would get all of it, a test part what was trained on."""
    if source.split != "train":
        raise UserError(
            f"{source.path} has one split, called train: leave split {source.split} out, and give the part a file of "
            "its own or a range of records with take"
        )


def _files(path: Path) -> tuple[list[Path], str]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FORMATS)
    kinds = {FORMATS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        found = ", ".join(sorted({file.suffix or file.name for file in files})) or "nothing"
        raise UserError(f"{path} must hold files of one of the kinds {', '.join(FORMATS)}; it holds {found}")
    return files, str(kinds.pop())
