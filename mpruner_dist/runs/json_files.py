"""JSON that others wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpruner_dist.errors import UserError


def read_json(path: Path, make_object: Callable[[list[tuple[str, Any]]], dict[str, Any]] = dict) -> dict[str, Any]:
    """A JSON object; `make_object` may refuse pairs of keys and values with a ValueError.

    Raises:
        UserError: unreadable, or something else.
    """
    try:
        content = json.loads(path.read_text(), object_pairs_hook=make_object)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content
