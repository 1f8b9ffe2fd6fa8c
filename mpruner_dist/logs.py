"""What a person sees while it runs: log lines, and a bar on a terminal or a line every few seconds elsewhere."""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0
WRITE_EVERY_S = 0.5


def set_up_logging() -> None:
    """Print our own records to standard error. Other libraries keep their own loggers."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("mpruner_dist")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class ProgressWriter:
    """The side that does the work: tells, through a small file, how far it is."""

    def __init__(self, path: Path, label: str, unit: str, total: int, done: int = 0) -> None:
        self.path, self.label, self.unit, self.total = path, label, unit, total
        self.first = done
        self.begun = time.monotonic()
        self.written = 0.0
        self.tell(done)

    def tell(self, done: int, note: str = "") -> None:
        """Say that `done` of the total units are done; `note` is shown as it is."""
        now = time.monotonic()
        if now - self.written < WRITE_EVERY_S and done < self.total:
            return
        self.written = now
        rate = (done - self.first) / max(now - self.begun, 1e-9)
        state = {
            "label": self.label,
            "unit": self.unit,
            "total": self.total,
            "done": done,
            "rate": rate,
            "note": note,
        }
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(self.path)


@contextmanager
def show_progress(path: Path) -> Iterator[None]:
    """Show what a ProgressWriter writes to `path` while the block runs."""
    path.unlink(missing_ok=True)
    stop = threading.Event()
    watch = _watch_terminal if sys.stderr.isatty() else _watch_lines
    thread = threading.Thread(target=watch, args=(path, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink(missing_ok=True)


def read_progress(path: Path) -> dict[str, Any] | None:
    """What a ProgressWriter last wrote; None if nothing."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None  # nothing told yet


def _watch_lines(path: Path, stop: threading.Event) -> None:
    log = logging.getLogger(__name__)
    last = time.monotonic()
    while not stop.wait(0.5):
        state = read_progress(path)
        if state and time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            log.info("%s", progress_line(state))


def progress_line(state: dict[str, Any]) -> str:
    """One line for a log: how far, how fast, how long still."""
    left = (state["total"] - state["done"]) / state["rate"] if state["rate"] else 0.0
    eta = f"{int(left) // 60}:{int(left) % 60:02d} left" if state["rate"] else "starting"
    line = f"  {state['label']} {state['done']}/{state['total']} {state['unit']}, {state['rate']:.2f}/s, {eta}"
    return f"{line}, {state['note']}" if state["note"] else line


def _watch_terminal(path: Path, stop: threading.Event) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}  {task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}
        while not stop.wait(0.2):
            state = read_progress(path)
            if state is None:
                continue
            label = state["label"]
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=state["total"], unit=state["unit"], note="")
            progress.update(
                tasks[label],
                completed=state["done"],
                total=state["total"],
                unit=state["unit"],
                note=state["note"],
            )
