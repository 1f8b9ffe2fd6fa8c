"""Two real Ray nodes: that both see the same storage and packages, and what is said where one does not."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import can_unshare, write_config
from ray.cluster_utils import Cluster

from mpruner_dist.cluster import probe
from mpruner_dist.cluster.look import contents, exchange
from mpruner_dist.cluster.nodes import Node, working_nodes
from mpruner_dist.cluster.probe import require_same_view
from mpruner_dist.cluster.session import RaySession
from mpruner_dist.config import ClusterConfig
from mpruner_dist.errors import StageFailure

needs_unshare = pytest.mark.skipif(not can_unshare(), reason="no mount namespaces here (unshare -rm)")


def join(address: str, mounts: str, *arguments: Path) -> "subprocess.Popen[bytes]":
    """A second node, with a name and mounts of its own: the shell command `mounts` has the paths as $1, $2, ..."""
    node = (
        f"{shlex.quote(sys.executable)} -m ray.scripts.scripts start --address={address} --num-cpus=2 --block "
        "--object-store-memory=100000000"
    )
    return subprocess.Popen(
        ["unshare", "-rmu", "bash", "-c", f"hostname other-node && {mounts} && exec {node}", "-", *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


Join = Callable[..., RaySession]


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Join]:
    """Add a node with other mounts to a cluster of one; gives the session that would use it."""
    (tmp_path / "run").mkdir()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"0" * 64)
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100_000_000})
    session = RaySession(ClusterConfig(workers=2, device="cpu", address=head.address), None, [model])
    others = []

    def begin(mounts: str, *arguments: Path) -> RaySession:
        session.shared = None  # not asked before the new node is there
        session.connect()
        others.append(join(head.address, mounts, *arguments))
        until = time.monotonic() + 90
        while len(working_nodes()) <= len(others):
            assert time.monotonic() < until, "the new node does not come"
            time.sleep(0.2)
        session.shared = tmp_path / "run"
        return session

    yield begin
    ray.shutdown()
    for other in others:
        other.terminate()
        other.wait(timeout=30)
    head.shutdown()


@pytest.mark.ray
@pytest.mark.unshare
@needs_unshare
def test_nodes_that_see_the_same_are_asked_once_and_new_ones_when_they_come(
    two_nodes: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = two_nodes("true")
    session.connect()
    assert list((tmp_path / "run").iterdir()) == [], "the probe leaves nothing"

    asked: list[list[Node]] = []
    monkeypatch.setattr("mpruner_dist.cluster.session.require_same_view", lambda nodes, *_: asked.append(nodes))
    session.connect()
    assert asked == []
    known = set(working_nodes())
    two_nodes("true")  # one more
    session.connect()
    assert [set(nodes) for nodes in asked] == [set(working_nodes()) - known]


@pytest.mark.ray
@pytest.mark.unshare
@needs_unshare
def test_a_node_with_other_storage_and_packages_is_named_with_all_that_it_saw(two_nodes: Join, tmp_path: Path) -> None:
    """The second node has an empty run folder, another model, another transformers and no deepspeed."""
    packages = Path(ray.__file__).parent.parent
    transformers = next(packages.glob("transformers-*.dist-info"))
    deepspeed = next(packages.glob("deepspeed-*.dist-info"))
    other = tmp_path / "other"
    shutil.copytree(transformers, other / "transformers")
    metadata = other / "transformers" / "METADATA"
    version = transformers.name.removeprefix("transformers-").removesuffix(".dist-info")
    metadata.write_text(metadata.read_text().replace(f"Version: {version}", "Version: 4.0.1", 1))
    shutil.copytree(tmp_path / "model", other / "model")
    (other / "model" / "model.safetensors").write_bytes(b"0" * 32)
    (other / "empty").mkdir()
    mounts = 'mount -t tmpfs none "$1" && mount --bind "$2" "$3" && mount --bind "$4" "$5" && mount --bind "$6" "$7"'
    session = two_nodes(
        mounts, tmp_path / "run", other / "model", tmp_path / "model",
        other / "transformers", transformers, other / "empty", deepspeed,
    )  # fmt: skip
    with pytest.raises(StageFailure) as error:
        session.connect()
    message = str(error.value)
    assert message.startswith("1 of 2 nodes cannot take part in this run:\n"), message
    assert "  other-node (node " in message
    assert f"{tmp_path / 'run'} is another folder there, or stale" in message
    assert (
        f"{tmp_path / 'model'} holds something else there: model.safetensors: 32 bytes there, 64 bytes here" in message
    )
    assert f"transformers is 4.0.1 there, {version} here" in message
    assert "deepspeed is not installed there" in message
    assert f"mpruner doctor --run-dir {tmp_path / 'run'}" in message
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.ray
@pytest.mark.unshare
@needs_unshare
def test_a_node_that_may_not_write_and_one_that_hangs(
    two_nodes: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = two_nodes('mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"', tmp_path / "run")
    nodes = working_nodes()
    with pytest.raises(StageFailure, match=r"1 of 2 nodes (?s:.*)cannot be written to from there: Read-only"):
        session.connect()

    def hangs(*_: Any) -> None:
        time.sleep(60)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(probe.look, "look", hangs)  # as a dead network file system would
    with pytest.raises(StageFailure, match=r"2 of 2 nodes (?s:.*)did not answer within 5 s: a file system that hangs"):
        require_same_view(nodes, tmp_path / "run", [], deadline=5)


@pytest.mark.ray
@pytest.mark.unshare
@needs_unshare
def test_a_run_says_it_before_its_text_is_prepared(
    two_nodes: Join, tmp_path: Path, settings: dict[str, Any], mpruner: Callable[..., tuple[int, str]]
) -> None:
    session = two_nodes('mount -t tmpfs none "$1"', tmp_path / "run")
    settings["cluster"]["address"] = session.config.address
    code, output = mpruner("run", write_config(tmp_path / "c.yaml", settings), "--run-dir", tmp_path / "run")
    assert code == 1
    assert "1 of 2 nodes cannot take part in this run" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "data").exists()


def test_what_a_node_can_see_in_a_folder(tmp_path: Path) -> None:
    place = tmp_path / "shared" / ".probe-x"
    assert exchange(place, "word", "node") == f"the folder {tmp_path / 'shared'} does not exist there"
    place.mkdir(parents=True)
    (place / "driver").write_text("an older word")
    assert "is stale there" in str(exchange(place, "word", "node"))
    (place / "driver").write_text("word")
    assert exchange(place, "word", "node") is None
    assert (place / "node").read_text() == "word node"
    assert contents(tmp_path / "gone") == {"wrong": f"the folder {tmp_path / 'gone'} does not exist there"}
    (tmp_path / "shared" / "a.safetensors").symlink_to(tmp_path / "gone")
    assert "a.safetensors cannot be read there: No such file" in contents(tmp_path / "shared")["wrong"]


@pytest.mark.ray
@pytest.mark.unshare
@needs_unshare
def test_doctor_on_two_nodes_puts_a_worker_on_each(
    two_nodes: Join, tmp_path: Path, mpruner: Callable[..., tuple[int, str]]
) -> None:
    address = str(two_nodes("true").config.address)
    code, output = mpruner("doctor", "--address", address, "--device", "cpu")
    assert code == 1
    assert "failed  nodes: the cluster has nodes beside this one: give --run-dir a folder on storage that all" in output
    assert "skipped all-reduce: it needs: nodes" in output
    code, output = mpruner("doctor", "--address", address, "--device", "cpu", "--run-dir", tmp_path / "run")
    assert code == 0, output
    assert "ok      Ray: joined the cluster: 2 node(s), 4 CPUs" in output
    assert "other-node" in output
    code, output = mpruner("env", "--json", env=os.environ | {"RAY_ADDRESS": address})
    assert json.loads(output)["Ray"]["nodes"] == 2
    assert address.split(":")[0] not in output
