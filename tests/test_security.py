"""What others wrote - a configuration, a run folder, a plan, a model - runs nothing on this machine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_config

Mpruner = Callable[..., tuple[int, str]]


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The file that a test's trap makes if it is sprung."""
    return tmp_path / "sprung"


def payload(trap: Path) -> str:
    return f'!!python/object/apply:os.system ["touch {trap}"]'


def test_the_payload_is_real(trap: Path) -> None:
    yaml.unsafe_load(payload(trap))
    assert trap.exists()


@pytest.mark.parametrize("where", ["configuration", "override", "run folder", "plan"])
def test_yaml_that_makes_objects_is_refused(
    mpruner: Mpruner, tmp_path: Path, tiny: Path, settings: dict[str, Any], trap: Path, where: str
) -> None:
    good = write_config(tmp_path / "good.yaml", settings)
    bad = tmp_path / "config.yaml"  # as in a run folder
    bad.write_text(good.read_text() + f"rounds: {payload(trap)}\n")
    (tmp_path / "plan.yaml").write_text(f"slices: {payload(trap)}\n")
    commands: dict[str, tuple[object, ...]] = {
        "configuration": ("run", bad, "--run-dir", tmp_path / "run"),
        "override": ("run", good, "--run-dir", tmp_path / "run", "--set", f"plan.threshold={payload(trap)}"),
        "run folder": ("status", tmp_path),
        "plan": ("rewrite", tiny / "model", tmp_path / "out", "--plan", tmp_path / "plan.yaml"),
    }
    code, output = mpruner(*commands[where])
    assert code == 2, output
    assert "python/object/apply" in output, output
    assert not trap.exists()
    assert not (tmp_path / "run").exists()


def test_only_who_asks_for_it_runs_code_of_a_model(
    mpruner: Mpruner, tmp_path: Path, tiny: Path, settings: dict[str, Any], trap: Path
) -> None:
    """A run folder from elsewhere may say trust_remote_code: looking at it is not running it."""
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    content = json.loads((model / "config.json").read_text())
    content |= {"model_type": "trapped", "auto_map": {"AutoConfig": "configuration_trapped.TrappedConfig"}}
    (model / "config.json").write_text(json.dumps(content))
    (model / "configuration_trapped.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig\nPath({str(trap)!r}).touch()\n\n\n"
        "class TrappedConfig(LlamaConfig):\n    model_type = 'trapped'\n"
    )
    settings["model"] |= {"path": str(model), "trust_remote_code": True}
    run = tmp_path / "run"
    run.mkdir()
    write_config(run / "config.yaml", settings)
    stage = {"state": "done", "seconds": 1.0, "outputs": ["data/data.json"], "inputs": {}}
    (run / "manifest.json").write_text(json.dumps({"version": 1, "stages": {"data": stage}}))
    code, output = mpruner("status", run)
    assert code == 0, output
    assert "done in 1.0 s" in output
    assert not trap.exists()
    code, _ = mpruner("run", run / "config.yaml", "--dry-run", "--set", "model.trust_remote_code=false")
    assert code != 0
    assert not trap.exists()
    mpruner("run", run / "config.yaml", "--dry-run")
    assert trap.exists(), "the trap works: who asks for it runs the model's code"
