"""Which shape is chosen, and why."""

import re
from pathlib import Path

import pytest
import torch

from mpruner_dist.cluster import control_group
from mpruner_dist.cluster.shape import choose_shape, free_memory, require_room_to_load
from mpruner_dist.errors import StageFailure

GB = 10**9


def tensors(gigabytes: float) -> list[int]:
    """Elements of as many tensors of 2 MB, of 2 bytes each, as take so much; pinned, a twentieth more."""
    return [10**6] * round(gigabytes * 500)


@pytest.mark.parametrize(
    ("weights", "workers", "free", "beside", "stage", "offload", "reason"),
    [
        (1, 1, 2, None, 0, False, "a replica on each worker: the weights take 1.0 GB, 2.0 GB are free"),
        (14, 1, 80, 100, 0, False, "a replica"),
        (14, 2, 16, None, 3, False, r"partitions \(ZeRO stage 3\): the weights take 14.0 GB, a partition 7.0 GB and"),
        (32, 8, 80, 20, 3, False, "a partition 4.0 GB"),  # eight replicas would be loaded through 160 GB at once
        (140, 8, 80, 100, 3, False, "a partition 17.5 GB and what is gathered 2.0 GB, 80.0 GB are free"),
        (140, 1, 80, 200, 3, True, r"partitions in CPU memory .*80.0 GB are free .* and 200.0 GB of CPU memory"),
        (140, 4, 24, 60, 3, True, "pinned, a partition takes 36.7 GB"),
    ],
)  # fmt: skip
def test_the_quickest_shape_that_fits(
    weights: int, workers: int, free: int, beside: int | None, stage: int, offload: bool, reason: str
) -> None:
    shape = choose_shape(tensors(weights), 2, workers, free * GB, beside * GB if beside else None)
    assert (shape.stage, shape.offload) == (stage, offload)
    assert re.search(reason, shape.reason)


@pytest.mark.parametrize(
    ("weights", "workers", "free", "beside"), [(14, 1, 16, None), (14, 4, 5, None), (140, 1, 80, 100), (140, 8, 2, 100)]
)
def test_nothing_fits(weights: int, workers: int, free: int, beside: int | None) -> None:
    with pytest.raises(StageFailure, match=rf"does not fit: the weights take {weights}.0 GB.*more workers.*nvme"):
        choose_shape(tensors(weights), 2, workers, free * GB, beside * GB if beside else None)


def test_replicas_to_train_are_not_loaded_where_there_is_no_room() -> None:
    require_room_to_load(28 * GB, 8, None)  # on CPUs they stay where they are loaded
    require_room_to_load(28 * GB, 1, 25 * GB)
    require_room_to_load(28 * GB, 8, 40 * GB)
    with pytest.raises(StageFailure, match=r"28\.0 GB, .* 25\.0 GB are free for it: set retrain\.zero_stage 3"):
        require_room_to_load(28 * GB, 8, 25 * GB)


def test_pinned_memory_is_counted_as_torch_reserves_it() -> None:
    """Each of the partitions of 2.1 MB takes 4 MiB."""
    elements = [1_050_000] * 14_000
    assert choose_shape(elements, 2, 1, 24 * GB, 80 * GB).offload
    with pytest.raises(StageFailure, match=r"47\.0 GB of CPU memory, where a partition would take 58\.7 GB"):
        choose_shape(elements, 2, 1, 24 * GB, 47 * GB)


def test_the_logits_of_a_batch_need_room_too() -> None:
    """Of 7B on 24 GB: a replica alone fits, but not beside batches of long texts."""
    assert choose_shape(tensors(15.2), 2, 8, 24 * GB, 400 * GB).stage == 0
    shape = choose_shape(tensors(15.2), 2, 8, 24 * GB, 400 * GB, 12 * GB)
    assert (shape.stage, shape.offload) == (3, False)
    assert "24.0 GB are free for each worker, 12.0 GB of them for the logits of a batch" in shape.reason
    with pytest.raises(StageFailure, match=r"Use a smaller evaluate\.batch_size, more workers"):
        choose_shape(tensors(15.2), 2, 8, 24 * GB, 400 * GB, 30 * GB)


def test_free_memory_of_this_machine_is_shared_by_its_workers() -> None:
    one, beside = free_memory(torch.device("cpu"), 1)
    assert beside is None
    assert 10**8 < one < 10**14
    four, _ = free_memory(torch.device("cpu"), 4)
    assert four == pytest.approx(one / 4, rel=0.2)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_job_is_that_of_its_group_or_of_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    own = {1: "12:cpu,cpuacct:/\n7:memory:/slurm/job_5/step_0\n0::/\n", 2: "0::/slurm/job_5/step_0\n"}[version]
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
        2: ("memory.max", "memory.current", "file", "shmem"),
    }[version]
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(control_group, "GROUPS", tmp_path)
    monkeypatch.setattr(control_group, "OWN", tmp_path / "own")
    assert control_group.memory_limit() is None
    assert control_group.memory_left() is None
    none = {1: str(2**63 - 4096), 2: "max"}[version]
    root = tmp_path / "memory" if version == 1 else tmp_path
    for folder, limit in (("slurm", "9000"), ("slurm/job_5", "5000"), ("slurm/job_5/step_0", none)):
        (root / folder).mkdir(parents=True)
        (root / folder / names[0]).write_text(f"{limit}\n")
        (root / folder / names[1]).write_text("4000\n")
        (root / folder / "memory.stat").write_text(f"anon 1\n{names[2]} 3000\n{names[3]} 500\n")
    assert control_group.memory_limit() == 5000
    assert control_group.memory_left() == 5000 - (4000 - 2500)
