"""Whether a machine or a cluster can do what a run needs, tried in a minute."""

import json
import logging
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpruner_dist.cluster import look
from mpruner_dist.cluster.address import cluster_address
from mpruner_dist.cluster.nodes import elsewhere, working_nodes
from mpruner_dist.cluster.probe import DEADLINE_S, on_each, require_same_view
from mpruner_dist.cluster.session import RaySession
from mpruner_dist.config import ClusterConfig
from mpruner_dist.errors import MPrunerError, StageFailure, UserError
from mpruner_dist.machine.jobs import MEGABYTES, all_reduce_job, train_job
from mpruner_dist.runs.folder import TRIAL

PATIENCE_S = 60
"""A collective that takes longer hangs: the workers cannot reach each other."""
REACH = (
    "if the workers cannot reach each other, name their network with NCCL_SOCKET_IFNAME (GPUs) or GLOO_SOCKET_IFNAME "
    "(CPUs) on all nodes, and look for a firewall between them"
)


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    state: str
    """ok, failed or skipped."""
    told: str


def diagnose(config: ClusterConfig, run_dir: Path | None) -> Iterator[Check]:
    """Try one thing after another, and say what came of each; what needs one that failed is skipped.

    Args:
        config: where and how wide.
        run_dir: a folder on the storage that all nodes share; None takes a temporary one, which does for one node.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    parent = run_dir.absolute() if run_dir else Path(tempfile.gettempdir())
    work = parent / f"{TRIAL}{secrets.token_hex(4)}"
    logs = work / "logs"
    try:
        logs.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror}; give another --run-dir") from error
    logging.getLogger("mpruner_dist").setLevel(logging.WARNING)  # a line a check is enough
    failed: set[str] = set()
    with RaySession(config, spread=True, patience_s=PATIENCE_S) as session:
        trial = _Trial(session, parent if run_dir else None, work)
        checks: dict[str, tuple[tuple[str, ...], Callable[[], str]]] = {
            "Ray": ((), trial.ray),
            "nodes": (("Ray",), trial.nodes),
            "compiler": (("Ray",), trial.compiler),
            "all-reduce": (("Ray", "nodes"), trial.all_reduce),
            "training": (("Ray", "nodes", "compiler", "all-reduce"), trial.training),
        }
        for name, (needs, check) in checks.items():
            missing = [need for need in needs if need in failed]
            if missing:
                failed.add(name)
                yield Check(name, "skipped", f"it needs: {', '.join(missing)}")
                continue
            try:
                yield Check(name, "ok", check())
            except MPrunerError as error:
                failed.add(name)
                yield Check(name, "failed", str(error))
    if not failed or not any(logs.iterdir()):  # else a message may name a log in it
        shutil.rmtree(work, ignore_errors=True)


class _Trial:
    """The checks; each says what it found, or raises what is wrong and what to do."""

    def __init__(self, session: RaySession, shared: Path | None, work: Path) -> None:
        self.session, self.shared, self.work = session, shared, work

    def ray(self) -> str:
        self.session.connect()
        where = "joined the cluster" if cluster_address(self.session.config) else "started on this machine"
        have = self.session.resources()
        return f"{where}: {len(working_nodes())} node(s), {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"

    def nodes(self) -> str:
        nodes = working_nodes()
        if self.shared is None and elsewhere(nodes):
            raise StageFailure(
                "the cluster has nodes beside this one: give --run-dir a folder on storage that all of them share"
            )
        require_same_view(nodes, self.shared or self.work, [])
        where = self.shared or "a temporary folder"
        return f"all {len(nodes)} read and wrote {where}, and have the same versions of Python and packages"

    def compiler(self) -> str:
        """DeepSpeed compiles its collective for CPUs; on GPUs only what the user's JSON asks for."""
        said, wrong = on_each(working_nodes(), look.tools, lambda _: (str(Path(sys.executable).parent),), DEADLINE_S)
        lacking = [f"{node} {problem}" for node, problem in wrong.items()]
        on_gpus = self.session.device() == "cuda"
        for node, tools in said.items():
            missing = [tool for tool, there in tools.items() if not there and (on_gpus or tool != look.NVCC)]
            lacking += [f"{node} lacks {', '.join(missing)}"] if missing else []
        if not lacking:
            nvcc = ", nvcc" if on_gpus else ""
            return f"a C++ compiler, ninja, Python's headers{nvcc} on all {len(said)} node(s)"
        if on_gpus:
            return f"{'; '.join(lacking)}: needed only for DeepSpeed's own optimizers and for NVMe"
        raise StageFailure(
            f"{'; '.join(lacking)}: DeepSpeed compiles its collective for CPUs with them; install them there (Debian: "
            "g++ python3-dev; pip: ninja)"
        )

    def all_reduce(self) -> str:
        answers = self._answers("all-reduce", all_reduce_job)
        slowest = min(answer["GB/s"] for answer in answers)
        note = ""
        gpus, workers = self.session.resources().get("GPU", 0), len(answers)
        if answers[0]["device"] == "cpu" and gpus:
            note = f"; on CPUs, as {workers} workers need as many GPUs and {gpus:g} are there, or as was asked"
        hosts = sorted({answer["host"] for answer in answers})
        return (
            f"{MEGABYTES} MB over {workers} workers ({answers[0]['device']}) on {', '.join(hosts)}: "
            f"the sum is right, {slowest:.2f} GB/s{note}"
        )

    def training(self) -> str:
        answers = self._answers("training", train_job)
        error = max(answer["error"] for answer in answers)
        return f"a step under ZeRO stage 3 moved the weights as torch alone would, within {error:.0e}, on all workers"

    def _answers(self, name: str, job: Callable[..., None]) -> list[dict[str, Any]]:
        folder = self.work / name
        folder.mkdir()
        try:
            self.session.run_workers(job, {"answer": folder}, name, self.work)
        except StageFailure as error:
            raise StageFailure(f"{error}; {REACH}") from error
        return [json.loads(file.read_text()) for file in sorted(folder.iterdir())]
