"""A real Slurm of a few nodes on this machine, each a host of its own: network, processes, name, shared memory."""

import os
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare", "nsenter", "ip")
NETWORK = "10.77.0"  # inside the namespaces only
GPUS = 2
"""Of a node; they are copies of /dev/null."""

SLURM_CONF = """
ClusterName=test
SlurmctldHost=ctl({network}.1)
AuthType=auth/munge
CredType=cred/munge
# how long a job that goes back into the queue is held: 120 s by default
AuthInfo=socket={root}/munge.sock,cred_expire=5
SlurmUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmctldParameters=preempt_send_user_signal
SlurmdTimeout=30
# a message that a busy node answers too late is sent again after a minute, perhaps to the job's next start
MessageTimeout=25
KillWait=10
ReturnToService=2
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

ENTER = """
hostname "$0" && mount --bind {root}/hosts /etc/hosts && mount --bind {root}/nsswitch.conf /etc/nsswitch.conf || exit 1
"""
NODE = """
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
slurmd -D -N "$0" & daemon=$!
while kill -0 $daemon 2>/dev/null; do wait $daemon; done
"""


def why_not() -> str | None:
    """What this machine lacks for it."""
    missing = [command for command in COMMANDS if shutil.which(command, path=_path()) is None]
    if missing:
        return f"no {', '.join(missing)} on PATH (Debian: slurmctld slurmd slurm-client munge iproute2 util-linux)"
    entered = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return None if os.geteuid() == 0 and entered.returncode == 0 else "namespaces need root"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class SlurmCluster:
    """Starts when it is made; `stop` ends all of it."""

    def __init__(self, nodes: int, cpus: int, memory_mb: int = 8000) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # names of sockets end at 107 bytes
        self.names = [f"n{number + 1}" for number in range(nodes)]
        self.label = f"s{secrets.token_hex(2)}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": _path()}
        self._write_files(cpus, memory_mb)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _write_files(self, cpus: int, memory_mb: int) -> None:
        lines = [
            f"NodeName={name} NodeAddr={NETWORK}.{number + 11} CPUs={cpus} RealMemory={memory_mb} "
            f"Gres=gpu:{GPUS} State=UNKNOWN"
            for number, name in enumerate(self.names)
        ]
        conf = SLURM_CONF.format(network=NETWORK, root=self.root, nodes="\n".join(lines))
        (self.root / "slurm.conf").write_text(conf)
        for number in range(GPUS):  # Slurm wants devices
            os.mknod(self.root / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        (self.root / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.root}/gpu[0-{GPUS - 1}]\n")
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        hosts = [f"{NETWORK}.1 ctl", *(f"{NETWORK}.{number + 11} {name}" for number, name in enumerate(self.names))]
        (self.root / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        (self.root / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no name server here
        (self.root / "munge.key").write_bytes(secrets.token_bytes(1024))
        (self.root / "munge.key").chmod(0o600)
        self.root.chmod(0o755)
        (self.root / "state").mkdir()

    def _start(self) -> None:
        control = f"{self.label}-ctl"
        self._ip("netns", "add", control)
        self._ip("-n", control, "link", "set", "lo", "up")
        self._ip("-n", control, "link", "add", "br0", "type", "bridge")
        self._ip("-n", control, "addr", "add", f"{NETWORK}.1/24", "dev", "br0")
        self._ip("-n", control, "link", "set", "br0", "up")
        for number, name in enumerate(self.names):
            own = f"{self.label}-{name}"
            self._ip("netns", "add", own)
            self._ip("-n", own, "link", "set", "lo", "up")
            self._ip("-n", control, "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", own)
            self._ip("-n", control, "link", "set", f"v{name}", "master", "br0", "up")
            self._ip("-n", own, "addr", "add", f"{NETWORK}.{number + 11}/24", "dev", "eth0")
            self._ip("-n", own, "link", "set", "eth0", "up")
        self._begin(
            "munged", "munged", "-F", "--force", f"--socket={self.root}/munge.sock",
            f"--key-file={self.root}/munge.key", f"--pid-file={self.root}/munge.pid",
            f"--seed-file={self.root}/munge.seed", f"--log-file={self.root}/munge.log",
        )  # fmt: skip
        wait_until(lambda: (self.root / "munge.sock").exists(), 10, "munged")
        enter = ENTER.format(root=self.root)
        self._begin(
            "slurmctld", "ip", "netns", "exec", control, "unshare", "--mount", "--uts",
            "bash", "-c", f"{enter} exec slurmctld -D", "ctl",
        )  # fmt: skip
        for name in self.names:
            self.boot(name)
        wait_until(lambda: self.idle() == set(self.names), 60, "nodes to be idle")

    def boot(self, name: str) -> None:
        """Switch a node on."""
        self._begin(
            name, "ip", "netns", "exec", f"{self.label}-{name}", "unshare", "--mount", "--uts", "--ipc", "--pid",
            "--fork", "--kill-child=KILL", "--mount-proc", "bash", "-c", ENTER.format(root=self.root) + NODE, name,
        )  # fmt: skip

    def reboot(self, name: str) -> None:
        """Switch a node off, so that all its processes die at once, and on again."""
        self.processes[name].kill()
        self.processes[name].wait()
        self.boot(name)

    def link(self, name: str, state: str) -> None:
        """Take the network of a node `down` or `up`."""
        self._ip("-n", f"{self.label}-{name}", "link", "set", "eth0", state)

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """Output of a command given on the controller's network."""
        inside = ["nsenter", f"--net=/run/netns/{self.label}-ctl", *command]
        done = subprocess.run(inside, env=self.environment, cwd=cwd, capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{command} exited with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def idle(self) -> set[str]:
        """Names of the nodes that wait for work."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).splitlines()
        return {line.split()[0] for line in lines if line.endswith(" idle")}

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, states: tuple[str, ...] = ("COMPLETED",), seconds: float = 300) -> dict[str, str]:
        """What Slurm knows of a job once it is in one of these states; another end of it is an error."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        end = time.monotonic() + seconds
        while (facts := self.facts(job))["JobState"] not in states:
            if facts["JobState"] in ends or time.monotonic() > end:
                log = Path(facts["StdOut"])
                raise RuntimeError(f"job {job} is {facts['JobState']}: {log.read_text() if log.exists() else ''}")
            time.sleep(0.5)
        return facts

    def processes_of(self, name: str) -> dict[int, str]:
        """Processes on a node, by their numbers on this machine, and how they were started."""
        own = Path(f"/run/netns/{self.label}-{name}").stat().st_ino
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "ns/net").stat().st_ino == own:
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    found[int(folder.name)] = command
            except OSError:
                continue  # it ended
        return {pid: command for pid, command in found.items() if command}

    def stop(self) -> None:
        """End everything that was started."""
        for name in [*self.names, "slurmctld", "munged"]:
            process = self.processes.get(name)
            if process is None or process.poll() is not None:
                continue
            if name in self.names:
                process.kill()
            else:
                process.terminate()
            process.wait(20)
        for name in ["ctl", *self.names]:
            subprocess.run(["ip", "netns", "del", f"{self.label}-{name}"], env=self.environment, capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)

    def _begin(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, env=self.environment, capture_output=True)


def wait_until(is_so: Callable[[], object], seconds: float, what: str) -> None:
    """Return when it is so."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.1)
