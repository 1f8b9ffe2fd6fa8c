"""The batch step of a Slurm job: Ray on every node, one `mpruner` command on the first, and the end of both.

    python -m mpruner_dist.submission.allocation CONFIG [--command COMMAND] [--sweep KEY=V1,V2] [OPTIONS OF THE COMMAND]

`prune.sbatch` becomes this process, so that the signals of Slurm reach it. `ray symmetric-run` would not do: it refuses
a node on which another Ray runs, and ends with `ray stop`, which ends every Ray of the user on the node.
"""

import argparse
import logging
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mpruner_dist.errors import MPrunerError, Preempted, StageFailure, UserError
from mpruner_dist.logs import set_up_logging
from mpruner_dist.runs.folder import begin_run
from mpruner_dist.submission.allotment import Allocation
from mpruner_dist.submission.saved import MAX_BARREN, count, is_stuck, saved

log = logging.getLogger("mpruner_dist.submission")  # __name__ is __main__ here

Process = subprocess.Popen[bytes]
GRACE_S = 60
"""Seconds that a process has to end after it was asked."""
NOTICE_S = 5
"""Seconds in which srun notices that Ray has ended."""
LAST_S = 45
"""Seconds before the time limit in which Ray ends on all nodes and the job goes back into the queue."""
BY_LIMIT_S = 900
"""A signal so many seconds before the time limit, or later, is taken for its announcement."""
MAX_LOST = 5
"""A job is put back into the queue so often because its Ray ended under the command."""


@dataclass
class _Signals:
    """The first signal that came; the loops that wait look for it."""

    received: str = ""

    def __call__(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


class HeadLost(StageFailure):
    """Ray ended under the command."""


def run_in_allocation(arguments: list[str]) -> int:
    """Run one command of mpruner on all nodes; put the job back into the queue if it was preempted or lost its head.

    Returns:
        The exit code of the command.

    Raises:
        UserError: wrong arguments.
        StageFailure: the command was not begun, Ray ended under it once too often, or the time limit ended it again and
            again before anything was saved.
    """
    signals = _Signals()
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signals)
    command, run_dir = command_line(arguments, os.environ.get("SLURM_ARRAY_TASK_ID"))
    allocation = Allocation.here()
    begin_run(run_dir).close()
    log.info("job %s, start %d, on %s", allocation.job, allocation.restarts + 1, " ".join(allocation.hosts))
    before = saved(run_dir)
    try:
        code = _on_all_nodes(command, allocation, run_dir / "logs", signals)
    except HeadLost as error:
        if count(run_dir / "logs" / f".lost-{allocation.job}") > MAX_LOST:
            raise
        log.error("%s", error)
        code = Preempted.exit_code
    if code == Preempted.exit_code:
        if signals.received and time.time() > _end_time() - BY_LIMIT_S and is_stuck(before, run_dir, allocation.job):
            raise StageFailure(
                f"nothing was saved in {MAX_BARREN} starts, each of which the time limit ended: raise --time, save "
                "more often (retrain.save_every, collect.save_every), or announce the limit earlier "
                "(--signal=B:USR2@SECONDS); the same submission goes on from what was saved before"
            )
        allocation.requeue()
    return code


def _end_time() -> float:
    """When Slurm ends the job, in seconds since 1970."""
    return float(os.environ.get("SLURM_JOB_END_TIME", "inf"))


def command_line(arguments: list[str], array_task: str | None) -> tuple[list[str], Path]:
    """The command to run and its run folder.

    Args:
        arguments: of this process. `--sweep KEY=V1,V2` gives each task of an array a value and a run folder, which
            takes the similarities over from the run folder that is named.
        array_task: the number of this task, from 0.

    Raises:
        UserError: a sweep without a value for this task.
    """
    parser = argparse.ArgumentParser("prune.sbatch", allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--command", default="run", choices=["run", "collect", "plan", "retrain", "evaluate", "report"])
    parser.add_argument("--sweep", metavar="KEY=V1,V2")
    parser.add_argument("--run-dir", type=Path)
    passed_on = ("set", "until", "collected")  # whose values would else be taken for CONFIG
    for name in passed_on:
        parser.add_argument(f"--{name}", action="append", default=[])
    given, options = parser.parse_known_args(arguments)
    for name in passed_on:
        for value in getattr(given, name):
            options += [f"--{name}", value]
    run_dir = (given.run_dir or Path("runs") / given.config.stem).absolute()
    if given.sweep is not None:
        key, _, values = given.sweep.partition("=")
        try:
            value = values.split(",")[int(array_task or "")]
        except (ValueError, IndexError) as error:
            raise UserError(f"--sweep {given.sweep}: no value for the task {array_task!r} of an array") from error
        options += ["--set", f"{key}={value}", "--collected", str(run_dir)]
        run_dir = run_dir.with_name(f"{run_dir.name}-{key}-{value.replace('/', '_')}")
    options += ["--set", "cluster.address=null"]  # the job's own Ray, whatever cluster the configuration names
    command = [sys.executable, "-m", "mpruner_dist", given.command, str(given.config), "--run-dir", str(run_dir)]
    return [*command, *options], run_dir


def _on_all_nodes(command: list[str], allocation: Allocation, logs: Path, signals: _Signals) -> int:
    """Ray on every node while the command runs; its exit code."""
    address = allocation.address()
    # in the environment alone: neither a file nor the list of processes shows it to others
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = _network() | os.environ | secret
    nodes = subprocess.Popen(_srun(allocation, address, logs), env=environment)
    try:
        _wait_for_nodes(allocation, address, environment, nodes, logs, signals)
        return _run_command(command, environment | {"RAY_ADDRESS": address}, signals, nodes)
    finally:
        _end(nodes, signal.SIGUSR1)


def _network() -> dict[str, str]:
    """Where gloo and NCCL find the network between the nodes, if the site file says it."""
    interface = os.environ.get("MPRUNER_INTERFACE")
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}


def _srun(allocation: Allocation, address: str, logs: Path) -> list[str]:
    """The step that keeps Ray on every node."""
    count = str(len(allocation.hosts))
    return [
        "srun", "--nodes", count, "--ntasks", count, "--ntasks-per-node", "1", "--kill-on-bad-exit=1",
        "--cpu-bind=none", "--mem=0",  # all that the job has: else a step gets one CPU
        "--export=ALL",  # also where the job was submitted with less: the token, and what the site file set
        "--open-mode=append", f"--output={logs}/ray-%N.log", f"--job-name=ray-{allocation.job}",
        sys.executable, "-m", "mpruner_dist.submission.node", address, str(allocation.temporary),
    ]  # fmt: skip


def _wait_for_nodes(
    allocation: Allocation, address: str, environment: dict[str, str], nodes: Process, logs: Path, signals: _Signals
) -> None:
    """Return when Ray runs on all nodes, or a signal came.

    Raises:
        StageFailure: not in time, with the nodes that are missing.
    """
    seconds = os.environ.get("MPRUNER_WAIT_S", "300")
    names = ",".join(allocation.hosts)
    waiting = subprocess.Popen(
        [sys.executable, "-m", "mpruner_dist.submission.waiting", address, names, seconds], env=environment
    )
    while waiting.poll() is None and not signals.received:
        if nodes.poll() is not None:
            waiting.kill()
            raise StageFailure(f"Ray did not start (srun ended with {nodes.returncode}); see {logs}/ray-*.log")
        time.sleep(0.2)
    if signals.received:
        waiting.kill()
    elif waiting.returncode:
        raise StageFailure(f"not all nodes joined Ray; see {logs}/ray-*.log, and MPRUNER_WAIT_S in the site file")


def _run_command(command: list[str], environment: dict[str, str], signals: _Signals, nodes: Process) -> int:
    """Run it to its end; its exit code. A signal is handed on: it saves, and exits with 75.

    What cannot save in time is killed, and goes on from what was saved before: Slurm would end the job for good.

    Raises:
        HeadLost: Ray ended under it.
    """
    if signals.received:
        log.info("stopped by %s before the command began", signals.received)
        return Preempted.exit_code
    log.info("%s", shlex.join(command))
    ends = _end_time()
    process, told = subprocess.Popen(command, env=environment), False
    while process.poll() is None:
        if nodes.poll() is not None:
            _end(process)
            return _after_ray(nodes, signals)
        if signals.received and not told:
            process.send_signal(signal.SIGUSR2)
            told = True
        if told and time.time() > ends - LAST_S:
            log.warning("the command has not stopped %d s before the time limit, and is killed", LAST_S)
            process.kill()
            process.wait()
            return Preempted.exit_code
        time.sleep(0.5)
    if told and process.returncode == -signal.SIGUSR2:  # it had not begun to listen
        return Preempted.exit_code
    if process.returncode == StageFailure.exit_code:
        with suppress(subprocess.TimeoutExpired):  # the command may know that Ray has ended before srun does
            nodes.wait(NOTICE_S)
            return _after_ray(nodes, signals)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode  # ended by a signal


def _after_ray(nodes: Process, signals: _Signals) -> int:
    """The exit code of a command under which Ray has ended: that of a preempted one where SIGTERM was the reason.

    Raises:
        HeadLost: it was not.
    """
    if signals.received or nodes.returncode == Preempted.exit_code:
        log.warning("Ray was ended by a signal: the job goes on from what was last saved")
        return Preempted.exit_code
    raise HeadLost(f"Ray ended under the command (srun ended with {nodes.returncode})")


def _end(process: Process, first: signal.Signals = signal.SIGTERM) -> None:
    """Ask a process to end, and make it."""
    for number in (first, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def main() -> None:
    """Run the command that the arguments name."""
    set_up_logging()
    try:
        sys.exit(run_in_allocation(sys.argv[1:]))
    except MPrunerError as error:
        print(f"mpruner: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
