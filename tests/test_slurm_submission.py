"""What is handed to Slurm, and what is refused before."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, write_config

from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.submission import allocation, allotment, node, slurm
from mpruner_dist.submission.slurm import Shape, plan_submissions


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", settings)


def test_a_job_has_a_worker_on_each_gpu(config: Path, tmp_path: Path) -> None:
    settings = ["retrain.batch_size=32"]
    (job,) = plan_submissions(config, tmp_path / "run", settings, Shape("2", 8), ["--qos=long"])
    command = job.command(None)
    assert command[:2] == ["sbatch", "--parsable"]
    assert {"--nodes=2", "--gpus-per-node=8", "--qos=long"} <= set(command)
    assert command[command.index(str(slurm.SCRIPT)) + 1 :][:3] == [str(config), "--run-dir", str(tmp_path / "run")]
    assert {"cluster.workers=16", "cluster.device=cuda"} <= set(command)


def test_what_the_user_sets_stays(config: Path) -> None:
    (job,) = plan_submissions(config, None, ["cluster.workers=2"], Shape("1", 8), [])
    assert "cluster.workers=2" in job.arguments
    assert "cluster.workers=8" not in job.arguments


def test_a_chain_waits_for_its_first_job(config: Path) -> None:
    first, second = plan_submissions(config, None, [], Shape("1"), [], then=Shape("2"))
    assert first.arguments[-2:] == ["--until", "rewrite"]
    assert "--until" not in second.arguments
    assert {"--dependency=afterok:7", "--kill-on-invalid-dep=yes", "--nodes=2"} <= set(second.command("7"))


def test_a_sweep_collects_once(config: Path, tmp_path: Path) -> None:
    sweep = "plan.keep_layers=5,6"
    first, second = plan_submissions(config, tmp_path / "run", [], Shape("1"), [], sweep=sweep)
    assert first.arguments[-2:] == ["--command", "collect"]
    assert "--array=0-1" in second.options
    command, run = allocation.command_line(second.arguments, "1")
    assert run == tmp_path / "run-plan.keep_layers-6"
    assert command[command.index("--collected") + 1] == str(tmp_path / "run")
    assert command[command.index("--set") + 1] == "plan.keep_layers=6"
    with pytest.raises(UserError, match="no value for the task '2'"):
        allocation.command_line(second.arguments, "2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": Shape("two")}, "--nodes two: write a number"),
        ({"overrides": ["plan.keep_layer=3"]}, "did you mean 'keep_layers'"),
        ({"shape": Shape("3", 8)}, "retrain.batch_size 4 must be a multiple of cluster.workers 24"),
        ({"sweep": "plan.threshold"}, "write KEY=V1,V2"),
        ({"sweep": "plan.keep_layers=4,many"}, "keep_layers"),
        ({"sweep": "plan.keep_layers=4,5", "then": Shape("2")}, "do not go together"),
        ({"sweep": "plan.threshold=0.9,0.95"}, "plan.keep_layers is a budget, beside which no threshold is heard"),
        ({"sweep": "collect.samples=32,64"}, "are not the same for collect.samples 64: submit a run for each value$"),
        (
            {
                "sweep": "plan.threshold=0.98,0.9",
                "overrides": ["collect.until=settled", "plan.method=anchor", "plan.keep_layers=null"],
            },
            "not the same for plan.threshold 0.9: .*, or set collect.until all",
        ),
    ],
)
def test_mistakes_come_back_before_anything_is_submitted(config: Path, changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"config": config, "run_dir": None, "overrides": [], "shape": Shape("1"), "options": []}
    with pytest.raises(UserError, match=message):
        plan_submissions(**(given | changes))


def test_rounds_are_not_divided_among_jobs(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["plan"] = {"method": "influence", "keep_layers": 5}
    settings["rounds"] = {"tolerance": 0.1, "remove": 1}
    config = write_config(tmp_path / "config.yaml", settings)
    for divided in ({"then": Shape("2")}, {"sweep": "plan.keep_layers=4,5"}):
        with pytest.raises(UserError, match="a run in rounds does again and again"):
            plan_submissions(config, None, [], Shape("1"), [], **divided)  # type: ignore[arg-type]
    assert len(plan_submissions(config, None, [], Shape("1"), [])) == 1


@pytest.mark.parametrize(
    "limit", ["10", "10:30", "1:00:00", "0:10:00", "1-0", "1-2:30", "2-03:04:05", "0", "UNLIMITED"]
)
def test_times_of_slurm_are_understood(limit: str) -> None:
    slurm.require_time(limit)


@pytest.mark.parametrize(
    ("limit", "message"),
    [("2:00", "is 2 minutes: a start needs at least 10"), ("9", "is 9 minutes"), ("0:09:59", "is 9 minutes"),
     ("8h", "write MINUTES"), ("1:2:3:4", "write MINUTES"), ("-5", "write MINUTES")],
)  # fmt: skip
def test_a_limit_in_which_nothing_gets_done_is_refused(limit: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        slurm.require_time(limit)


def test_a_value_of_a_sweep_may_be_a_path(tmp_path: Path) -> None:
    _, run = allocation.command_line(
        ["c.yaml", "--run-dir", str(tmp_path / "run"), "--sweep", "plan.file=a/p.json"], "0"
    )
    assert run == tmp_path / "run-plan.file-a_p.json"


def test_settings_may_stand_before_the_configuration(tmp_path: Path) -> None:
    command, run = allocation.command_line(["--set", "a.b=c", "--until", "plan", "c.yaml", "--set", "d.e=f"], None)
    assert command[4] == "c.yaml"
    assert command[7:] == ["--set", "a.b=c", "--set", "d.e=f", "--until", "plan", "--set", "cluster.address=null"]
    assert run.name == "c"


def test_the_configuration_does_not_lead_to_another_ray() -> None:
    command, _ = allocation.command_line(["c.yaml", "--set", "cluster.address=10.0.0.1:6379"], None)
    assert command[-2:] == ["--set", "cluster.address=null"]


def test_what_does_not_stop_before_the_time_limit_is_killed_and_queued_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deaf = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGUSR2, signal.SIG_IGN)\n"
        "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    )
    nodes = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + allocation.LAST_S + 3))
        signals = allocation._Signals()

        def tell_when_it_is_deaf() -> None:
            while not (tmp_path / "deaf").exists():
                time.sleep(0.05)
            signals(signal.SIGUSR2, None)

        threading.Thread(target=tell_when_it_is_deaf, daemon=True).start()
        command = [sys.executable, "-c", deaf, str(tmp_path / "deaf")]
        assert allocation._run_command(command, dict(os.environ), signals, nodes) == 75
        assert "and is killed" in caplog.text
    finally:
        nodes.kill()
        nodes.wait()


def test_a_job_that_saves_nothing_before_its_time_limit_does_not_begin_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued: list[str] = []
    here = SimpleNamespace(job="7", restarts=0, hosts=["n1"], requeue=lambda: queued.append("7"))
    monkeypatch.setattr(allocation.Allocation, "here", lambda: here)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    step = tmp_path / "run/round-02/retrain/12ab/step-000010"

    def start(saves: bool = False) -> int:
        def command(*given: Any) -> int:
            given[-1].received = "SIGUSR2"
            step.mkdir(parents=True, exist_ok=True)
            (step / "weights").write_text("cut off")
            if saves:
                (step / "mpruner.json").touch()
            return 75

        monkeypatch.setattr(allocation, "_on_all_nodes", command)
        return allocation.run_in_allocation(["c.yaml", "--run-dir", str(tmp_path / "run")])

    assert [start(), start(), start(saves=True), start(), start()] == [75] * 5
    assert len(queued) == 5
    with pytest.raises(StageFailure, match="nothing was saved in 3 starts, each of which the time limit ended"):
        start()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 5000))  # preempted by others, long before
    assert [start(), start()] == [75] * 2
    assert len(queued) == 7


def test_a_program_that_is_not_there_is_said(tmp_path: Path) -> None:
    given = os.environ | {"MPRUNER_PYTHON": "/nowhere/python"}
    script = ["bash", str(ROOT / "slurm/prune.sbatch"), "c.yaml"]
    done = subprocess.run(script, env=given, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "MPRUNER_PYTHON names /nowhere/python, which is no program on" in done.stderr


def test_without_slurm_it_says_so(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        slurm.submit(plan_submissions(config, None, [], Shape("1"), []))


def test_the_script_outside_of_slurm_says_what_to_do(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    script = [str(ROOT / "slurm/prune.sbatch"), "config.yaml"]
    given = environment | {"MPRUNER_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", *script], env=given, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sbatch slurm/prune.sbatch CONFIG" in done.stderr
    assert list(tmp_path.iterdir()) == []
    missing = environment | {"MPRUNER_SITE": "/nowhere/site.env"}
    done = subprocess.run(["bash", *script], env=missing, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "MPRUNER_SITE names /nowhere/site.env" in done.stderr


@pytest.mark.parametrize("late", [False, True])
def test_a_preemption_that_ends_ray_first_is_no_lost_head(late: bool) -> None:
    """Slurm ends all processes of a job at once; the command may notice that Ray is gone before srun does."""
    nodes = subprocess.Popen([sys.executable, "-c", f"import sys, time; time.sleep({int(late)}); sys.exit(75)"])
    command = [sys.executable, "-c", "import sys; sys.exit(1)" if late else "import time; time.sleep(60)"]
    assert allocation._run_command(command, dict(os.environ), allocation._Signals(), nodes) == 75


def test_a_head_that_is_lost_is_told() -> None:
    nodes = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(1)"])
    with pytest.raises(allocation.HeadLost, match=r"srun ended with 1"):
        allocation._run_command(
            [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), allocation._Signals(), nodes
        )


def test_ray_takes_what_slurm_gave_and_collides_with_nothing() -> None:
    environment = {"SLURM_CPUS_ON_NODE": "12", "CUDA_VISIBLE_DEVICES": "0,3", "SLURMD_NODENAME": "n7"}
    head = node.ray_command("10.0.0.1:20123", Path("/tmp/x"), environment | {"SLURM_PROCID": "0"})
    other = node.ray_command("10.0.0.1:20123", Path("/tmp/x"), environment | {"SLURM_PROCID": "1"})
    assert {"--num-cpus=12", "--num-gpus=2", "--node-name=n7"} <= set(head) & set(other)
    assert {"--head", "--port=20123", "--include-dashboard=false"} <= set(head)
    assert "--head" not in other
    assert "--address=10.0.0.1:20123" in other
    without = environment | {"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_PROCID": "1"}
    assert "--num-gpus=0" in node.ray_command("10.0.0.1:20123", Path("/tmp/x"), without)


def test_a_head_that_others_cannot_reach_is_refused() -> None:
    with pytest.raises(StageFailure, match=r"localhost resolves to 127\.0\.0\.1, which other nodes cannot reach"):
        allotment._address_of("localhost", several=True)
    assert allotment._address_of("localhost", several=False) == "127.0.0.1"
