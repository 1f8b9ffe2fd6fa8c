"""What is done in a run folder."""

import json
import time
from pathlib import Path
from typing import Any

from mpruner_dist.errors import UserError
from mpruner_dist.logs import progress_line, read_progress
from mpruner_dist.runs.folder import read_manifest

BEFORE_ROUNDS, AFTER_ROUNDS = ("data", "baseline"), ("result", "evaluate", "report")


def status_rows(run_dir: Path, stages: tuple[str, ...]) -> list[tuple[str, str]]:
    """A row for each stage: done and how long it took, running and how far, or what is next.

    Raises:
        UserError: not a run folder.
    """
    known = _known(run_dir)
    rows: list[tuple[str, str]] = []
    waiting = "next"
    for name in stages:
        stage = known.get(name)
        if stage is None:
            rows.append((name, waiting))
        else:
            rows.append((name, _state(stage, run_dir)))
        if stage is None or stage["state"] != "done":
            waiting = "waits"
    return rows


def status_of_rounds(run_dir: Path) -> list[tuple[str, str]]:
    """The same for a run in rounds, a row also for each stage that a round has begun and for each decision.

    A folder of a round beyond those that are decided and the next was left by another tolerance, and is not told.

    Raises:
        UserError: not a run folder.
    """
    known = _known(run_dir)
    rows = [(name, _state(known[name], run_dir)) for name in BEFORE_ROUNDS if name in known]
    record = run_dir / "rounds.json"
    decided = json.loads(record.read_text()) if record.is_file() else {"rounds": [], "stopped": None}
    decisions = {entry["folder"]: entry for entry in decided["rounds"]}
    for name, entry in decisions.items():
        rows += _rows_of_round(run_dir / name)
        rows.append((name, f"{'accepted' if entry['accepted'] else 'rolled back'}: {entry['why']}"))
    if not decided["stopped"]:
        rows += _rows_of_round(run_dir / f"round-{len(decisions) + 1:02d}")
    rows.append(("rounds", f"end: {decided['stopped']}" if decided["stopped"] else "`mpruner run` goes on"))
    return rows + [(name, _state(known[name], run_dir)) for name in AFTER_ROUNDS if name in known]


def _rows_of_round(folder: Path) -> list[tuple[str, str]]:
    return [(f"{folder.name} {name}", _state(stage, folder)) for name, stage in read_manifest(folder).items()]


def _known(run_dir: Path) -> dict[str, dict[str, Any]]:
    known = read_manifest(run_dir)
    if not known:
        raise UserError(f"{run_dir} is no run folder: it holds no manifest.json")
    return known


def _state(stage: dict[str, Any], folder: Path) -> str:
    if stage["state"] == "done":
        return f"done in {stage['seconds']:.1f} s: {', '.join(stage['outputs'])}"
    if stage["state"] == "given up":
        return f"given up: {stage['why']}"
    begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stage["since"]))
    progress = read_progress(folder / "logs" / "progress.json")
    far = progress_line(progress).strip() if progress else "no progress told"
    return f"begun {begun}: {far}; if no process works on it, `mpruner run` goes on from here"
