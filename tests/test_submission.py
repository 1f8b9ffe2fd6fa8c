"""Runs as jobs of a real Ray cluster, and what is said where that cannot be."""

import http.server
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import yaml
from conftest import Mpruner, make_text, write_config
from ray.cluster_utils import Cluster
from test_resume import wait_for

from mpruner_dist.config_file import load_config
from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.submission import ray_jobs
from mpruner_dist.submission.portable import portable
from mpruner_dist.submission.ray_jobs import submit_job


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the dashboard of a Ray cluster, whose `python` is this one."""
    before = os.environ["PATH"]
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield f"http://{cluster.webui_url}"
    cluster.shutdown()
    os.environ["PATH"] = before


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_job_is_followed_left_stopped_and_submitted_again(
    address: str, settings: dict[str, Any], start: Mpruner, mpruner: Any, tmp_path: Path
) -> None:
    make_text(tmp_path / "text.jsonl", records=8000)
    for part in ("calibration", "train", "validation", "test"):
        settings["data"][part]["path"] = "text.jsonl"  # seen from here
    settings["collect"] |= {"num_batches": 1500, "save_every": 2000}  # only a signal makes it save
    settings["retrain"] = None
    settings["cluster"]["address"] = "10.0.0.1:6379"
    config, run = write_config(tmp_path / "config.yaml", settings), tmp_path / "run"
    here = {"cwd": tmp_path, "env": os.environ | {"RAY_ADDRESS": "10.0.0.1:6379"}}  # --address counts, not this
    submit = ["submit", "ray", config, "--address", address, "--run-dir", "run", "--env", "HF_HUB_OFFLINE=1"]
    process = start(*submit, **here)
    wait_for(lambda: "collect" in said_progress(run), process, 300)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"data.calibration.path text.jsonl is taken as {tmp_path / 'text.jsonl'}" in output
    assert "cluster.address 10.0.0.1:6379 is left out" in output
    assert "joining the Ray cluster at" in output  # the job's own log
    job = output.split("submitted as ")[1].split(";")[0]
    assert f"mpruner submit stop {job} --address {address}" in output
    code, output = mpruner("submit", "status", job, "--address", address)
    assert code == 0, output
    assert output.startswith(f"{job}: RUNNING, ")
    assert output.endswith(f"run folder {run}\n")
    assert not list(run.glob("stats/*/from-*.safetensors"))
    code, output = mpruner("submit", "stop", job, "--address", address)
    assert code == 0, output
    assert f"{job}: STOPPED; the same submission goes on\nmpruner: collect: mpruner got SIGTERM; " in output
    assert list(run.glob("stats/*/from-*.safetensors"))
    code, output = mpruner(*submit, **here)
    assert code == 0, output
    assert (run / "report.html").is_file()
    assert f"{run}/report.html" in output
    code, output = mpruner("submit", "stop", job, "--address", address)
    assert (code, output) == (0, f"{job} is not running: STOPPED\n")


def said_progress(run: Path) -> str:
    path = run / "logs/progress.json"
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.ray
def test_the_exit_code_is_that_of_the_job(address: str, settings: dict[str, Any], mpruner: Any, tmp_path: Path) -> None:
    settings["model"]["path"] = str(tmp_path / "only-on-the-cluster")
    config = write_config(tmp_path / "config.yaml", settings)
    code, output = mpruner("submit", "ray", config, "--address", address, "--run-dir", tmp_path / "run")
    assert code == 2, output
    assert "mpruner: " in output.split("submitted as")[1]
    code, output = mpruner("submit", "status", "nobody", "--address", address)
    assert (code, output.count("Traceback")) == (2, 0)
    assert f"the Ray cluster at {address} knows no job nobody" in output


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../model", "model.path ../model is relative, and is not there from"),
        ("elsewhere.jsonl", "data.train.path elsewhere.jsonl is relative"),
        ("elsewhere.csv", "data.train.path elsewhere.csv is relative"),
    ],
)
def test_paths_that_no_job_would_find(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    section = settings["model"] if "model" in message.split()[0] else settings["data"]["train"]
    section["path"] = path
    config = load_config(write_config(tmp_path / "config.yaml", settings), [])
    with pytest.raises(UserError, match=message):
        portable(config)


def test_paths_become_absolute_and_ids_stay(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero.json").write_text("{}")
    settings["retrain"] |= {"deepspeed": "zero.json", "distillation": {"teacher": "somebody/teacher"}}
    settings["data"]["test"] = {"path": "somebody/text", "split": "test"}
    settings["evaluate"] = settings.get("evaluate", {}) | {"tasks": [{"name": "mine", "folder": "."}]}
    given = load_config(write_config(tmp_path / "config.yaml", settings), [])
    made = portable(given).model_dump(mode="json")
    assert made["retrain"]["deepspeed"] == str(tmp_path / "zero.json")
    assert made["retrain"]["distillation"]["teacher"] == "somebody/teacher"
    assert made["data"]["test"]["path"] == "somebody/text"
    assert made["evaluate"]["tasks"][0]["folder"] == str(tmp_path)
    made["retrain"]["deepspeed"], made["evaluate"]["tasks"][0]["folder"] = "zero.json", "."
    assert made == given.model_dump(mode="json")


def submit(config: Path, address: str, env: list[str] | None = None, dry_run: bool = False) -> int:
    return submit_job(config, address, None, [], env or [], follow=True, dry_run=dry_run)


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", settings)


def test_a_dry_run_shows_the_command_and_no_value_of_a_variable(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert submit(config, "http://nobody:8265", ["HF_TOKEN=secret"], dry_run=True) == 0
    printed = capsys.readouterr().out
    assert f"python -m mpruner_dist run run.yaml --run-dir {tmp_path / 'runs/run'}\n" in printed
    assert "RAY_JOB_STOP_WAIT_TIME_S HF_TOKEN" in printed
    assert "secret" not in printed
    content = yaml.safe_load(printed.split("HF_TOKEN\n")[1])
    assert content["collect"]["num_batches"] == 7


@pytest.mark.parametrize(
    ("entry", "message"),
    [("HF_HOME", "write NAME=value"), ("RAY_AUTH_TOKEN=x", "the cluster has its token"), ("=x", "write NAME=value")],
)
def test_variables_that_are_refused(config: Path, entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        submit(config, "http://nobody:8265", [entry])


@pytest.mark.parametrize("address", ["ray://head:10001", "head:6379", "head"])
def test_an_address_that_is_no_dashboard(config: Path, address: str) -> None:
    with pytest.raises(UserError, match=f"--address {address}: write the address of the dashboard"):
        submit(config, address)


def test_nobody_answers(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # set by what is tested: put back
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StageFailure, match=f"nobody answers at {address}: is it the address of the dashboard"):
        submit(config, address)


class Away:
    """A client of a dashboard that does not answer for a while, and then knows, or no longer, how the job ended."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def get_job_info(self, _: str) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: answer))


def test_a_dashboard_that_is_away_for_a_while_is_asked_again(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(ray_jobs, "POLL_S", 0)
    away = [requests.exceptions.ConnectionError("refused"), RuntimeError("status code 502")]
    client = Away(False, *away, False, away[0], True)
    assert ray_jobs._await_end(client, "job").status.is_terminal()
    assert client.answers == []
    assert caplog.text.count("how job is cannot be asked (refused); trying for 300 s") == 2
    with pytest.raises(RuntimeError, match="404"):
        ray_jobs._await_end(Away(RuntimeError("status code 404"), True), "job")
    monkeypatch.setattr(ray_jobs, "AWAY_S", 0)
    with pytest.raises(StageFailure, match="nobody answers at http://head"), ray_jobs._refusals("http://head"):
        ray_jobs._await_end(Away(*away[:1] * 2, True), "job")


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, UserError, r"refuses: Authentication required.*Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_"),
        (403, UserError, r"refuses: Authentication failed.*Set RAY_AUTH_MODE=token"),
        (404, StageFailure, r"refuses: .*404"),
        (502, StageFailure, r"refuses: .*502"),
    ],
)
def test_a_server_that_refuses(
    config: Path, monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception], message: str
) -> None:
    """What Ray's Jobs server answers without its token, or another server, or a proxy."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(error, match=f"(?s)the Ray cluster at http://127.0.0.1:{server.server_port} {message}"):
                submit(config, f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
