"""Real Ray workers: what they know, how they fail, and that killed ones start again."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from mpruner_dist.cluster.preemption import stop_on_signals
from mpruner_dist.cluster.session import RaySession
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import ClusterConfig
from mpruner_dist.errors import Interrupted, Preempted, StageFailure, UserError

pytestmark = pytest.mark.ray
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import this file

TWO = ClusterConfig(workers=2, device="cpu", cpus_per_worker=1, max_restarts=1)


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with RaySession(TWO) as session:
        yield session


def write_what_it_knows(worker: Worker, spec: dict[str, Any]) -> None:
    from mpruner_dist.cluster.engine import start_deepspeed

    start_deepspeed(worker.device)
    total = worker.sum_over_workers(torch.full((2,), 10.0**worker.rank, dtype=torch.float64))
    threads, host = torch.get_num_threads(), worker.host
    (Path(spec["folder"]) / f"{worker.rank}.txt").write_text(f"{worker.world_size} {threads} {total.tolist()} {host}")
    print("a word for the log")


def test_every_worker_runs_the_job_and_sums_agree(session: RaySession, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    session.run_workers(write_what_it_knows, {"folder": str(tmp_path)}, "test", tmp_path)
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == f"2 1 [11.0, 11.0] {os.uname().nodename}"
        assert "a word for the log" in (tmp_path / "logs" / f"test-rank{rank}.log").read_text()


def kill_yourself(worker: Worker, spec: dict[str, Any]) -> None:
    worker.doing(f"batch {7 + worker.rank}")
    if worker.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    worker.barrier()


def test_a_worker_killed_again_and_again_is_one_message(session: RaySession, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(StageFailure, match=r"(?s)^test: .*killed.* at batch 8.*; gave up after 1 restart"):
        session.run_workers(kill_yourself, {}, "test", tmp_path)


def fail(worker: Worker, spec: dict[str, Any]) -> None:
    if worker.rank == 1:
        if spec["kind"] == "ours":
            raise UserError("the text is empty")
        raise ZeroDivisionError("a bug")
    worker.barrier()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("ours", UserError, r"test: rank 1 on \S+ failed: the text is empty"),
        ("bug", StageFailure, r"test: rank 1 on \S+ failed: ZeroDivisionError: a bug; its log: .*test-rank1.log"),
    ],
)
def test_a_failure_is_one_message_with_rank_and_host(
    session: RaySession, tmp_path: Path, kind: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(error, match=message):
        session.run_workers(fail, {"kind": kind}, "test", tmp_path)
    assert "Traceback" in (tmp_path / "logs" / "test-rank1.log").read_text()


def work_until_told(worker: Worker, spec: dict[str, Any]) -> None:
    folder = Path(spec["folder"])
    with (folder / "attempts").open("a") as file:
        file.write(f"{worker.rank}\n")
    (folder / f"pid{worker.rank}").write_text(str(os.getpid()))
    step = 0
    while spec["is_deaf"] or not worker.must_stop():
        step += 1
        time.sleep(0.01)
    if spec["dies"] and worker.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"saved{worker.rank}").write_text(str(step))
    worker.stop(f"step {step} is saved")


def told(session: RaySession, folder: Path, whom: str, *signals: int, deaf: bool = False, dies: bool = False) -> str:
    """The message with which the work ends after these signals to a rank or to this process, the driver."""
    (folder / "logs").mkdir()

    def send() -> None:
        for rank in range(2):
            while not (folder / f"pid{rank}").exists() or not (folder / f"pid{rank}").read_text():
                time.sleep(0.01)
        for number in signals:
            os.kill(os.getpid() if whom == "driver" else int((folder / f"pid{whom}").read_text()), number)
            while whom == "driver" and not (folder / "logs/.test-stop").exists():
                time.sleep(0.01)  # Ray lets handlers run once a second: two signals at once would be one

    sender = threading.Thread(target=send)
    sender.start()
    spec = {"folder": str(folder), "is_deaf": deaf, "dies": dies}
    with pytest.raises(Preempted) as error, stop_on_signals():
        session.run_workers(work_until_told, spec, "test", folder)
    sender.join()
    assert sorted((folder / "attempts").read_text().split()) == ["0", "1"], "started again"
    return str(error.value)


def be_ended_for_a_partner(worker: Worker, spec: dict[str, Any]) -> None:
    partner_died = Path(spec["folder"]) / "partner_died"
    if not partner_died.exists():
        worker.barrier()
        if worker.rank == 1:
            partner_died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while not worker._signals.received():  # a long step
            time.sleep(0.01)
        worker.must_stop()
    (Path(spec["folder"]) / f"done{worker.rank}").touch()


def test_a_worker_that_ray_ends_for_a_partners_death_was_not_told_to_stop(
    session: RaySession, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").mkdir()
    session.run_workers(be_ended_for_a_partner, {"folder": str(tmp_path)}, "test", tmp_path)
    assert f"test: rank 1 on {os.uname().nodename} was killed" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done0", "done1"]


def expect_ended(folder: Path) -> None:
    """Ray can end its workers although they take SIGTERM for something else."""
    processes = [int((folder / f"pid{rank}").read_text()) for rank in range(2)]
    deadline = time.monotonic() + 30
    while alive := [process for process in processes if Path(f"/proc/{process}").exists()]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(session: RaySession, tmp_path: Path) -> None:
    message = told(session, tmp_path, "1", signal.SIGTERM)
    step = int((tmp_path / "saved0").read_text())
    assert (tmp_path / "saved1").read_text() == str(step)
    got = f"rank 1 on {os.uname().nodename} got SIGTERM"
    assert message == f"test: {got}; step {step} is saved; the same command goes on"
    expect_ended(tmp_path)


def get_a_signal_too_late(worker: Worker, spec: dict[str, Any]) -> None:
    assert not worker.must_stop()
    if worker.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR2)  # in the middle of an export, say
        while not worker._signals.received():  # another thread is interrupted
            time.sleep(0.01)
    (Path(spec["folder"]) / f"exported{worker.rank}").touch()


def test_a_signal_after_the_jobs_last_look_is_not_lost(session: RaySession, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(Preempted) as error:
        session.run_workers(get_a_signal_too_late, {"folder": str(tmp_path)}, "test", tmp_path)
    got = f"rank 1 on {os.uname().nodename} got SIGUSR2"
    assert str(error.value) == f"test: {got}; its work is done; the same command goes on"
    assert sorted(path.name for path in tmp_path.glob("exported*")) == ["exported0", "exported1"]


def test_a_signal_to_the_driver_stops_its_workers(session: RaySession, tmp_path: Path) -> None:
    message = told(session, tmp_path, "driver", signal.SIGTERM)
    step = int((tmp_path / "saved0").read_text())
    assert message == f"test: mpruner got SIGTERM; step {step} is saved; the same command goes on"


def test_a_worker_killed_after_a_signal_is_not_started_again(session: RaySession, tmp_path: Path) -> None:
    message = told(session, tmp_path, "1", signal.SIGUSR2, dies=True)
    assert "rank 1" in message
    assert "got SIGUSR2" in message


def test_a_second_signal_to_the_driver_stops_at_once(session: RaySession, tmp_path: Path) -> None:
    message = told(session, tmp_path, "driver", signal.SIGUSR2, signal.SIGUSR2, deaf=True)
    assert message == "stopped by SIGUSR2; what was saved is kept, and the same command goes on"
    ray.shutdown()  # as the end of a command does
    expect_ended(tmp_path)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)]
    with pytest.raises(Preempted, match=r"^stopped by SIGTERM; what was saved is kept"), stop_on_signals():
        signal.raise_signal(signal.SIGTERM)  # no workers: at once
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)] == before
    with pytest.raises(Interrupted, match="the same command goes on"), stop_on_signals():
        signal.raise_signal(signal.SIGINT)


def sleep_and_count(path: str) -> None:
    Path(path).touch()
    time.sleep(0.3)


def test_tasks_stop_between_two(session: RaySession, tmp_path: Path) -> None:
    session.connect()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    many = [str(tmp_path / f"task{number}") for number in range(200)]
    with pytest.raises(Preempted, match=r"^stopped by SIGTERM; what is finished is kept"), stop_on_signals():
        session.run_tasks(sleep_and_count, many, tmp_path / "progress.json")
    assert 0 < len(list(tmp_path.glob("task*"))) < 200
    ray.shutdown()  # as the end of a command does: those that wait are not done


def double(number: int) -> int:
    if number < 0:
        raise UserError("no negative numbers")
    return 2 * number


def test_tasks_keep_their_order_and_their_errors(session: RaySession, tmp_path: Path) -> None:
    assert session.run_tasks(double, [3, 1, 2], tmp_path / "progress.json") == [6, 2, 4]
    with pytest.raises(UserError, match=r"^no negative numbers$"):
        session.run_tasks(double, [1, -1], tmp_path / "progress.json")


def die_while_there_is_no(marker: str) -> str:
    path = Path(marker)
    if not path.exists():
        path.with_name("begun").touch()
        if path.name == "later":
            path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def test_a_task_whose_process_is_killed_is_given_to_another(session: RaySession, tmp_path: Path) -> None:
    progress = tmp_path / "progress.json"
    assert session.run_tasks(die_while_there_is_no, [str(tmp_path / "later")], progress) == ["later"]
    assert (tmp_path / "begun").exists()
    with pytest.raises(StageFailure, match=r"^die while there is no: a process was killed again and again"):
        session.run_tasks(die_while_there_is_no, [str(tmp_path / "never")], progress)


def test_more_than_the_cluster_has_is_said_before_anything_starts(session: RaySession, tmp_path: Path) -> None:
    session.connect()  # one that asked for more would start Ray with as many CPUs
    greedy = RaySession(TWO.model_copy(update={"workers": 500}))
    with pytest.raises(StageFailure, match=r"^\d+ of 500 workers of 1 CPU fit on this machine; even if"):
        greedy.run_workers(fail, {}, "test", tmp_path)
