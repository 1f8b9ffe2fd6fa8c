"""Runs as jobs of Slurm: what `mpruner submit slurm` hands to `sbatch`."""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mpruner_dist.config import Config
from mpruner_dist.config_file import load_config
from mpruner_dist.errors import UserError

SCRIPT = Path(__file__).parent / "prune.sbatch"
LEAST_MINUTES = 10
NOT_FOR_JOBS = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
"""Of another cluster than the job's own; Slurm keeps the environment of a job in its files."""


@dataclass(frozen=True)
class Shape:
    """What a job asks for."""

    nodes: str = "1"
    """Their number, or `LEAST-MOST`."""
    gpus_per_node: int | None = None
    cpus_per_gpu: int | None = None

    def options(self) -> list[str]:
        """Of sbatch."""
        given = {"gpus-per-node": self.gpus_per_node, "cpus-per-gpu": self.cpus_per_gpu}
        return [f"--nodes={self.nodes}", *(f"--{name}={value}" for name, value in given.items() if value)]

    def settings(self) -> list[str]:
        """Of the run: a worker on each GPU, as many of them as Slurm gives. Workers on CPUs are in the configuration.

        Raises:
            UserError: the number of nodes is none.
        """
        least, dash, most = self.nodes.partition("-")
        if not (least.isdigit() and (most.isdigit() or not dash)):
            raise UserError(f"--nodes {self.nodes}: write a number, or the least and the most: 2-4")
        if self.gpus_per_node is None:
            return []
        workers = ["cluster.device=cuda", f"cluster.workers={int(most or least) * self.gpus_per_node}"]
        return [*workers, *([f"cluster.min_workers={int(least) * self.gpus_per_node}"] if dash else [])]


@dataclass(frozen=True)
class Submission:
    """One call of sbatch."""

    options: list[str]
    arguments: list[str]

    def command(self, after: str | None) -> list[str]:
        """Of a submission that waits for the job `after`."""
        waits = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["sbatch", "--parsable", *waits, *self.options, str(SCRIPT), *self.arguments]


def plan_submissions(
    config: Path,
    run_dir: Path | None,
    overrides: list[str],
    shape: Shape,
    options: list[str],
    *,
    then: Shape | None = None,
    sweep: str | None = None,
) -> list[Submission]:
    """The jobs that a run takes.

    Args:
        config: its file.
        run_dir: its folder.
        overrides: `a.b=c` settings.
        shape: of the job, or of the first.
        options: further options of sbatch, for all of them.
        then: the shape of a second job, which retrains and evaluates what the first has pruned.
        sweep: `KEY=V1,V2`: the first job collects; an array then runs once with each value.

    Raises:
        UserError: the configuration is wrong, for one of the shapes or values.
    """
    if then is not None and sweep is not None:
        raise UserError("--then and --sweep do not go together: each task of a sweep retrains what it has pruned")
    if (then or sweep) and load_config(config, overrides).rounds is not None:
        raise UserError("--then and --sweep divide a run after its pruning, which a run in rounds does again and again")
    folder = (run_dir or Path("runs") / config.stem).absolute()
    base = [str(config.absolute()), "--run-dir", str(folder)]
    if sweep is None:
        first = _job(config, base, overrides, shape, options, ["--until", "rewrite"] if then else [])
        if then is None:
            return [first]
        return [first, _job(config, base, overrides, then, options, [])]
    key, equals, values = sweep.partition("=")
    if not equals or not all(values.split(",")):
        raise UserError(f"--sweep {sweep}: write KEY=V1,V2, such as plan.threshold=0.95,0.98")
    asked = load_config(config, overrides)
    for budget in ("keep_layers", "target_parameters"):
        if key == "plan.threshold" and getattr(asked.plan, budget) is not None:
            raise UserError(
                f"--sweep {sweep}: plan.{budget} is a budget, beside which no threshold is heard: sweep plan.{budget}, "
                f"or give --set plan.{budget}=null"
            )
    measured = _what_is_measured(asked)
    for value in values.split(","):
        if _what_is_measured(load_config(config, [*overrides, f"{key}={value}"])) != measured:
            remedy = "submit a run for each value" + (", or set collect.until all" if key.startswith("plan.") else "")
            raise UserError(
                f"--sweep {sweep}: similarities are collected once, and are not the same for {key} {value}: {remedy}"
            )
    array = [f"--array=0-{len(values.split(',')) - 1}", "--output=mpruner-%A_%a.log"]
    return [
        _job(config, base, overrides, shape, options, ["--command", "collect"]),
        _job(config, base, overrides, shape, [*options, *array], ["--sweep", sweep]),
    ]


def _what_is_measured(config: Config) -> object:
    """What similarities depend on, so that they can be taken over."""
    data = config.data.model_dump(exclude={"train", "validation", "test"})
    settled = (config.plan.measure, config.plan.threshold) if config.collect.until == "settled" else None
    return config.model, data, config.collect.model_dump(exclude={"save_every"}), settled


def require_time(limit: str) -> None:
    """Refuse a time limit in which a job can hardly begin: two minutes before it, it goes back into the queue.

    Raises:
        UserError: it is no time of Slurm, or less than ten minutes.
    """
    if limit.upper() in ("0", "UNLIMITED", "INFINITE"):
        return
    days, dash, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise UserError(f"--time {limit}: write MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes = ([*numbers, 0])[:2]
        total = (int(days) * 24 + hours) * 60 + minutes
    else:
        total = numbers[0] * 60 + numbers[1] if len(numbers) == 3 else numbers[0]
    if total < LEAST_MINUTES:
        raise UserError(f"--time {limit} is {total} minutes: a start needs at least {LEAST_MINUTES}")


def _job(
    config: Path, base: list[str], overrides: list[str], shape: Shape, options: list[str], arguments: list[str]
) -> Submission:
    known = {override.partition("=")[0] for override in overrides}
    settings = [*overrides, *(each for each in shape.settings() if each.partition("=")[0] not in known)]
    load_config(config, settings)
    sets = [word for setting in settings for word in ("--set", setting)]
    return Submission([*shape.options(), *options], [*base, *sets, *arguments])


def submit(submissions: list[Submission]) -> list[str]:
    """Hand them to sbatch, each to begin when the one before it has succeeded; the numbers of the jobs.

    Raises:
        UserError: sbatch is not there, or refuses one; those before it are taken back.
    """
    jobs: list[str] = []
    for submission in submissions:
        try:
            said = _sbatch(submission.command(jobs[-1] if jobs else None))
        except UserError:
            for job in jobs:
                subprocess.run(["scancel", job], check=False)
            raise
        jobs.append(said.strip().partition(";")[0])  # NUMBER, or NUMBER;CLUSTER
    return jobs


def describe(submissions: list[Submission]) -> str:
    """The commands that would be given, the script, and where there is Slurm, what it says to them.

    Raises:
        UserError: Slurm would refuse one.
    """
    lines = []
    for number, submission in enumerate(submissions):
        lines.append(shlex.join(submission.command("JOB-BEFORE" if number else None)))
        if shutil.which("sbatch"):
            alone = submission.command(None)
            lines.append(f"# {_sbatch([alone[0], '--test-only', *alone[2:]]).strip()}")
    return "\n".join([*lines, "", f"# {SCRIPT}", SCRIPT.read_text()])


def _sbatch(command: list[str]) -> str:
    """What sbatch says.

    Raises:
        UserError: it is not there, or refuses.
    """
    kept = {name: value for name, value in os.environ.items() if name not in NOT_FOR_JOBS}
    environment = {"MPRUNER_PYTHON": sys.executable} | kept
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise UserError("sbatch is not on PATH: submit from a machine that Slurm knows") from error
    if done.returncode:
        raise UserError(f"Slurm refuses the job: {done.stderr.strip()}\nThe command was: {shlex.join(command)}")
    return done.stdout or done.stderr  # --test-only speaks on the latter
