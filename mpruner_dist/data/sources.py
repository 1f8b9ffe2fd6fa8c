"""Records of text from files or the `datasets` library."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from mpruner_dist.config import SourceConfig
from mpruner_dist.errors import UserError

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def open_source(source: SourceConfig) -> tuple[Iterator[str], int, str | None]:
    """The records that a source takes, how many they are, and the text between two of them.

    A text file is one running text, whose paragraphs are its records: between them goes a blank line. Records of any
    other format are texts of their own: None, so that the tokenizer's end-of-text token goes between them.

    Raises:
        UserError: nothing there, an unknown format, no such field.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    table, separator = _load(source)
    if source.text_field not in table.column_names:
        raise UserError(
            f"{source.path} has no field {source.text_field!r}: set text_field to one of "
            + ", ".join(table.column_names)
        )
    first, last = (round(len(table) * share) for share in source.take)
    return _texts(table, source.text_field, first, last), last - first, separator


def _texts(table: Any, field: str, first: int, last: int) -> Iterator[str]:
    for row in range(first, last):
        text = table[row][field]
        if isinstance(text, str) and text.strip():
            yield text


def _load(source: SourceConfig) -> tuple[Any, str | None]:
    path = Path(source.path).expanduser()
    try:
        if not path.exists():
            if source.path.startswith((".", "/", "~")) or path.suffix in FORMATS:
                raise UserError(f"there is no text at {source.path}")
            return datasets.load_dataset(source.path, source.name, split=source.split), None
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            return (saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved), None
        files, kind = _files(path)
        options = {"sample_by": "paragraph"} if kind == "text" else {}
        table = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
        return table, "\n\n" if kind == "text" else None
    except (OSError, ValueError, KeyError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot read text from {source.path} (split {source.split}): {reason}") from error


def _files(path: Path) -> tuple[list[Path], str]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FORMATS)
    kinds = {FORMATS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        found = ", ".join(sorted({file.suffix or file.name for file in files})) or "nothing"
        raise UserError(f"{path} must hold files of one of the kinds {', '.join(FORMATS)}; it holds {found}")
    return files, str(kinds.pop())
