"""A file beside the model that changes after the run: what follows from it is made anew, what does not is not."""

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import Cli, write_config


def test_a_new_chat_template_reaches_all_models_without_other_training(
    settings: dict[str, Any], tiny: Path, without_ray: Cli, tmp_path: Path
) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    template = tmp_path / "model/chat_template.jinja"
    template.write_text("one")
    settings["model"]["path"] = str(tmp_path / "model")
    config, run = write_config(tmp_path / "config.yaml", settings), tmp_path / "run"
    code, output = without_ray("run", config, "--run-dir", run)
    assert code == 0, output
    trained = json.loads((run / "retrain.json").read_text())
    weights = [(shard.name, shard.read_bytes()) for shard in sorted((run / "retrained").glob("*.safetensors"))]
    assert json.loads((run / "retrained/layer_map.json").read_text()).keys() == {"old_to_new", "new_to_old"}

    template.write_text("two")
    code, output = without_ray("run", config, "--run-dir", run)
    assert code == 2
    assert "tokenizer.chat_template.jinja: was" in output
    assert "mpruner collect CONFIG" in output
    code, output = without_ray("collect", config, "--run-dir", run)
    assert code == 0, output
    assert "outdated, made again by the next `mpruner run`: rewrite, retrain, evaluate, report" in output
    code, output = without_ray("run", config, "--run-dir", run)
    assert code == 0, output
    assert "collect   done before" in output
    assert [(run / name / template.name).read_text() for name in ("pruned", "retrained")] == ["two", "two"]
    assert json.loads((run / "retrain.json").read_text()) == trained
    assert [(shard.name, shard.read_bytes()) for shard in sorted((run / "retrained").glob("*.safetensors"))] == weights
    [log] = run.glob("retrain/*/metrics.jsonl")
    assert len([line for line in log.read_text().splitlines() if '"loss"' in line]) == 6, "no step was done again"
