"""The manifest for KubeRay: as its schema asks, and with a command that this package has."""

import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT, write_config
from typer.testing import CliRunner

from mpruner_dist.cli import app

SCHEMA = yaml.safe_load((Path(__file__).parent / "rayjob_schema.yaml").read_text())


@pytest.fixture
def manifest() -> Any:
    return yaml.safe_load((ROOT / "launch/rayjob.yaml").read_text())


def test_it_is_what_kuberay_takes(manifest: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(manifest, SCHEMA)
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        jsonschema.validate(manifest, SCHEMA)


def test_the_driver_and_the_head_are_on_no_gpu_and_the_workers_on_all(manifest: Any) -> None:
    spec = manifest["spec"]
    head, (workers,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert head["rayStartParams"]["num-gpus"] == "0"
    assert "entrypointNumGpus" not in spec
    pod = workers["template"]["spec"]
    gpus = workers["replicas"] * pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert f"cluster.workers={gpus}" in spec["entrypoint"]
    for template in (head["template"], workers["template"]):  # every mount has its volume
        inside = template["spec"]
        mounted = {mount["name"] for mount in inside["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in inside["volumes"]}
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) == pod["terminationGracePeriodSeconds"]
    assert not any("TOKEN" in name for name in variables)


def test_its_command_is_one_of_ours(manifest: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    settings["retrain"] |= {"batch_size": 16, "micro_batch_size": 1}
    command = shlex.split(manifest["spec"]["entrypoint"])
    assert command[0] == "mpruner"
    command[2] = str(write_config(tmp_path / "run.yaml", settings))
    done = CliRunner().invoke(app, [*command[1:], "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "16 (at least 8 when no more fit), device cuda" in " ".join(done.output.split())
