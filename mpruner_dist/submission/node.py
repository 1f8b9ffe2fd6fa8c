"""One node of a Slurm allocation: Ray runs on it until it is told to end.

    python -m mpruner_dist.submission.node ADDRESS TEMPORARY

`srun` starts it on every node, the first of which is the head. It starts Ray again on a node that lost it; the head it
cannot, for with it all that Ray knew is lost.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from mpruner_dist.errors import MPrunerError, Preempted, StageFailure
from mpruner_dist.logs import set_up_logging

log = logging.getLogger("mpruner_dist.submission")  # __name__ is __main__ here

NO_GPU = ("", "-1", "NoDevFiles")
"""What stands in CUDA_VISIBLE_DEVICES where a job has none; Slurm writes the last."""
MAX_STARTS = 4
"""A node whose Ray ended so often is left alone: something is wrong with it."""
OBJECT_STORE = 1_000_000_000
"""Bytes of shared memory. Ray would take a third of a machine that others may share; only messages pass through it."""


def ray_command(address: str, temporary: Path, environment: Mapping[str, str]) -> list[str]:
    """How Ray is started on this node: with what Slurm gave, in the way of no other job.

    Args:
        address: host:port of the head.
        temporary: Ray's folder of this job.
        environment: of a task of Slurm.
    """
    gpus = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu not in NO_GPU]
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
        f"--node-name={environment['SLURMD_NODENAME']}", f"--num-cpus={environment['SLURM_CPUS_ON_NODE']}",
        f"--num-gpus={len(gpus)}", f"--object-store-memory={OBJECT_STORE}", f"--temp-dir={temporary}",
        "--min-worker-port=0", "--max-worker-port=0",  # 0: the system chooses, so that no two jobs choose the same
        "--dashboard-agent-listen-port=0", "--include-log-monitor=false",
    ]  # fmt: skip
    if environment["SLURM_PROCID"] == "0":
        host, _, port = address.rpartition(":")
        return [
            *command, "--head", f"--node-ip-address={host}", f"--port={port}", "--include-dashboard=false",
            f"--ray-client-server-port={int(port) + 1000}",  # it cannot be left out
        ]  # fmt: skip
    return [*command, f"--address={address}"]


def keep_ray(address: str, temporary: Path) -> None:
    """Run Ray on this node until SIGUSR1, which srun hands on; told by SIGTERM, srun would kill the step at once.

    Raises:
        StageFailure: the head's Ray ended.
        Preempted: SIGTERM came, by which Slurm takes the node away.
    """
    stop = _Stop()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, stop)
    _own(temporary)
    command, name = ray_command(address, temporary, os.environ), os.environ["SLURMD_NODENAME"]
    log.info("node %s: Ray with %s", name, " ".join(word for word in command if word.startswith("--num")))
    try:
        for start in range(MAX_STARTS):
            if not stop.asked:
                stop.child = subprocess.Popen(command)
                code = stop.child.wait()
            if stop.asked == signal.SIGTERM:
                raise Preempted(f"node {name}: got SIGTERM")
            if stop.asked:
                return
            if "--head" in command:
                raise StageFailure(f"node {name}: the head's Ray ended with code {code}")
            if start + 1 < MAX_STARTS:
                log.warning("node %s: Ray ended with code %d; start %d of %d", name, code, start + 2, MAX_STARTS)
                time.sleep(2)
        # no failure of this task: with it, srun would end the others
        log.error("node %s: Ray ended %d times; the run must do without this node", name, MAX_STARTS)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a process that ends may still write; it is in /tmp


class _Stop:
    """What the signals do."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        self.asked = self.asked or number
        if self.child is not None:
            self.child.terminate()  # `ray start --block` ends the processes that it started


def _own(folder: Path) -> None:
    """Make a folder that nobody else can read or has made before: sockets lie in it.

    Raises:
        StageFailure: somebody else made it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StageFailure(f"{folder} belongs to another user: set MPRUNER_TMP in the site file to another folder")
    folder.chmod(0o700)


def main() -> None:
    """Keep Ray on this node."""
    set_up_logging()
    address, temporary = sys.argv[1:]
    try:
        # a node's own, for some clusters of virtual machines share /tmp
        keep_ray(address, Path(f"{temporary}-{os.environ['SLURM_NODEID']}"))
    except MPrunerError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
