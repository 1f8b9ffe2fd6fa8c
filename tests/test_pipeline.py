"""The whole road on a small model, with real Ray and real DeepSpeed."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from collecting import collected
from conftest import make_idle_layers, write_config
from safetensors.torch import load_file

from mpruner_dist.config import Config
from mpruner_dist.rewriting.proof import verify_checkpoint
from mpruner_dist.similarity.hsic import cka_matrix

pytestmark = pytest.mark.ray
Run = Callable[..., tuple[int, str]]


def matrix(run: Path) -> np.ndarray:
    return np.array(json.loads((run / "cka.json").read_text())["cka"])


def test_the_road_with_one_worker(walked: tuple[Path, str]) -> None:
    run, output = walked
    assert "perplexity" in output
    assert str(run / "report.html") in output
    plan = json.loads((run / "plan.json").read_text())
    assert len(plan["kept"]) == 6
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert list(evaluation) == ["original", "pruned", "retrained"]
    assert [entry["layers"] for entry in evaluation.values()] == [8, 6, 6]
    assert evaluation["retrained"]["loss"] < evaluation["pruned"]["loss"]
    for name in ("pruned", "retrained"):
        verify_checkpoint(run / name)
        card = (run / name / "README.md").read_text()
        assert "mpruner" in card
    before, after = (load_all(run / name) for name in ("pruned", "retrained"))
    assert all((before[name] != after[name]).any() for name in before if "proj" in name)  # every layer was trained
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "retrained")
    assert model.config.num_hidden_layers == 6
    assert "<svg" in (run / "report.html").read_text() or "data:image" in (run / "report.html").read_text()


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def test_the_perplexity_is_the_one_of_a_plain_forward(settings: dict[str, Any], finished: Path) -> None:
    """Against transformers' own loss, one block at a time."""
    run = finished
    blocks = load_file(run / "data" / "test.safetensors")["input_ids"].long()
    for name, folder in (("original", Path(settings["model"]["path"])), ("pruned", run / "pruned")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in blocks]
        expected = math.exp(sum(losses) / len(losses))
        got = json.loads((run / "evaluation.json").read_text())[name]["perplexity"]
        assert got == pytest.approx(expected, rel=1e-5)


def test_the_cka_is_the_one_of_a_dense_computation(settings: dict[str, Any], finished: Path) -> None:
    """All eligible tokens of the first batch, without any of the package's sampling."""
    run = finished
    blocks = load_file(run / "data" / "calibration.safetensors")["input_ids"].long()
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"]["path"]).eval()
    outputs: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, o: outputs.append(o)) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=blocks[:2])
    for hook in hooks:
        hook.remove()
    vectors = [out[:, 1:].flatten(0, 1) for out in outputs]
    dense = cka_matrix([v / v.pow(2).mean(1, keepdim=True).sqrt() for v in vectors]).numpy()
    # 32 samples a batch, 7 batches: an estimate of the same thing, within its own error bars
    content = json.loads((run / "cka.json").read_text())
    spread = np.array(content["stderr"])
    assert np.abs(matrix(run) - dense).max() < 0.2
    assert content["num_batches"] == 7
    assert content["num_samples"] == 7 * 32
    assert (spread[~np.eye(8, dtype=bool)] > 0).all()


def test_the_same_command_again_does_nothing(settings: dict[str, Any], mpruner: Run, finished: Path) -> None:
    run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.json")}
    code, output = mpruner("run", run.parent / "config.yaml", "--run-dir", run)
    assert code == 0
    assert output.count("done before") == 7
    assert "starting Ray" not in output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.json")} == before


def test_status_says_what_is_done(mpruner: Run, finished: Path) -> None:
    code, output = mpruner("status", finished)
    assert code == 0
    assert output.count("done in") == 7


def test_another_configuration_is_refused_and_replanning_is_instant(
    settings: dict[str, Any], mpruner: Run, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = run.parent / "config.yaml"
    write_config(config, settings)
    deeper = ("--run-dir", run, "--set", "plan.keep_layers=5")
    code, output = mpruner("run", config, *deeper)
    assert code == 2
    assert "plan.keep_layers: was 6, is 5" in output
    assert "mpruner plan CONFIG" in output
    assert len(json.loads((run / "plan.json").read_text())["kept"]) == 6
    code, output = mpruner("plan", config, *deeper)
    assert code == 0, output
    assert "starting Ray" not in output
    assert len(json.loads((run / "plan.json").read_text())["kept"]) == 5
    assert "outdated" in output
    assert (run / "pruned").exists()  # the old is kept until the new replaces it
    code, output = mpruner("status", run)
    assert "rewrite" in output
    assert "next" in output
    content = json.loads((run / "manifest.json").read_text())["stages"]
    assert list(content) == ["data", "collect", "plan"]


@pytest.mark.parametrize(("ranks", "zero_stage"), [(2, 0), (2, 3), (5, 0)])
def test_the_cka_does_not_depend_on_the_sharding(
    settings: dict[str, Any], finished: Path, tmp_path: Path, ranks: int, zero_stage: int
) -> None:
    """Seven batches on two and five ranks: uneven, which must not hang ZeRO-3."""
    settings["cluster"] |= {"workers": ranks, "zero_stage": zero_stage}
    settings["retrain"] = None
    one = json.loads((finished / "cka.json").read_text())
    blocks = finished / "data/calibration.safetensors"
    other = collected(tmp_path / "sums", ranks, Config.model_validate(settings), blocks, one["layers"])
    if zero_stage == 3:
        assert np.abs(np.array(other["cka"]) - np.array(one["cka"])).max() < 1e-6
    else:  # every number that was measured, to the last bit
        assert one == other
    assert len(list((tmp_path / "sums").glob("from-*.safetensors"))) >= ranks


def test_two_workers_under_zero_3_retrain_like_one(
    settings: dict[str, Any], mpruner: Run, finished: Path, tmp_path: Path
) -> None:
    """Same global batches, so the same losses; weights, gradients and optimizer divided; exported whole."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("retrain", "retrained", "evaluation*"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"] = {name: manifest["stages"][name] for name in ("data", "collect", "plan", "rewrite")}
    (run / "manifest.json").write_text(json.dumps(manifest))
    settings["cluster"] |= {"workers": 2, "zero_stage": 3}
    settings["retrain"] |= {"zero_stage": 3, "micro_batch_size": 1}
    config = write_config(tmp_path / "config.yaml", settings)
    code, output = mpruner("run", config, "--run-dir", run)
    assert code == 0, output
    one, two = (json.loads((folder / "retrain.json").read_text()) for folder in (finished, run))
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=2e-4)
    np.testing.assert_allclose(one["validation_loss"], two["validation_loss"], rtol=2e-4)
    expected, got = load_all(finished / "retrained"), load_all(run / "retrained")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-2, atol=2e-3)
    first, second = (json.loads((folder / "evaluation.json").read_text()) for folder in (finished, run))
    for label in ("original", "pruned"):
        assert second[label]["loss"] == pytest.approx(first[label]["loss"], rel=1e-6)


def test_planted_redundancy_is_found(settings: dict[str, Any], mpruner: Run, tmp_path: Path, tiny: Path) -> None:
    """Layers 3 to 5 hardly change their input: they repeat layer 2, and just they must go. Text that is not packed.

    It is settled early, and after the same batches for two workers.
    """
    make_idle_layers(tmp_path / "model", [3, 4, 5])
    settings["model"]["path"] = str(tmp_path / "model")
    settings["data"]["pack"] = False
    settings["collect"] |= {"batch_size": 6, "samples": 48, "num_batches": 15, "until": "settled", "check_every": 5}
    settings["plan"] = {"method": "anchor", "threshold": 0.99}
    settings["retrain"] = None
    config = write_config(tmp_path / "config.yaml", settings)
    code, output = mpruner("run", config, "--run-dir", tmp_path / "run")
    assert code == 0, output
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["dropped"] == [3, 4, 5]
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["pruned"]["loss"] == pytest.approx(evaluation["original"]["loss"], rel=1e-2)
    similarity = json.loads((tmp_path / "run" / "cka.json").read_text())
    assert (similarity["num_batches"], similarity["asked_batches"], similarity["open"]) == (5, 15, [])
    assert "settled after 5 of 15 batches" in output
    assert "settled after 5 of 15 batches" in (tmp_path / "run" / "report.html").read_text()
    np.testing.assert_array_less(similarity["block_influence"][3:6], 1e-3)
    code, output = mpruner("collect", config, "--run-dir", tmp_path / "two", "--set", "cluster.workers=2")
    assert code == 0, output
    assert json.loads((tmp_path / "two" / "cka.json").read_text()) == similarity
