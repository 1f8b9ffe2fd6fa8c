"""A configuration for a run that starts in another folder of another machine: every path whole."""

import logging
from pathlib import Path
from typing import Any

from mpruner_dist.config import Config
from mpruner_dist.config.base import Section
from mpruner_dist.errors import UserError

log = logging.getLogger(__name__)

FOLDER_OR_ID = ("path", "teacher")
"""Keys whose value is a file or folder, or else an id on a hub."""
TEXT_FILES = (".txt", ".jsonl", ".json", ".csv", ".parquet")


def portable(config: Config) -> Config:
    """The same configuration, its relative paths made absolute as they are seen from here.

    Raises:
        UserError: a path that can only be meant relative to some folder, and does not exist here.
    """
    content = _content(config, "")
    if config.cluster.address:
        log.info("cluster.address %s is left out: the job joins the cluster that it runs on", config.cluster.address)
        content["cluster"]["address"] = None
    return Config.model_validate(content)


def _content(section: Section, where: str) -> dict[str, Any]:
    content = section.model_dump(mode="json")
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            content[name] = _content(value, f"{where}{name}.")
        elif isinstance(value, tuple):
            for number, part in enumerate(value):
                if isinstance(part, Section):
                    content[name][number] = _content(part, f"{where}{name}.{number}.")
        elif isinstance(value, Path) or (isinstance(value, str) and name in FOLDER_OR_ID):
            content[name] = _absolute(value, f"{where}{name}")
    return content


def _absolute(value: str | Path, key: str) -> str:
    path = Path(value).expanduser()
    if path.is_absolute():
        return str(path)
    if path.exists():
        log.info("%s %s is taken as %s: it must be there on all nodes", key, value, path.absolute())
        return str(path.absolute())
    if isinstance(value, Path) or value.startswith(".") or path.suffix in TEXT_FILES:
        raise UserError(
            f"{key} {value} is relative, and is not there from {Path.cwd()}: the job runs in another folder; "
            "write an absolute path on storage that all nodes share"
        )
    return value
