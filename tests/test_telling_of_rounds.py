"""What the terminal, the status and the report tell of rounds."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
from finished_run import edit, make_run

from mpruner_dist.config import RoundsConfig
from mpruner_dist.reporting.report import write_report
from mpruner_dist.reporting.rounds import print_rounds, round_rows, rounds_figure
from mpruner_dist.reporting.status import status_of_rounds
from mpruner_dist.runs.commit import write_json


def test_what_is_told_of_rounds(loop: Any) -> None:
    made = loop(tolerance=0.06)
    record = made.run()
    rows = round_rows(record)
    assert rows[0][:7] == ("1", "original", "1", "2, 4, 6, 8, 10", "7", "0.0 M", "10.50")
    assert (rows[0][7], rows[0][9], rows[1][9]) == ("+5.0 %", "accepted", "rolled back")
    assert "<svg" in rounds_figure(record)
    told = dict(status_of_rounds(made.folder))
    assert told["round-01"].startswith("accepted: perplexity 10.00 -> 10.50")
    assert told["round-02 gate"].startswith("done in")
    assert told["rounds"].startswith("end: no stride is left")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_on_a_narrow_terminal_the_table_folds(loop: Any, monkeypatch: Any, capsys: Any, width: int) -> None:
    made = loop(tolerance=0.06)
    made.run()
    monkeypatch.setenv("COLUMNS", str(width))
    print_rounds(made.folder / "rounds.json")
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= width
    cells = zip(*(line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")), strict=True)
    shown = ["".join("".join(column).split()) for column in cells]
    rows = round_rows(json.loads((made.folder / "rounds.json").read_text()))
    assert shown == ["".join("".join(column).split()) for column in zip(*rows, strict=True)]


def test_folders_that_another_tolerance_left_are_not_told(loop: Any) -> None:
    made = loop(tolerance=0.06, max_rounds=2)
    made.run()
    assert (made.folder / "round-02").is_dir()
    made.config = made.config.model_copy(update={"rounds": RoundsConfig(tolerance=0.06, max_rounds=1)})
    record = made.run()
    assert {name.split()[0] for name, _ in status_of_rounds(made.folder)} == {
        "baseline",
        "round-01",
        "rounds",
        "result",
    }
    write_json(made.folder / "rounds.json", record | {"stopped": None})  # as before the second round ends
    assert "round-02 gate" in dict(status_of_rounds(made.folder))
    write_json(made.folder / "rounds.json", record | {"stopped": None, "rounds": []})
    assert "round-02 gate" not in dict(status_of_rounds(made.folder))


@pytest.mark.parametrize("accepted", [True, False])
def test_the_report_of_rounds(loop: Any, tmp_path: Path, accepted: bool) -> None:
    made = loop(tolerance=0.06 if accepted else 0.001)
    record = made.run()
    run = make_run(tmp_path / "report", retrain=accepted)
    (run / "rounds.json").write_text(json.dumps(record))
    if not accepted:
        edit(run / "evaluation.json", lambda evaluation: evaluation.pop("pruned"))
        edit(run / "plan.json", lambda plan: plan.update(kept=list(range(6)), reasons={}))
    write_report(run, made.config, {})
    page = html.unescape((run / "report.html").read_text())
    assert "<h2>Rounds</h2>" in page
    assert f"The rounds ended: {record['stopped']}." in page
    assert ("Nothing was removed." in page) == (not accepted)
    assert ("the original is kept as it is" in page) == (not accepted)
    if accepted:
        assert "| 1 | original | 1 | 2, 4, 6, 8, 10 | 7 |" in (run / "retrained/README.md").read_text()


def test_what_several_rounds_made_is_told(loop: Any, tmp_path: Path) -> None:
    """The last round pruned a model that the rounds before had retrained."""
    made = loop(tolerance=0.06)
    record = made.run()
    record["rounds"] = [entry | {"accepted": number < 2} for number, entry in enumerate(record["rounds"] * 2)]
    run = make_run(tmp_path / "report")
    (run / "rounds.json").write_text(json.dumps(record))
    write_report(run, made.config, {})
    page, card = (" ".join((run / name).read_text().split()) for name in ("report.html", "pruned/README.md"))
    assert "which the last of 2 rounds cut from what those before it retrained" in page
    assert " pruned (in the last of 2 rounds)" in page
    assert "in each of 2 accepted rounds" in page
    assert "It was made in 2 rounds" in card
    assert "and is what the last of them cut" in card
