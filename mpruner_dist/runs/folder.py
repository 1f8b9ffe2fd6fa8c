"""The run folder: one artefact a stage, and a manifest that says which stages are done and from what.

config.yaml     the resolved configuration
manifest.json   per stage: state, inputs, seconds; replaced whole
data/ stats/ cka.json plan.json pruned/ retrain/ retrained/ evaluation.json report.html
logs/           a log file per worker, progress of the stage that runs
"""

import fcntl
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mpruner_dist.errors import Fruitless, UserError
from mpruner_dist.runs.commit import disk_errors, write_bytes, write_json, write_text

log = logging.getLogger(__name__)

MANIFEST_VERSION = 1
TRIAL = ".doctor-"
"""Begins the name of the folder that `mpruner doctor` tries things in, and leaves if one failed."""
Inputs = dict[str, Any]


class RunFolder:
    """A folder that one run owns. `stage` is how artefacts come to be in it."""

    def __init__(self, path: Path, resolved_config: str) -> None:
        self.path = path.absolute()
        self.resolved_config = resolved_config
        self.manifest_path = self.path / "manifest.json"
        self.stages: dict[str, dict[str, Any]] = read_manifest(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def is_done(self, name: str) -> bool:
        """Whether the stage finished."""
        return self.stages.get(name, {}).get("state") == "done"

    def stage(
        self,
        name: str,
        inputs: Inputs,
        outputs: tuple[str, ...],
        make: Callable[[], None],
        *,
        remedy: str,
        replace: bool = False,
    ) -> None:
        """Make a stage's outputs, unless they are there and were made from the same inputs.

        Args:
            name: of the stage.
            inputs: everything that the outputs depend on.
            outputs: what must be there when it is done, relative to the folder.
            make: makes them.
            remedy: what to do where they were made from other inputs.
            replace: make them anew then.

        Raises:
            UserError: the outputs are there, or were begun, from other inputs, and may not be replaced.
            Fruitless: so it ended before from the same inputs, and `give_up` recorded it.
        """
        inputs = json.loads(json.dumps(inputs))  # as the manifest will give them back
        changes = self.changes(name, inputs)
        if changes and not replace:
            listed = "\n".join(f"  {line}" for line in changes)
            raise UserError(
                f"{self.path} was made by another configuration; for the stage {name} these differ:\n{listed}\n"
                f"Give a new --run-dir, or {remedy}"
            )
        known = self.stages.get(name, {})
        if not changes and self.is_done(name) and all((self.path / output).exists() for output in outputs):
            log.info("%-9s done before (%.1f s)", name, known["seconds"])
            return
        if not changes and known.get("state") == "given up":
            raise Fruitless(known["why"])
        begun = time.monotonic()
        write_text(self / "config.yaml", self.resolved_config)
        self._record(name, {"state": "running", "inputs": inputs, "since": time.time()})
        log.info("%-9s begins", name)
        make()
        seconds = time.monotonic() - begun
        self._record(name, {"state": "done", "inputs": inputs, "seconds": seconds, "outputs": list(outputs)})
        log.info("%-9s done in %.1f s", name, seconds)

    def changes(self, name: str, inputs: Inputs) -> list[str]:
        """What differs between the inputs that a stage was made or begun from and these; empty for a new stage."""
        if name not in self.stages:
            return []
        return _differences(self.stages[name]["inputs"], json.loads(json.dumps(inputs)))

    def adopt(self, name: str, other: "RunFolder") -> None:
        """Take a finished stage over from another folder, where it is not done here: the same inputs, the same files.

        Files are copied, so that either folder can be deleted. It took no time of this run.
        """
        if self.is_done(name) or not other.is_done(name):
            return
        for output in other.stages[name]["outputs"]:
            write_bytes(self / output, (other / output).read_bytes())
        self._record(name, other.stages[name] | {"seconds": 0.0})

    def give_up(self, name: str, why: str) -> None:
        """Record that a begun stage is not to be tried again from the same inputs."""
        self._record(name, {"state": "given up", "inputs": self.stages[name]["inputs"], "why": why})

    def forget(self, names: Sequence[str]) -> None:
        """Mark stages as not done. Their artefacts stay until new ones replace them."""
        self.stages = {name: stage for name, stage in self.stages.items() if name not in names}
        self._write()

    def _record(self, name: str, stage: dict[str, Any]) -> None:
        self.stages[name] = stage
        self._write()

    def _write(self) -> None:
        write_json(self.manifest_path, {"version": MANIFEST_VERSION, "stages": self.stages})


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{where}.{key}".strip("."))]
    return [] if old == new else [f"{where}: was {old!r}, is {new!r}"]


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The stages that a run folder's manifest records; none where there is no manifest.

    Raises:
        UserError: the manifest is unreadable or of a newer version.
    """
    manifest_path = path / "manifest.json"
    if not manifest_path.exists():
        return {}
    try:
        content = json.loads(manifest_path.read_text())
        version, stages = int(content["version"]), dict(content["stages"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest_path} is not a run's manifest ({error}): give another --run-dir") from error
    if version > MANIFEST_VERSION:
        raise UserError(
            f"{manifest_path} has version {version}, this program reads up to {MANIFEST_VERSION}: upgrade it"
        )
    return stages


@contextmanager
def open_run(path: Path, resolved_config: str) -> Iterator[RunFolder]:
    """Own a run folder while the block runs; made if need be.

    Raises:
        UserError: another process owns it, or the folder is something else's.
    """
    with begin_run(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another mpruner works in {path}: wait for it or give another --run-dir") from error
        except OSError as error:  # Lustre's default
            log.warning("%s: its file system has no locks (%s): start no second mpruner in it", path, error.strerror)
        yield RunFolder(path, resolved_config)


def begin_run(path: Path) -> IO[str]:
    """Make a run folder with a place for logs, if it is not there; return the file to lock by who owns it.

    Raises:
        UserError: the folder is something else's.
    """
    with disk_errors(path):
        if path.exists() and not path.is_dir():
            raise UserError(f"the run folder {path} is a file: give another --run-dir")
        others = [file for file in path.iterdir() if not file.name.startswith(TRIAL)] if path.is_dir() else []
        if others and not (path / ".lock").exists():
            raise UserError(f"the run folder {path} is not empty and no run's: give another --run-dir")
        (path / "logs").mkdir(parents=True, exist_ok=True)
        return (path / ".lock").open("w")
