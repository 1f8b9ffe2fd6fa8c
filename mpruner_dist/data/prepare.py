"""The stage `data`: the four parts of the text as token blocks in the run folder."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers

from mpruner_dist.config import Config, SourceConfig
from mpruner_dist.data.blocks import Blocks, make_blocks
from mpruner_dist.data.needed import blocks_needed
from mpruner_dist.data.parts import save_part
from mpruner_dist.data.sources import open_source
from mpruner_dist.errors import UserError
from mpruner_dist.logs import ProgressWriter
from mpruner_dist.runs.commit import write_json
from mpruner_dist.runs.digest import file_digest

log = logging.getLogger(__name__)


def make_part(
    config: Config, part: str, source: SourceConfig, tokenizer: Any, progress: Path
) -> tuple[Blocks, set[bytes]]:
    """Blocks of one part, and the digests of the records they come from; tells its progress to a file.

    Raises:
        UserError: less text than one block, or than calibration needs.
    """
    seen: set[bytes] = set()
    records, number, separator = open_source(source)
    writer = ProgressWriter(progress, f"data {part}", "records", number)
    limit = blocks_needed(config)[part]
    blocks = make_blocks(
        _remembered(records, seen, writer), tokenizer, config.data.block_size, config.data.pack, separator, limit
    )
    least = limit if part == "calibration" and limit is not None else 1
    if len(blocks) < least:
        raise UserError(
            f"data.{part}: {source.path} with take {list(source.take)} gives {len(blocks)} blocks of "
            f"{config.data.block_size} tokens, {least} needed: give more text, a smaller data.block_size"
            + (", or fewer collect.num_batches" if part == "calibration" else "")
        )
    return blocks, seen


def prepare_data(config: Config, model_folder: Path, target: Path, progress: Path) -> None:
    """Write `PART.safetensors` for every part, and `data.json` with counts and digests.

    Raises:
        UserError: no tokenizer, or text that cannot be used.
    """
    tokenizer = load_tokenizer(model_folder, config.model.trust_remote_code)
    summary: dict[str, Any] = {"block_size": config.data.block_size, "packed": config.data.pack, "parts": {}}
    records: dict[str, set[bytes]] = {}
    for part, source in config.data.parts().items():
        blocks, records[part] = make_part(config, part, source, tokenizer, progress)
        path = target / f"{part}.safetensors"
        save_part(path, blocks)
        tokens = int(blocks.lengths.sum())
        shared = {other: len(records[part] & records[other]) for other in records if other != part}
        for other, count in shared.items():
            if count:
                log.warning("%d records of data.%s also stand in data.%s", count, part, other)
        summary["parts"][part] = {
            "blocks": len(blocks), "tokens": tokens, "digest": file_digest(path), "records_also_in": shared
        }  # fmt: skip
        log.info("  %s: %d blocks, %d tokens", part, len(blocks), tokens)
    write_json(target / "data.json", summary)


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer that lies in a model's folder.

    Raises:
        UserError: there is none that transformers can load.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{folder} holds no tokenizer that transformers can load: {error}") from error


def _remembered(records: Iterable[str], seen: set[bytes], writer: ProgressWriter) -> Iterator[str]:
    for number, text in enumerate(records, 1):
        writer.tell(number)
        seen.add(hashlib.sha256(text.strip().encode()).digest()[:16])
        yield text
