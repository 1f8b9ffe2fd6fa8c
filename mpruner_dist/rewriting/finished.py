"""Whether a rewrite is done already: told from the files, without torch."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.errors import UserError
from mpruner_dist.plan import Keep, Plan
from mpruner_dist.runs import digest

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

    source: str
    """Fingerprint of the source."""
    kept: Keep
    max_shard_bytes: int | None = None
    drop_next_token: bool = False
    preserve_pattern: bool = False

    @property
    def digest(self) -> str:
        """Equal for requests with equal results."""
        kept = self.kept.kept if isinstance(self.kept, Plan) else self.kept
        return digest.digest([self.source, kept, self.max_shard_bytes, self.drop_next_token, self.preserve_pattern])


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
    try:
        content: Any = json.loads((target / LAYER_MAP).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("request") == request.digest
