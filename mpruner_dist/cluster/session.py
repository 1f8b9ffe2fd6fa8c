"""Ray: a machine's own or an existing cluster; worker actors for jobs, tasks for files."""

import functools
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from mpruner_dist.cluster import preemption
from mpruner_dist.cluster.address import cluster_address, require_listener
from mpruner_dist.cluster.failures import LeaveWordOfEnd, explain
from mpruner_dist.cluster.nodes import Node, elsewhere, living_nodes, working_nodes
from mpruner_dist.cluster.placement import Place, Usable, await_room, choose_device, find_place
from mpruner_dist.cluster.probe import require_same_view
from mpruner_dist.cluster.worker import Job, Worker, said, stop_request, worker_note
from mpruner_dist.config import ClusterConfig
from mpruner_dist.errors import MPrunerError, StageFailure, first_line
from mpruner_dist.logs import ProgressWriter, show_progress

log = logging.getLogger(__name__)

IF_IT_ASKS = (
    "If the cluster asks for a token, as Ray's do wherever ~/.ray/auth_token is, set RAY_AUTH_MODE=token, and "
    "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH where the token is not in that file"
)
Item = TypeVar("Item")
Result = TypeVar("Result")


class RaySession:
    """Connects at the first use, disconnects at the end of the `with` block.

    Args:
        config: where and how wide.
        shared: the folder that all nodes must be able to write to; None if they need not be asked.
        folders: that they must be able to read.
        spread: put workers on as many nodes as there are, and not on as few as hold them.
        patience_s: how long a collective of torch may take.
    """

    def __init__(
        self,
        config: ClusterConfig,
        shared: Path | None = None,
        folders: list[Path] | None = None,
        *,
        spread: bool = False,
        patience_s: int = 1800,
    ) -> None:
        self.config, self.shared, self.folders = config, shared, folders or []
        self.placement, self.patience_s = "SPREAD" if spread else "PACK", patience_s
        self._probed: set[Node] = set()
        self._device: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if ray.is_initialized():
            ray.shutdown()

    def connect(self) -> None:
        """Start Ray on this machine, or join the cluster that the configuration or RAY_ADDRESS names.

        Raises:
            StageFailure: Ray does not start; or nodes of the cluster do not see the same folders and packages.
        """
        if not ray.is_initialized():
            self._start()
        if self.shared is not None:
            self._probe(self.shared)

    def _probe(self, shared: Path) -> None:
        """Ask the nodes that have not been asked, also those that joined since."""
        nodes = working_nodes()
        new = [node for node in nodes if node not in self._probed]
        if new and elsewhere(nodes):
            require_same_view(new, shared, self.folders)
            self._probed.update(new)

    def _start(self) -> None:
        address = cluster_address(self.config)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        # Ray hands the interpreter's path to a shell as it is; a space in it would cut it in two.
        runtime_env = {"py_executable": shlex.quote(sys.executable)} if " " in sys.executable else {}
        # how often Ray Train looks whether the workers are done: its own 2 s are a tenth of a short stage
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        # an actor that would have Ray Train start workers again while their node is drained: that is done below
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        for name in ("ray", "ray.train", "ray._private"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            if address:
                log.info("joining the Ray cluster at %s", address)
                require_listener(address)
                ray.init(address=address, runtime_env=runtime_env, **quiet)
            else:
                log.info("starting Ray on this machine")
                cpus = max(cpus_here(), self.config.workers * (self.config.cpus_per_worker or 1))
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, runtime_env=runtime_env, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            if not address:
                raise StageFailure(f"Ray does not start on this machine: {error}") from error
            token = "" if "RAY_AUTH_MODE" in os.environ else f". {IF_IT_ASKS}"
            raise StageFailure(f"Ray does not join the cluster at {address}: {error}{token}") from error
        preemption.install()  # Ray has set a handler of its own for SIGTERM

    def run_workers(
        self, job: Job, spec: dict[str, Any], stage: str, run_path: Path, *,
        usable: Usable = lambda _: True, prepare: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Run `job(worker, spec)` on every worker; start all again when one was killed, so jobs must resume.

        Args:
            job: what each does.
            spec: what it is given.
            stage: its name.
            run_path: the run folder.
            usable: whether so many workers, fewer than `cluster.workers`, can share the work.
            prepare: called with the number of workers each time before they start.

        Raises:
            MPrunerError: what a worker raised, with its rank and host; a worker killed too often; or no room.
            Preempted: a worker, or this process, was told to stop by a signal.
        """
        self.connect()
        with preemption.asking_first(stop_request(run_path / "logs", stage)):
            self._run_workers(job, spec, stage, run_path / "logs", usable, prepare)

    def _run_workers(
        self, job: Job, spec: dict[str, Any], stage: str, logs: Path, usable: Usable, prepare: Callable[[int], None]
    ) -> None:
        said(logs, stage).unlink(missing_ok=True)
        for attempt in range(self.config.max_restarts + 1):
            place = self._find_place(usable)
            prepare(place.workers)
            preemption.stop_if_told()
            for rank in range(self.config.workers):
                worker_note(logs, stage, rank).unlink(missing_ok=True)
            settings = {
                "job": job, "spec": spec, "device": place.device, "cpus": place.cpus, "logs": str(logs), "stage": stage,
            }  # fmt: skip
            trainer = _Trainer(
                # not as `train_loop_config`, which Ray Train's controller reads, importing all that the job needs
                functools.partial(_run_job, settings),
                torch_config=TorchConfig(
                    backend="nccl" if place.device == "cuda" else "gloo", timeout_s=self.patience_s
                ),
                scaling_config=ScalingConfig(
                    num_workers=place.workers, use_gpu=place.device == "cuda", resources_per_worker=place.resources,
                    placement_strategy=self.placement,
                ),
                run_config=RunConfig(
                    name=f"{stage}-{time.time_ns()}", storage_path=str(logs / "ray"),
                    # else Ray Train would wait for ever for workers that cannot start, or start them again by itself,
                    # as many as before and unprepared, where they were lost with a node that was drained
                    failure_config=FailureConfig(controller_failure_limit=0, max_preemption_failures=0),
                    callbacks=[LeaveWordOfEnd(logs, stage)],
                ),
            )  # fmt: skip
            try:
                with show_progress(logs / "progress.json"):
                    trainer.fit()
                shutil.rmtree(logs / "ray", ignore_errors=True)  # empty folders of Ray Train: one left does no harm
                _repeat(said(logs, stage))
                return
            except TrainingFailedError as error:
                lost = explain(error, stage, logs, place.workers, joined=self._joined())
                # A worker that dies while the group starts leaves its resources reserved; leaving Ray frees them.
                ray.shutdown()
                if attempt == self.config.max_restarts:
                    raise StageFailure(f"{lost}; gave up after {attempt} restart(s)") from error
                log.warning("%s; starting the workers again (%d of %d)", lost, attempt + 1, self.config.max_restarts)
                self.connect()

    def run_tasks(self, function: Callable[[Item], Result], items: list[Item], progress: Path) -> list[Result]:
        """`[function(item) for item in items]`, each call a Ray task; tells its progress to a file.

        A task whose process is killed, or whose node is lost, is given to another, three times.

        Raises:
            MPrunerError: what a task raised.
            StageFailure: its process was killed each time; or no CPU is free on a cluster that was there before.
            Preempted: this process was told to stop by a signal.
        """
        self.connect()
        if self._joined():
            await_room(self.config)
        remote = ray.remote(num_cpus=1)(function)
        label = function.__name__.replace("_", " ")
        try:
            with preemption.asking_first(None), show_progress(progress):
                writer = ProgressWriter(progress, label, "done", len(items))
                references = [remote.remote(item) for item in items]
                waiting = references
                while waiting:
                    done, waiting = ray.wait(waiting, timeout=1)  # and hear a signal where others took the CPUs
                    ray.get(done)  # raises what the task raised
                    writer.tell(len(items) - len(waiting))
                    preemption.stop_if_told()
                return list(ray.get(references))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, MPrunerError):
                raise type(cause)(str(cause)) from error
            raise
        except ray.exceptions.RayError as error:
            raise StageFailure(f"{label}: a process was killed again and again ({first_line(error)})") from error

    def resources(self) -> dict[str, float]:
        """What the cluster has, busy or free."""
        return dict(ray.cluster_resources())

    def device(self) -> str:
        """Where workers compute, cpu or cuda: for all stages the same, for a lost node must not take the GPUs away."""
        self._device = self._device or choose_device(self.config, living_nodes(), self._joined())
        return self._device

    def _joined(self) -> bool:
        return cluster_address(self.config) is not None

    def _find_place(self, usable: Usable) -> Place:
        return find_place(self.config, self.device(), joined=self._joined(), usable=usable)


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """One that leaves Ctrl-C to `stop_on_signals`: Ray Train's handler ends the process with 1, without a word."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Set none: the KeyboardInterrupt comes out of `fit`."""


def cpus_here() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _repeat(messages: Path) -> None:
    """Print what the workers said, each once."""
    if messages.exists():
        for message in dict.fromkeys(messages.read_text().splitlines()):
            log.info("  %s", message)
        messages.unlink()


def _run_job(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker."""
    if settings["device"] == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported: it looks for devices at import
    # DeepSpeed calls `ninja`, which lies beside this interpreter; a worker's PATH may not name that folder
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    import torch

    torch.set_num_threads(settings["cpus"])
    context = ray.train.get_context()
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_workers=context.get_local_world_size(),
        device_kind=settings["device"],
        logs=Path(settings["logs"]),
        stage=settings["stage"],
        node=ray.get_runtime_context().get_node_id(),
    )
    worker.run(settings["job"], settings["spec"])
