"""What is done in a run folder."""

import time
from pathlib import Path

from mpruner_dist.errors import UserError
from mpruner_dist.logs import progress_line, read_progress
from mpruner_dist.runs.folder import read_manifest


def status_rows(run_dir: Path, stages: tuple[str, ...]) -> list[tuple[str, str]]:
    """A row for each stage: done and how long it took, running and how far, or what is next.

    Raises:
        UserError: not a run folder.
    """
    known = read_manifest(run_dir)
    if not known:
        raise UserError(f"{run_dir} is no run folder: it holds no manifest.json")
    rows: list[tuple[str, str]] = []
    waiting = "next"
    for name in stages:
        stage = known.get(name)
        if stage is None:
            rows.append((name, waiting))
            waiting = "waits"
        elif stage["state"] == "done":
            rows.append((name, f"done in {stage['seconds']:.1f} s: {', '.join(stage['outputs'])}"))
        else:
            begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stage["since"]))
            progress = read_progress(run_dir / "logs" / "progress.json")
            far = progress_line(progress).strip() if progress else "no progress told"
            rows.append((name, f"begun {begun}: {far}; if no process works on it, `mpruner run` goes on from here"))
            waiting = "waits"
    return rows
