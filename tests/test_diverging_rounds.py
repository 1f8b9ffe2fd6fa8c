"""A run in rounds whose training diverges, on real ranks: what is decided, and that the same command is content."""

import json
from pathlib import Path
from typing import Any

from conftest import Cli, write_config


def test_rounds_whose_training_diverges_are_rolled_back(
    settings: dict[str, Any], without_ray: Cli, tmp_path: Path
) -> None:
    settings["plan"] = {"method": "partition", "keep_layers": 4}
    settings["retrain"] |= {"learning_rate": 1e30, "distillation": None}
    settings["rounds"] = {"tolerance": 0.5, "remove": 2, "max_stride": 2}
    settings["collect"]["num_batches"] = 4
    settings["retrain"]["eval_every"] = 6  # the loss of a step is looked at before that of the validation text
    config, run = write_config(tmp_path / "config.yaml", settings), tmp_path / "run"
    code, output = without_ray("run", config, "--run-dir", run)
    assert code == 0, output
    assert "no round was accepted: the original is kept as it is" in output
    record = json.loads((run / "rounds.json").read_text())
    assert [(len(entry["kept"]), entry["accepted"]) for entry in record["rounds"]] == [(6, False), (7, False)]
    for entry in record["rounds"]:
        assert "is not finite" in entry["why"]
        assert "lower retrain.learning_rate" in entry["why"]
        assert str(tmp_path) not in entry["why"]
    assert "No round was accepted" in (run / "report.html").read_text()
    assert list(json.loads((run / "evaluation.json").read_text())) == ["original"]
    code, output = without_ray("run", config, "--run-dir", run)
    assert code == 0, output
    assert "ranks without Ray" not in output
    assert json.loads((run / "rounds.json").read_text()) == record
    code, output = without_ray("status", run)
    assert "given up" in output
