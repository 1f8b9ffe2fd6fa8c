"""What a dry run says of the work, the memory and the plans, and that it does nothing."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import transformers
import yaml
from conftest import ROOT, WORDS, Cli, make_model, make_text, make_tokenizer, write_config
from speech_models import make_whisper, sound
from test_images import make_resnet, some_images, write_idx


def dry_run(command: Cli, tmp_path: Path, settings: dict[str, Any]) -> tuple[int, str]:
    return command("run", write_config(tmp_path / "config.yaml", settings), "--dry-run")


def test_a_dry_run_says_what_would_happen_and_does_nothing(
    command: Cli, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = dry_run(command, tmp_path, settings)
    assert code == 0, output
    for words in ("llama", "8, model.layers.0 to model.layers.7",
                  "7 batches of 2 x 32 tokens (448)", "6 steps of 4 x 32",
                  "2 micro-batches of 2", "3 models", "ZeRO stage 1", "kB in", "a worker",
                  "each on disk; 2 stay, and one more while it is saved"):  # fmt: skip
        assert words in output, words
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_dry_run_tells_what_a_replica_takes_and_what_divided_weights(
    command: Cli, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings["cluster"]["workers"] = 2
    code, output = dry_run(command, tmp_path, settings)
    assert code == 0, output
    told = " ".join(output.replace("│", " ").split())
    found = re.findall(r"([\d.]+) kB a worker with a replica on each, ([\d.]+) kB a worker with divided", told)
    assert len(found) == 2  # of collection and evaluation
    weights = sum(file.stat().st_size for file in Path(settings["model"]["path"]).glob("*.safetensors")) / 1e3
    for replica, divided in found:
        assert float(replica) - float(divided) == pytest.approx(weights / 2, rel=0.05)


def test_a_model_of_one_layer_is_refused(command: Cli, tmp_path: Path, settings: dict[str, Any]) -> None:
    make_model("llama", tmp_path / "one", num_hidden_layers=1)
    make_tokenizer(tmp_path / "one")
    settings["model"]["path"] = str(tmp_path / "one")
    code, output = dry_run(command, tmp_path, settings)
    assert (code, "a single layer in model.layers: there is nothing to compare" in output) == (2, True), output


SHORT: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gpt2", {"n_positions": 16, "vocab_size": 128, "n_embd": 32, "n_head": 4, "n_layer": 3}),
        ("opt", {"max_position_embeddings": 16, "ffn_dim": 64, "word_embed_proj_dim": 32, **SHORT}),
    ],
)
def test_texts_longer_than_learned_positions_are_refused(
    command: Cli, tmp_path: Path, settings: dict[str, Any], kind: str, sizes: dict[str, Any]
) -> None:
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "short")
    make_tokenizer(tmp_path / "short")
    settings["model"]["path"] = str(tmp_path / "short")
    settings["plan"]["keep_layers"] = 2
    code, output = dry_run(command, tmp_path, settings)
    assert (code, "data.block_size 32: the model has learned positions for 16" in output) == (2, True), output
    settings["data"]["block_size"] = settings["collect"]["samples"] = 16
    code, output = dry_run(command, tmp_path, settings)
    assert code == 0, output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": {"method": "last", "keep_layers": 99}}, "99 layers cannot be kept of 8"),
        ({"plan": {"method": "last", "keep_layers": 8}}, "the model has 8 layers and"),
        ({"plan": {"method": "last", "keep_layers": 1}}, "would remove one of the protected [0, 7]"),
        ({"plan": {"method": "last", "target_parameters": 9}}, "plan.target_parameters 9 cannot be met"),
        ({"plan": {"method": "file", "file": "nowhere.json"}}, "cannot read the plan nowhere.json"),
        ({"retrain": {"deepspeed": "nowhere.json"}}, "cannot read nowhere.json"),
        ({"retrain": {"distillation": {"teacher": "nowhere"}}}, "nowhere"),
        ({"retrain": {"lora": {"targets": ["nothing"]}}}, "nothing"),
    ],
)
def test_a_run_refuses_before_it_collects_what_a_dry_run_refuses(
    command: Cli, tmp_path: Path, settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    settings["retrain"] = settings["retrain"] | changes.get("retrain", {})
    config = write_config(tmp_path / "config.yaml", settings | changes | {"retrain": settings["retrain"]})
    for arguments in (("--dry-run",), ("--run-dir", tmp_path / "run")):
        code, output = command("run", config, *arguments)
        assert code == 2, output
        assert message in " ".join(output.split())


def test_brackets_in_names_are_no_markup(
    command: Cli, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shutil.copytree(settings["model"]["path"], tmp_path / "[v2]" / "[/v2]")
    settings["model"]["path"] = str(tmp_path / "[v2]" / "[/v2]")
    code, output = dry_run(command, tmp_path, settings)
    assert code == 0, output
    assert "[v2]/[/v2]" in output


def make_classifier(folder: Path) -> None:
    """A BERT for two classes, and the records of `text.jsonl` with labels."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6}
    config = transformers.BertConfig(vocab_size=128, max_position_embeddings=128, num_labels=2, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    make_tokenizer(folder / "model")
    records = [json.loads(line) for line in (folder / "text.jsonl").read_text().splitlines()]
    labelled = (json.dumps(record | {"label": number % 2}) for number, record in enumerate(records))
    (folder / "text.jsonl").write_text("\n".join(labelled))


def make_translator(folder: Path) -> None:
    """A T5, and the records of `text.jsonl` with themselves as what should be said."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 3}
    config = transformers.T5Config(vocab_size=128, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "model")
    make_tokenizer(folder / "model")
    records = [json.loads(line) for line in (folder / "text.jsonl").read_text().splitlines()]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(record | {"target": record["text"]}) for record in records))


def stand_in(content: dict[str, Any], folder: Path, tiny: Path) -> None:
    """Put a small model and made-up data in the place of those that a configuration names."""
    task = content["model"].get("task", "causal-lm")
    content["model"]["path"] = str(tiny / "model" if task == "causal-lm" else folder / "model")
    content["plan"] = {"method": "anchor"}
    content.get("rounds", {}).pop("remove", None)  # of other methods
    if task == "image-classification":
        make_resnet(folder / "model", [])
        for prefix, count in (("train", 60_000), ("t10k", 200)):
            pixels, labels = some_images(count)
            write_idx(folder / f"{prefix}-images-idx3-ubyte", pixels)
            write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
        content["data"] |= {part: source | {"path": str(folder)} for part, source in content["data"].items()}
        return
    records = folder / "text.jsonl"
    if task == "automatic-speech-recognition":
        make_whisper(folder / "model")
        soundfile.write(folder / "tone.wav", sound(0, 0.5, 16000), 16000)
        records.write_text("\n".join(400 * [json.dumps({"audio": "tone.wav", "target": " ".join(WORDS[:8])})]))
    else:
        make_text(records, records=60_000)
    if task == "text-classification":
        make_classifier(folder)
    if task == "sequence-to-sequence":
        make_translator(folder)
    bounds = [0.0, 0.5, 0.8, 0.9, 1.0]
    for part, *take in zip(("calibration", "train", "validation", "test"), bounds, bounds[1:], strict=False):
        content["data"][part] = {"path": str(records), "take": take}


CONFIGURATIONS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_every_configuration_dry_runs(command: Cli, tmp_path: Path, tiny: Path, path: Path) -> None:
    """On small models and made-up data: the same on every machine."""
    content = yaml.safe_load(path.read_text())
    stand_in(content, tmp_path, tiny)
    code, output = command("run", write_config(tmp_path / "config.yaml", content), "--dry-run")
    assert code == 0, output


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_every_configuration_dry_runs_on_its_own_model(
    command: Cli, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(path.read_text())
    needed = [
        content["model"]["path"],
        *(source["path"] for source in content["data"].values() if isinstance(source, dict)),
    ]
    if missing := [name for name in needed if not Path(name).exists()]:
        pytest.skip(f"{missing[0]} is not made: launch/prepare_demo.py, launch/prepare_recipes.py")
    code, output = command("run", path, "--dry-run")
    assert code == 0, output


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_every_deepspeed_configuration_is_completed(
    command: Cli, tmp_path: Path, settings: dict[str, Any], path: Path
) -> None:
    settings["retrain"]["deepspeed"] = str(path)
    code, output = dry_run(command, tmp_path, settings)
    assert code == 0, output
    assert f"ZeRO stage {json.loads(path.read_text())['zero_optimization']['stage']}" in output


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "at most 0.08 M parameters trained, at most 2.0 MB a worker; activations"),
        ({"trainable": "neighbours"}, "at most 0.04 M parameters trained"),  # two gaps, four layers
        ({"lora": {"rank": 1}}, "at most 0.00 M parameters trained"),
        ({"distillation": {"top_k": 3, "cache": True}}, "at most 1.6 MB a worker"),
        ({"deepspeed": str(ROOT / "configs/deepspeed/zero3_offload.json")}, "2.0 MB on cpu"),
    ],
)
def test_the_dry_run_counts_what_is_trained(
    command: Cli, tmp_path: Path, settings: dict[str, Any], values: dict[str, Any], told: str
) -> None:
    settings["retrain"] |= values
    code, output = dry_run(command, tmp_path, settings)
    assert code == 0, output
    assert told in " ".join(output.split()), output


@pytest.mark.parametrize(
    ("plan", "cost"),
    [
        ({"method": "greedy", "keep_layers": 6}, "greedy: 2 layers go, 12 forward passes over 256 validation tokens"),
        ({"method": "search", "keep_layers": 5, "passes": 9}, "search: 3 layers go, at most 9 forward passes"),
        ({"method": "last", "keep_layers": 5}, "last: 3 layers go"),
    ],
)
def test_a_dry_run_says_what_judging_plans_costs(
    command: Cli, tmp_path: Path, settings: dict[str, Any], plan: dict[str, Any], cost: str
) -> None:
    settings["plan"] = plan | {"judge_blocks": 8}
    code, output = dry_run(command, tmp_path, settings)
    assert code == 0, output
    assert cost in " ".join(output.replace("│", " ").split())


def test_a_dry_run_tells_of_the_first_round(command: Cli, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings["plan"] = {"method": "greedy", "keep_layers": 2, "judge_blocks": 8}
    settings["rounds"] = {"tolerance": 0.1, "remove": 2}
    code, output = dry_run(command, tmp_path, settings)
    assert code == 0, output
    text = " ".join(output.replace("│", " ").split())
    assert "greedy: 2 layers go, 12 forward passes" in text
    assert "at most 8, the first as above; judged by perplexity on the validation part" in text
    settings["plan"]["keep_layers"] = 8
    code, output = dry_run(command, tmp_path, settings)
    assert code == 2
    assert "the model has 8 layers, so that none would go" in output
