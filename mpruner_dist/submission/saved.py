"""Whether a start of a job saved anything: one that the time limit ends again and again must not begin for ever."""

from pathlib import Path

PATTERNS = (
    "data/data.json", "cka.json", "plan.json", "pruned/config.json", "retrained/config.json", "retrain.json",
    "stats/*/from-*", "plan/*/*", ".pruned.partial-*/*.safetensors", "retrain/*/step-*/mpruner.json",
    "retrain/teacher/*/*", *(f"{name}/*/*.json" for name in ("evaluation", "baseline", "gate")),
)  # fmt: skip
"""The files of a run, or of a round, from which the next start goes on; not those that each start writes anew."""
MAX_BARREN = 3
"""So many starts one after another may save nothing."""


def saved(run: Path) -> set[tuple[str, int]]:
    """What is there of these files: their names in the run folder, and their sizes."""
    files = (file for prefix in ("", "round-*/") for pattern in PATTERNS for file in run.glob(prefix + pattern))
    return {(str(file.relative_to(run)), file.stat().st_size) for file in files if file.is_file()}


def is_stuck(before: set[tuple[str, int]], run: Path, job: str) -> bool:
    """Whether this start of the job was one too many that saved nothing.

    Args:
        before: what was saved when it began.
        run: the run folder, whose `logs/` keeps the count.
        job: of Slurm.
    """
    barren = run / "logs" / f".barren-{job}"
    if saved(run) != before:
        barren.unlink(missing_ok=True)
        return False
    return count(barren) >= MAX_BARREN


def count(file: Path) -> int:
    """How often this was called for a file."""
    number = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(number))
    return number
