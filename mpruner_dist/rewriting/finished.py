"""Whether a rewrite is done already: told from the files, without torch."""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mpruner_dist.checkpoints.folder import read_checkpoint, tokenizer_digests
from mpruner_dist.checkpoints.stored import StoredCheckpoint
from mpruner_dist.errors import UserError
from mpruner_dist.plan import Keep, Plan
from mpruner_dist.runs import digest
from mpruner_dist.runs.commit import write_json

LAYER_MAP = "layer_map.json"


def layer_map(kept: dict[str, list[int]]) -> dict[str, Any]:
    """Its content, from what is kept of each stack; of several stacks, by name."""
    maps = {
        stack: {"old_to_new": {str(old): new for new, old in enumerate(layers)}, "new_to_old": layers}
        for stack, layers in kept.items()
    }
    return next(iter(maps.values())) if len(maps) == 1 else {"stacks": maps}


@dataclass(frozen=True)
class Request:
    """What the content of a rewritten checkpoint follows from."""

    source: StoredCheckpoint
    kept: Keep
    max_shard_bytes: int | None = None
    drop_next_token: bool = False
    preserve_pattern: bool = False

    @cached_property
    def digest(self) -> str:
        """Equal for requests with equal results."""
        source = [self.source.fingerprint(), tokenizer_digests(self.source.companions)]
        kept = self.kept.kept if isinstance(self.kept, Plan) else self.kept
        return digest.digest([*source, kept, self.max_shard_bytes, self.drop_next_token, self.preserve_pattern])


def is_finished(request: Request, target: Path) -> bool:
    """Whether `target` is what was asked for, whole."""
    try:
        read_checkpoint(target)
    except UserError:
        return False
    return is_made_by(request, target)


def clear_beside(target: Path) -> None:
    """Remove what rewrites that were killed have left beside a finished one."""
    for leftover in (target.with_name(f".{target.name}.old"), *target.parent.glob(f".{target.name}.partial-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def is_made_by(request: Request, target: Path) -> bool:
    """Whether `target` says that it follows from this request."""
    return _map_of(target).get("request") == request.digest


def is_rewritten(folder: Path) -> bool:
    """Whether a rewrite made the folder, and nothing changed its weights since."""
    return "request" in _map_of(folder)


def forget_request(folder: Path) -> None:
    """Leave of a rewritten folder's map the layers alone: its weights are others now, and no rewrite may replace it."""
    content = _map_of(folder)
    content.pop("request", None)
    write_json(folder / LAYER_MAP, content)


def _map_of(folder: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads((folder / LAYER_MAP).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
