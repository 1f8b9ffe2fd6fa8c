"""The record of a training run: `metrics.jsonl` always, TensorBoard and Weights & Biases if the user asks."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpruner_dist.errors import UserError
from mpruner_dist.runs.commit import write_text
from mpruner_dist.runs.digest import digest

PROJECT = "mpruner-dist"
Entry = dict[str, Any]
Logger = tuple[Callable[[Entry], None], Callable[[], None]]
"""What takes an entry, and what ends the record."""


def require_loggers(names: tuple[str, ...]) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"retrain.log_to names {name}, which is not installed: pip install '.[{name}]' in the repository's "
                "folder, or leave it out (metrics.jsonl is always written)"
            )


class Metrics:
    """Written by the first worker alone."""

    def __init__(self, work: Path, is_writer: bool) -> None:
        self.path, self.is_writer = work / "metrics.jsonl", is_writer
        self._loggers: list[Logger] = []

    def begin(self, step: int, log_to: tuple[str, ...]) -> None:
        """Go on after this step: what an attempt recorded after its last sharded checkpoint was saved is done again."""
        if not self.is_writer:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        entries = [(line, json.loads(line)) for line in lines if line.endswith("}")]
        kept = [line for line, entry in entries if entry["step"] < step or (entry["step"] == step and "loss" in entry)]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        require_loggers(log_to)
        made = {"tensorboard": _tensorboard, "wandb": _wandb}
        self._loggers = [made[name](self.path.parent, step) for name in log_to]

    def record(self, entry: Entry) -> None:
        """Add an entry, which has a `step`."""
        if self.is_writer:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        for log, _ in self._loggers:
            log(entry)

    def rates(self) -> list[float]:
        """Learning rates of the steps that are recorded."""
        entries = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [entry["lr"] for entry in entries if "lr" in entry]

    def end(self) -> None:
        """Wait until everything is written, or sent."""
        for _, close in self._loggers:
            close()


def _tensorboard(work: Path, step: int) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(work / "tensorboard"), purge_step=step + 1 if step else 0)

    def log(entry: Entry) -> None:
        for name, value in entry.items():
            if name != "step":
                writer.add_scalar(name, value, entry["step"])
        writer.flush()

    return log, writer.close


def _wandb(work: Path, step: int) -> Logger:
    import wandb

    # a resumed run goes on in the same record, the same training in another run folder has one of its own
    run = wandb.init(
        project=PROJECT, name=_run_name(work), id=digest(str(work.absolute())), resume="allow", dir=str(work)
    )
    run.define_metric("*", step_metric="step")  # steps that are done again may be logged again
    return run.log, run.finish


def _run_name(work: Path) -> str:
    """Of the run folder, in which `work` is retrain/DIGEST."""
    return work.parent.parent.name
