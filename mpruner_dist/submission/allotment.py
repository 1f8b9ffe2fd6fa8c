"""What Slurm gave to the job that this process is a part of."""

import logging
import os
import shlex
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from mpruner_dist.errors import StageFailure, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave."""

    job: str
    name: str
    """What commands of Slurm call it; the number alone of one task of an array stands for the whole array."""
    hosts: list[str]
    restarts: int

    @staticmethod
    def here() -> "Allocation":
        """The one in whose batch step this process runs.

        Raises:
            UserError: it does not run in one.
            StageFailure: Slurm contradicts itself.
        """
        if "SLURM_JOB_NODELIST" not in os.environ:
            raise UserError("this is no job of Slurm: submit it, with `sbatch slurm/prune.sbatch CONFIG`")
        hosts = _run("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        if len(hosts) != int(os.environ["SLURM_JOB_NUM_NODES"]):
            raise StageFailure(f"Slurm gave {os.environ['SLURM_JOB_NUM_NODES']} node(s) and names {hosts}")
        job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
        name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
        return Allocation(job, name, hosts, int(os.environ.get("SLURM_RESTART_COUNT", 0)))

    def address(self) -> str:
        """host:port for the head, which this node is; the port is the first free one from one that the job gives."""
        host = _address_of(self.hosts[0], several=len(self.hosts) > 1)
        first = 20000 + int(self.job) % 10000  # below the ports that systems hand out
        for port in range(first, first + 1000):
            with socket.socket() as trial:
                if trial.connect_ex((host, port)) != 0:
                    return f"{host}:{port}"
        raise StageFailure(f"{host}: no port from {first} to {first + 999} is free")

    def requeue(self) -> None:
        """Put the job back into the queue, unless Slurm ends it: a job that was cancelled would come back too."""
        facts = _run("scontrol", "-o", "show", "job", self.name).split()
        if "JobState=RUNNING" in facts:
            log.info("job %s goes back into the queue; what was saved is kept", self.name)
            _run("scontrol", "requeue", self.name)

    @property
    def temporary(self) -> Path:
        """The beginning of the name of Ray's folder on each node; short, for names of sockets end at 107 bytes."""
        return Path(os.environ.get("MPRUNER_TMP", "/tmp")) / f"mpruner-{os.getuid()}-{self.job}"


def _address_of(host: str, several: bool) -> str:
    """The address of this node on the network between the nodes.

    Raises:
        StageFailure: there is none.
    """
    interface = os.environ.get("MPRUNER_INTERFACE")
    if interface:
        addresses = [each.address for each in psutil.net_if_addrs().get(interface, []) if each.family == socket.AF_INET]
        if not addresses:
            raise StageFailure(f"MPRUNER_INTERFACE: {host} has no address on an interface {interface!r}")
        return str(addresses[0])
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise StageFailure(f"{host} does not resolve ({error}): set MPRUNER_INTERFACE in the site file") from error
    if several and address.startswith("127."):
        raise StageFailure(
            f"{host} resolves to {address}, which other nodes cannot reach: set MPRUNER_INTERFACE in the site file to "
            "the interface between the nodes, such as ib0"
        )
    return address


def _run(*command: str) -> str:
    """Output of a command of Slurm.

    Raises:
        StageFailure: it failed.
    """
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or error
        raise StageFailure(f"{shlex.join(command)}: {str(said).strip()}") from error
