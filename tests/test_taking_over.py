"""Similarities of another run: taken over where they were made from the same, refused by name where not."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, write_config

from mpruner_dist.errors import UserError
from mpruner_dist.pipeline import take_over
from mpruner_dist.runs.commit import write_json
from mpruner_dist.runs.folder import RunFolder, open_run

INPUTS = {"model": "abc", "calibration": "def"}


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    """A run whose similarities are made."""
    with open_run(tmp_path / "collected", "") as folder:
        make = partial(write_json, folder / "cka.json", {"cka": [[1.0]]})
        folder.stage("collect", INPUTS, ("cka.json",), make, remedy="")
    return tmp_path / "collected"


def take(into: Path, collected: Path, inputs: dict[str, Any] = INPUTS) -> RunFolder:
    with open_run(into, "") as folder:
        take_over(folder, inputs, collected)
        return folder


def test_files_and_record_are_taken_over_without_the_time(tmp_path: Path, collected: Path) -> None:
    folder = take(tmp_path / "run", collected)
    assert folder.is_done("collect")
    assert (folder / "cka.json").read_bytes() == (collected / "cka.json").read_bytes()
    assert folder.stages["collect"]["inputs"] == INPUTS
    assert folder.stages["collect"]["seconds"] == 0
    assert RunFolder(collected, "").stages["collect"]["seconds"] > 0


def test_other_inputs_are_refused_with_what_differs(tmp_path: Path, collected: Path) -> None:
    with pytest.raises(UserError, match=r"made from other inputs than this run's:\n  model: was '?abc'?, is '?xyz'?"):
        take(tmp_path / "run", collected, INPUTS | {"model": "xyz"})
    assert not (tmp_path / "run/cka.json").exists()


def test_what_is_not_there_is_refused(tmp_path: Path, collected: Path) -> None:
    with pytest.raises(UserError, match=r"none has no similarities to take over: its stage collect is not done"):
        take(tmp_path / "run", tmp_path / "none")
    (collected / "cka.json").unlink()
    with pytest.raises(UserError, match=r"collected has no similarities to take over: cka\.json is missing"):
        take(tmp_path / "run", collected)


def test_rounds_measure_their_own(command: Cli, tmp_path: Path, settings: dict[str, Any], collected: Path) -> None:
    settings["rounds"] = {"tolerance": 0.1, "remove": 1}
    config = write_config(tmp_path / "config.yaml", settings)
    code, output = command("run", config, "--run-dir", tmp_path / "run", "--collected", collected)
    assert (code, "rounds measure similarities of their own: leave out --collected" in output) == (2, True)


def test_a_dry_run_looks_at_where_the_run_begins_and_ends(
    command: Cli, tmp_path: Path, settings: dict[str, Any], collected: Path
) -> None:
    config = write_config(tmp_path / "config.yaml", settings)

    def told(*options: object) -> tuple[int, str]:
        code, output = command("run", config, "--dry-run", *options)
        return code, " ".join(output.replace("│", " ").split())

    code, output = told("--until", "plan", "--collected", collected)
    assert code == 0, output
    assert "after the stage plan" in output
    assert f"those of {collected}" in output
    assert "the end" not in told()[1]
    code, output = told("--until", "plam")
    assert (code, "there is no stage 'plam' to stop after; this run has data, collect" in output) == (2, True), output
    code, output = told("--collected", tmp_path)
    assert (code, "no similarities to take over: its stage collect is not done" in output) == (2, True), output
