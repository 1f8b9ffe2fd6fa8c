"""Run folders: stages that are made once from what their inputs say, by one process at a time."""

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import names

from mpruner_dist.errors import UserError
from mpruner_dist.runs.folder import RunFolder, begin_run, open_run, read_manifest

OWNER = """
import sys
from pathlib import Path
from mpruner_dist.runs.folder import open_run
with open_run(Path(sys.argv[1]), ""):
    print("mine", flush=True)
    sys.stdin.read()
"""


class Making:
    """A stage that writes a file and counts how often it was made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.times, self.fails = folder, 0, False
        self.run = RunFolder(folder, "config: here\n")

    def __call__(self, inputs: dict[str, Any], **options: Any) -> None:
        self.run.stage("plan", inputs, ("plan.json",), self.make, remedy="make it anew: mpruner plan CONFIG", **options)

    def make(self) -> None:
        self.times += 1
        if self.fails:
            raise RuntimeError("broken")
        (self.folder / "plan.json").write_text(str(self.times))


@pytest.fixture
def plan(tmp_path: Path) -> Making:
    return Making(tmp_path / "run")


def again(plan: Making) -> None:
    plan.run = RunFolder(plan.folder, plan.run.resolved_config)


INPUTS: dict[str, Any] = {"cka": "abc", "plan": {"method": "anchor", "threshold": 0.9}}


@pytest.mark.parametrize("reopened", [False, True])
def test_a_stage_is_made_once(plan: Making, reopened: bool) -> None:
    plan(INPUTS)
    if reopened:
        again(plan)
    plan(INPUTS)
    assert plan.times == 1
    assert plan.run.is_done("plan")
    assert (plan.folder / "config.yaml").read_text() == "config: here\n"
    manifest = json.loads((plan.folder / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["stages"]["plan"]["outputs"] == ["plan.json"]


@pytest.mark.parametrize("reopened", [False, True])
def test_inputs_that_json_writes_otherwise_are_the_same_inputs(plan: Making, reopened: bool) -> None:
    inputs = {"take": (0.0, 0.5)}  # JSON has lists only
    plan(inputs)
    if reopened:
        again(plan)
    plan(inputs)
    assert plan.times == 1


def test_other_inputs_are_refused_with_what_differs(plan: Making) -> None:
    plan(INPUTS)
    changed = {"cka": "abc", "plan": {"method": "partition", "keep_layers": 5, "threshold": 0.9}}
    with pytest.raises(UserError) as caught:
        plan(changed)
    message = str(caught.value)
    assert "for the stage plan these differ:" in message
    assert "  plan.keep_layers: was None, is 5\n" in message
    assert "  plan.method: was 'anchor', is 'partition'\n" in message
    assert "threshold" not in message
    assert "--run-dir" in message
    assert "mpruner plan CONFIG" in message
    assert plan.run.changes("plan", changed) == ["plan.keep_layers: was None, is 5",
                                                 "plan.method: was 'anchor', is 'partition'"]  # fmt: skip
    assert plan.run.changes("plan", INPUTS) == []
    assert plan.run.changes("rewrite", changed) == []
    assert (plan.times, (plan.folder / "plan.json").read_text()) == (1, "1")
    plan(changed, replace=True)
    assert (plan.times, (plan.folder / "plan.json").read_text()) == (2, "2")
    plan(changed)
    assert plan.times == 2


def test_a_stage_that_was_begun_here_is_taken_over_from_where_it_is_done(plan: Making, tmp_path: Path) -> None:
    other = Making(tmp_path / "other")
    other(INPUTS)
    plan.fails = True
    with pytest.raises(RuntimeError):
        plan(INPUTS)
    plan.run.adopt("plan", other.run)
    plan(INPUTS)
    assert plan.times == 1
    assert (plan.folder / "plan.json").read_text() == "1"


def test_an_output_that_is_missing_is_made_again(plan: Making) -> None:
    plan(INPUTS)
    (plan.folder / "plan.json").unlink()
    plan(INPUTS)
    assert plan.times == 2
    assert (plan.folder / "plan.json").exists()


@pytest.mark.parametrize("reopened", [False, True])
def test_a_stage_that_failed_is_not_done_and_is_made_again(plan: Making, reopened: bool) -> None:
    plan.fails = True
    with pytest.raises(RuntimeError, match="broken"):
        plan(INPUTS)
    assert read_manifest(plan.folder)["plan"]["state"] == "running"
    if reopened:
        again(plan)
    assert not plan.run.is_done("plan")
    with pytest.raises(UserError, match="cka: was 'abc', is 'xyz'"):
        plan(INPUTS | {"cka": "xyz"})  # what it had begun is of other inputs
    plan.fails = False
    plan(INPUTS)
    assert plan.times == 2
    assert read_manifest(plan.folder)["plan"]["state"] == "done"


def test_what_is_forgotten_is_made_again_from_anything(plan: Making) -> None:
    plan(INPUTS)
    plan.run.forget(["plan", "never made"])
    assert (plan.folder / "plan.json").exists()
    again(plan)
    plan({"cka": "other"})
    assert plan.times == 2


@pytest.fixture
def owner(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has the run folder open."""
    command = [sys.executable, "-c", OWNER, tmp_path / "run"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("killed", [False, True])
def test_another_process_may_not_open_a_run_until_its_owner_ends(
    tmp_path: Path, owner: "subprocess.Popen[str]", killed: bool
) -> None:
    with pytest.raises(UserError, match=r"another mpruner works in .*run: wait"), open_run(tmp_path / "run", ""):
        pass
    if killed:
        owner.kill()
    owner.communicate("")
    with open_run(tmp_path / "run", "") as run:
        assert (run.path, run.stages) == (tmp_path / "run", {})


def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with open_run(tmp_path / "run", "") as folder:
        assert folder.path.is_dir()
    assert "has no locks (Function not implemented): start no second mpruner in it" in caplog.text


def test_what_the_doctor_left_is_no_other_work(tmp_path: Path) -> None:
    (tmp_path / ".doctor-12ab" / "logs").mkdir(parents=True)
    begin_run(tmp_path).close()


def test_only_a_runs_own_or_empty_folder_is_taken(tmp_path: Path) -> None:
    def opens(path: Path) -> None:
        with open_run(path, ""):
            pass

    (tmp_path / "empty").mkdir()
    opens(tmp_path / "empty")
    opens(tmp_path / "empty")
    assert names(tmp_path / "empty") == [".lock", "logs"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis is not empty and no run's: give another --run-dir"):
        opens(tmp_path / "thesis")
    assert names(tmp_path / "thesis") == ["chapter.tex"]
    with pytest.raises(UserError, match=r"chapter\.tex is a file"):
        opens(tmp_path / "thesis" / "chapter.tex")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 2, "stages": {}}', "has version 2, this program reads up to 1: upgrade it"),
        ("{", "is not a run's manifest"),
        ("[]", "is not a run's manifest"),
        ('{"version": 1}', "is not a run's manifest"),
        ('{"version": "new", "stages": {}}', "is not a run's manifest"),
        ('{"version": 1, "stages": [1]}', "is not a run's manifest"),
    ],
)
def test_a_manifest_of_another_kind_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    assert read_manifest(tmp_path) == {}
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=rf"manifest\.json {message}"):
        RunFolder(tmp_path, "")
