"""How far the work is: told through a file, shown as a line."""

import io
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

import mpruner_dist.logs as logs
from mpruner_dist.logs import ProgressWriter, progress_line, read_progress, set_up_logging, show_progress


def state(**changes: Any) -> dict[str, Any]:
    return {"label": "collect", "unit": "batches", "total": 16, "done": 4, "rate": 0.5, "note": ""} | changes


def test_what_is_told_is_read(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    writer = ProgressWriter(path, "retrain", "steps", 10, done=4)
    first = read_progress(path)
    assert first is not None
    assert (first["label"], first["unit"], first["total"], first["done"]) == ("retrain", "steps", 10, 4)
    assert first["rate"] == 0
    time.sleep(0.02)
    writer.tell(10, "loss 3.1")
    last = read_progress(path)
    assert last is not None
    assert (last["done"], last["note"]) == (10, "loss 3.1")
    assert 0 < last["rate"] <= 6 / 0.02  # units since it began, not since zero
    assert [file.name for file in tmp_path.iterdir()] == ["progress.json"]


def test_telling_often_writes_seldom_but_always_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "progress.json"
    writer = ProgressWriter(path, "collect", "batches", 1000)
    for done in range(1, 1000):
        writer.tell(done)
    seen = read_progress(path)
    assert seen is not None
    assert seen["done"] < 999
    writer.tell(1000)
    assert (read_progress(path) or {})["done"] == 1000
    monkeypatch.setattr(logs, "WRITE_EVERY_S", 0.0)
    writer.tell(5)
    assert (read_progress(path) or {})["done"] == 5


def test_nothing_told_or_half_a_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    assert read_progress(path) is None
    path.write_text('{"label": "col')
    assert read_progress(path) is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "  collect 4/16 batches, 0.50/s, 0:24 left"),
        ({"rate": 0.0, "done": 0}, "  collect 0/16 batches, 0.00/s, starting"),
        ({"done": 16, "note": "loss 2.5"}, "  collect 16/16 batches, 0.50/s, 0:00 left, loss 2.5"),
        ({"total": 4000, "rate": 1.25}, "  collect 4/4000 batches, 1.25/s, 53:16 left"),
    ],
)
def test_a_line_says_how_far_how_fast_how_long(changes: dict[str, Any], line: str) -> None:
    assert progress_line(state(**changes)) == line


def test_lines_are_logged_while_the_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr("sys.stderr", io.StringIO())  # no terminal
    path = tmp_path / "progress.json"
    path.write_text(json.dumps(state(label="of an earlier run")))
    with caplog.at_level(logging.INFO, "mpruner_dist"), show_progress(path):
        assert not path.exists()
        path.write_text(json.dumps(state()))
        deadline = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.05)
    assert progress_line(state()) in caplog.messages
    assert not any("earlier" in message for message in caplog.messages)
    assert not path.exists()


def test_our_records_go_to_standard_error_once(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    set_up_logging()
    logging.getLogger("mpruner_dist.anything").info("stage begins")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("stage begins") == 1
