"""The stage `data`: the four parts of the data in the run folder, as the workers read them."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mpruner_dist.config import Config, SourceConfig
from mpruner_dist.data.needed import blocks_needed
from mpruner_dist.data.parts import save_part
from mpruner_dist.data.readers import Reader, make_reader
from mpruner_dist.errors import UserError
from mpruner_dist.logs import ProgressWriter
from mpruner_dist.runs.commit import write_json
from mpruner_dist.runs.digest import file_digest

log = logging.getLogger(__name__)

R = TypeVar("R")


class Watcher:
    """Tells a file how many records of a part have gone by, and keeps their digests."""

    def __init__(self, part: str, progress: Path) -> None:
        self.part, self.progress = part, progress
        self.seen: set[bytes] = set()

    def __call__(self, records: Iterable[R], number: int, content: Callable[[R], str]) -> Iterator[R]:
        """The same records."""
        writer = ProgressWriter(self.progress, f"data {self.part}", "records", number)
        for index, record in enumerate(records, 1):
            writer.tell(index)
            self.seen.add(hashlib.sha256(content(record).strip().encode()).digest()[:16])
            yield record


def make_part(
    config: Config, part: str, source: SourceConfig, reader: Reader, progress: Path
) -> tuple[Any, set[bytes]]:
    """One part, and the digests of the records it comes from; tells its progress to a file.

    Raises:
        UserError: less than one sequence, or than calibration needs.
    """
    watcher = Watcher(part, progress)
    limit = blocks_needed(config)[part]
    made = reader.read(source, limit, watcher)
    least = limit if part == "calibration" and limit is not None else 1
    if len(made) < least:
        raise UserError(
            f"data.{part}: {source.path} with take {list(source.take)} gives {len(made)} {reader.unit}, "
            f"{least} needed: give more data"
            + (", a smaller data.block_size" if config.model.task == "causal-lm" else "")
            + (", or fewer collect.num_batches" if part == "calibration" else "")
        )
    return made, watcher.seen


def prepare_data(config: Config, model_folder: Path, target: Path, progress: Path) -> None:
    """Write `PART.safetensors` for every part, and `data.json` with counts and digests.

    Raises:
        UserError: no tokenizer, or data that cannot be used.
    """
    reader = make_reader(config, model_folder)
    packed = config.data.pack and config.model.task == "causal-lm"
    summary: dict[str, Any] = {"block_size": config.data.block_size, "packed": packed, "parts": {}}
    records: dict[str, set[bytes]] = {}
    for part, source in config.data.parts().items():
        made, records[part] = make_part(config, part, source, reader, progress)
        path = target / f"{part}.safetensors"
        save_part(path, made)
        shared = {other: len(records[part] & records[other]) for other in records if other != part}
        for other, count in shared.items():
            if count:
                log.warning("%d records of data.%s also stand in data.%s", count, part, other)
        facts = reader.facts(made)
        for name, count in facts.get("labels", {}).items():
            if not count:
                log.warning("data.%s has nothing of the class %r: are the records sorted by class?", part, name)
        summary["parts"][part] = {
            "blocks": len(made), **facts, "digest": file_digest(path), "records_also_in": shared
        }  # fmt: skip
        log.info(
            "  %s: %d %s%s", part, len(made), reader.unit, f", {facts['tokens']} tokens" if "tokens" in facts else ""
        )
    write_json(target / "data.json", summary)
