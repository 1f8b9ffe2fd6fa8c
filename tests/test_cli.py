"""What a user sees: one message with what, where and what to do, and the exit code 2. Nothing is made."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOL, Cli, write_config
from test_dry_run import dry_run


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    return tmp_path / "model"


def a_first_shard(model: Path) -> Path:
    return sorted(model.glob("model-*.safetensors"))[0]


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def missing_shard(model: Path) -> None:
    a_first_shard(model).unlink()


def truncated_shard(model: Path) -> None:
    content = a_first_shard(model).read_bytes()
    a_first_shard(model).write_bytes(content[:-10])


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama", ')


def mistyped_field(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"hidden_size": "wide"}))


def unknown_family(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "no-such-family", "num_hidden_layers": 8}')


def no_tokenizer(model: Path) -> None:
    for file in model.glob("token*"):
        file.unlink()


def escaping_index(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../../x.safetensors"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "no config.json"),
        (missing_shard, r"lacks the shard model-00001-of-\d+\.safetensors"),
        (truncated_shard, r"model-00001-of-\d+\.safetensors is truncated"),
        (broken_config, r"cannot read .*config\.json: .*(Expecting|property name)"),
        (mistyped_field, r"cannot read .*config.json: .*hidden_size"),
        (unknown_family, "cannot read .*config.json.*no-such-family"),
        (no_tokenizer, "no tokenizer"),
        (escaping_index, r"'\.\./\.\./x\.safetensors', which is not a file of its own folder"),
    ],
)
def test_a_damaged_model_is_named(
    command: Cli, tmp_path: Path, settings: dict[str, Any], model: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(model)
    settings["model"]["path"] = str(model)
    code, output = dry_run(command, tmp_path, settings)
    assert code == 2
    assert re.search(message, output.replace("\n", " ")), output
    assert output.startswith("mpruner: ")
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"path": "./nowhere"}, "there is no such folder"),
        ("data", {"block_size": 4096}, r"gives 1 blocks of 4096 tokens, 14 needed|gives 0 blocks of 4096 tokens"),
        ("collect", {"samples": 3}, "greater than or equal to 4, got 3"),
        ("collect", {"skip_token": 2}, "did you mean 'skip_tokens'"),
        ("plan", {"method": "partition", "keep_layers": None}, "needs keep_layers or target_parameters"),
        ("plan", {"method": "file", "keep_layers": None, "file": "nowhere.json"}, "cannot read the plan nowhere.json"),
        ("retrain", {"batch_size": 5}, r"retrain.batch_size 5 must be a multiple of .* = 2"),
        ("retrain", {"warmup_steps": 6}, "warmup_steps 6 must be less than steps 6"),
        ("retrain", {"deepspeed": "nowhere.json"}, "the DeepSpeed configuration: cannot read nowhere.json"),
        ("retrain", {"lora": {"targets": ["q_prj", "v_proj"]}}, r"projection 'q_prj' \(did you mean q_proj or "),
        (
            "retrain",
            {"lora": {"targets": ["mlp.upproj"]}},
            r"'mlp\.upproj' \(did you mean mlp\.up_proj or .* there are ",
        ),
        ("retrain", {"distillation": {"top_k": 129}}, "top_k 129 is more than the 128 words of the vocabulary"),
        ("retrain", {"distillation": {"teacher": "./nowhere"}}, "'./nowhere': there is no such folder"),
        ("cluster", {"zero_stage": 2}, "Input should be 'auto', 0 or 3, got 2"),
        ("cluster", {"workers": 0}, "greater than or equal to 1, got 0"),
    ],
)
def test_a_wrong_value_is_named(
    command: Cli, tmp_path: Path, settings: dict[str, Any], section: str, values: dict[str, Any], message: str
) -> None:
    settings[section] |= values
    code, output = dry_run(command, tmp_path, settings)
    assert code == 2
    assert re.search(message, output), output


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"num_layers": 8, "kept": []}, "kept is empty"),
        ({"num_layers": 8, "kept": [0, 8]}, "kept names layer 8; the model has layers 0 to 7"),
        ({"num_layers": 9, "kept": [0, 8]}, "is for 9 layers, the model has 8"),
        ({"kept": [0]}, "num_layers"),
    ],
)
def test_a_wrong_plan_is_named(command: Cli, tmp_path: Path, tiny: Path, plan: dict[str, Any], message: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    code, output = command("rewrite", tiny / "model", tmp_path / "small", "--plan", tmp_path / "plan.json")
    assert code == 2
    assert message in output
    assert not (tmp_path / "small").exists()


def test_interrupted_it_says_that_nothing_is_lost(
    command: Cli, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpruner_dist.pipeline.run", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code, output = command("run", write_config(tmp_path / "config.yaml", settings), "--run-dir", tmp_path / "run")
    assert (code, output) == (130, "mpruner: interrupted; what was saved is kept, and the same command goes on\n")


def test_rewrite_and_verify_alone(command: Cli, tmp_path: Path, tiny: Path) -> None:
    code, output = command("rewrite", tiny / "model", tmp_path / "small", "--keep", "0-2,7")
    assert code == 0, output
    assert "small: proven to be" in output
    again = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mpruner_dist", "rewrite", tiny / "model", tmp_path / "small",
         "--keep", "0-2,7"], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (again.returncode, "done before" in again.stdout) == (0, True)
    assert re.search(r"\| +typer$", again.stderr, re.MULTILINE)
    assert not re.search(r"\| +torch$", again.stderr, re.MULTILINE)  # what is done before needs no torch
    code, output = command("verify", tmp_path / "small")
    assert code == 0, output
    assert re.search(r"\d+ tensors, [\d,]+ parameters", output)
    code, output = command("rewrite", tiny / "model", tmp_path / "other")
    assert code == 2
    assert "--plan plan.json or --keep" in output
    code, output = command("rewrite", tiny / "model", tmp_path / "other", "--keep", "0-2", "--keep", "3")
    assert (code, "write each once, by name, such as decoder=0-5" in output) == (2, True)
    code, output = command(
        "rewrite", tiny / "model", tmp_path / "other", "--keep", "0-2", "--max-shard-size", "5 stones"
    )
    assert (code, "such as 5GB, 500MB or 2GiB" in output) == (2, True)
    code, output = command("rewrite", tiny / "model", tmp_path / "other", "--keep", "0-99")
    assert code == 2
    assert "layer 8" in output


def test_rewrite_with_the_plans_of_other_tools(command: Cli, tmp_path: Path, tiny: Path) -> None:
    for name, told in (("plan.yaml", "mergekit"), ("plan.json", "DeepSpeed")):
        code, output = command(
            "rewrite", tiny / "model", tmp_path / "small", "--keep", "0-2,7", "--export", tmp_path / name
        )
        assert (code, f"the plan for {told}" in output) == (0, True), output
        code, output = command("rewrite", tiny / "model", tmp_path / f"by {name}", "--plan", tmp_path / name)
        assert code == 0, output
        assert json.loads((tmp_path / f"by {name}" / "layer_map.json").read_text())["new_to_old"] == [0, 1, 2, 7]
    code, output = command("verify", tmp_path / "small", "--against", tiny / "model")
    assert code == 0, output
    assert "llama.cpp: no pattern by layer number is known of llama" in output
    assert re.search(r"logits differ by \d", output)
    # not even where the layers were written before, as a checkpoint of another kind
    code, output = command("rewrite", tiny / "model", tmp_path / "small", "--keep", "0-2,7", "--universal")
    assert (code, "is no DeepSpeed checkpoint" in output) == (2, True), output
    code, output = command("rewrite", tiny / "model", tmp_path / "u", "--keep", "0", "--universal", "--drop-mtp")
    assert (code, "--universal writes no shards" in output) == (2, True), output
    code, output = command("rewrite", "owner/name/more", tmp_path / "u", "--keep", "0")
    assert (code, "there is no such folder" in output) == (2, True), output


def test_status_of_what_is_no_run(command: Cli, tmp_path: Path) -> None:
    code, output = command("status", tmp_path)
    assert code == 2
    assert "is no run folder" in output


def test_a_run_folder_that_is_something_else(command: Cli, tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    config = write_config(tmp_path / "config.yaml", settings)
    code, output = command("run", config, "--run-dir", tmp_path / "thesis")
    assert code == 2
    assert "not empty and no run's" in output
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_a_run_refuses_unknown_targets_of_adapters_before_it_collects(
    command: Cli, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings["retrain"]["lora"] = {"targets": ["gate"]}
    code, output = command("run", write_config(tmp_path / "config.yaml", settings), "--run-dir", tmp_path / "run")
    assert code == 2
    assert "no layer has a projection 'gate' (did you mean gate_proj?); there are mlp.down_proj, " in output
    assert "starting Ray" not in output


def test_depths_go_with_a_comparison(command: Cli, tmp_path: Path, settings: dict[str, Any]) -> None:
    code, output = command("plan", write_config(tmp_path / "config.yaml", settings), "--depths", "1,2")
    assert code == 2
    assert "--depths goes with --compare" in output


@pytest.mark.smol
@pytest.mark.skipif(not SMOL.exists(), reason="build/demo is not made: run launch/prepare_demo.py build/demo")
def test_the_real_model_is_rewritten_and_verified(command: Cli, tmp_path: Path) -> None:
    code, output = command("rewrite", SMOL, tmp_path / "small", "--keep", "0-9,12-29")
    assert code == 0, output
    code, output = command("verify", tmp_path / "small")
    assert code == 0, output
    assert "127,434,816 parameters" in output  # 134,515,008 less two layers of 3,540,096
