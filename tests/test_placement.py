"""Clusters of several nodes: what fits on them, who waits for whom, and what is done without a node that is lost."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import Mpruner, make_text, write_config
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from test_resume import wait_for

from mpruner_dist.cluster.address import cluster_address
from mpruner_dist.cluster.nodes import Node, living_nodes
from mpruner_dist.cluster.placement import choose_device, cpus_each
from mpruner_dist.cluster.session import RaySession
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import ClusterConfig
from mpruner_dist.errors import StageFailure, UserError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import this file

# a node that does not answer is dead within seconds
SYSTEM = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}  # fmt: skip


def nodes(*each: tuple[int, int]) -> list[Node]:
    return [
        Node(f"{number}", f"n{number}", f"10.0.0.{number}", {"CPU": cpus, "GPU": gpus})
        for number, (cpus, gpus) in enumerate(each)
    ]


def test_a_worker_is_on_one_node() -> None:
    assert sum(node.holds({"CPU": 4}) for node in nodes(*[(2, 0)] * 4)) == 0
    assert sum(node.holds({"CPU": 4, "GPU": 1}) for node in nodes((64, 2), (7, 8), (4, 0))) == 3


@pytest.mark.parametrize(
    ("workers", "device", "has", "joined", "cpus"),
    [
        (1, "cpu", [(8, 0)], False, 8),
        (3, "cpu", [(8, 0)], False, 2),
        (9, "cpu", [(8, 0)], True, 1),  # does not fit anyway
        (2, "cpu", [(4, 0), (4, 0)], True, 4),
        (3, "cpu", [(4, 0), (4, 0)], True, 2),
        (3, "cpu", [(2, 0), (9, 0)], True, 3),
        (4, "cuda", [(4, 0), (64, 8), (64, 8)], True, 8),  # others may use the other GPUs
        (4, "cuda", [(64, 8), (16, 4)], True, 4),
        (4, "cuda", [(64, 8), (2, 8)], True, 8),  # a node without a CPU for each GPU is not reckoned with
        (2, "cuda", [(64, 8)], False, 32),
    ],
)
def test_cpus_of_a_worker_follow_from_the_nodes(
    workers: int, device: str, has: list[tuple[int, int]], joined: bool, cpus: int
) -> None:
    assert cpus_each(workers, device, nodes(*has), joined) == cpus


@pytest.mark.parametrize(
    ("settings", "device"),
    [
        ({"workers": 4}, "cuda"),
        ({"workers": 5}, "cpu"),
        ({"workers": 8, "min_workers": 4}, "cuda"),
        ({"workers": 8, "min_workers": 5}, "cpu"),
        ({"workers": 8, "device": "cuda"}, "cuda"),
    ],
)
def test_gpus_are_taken_where_there_are_enough(settings: dict[str, Any], device: str) -> None:
    assert choose_device(ClusterConfig(**settings), nodes((8, 0), (8, 2), (8, 2)), joined=True) == device


@pytest.mark.parametrize("usable", [False, True])
def test_gpus_that_torch_cannot_use_are_not_taken(
    usable: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a torch for CPUs, or for a newer driver. Elsewhere on a cluster, torch may be another one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: usable)
    monkeypatch.setattr("mpruner_dist.cluster.placement.is_nccl_available", lambda: True)
    here = nodes((8, 2))
    assert choose_device(ClusterConfig(workers=2), here, joined=False) == ("cuda" if usable else "cpu")
    assert ("2 GPU(s) that torch" in caplog.text) == (not usable)
    assert choose_device(ClusterConfig(workers=2, device="cpu"), here, joined=False) == "cpu"
    assert choose_device(ClusterConfig(workers=2), here, joined=True) == "cuda"
    if not usable:
        with pytest.raises(
            StageFailure, match=r"cannot use: install a torch for its driver, or set cluster\.device cpu"
        ):
            choose_device(ClusterConfig(workers=2, device="cuda"), here, joined=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": SYSTEM}
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def second(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1)


def note_the_number(worker: Worker, spec: dict[str, Any]) -> None:
    worker.barrier()
    (Path(spec["folder"]) / f"{worker.rank} of {worker.world_size}").touch()


def upper(text: str) -> str:
    return text.upper()


OTHER_JOB = """
import sys, time, pathlib, ray
ray.init(address=sys.argv[1], log_to_driver=False)
group = ray.util.placement_group([{"CPU": 1}])
ray.get(group.ready())
pathlib.Path(sys.argv[2]).touch()
time.sleep(600)
"""


def test_an_address_of_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(UserError, match=r"ray://head:10001 is an address of Ray Client: .* mpruner submit ray"):
        RaySession(ClusterConfig()).connect()
    monkeypatch.setenv("RAY_ADDRESS", "")  # set to nothing names no cluster
    assert cluster_address(ClusterConfig()) is None


@pytest.mark.ray
def test_a_busy_cluster(cluster: Cluster, second: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another job has one of two CPUs: fewer workers do, or none fit; when it ends, those that wait go on."""
    caplog.set_level(logging.INFO)
    for name in ("logs", "few", "all"):
        (tmp_path / name).mkdir()
    other = subprocess.Popen([sys.executable, "-c", OTHER_JOB, cluster.address, str(tmp_path / "held")])
    try:
        wait_for((tmp_path / "held").exists, other)
        common = {"address": cluster.address, "workers": 2, "device": "cpu", "cpus_per_worker": 1}
        with RaySession(ClusterConfig(**common, wait_s=0)) as session:
            with pytest.raises(StageFailure) as refused:
                session.run_workers(note_the_number, {"folder": tmp_path}, "test", tmp_path)
            message = str(refused.value)
            assert message.startswith("1 of 2 workers of 1 CPU fit on the Ray cluster after 0 s; if it were idle, 2 ")
            assert message.count(" has 1 CPU; ") == 2
            assert "free in all: 1 CPU. Lower cluster.workers or" in message
            session.config = ClusterConfig(**common, wait_s=0, min_workers=1)
            session.run_workers(note_the_number, {"folder": tmp_path / "few"}, "test", tmp_path)
            assert "only 1 of 2 workers of 1 CPU fit: going on with 1 (cluster.min_workers 1)" in caplog.text
            with pytest.raises(StageFailure, match="no number from 1 to 1 divides the work"):
                session.run_workers(note_the_number, {}, "test", tmp_path, usable=lambda number: number != 1)
            second_job = subprocess.Popen([sys.executable, "-c", OTHER_JOB, cluster.address, str(tmp_path / "both")])
            try:
                wait_for((tmp_path / "both").exists, second_job)
                with pytest.raises(StageFailure, match="no CPU of the Ray cluster was free within 0 s"):
                    session.run_tasks(upper, ["a"], tmp_path / "progress.json")
            finally:
                second_job.kill()
                second_job.wait()
            session.config = ClusterConfig(**common, wait_s=100, min_workers=1)
            assert session.run_tasks(upper, ["a", "b"], tmp_path / "progress.json") == ["A", "B"]
            caplog.clear()
            threading.Timer(5, other.kill).start()
            session.run_workers(note_the_number, {"folder": tmp_path / "all"}, "test", tmp_path)
            assert "waiting at most 100 s for room for 2 worker(s) of 1 CPU on the Ray cluster" in caplog.text
            session.config = ClusterConfig(**common | {"cpus_per_worker": 2}, wait_s=0)
            with pytest.raises(StageFailure, match=r"^0 of 2 workers of 2 CPUs .* even if it were idle, only 0 would"):
                session.run_workers(note_the_number, {}, "test", tmp_path)
    finally:
        other.kill()
        other.wait()
    assert [path.name for path in (tmp_path / "few").iterdir()] == ["0 of 1"]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["0 of 2", "1 of 2"]


class Busy:
    """An actor."""


@pytest.mark.ray
def test_nothing_is_placed_on_a_node_that_is_drained(cluster: Cluster) -> None:
    """As a machine that its cloud takes back."""
    third = cluster.add_node(num_cpus=1)
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id",
             third.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "it is wanted back",
             "--deadline-remaining-seconds", "600"]  # fmt: skip
    with RaySession(ClusterConfig(address=cluster.address)) as session:
        session.connect()
        before = {node.id for node in living_nodes()}
        there = NodeAffinitySchedulingStrategy(third.node_id, soft=False)
        busy = ray.remote(num_cpus=1)(Busy).options(scheduling_strategy=there).remote()  # an idle one ends at once
        ray.get(busy.__ray_ready__.remote())
        subprocess.run(drain, check=True)
        assert before - {node.id for node in living_nodes()} == {third.node_id}
        assert third.node_id in {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    cluster.remove_node(third)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_nodes_lost_in_collection_and_in_retraining(
    cluster: Cluster, second: Any, settings: dict[str, Any], start: Mpruner, mpruner: Any, tmp_path: Path
) -> None:
    """It goes on with the worker that is left; the similarities are those of a run that lost nothing."""
    make_text(tmp_path / "text.jsonl", records=2000)
    for part in ("calibration", "train", "validation", "test"):
        settings["data"][part]["path"] = str(tmp_path / "text.jsonl")
    settings["collect"] |= {"num_batches": 300, "save_every": 1}
    settings["retrain"] |= {"steps": 150, "save_every": 5, "eval_every": 150, "distillation": None}
    config = write_config(tmp_path / "config.yaml", settings)
    run = tmp_path / "run"
    alone = start("collect", config, "--run-dir", tmp_path / "alone")
    options = {"workers": 2, "min_workers": 1, "wait_s": 2, "address": cluster.address}
    process = start(
        "run", config, "--run-dir", run, *(word for key, value in options.items()
                                           for word in ("--set", f"cluster.{key}={value}"))
    )  # fmt: skip
    wait_for(lambda: list(run.glob("stats/*/from-*.safetensors")), process, 300)
    cluster.remove_node(second, allow_graceful=False)
    log = run / "logs/collect-rank0.log"
    wait_for(lambda: log.read_text().count("collect_job on cpu") == 2, process, 300)  # alone now
    third = cluster.add_node(num_cpus=1)
    wait_for(lambda: list(run.glob("retrain/*/step-*/mpruner.json")), process, 400)
    assert workers_of(run) == [2]
    cluster.remove_node(third, allow_graceful=False)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert output.count("going on with 1 (cluster.min_workers 1)") >= 2
    assert output.count("starting the workers again (1 of 2)") == 2
    assert "under ZeRO stage 1, for 1 worker under ZeRO stage 1" in output
    assert workers_of(run) == [1]
    losses = json.loads((run / "retrain.json").read_text())["loss"]
    assert [step for step, _ in losses] == list(range(1, 151))
    said, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, said
    assert json.loads((run / "cka.json").read_text()) == json.loads((tmp_path / "alone/cka.json").read_text())


def workers_of(run: Path) -> list[int]:
    """By how many workers the newest checkpoint was saved."""
    newest = max(run.glob("retrain/*/step-*/mpruner.json"))
    return [json.loads(newest.read_text())["workers"]]
