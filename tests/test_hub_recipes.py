"""The recipes for models of a hub, dry-run on checkpoints of the published sizes: their tensors are holes in a file.

Model and data are made up here; workers, number types, ZeRO stages and all that a recipe says of the work are its own.
"""

import io
import json
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import ROOT, WORDS, Cli, make_tokenizer, write_config
from speech_models import WHISPER_TOKENS, make_whisper_tokenizer, sound
from tokenizers import pre_tokenizers

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.checkpoints.header import DTYPE_BITS
from mpruner_dist.cluster.shape import choose_shape
from mpruner_dist.models.loading import empty_model

RECIPES = sorted((ROOT / "configs" / "hub").glob("*.yaml"))
SHARE = 0.75
"""Of a GPU's memory; the rest is for activations and the losses of words, which a dry run does not count."""

MOODS = ["sadness", "joy", "love", "anger", "fear", "surprise"]
OBJECTS = [f"object {number}" for number in range(1000)]
OBJECTS[134] = OBJECTS[517] = "crane"
"""As models name the classes of ImageNet. `datasets` allows no name twice, and calls the second crane2."""

NEEDED = {
    "sequence-to-sequence": ("sacrebleu", "rouge_score"),
    "automatic-speech-recognition": ("sacrebleu", "rouge_score", "soundfile", "soxr", "jiwer"),
}
"""Packages of extras, by task."""

LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 5e5}
PUBLISHED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "bhadresh-savani/bert-base-uncased-emotion": (
        "BertForSequenceClassification", 109_486_854, {"id2label": dict(enumerate(MOODS))}
    ),
    "microsoft/resnet-50": (
        "ResNetForImageClassification", 25_557_032, {"id2label": dict(enumerate(OBJECTS)), "depths": [3, 4, 6, 3]}
    ),
    "microsoft/resnet-152": (
        "ResNetForImageClassification", 60_192_808, {"id2label": dict(enumerate(OBJECTS)), "depths": [3, 8, 36, 3]}
    ),
    "ZhangCheng/T5-Base-finetuned-for-Question-Generation": (
        "T5ForConditionalGeneration", 222_903_552,
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0},
    ),
    "openai/whisper-small": (
        "WhisperForConditionalGeneration", 241_734_912,
        {"d_model": 768, "encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 12,
         "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "vocab_size": 51865},
    ),
    "Qwen/Qwen2.5-0.5B": (
        "Qwen2ForCausalLM", 494_032_768,
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    ),
    "Qwen/Qwen3-8B-Base": (
        "Qwen3ForCausalLM", 8_190_735_360,
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    ),
    "meta-llama/Llama-3.1-8B": (
        "LlamaForCausalLM", 8_030_261_248,
        LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "Qwen/Qwen2.5-32B": (
        "Qwen2ForCausalLM", 32_763_876_352,
        {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
         "num_key_value_heads": 8, "vocab_size": 152064},
    ),
    "meta-llama/Llama-3.1-70B": (
        "LlamaForCausalLM", 70_553_706_496,
        LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    ),
}  # fmt: skip
"""By hub id: the architecture, the number of parameters as published, the dimensions where they are no defaults."""


def make_checkpoint(path: str, dtype: str, folder: Path) -> Path:
    """A model's folder with its configuration and a tokenizer; its weights are a hole that takes no disk."""
    architecture, parameters, sizes = PUBLISHED[path]
    config = getattr(transformers, architecture).config_class(**sizes, dtype=dtype, architectures=[architecture])
    config.save_pretrained(folder)
    if architecture.startswith("Qwen2"):  # transformers gives it a tokenizer of its own, whatever the files say
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        transformers.Qwen2Tokenizer({letter: n for n, letter in enumerate(letters)}, []).save_pretrained(folder)
    elif architecture.startswith("Whisper"):
        tokenizer = make_whisper_tokenizer(folder)
        config.eos_token_id, config.decoder_start_token_id = map(tokenizer.convert_tokens_to_ids, WHISPER_TOKENS[:2])
        config.save_pretrained(folder)
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
    else:
        make_tokenizer(folder)
    if architecture.startswith("ResNet"):  # small, for the sake of time
        (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": 8}))
    model = empty_model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    seen: set[int] = set()
    header, end = {}, 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # tied to one that is there
            continue
        seen.add(id(tensor))
        kind = "BF16" if dtype == "bfloat16" else "F32" if tensor.is_floating_point() else "I64"
        begin, end = end, end + tensor.numel() * DTYPE_BITS[kind] // 8
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    return folder


def make_records(source: dict[str, Any], count: int, path: Path) -> Path:
    """Records with the fields that a source names: texts of about 100 words, classes by number, short targets."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            record = {
                source.get("text_field", "text"): " ".join(draw.choices(WORDS, k=draw.randint(50, 150))),
                source.get("label_field", "label"): number % len(MOODS),
                source.get("target_field", "target"): " ".join(draw.choices(WORDS, k=draw.randint(10, 20))),
            }
            file.write(json.dumps(record) + "\n")
    return path


def make_images(count: int, path: Path) -> Path:
    """Images of every class as the hub has them: compressed, the classes named."""
    from PIL import Image

    compressed = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(compressed, "PNG")
    names = [*OBJECTS[:517], "crane2", *OBJECTS[518:]]
    datasets.Dataset.from_dict(
        {
            "image": [{"bytes": compressed.getvalue(), "path": None}] * count,
            "label": [number % len(names) for number in range(count)],
        },
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}),
    ).save_to_disk(path)
    return path


def make_speech(count: int, path: Path) -> Path:
    """Recordings as the hub has them: one of two seconds, again and again, with 40 words."""
    import soundfile

    content = io.BytesIO()
    soundfile.write(content, sound(0, 2.0, 16000), 16000, format="FLAC")
    features = datasets.Features({"audio": datasets.Audio(16000), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(
        {"audio": [{"bytes": content.getvalue(), "path": None}] * count, "text": [" ".join(WORDS[:40])] * count}
    )
    table.cast(features).save_to_disk(path)
    return path


def make_data(content: dict[str, Any], folder: Path) -> None:
    """Put a made-up source into the place of each that a recipe names, as large as calibration needs."""
    collect = content["collect"]
    for part, source in content["data"].items():
        if not isinstance(source, dict):
            continue
        count = collect["batch_size"] * collect["num_batches"] if part == "calibration" else 40
        if content["model"].get("task") == "image-classification":
            source["path"] = str(make_images(count, folder / part))
        elif content["model"].get("task") == "automatic-speech-recognition":
            source["path"] = str(make_speech(count, folder / part))
        else:
            texts = count * content["data"]["block_size"] // 90 if "task" not in content["model"] else count
            source["path"] = str(make_records(source, texts, folder / f"{part}.jsonl"))
        for key in ("name", "split", "take"):
            source.pop(key, None)


def head_of(path: Path) -> str:
    """The comment at the top of a recipe."""
    return " ".join(line.lstrip("# ") for line in path.read_text().split("\nmodel:")[0].splitlines())


def bytes_of(number: str, unit: str) -> float:
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_dry_runs_and_fits_on_its_gpus(
    command: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.chdir(ROOT)  # where the DeepSpeed configurations lie that recipes name
    content = yaml.safe_load(path.read_text())
    for package in NEEDED.get(content["model"].get("task"), ()):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}, of an extra")
    dtype = content["model"]["dtype"]
    model = make_checkpoint(content["model"]["path"], dtype, tmp_path / "model")
    content["model"]["path"] = str(model)
    make_data(content, tmp_path)
    code, output = command("run", write_config(tmp_path / "config.yaml", content), "--dry-run")
    elements = [tensor.num_elements for tensor in read_checkpoint(model).tensors.values()]
    (model / "model.safetensors").unlink()  # whoever copies the folder would fill the hole
    assert code == 0, output
    told = " ".join(output.replace("│", " ").split())
    [(trained, unit, beside)] = re.findall(r"trained, at most ([\d.]+) (.B) a worker(?:, ([\d.]+ .B) on cpu)?", told)
    on_gpu = bytes_of(trained, unit) - (bytes_of(*beside.split()) if beside else 0)
    gpu = 1e9 * int(re.findall(r"GPUs? of (\d+) GB", head_of(path))[0])
    assert on_gpu < SHARE * gpu, told
    width = getattr(torch, dtype).itemsize
    assert not choose_shape(elements, width, content["cluster"]["workers"], int(gpu), int(gpu)).offload


def test_every_recipe_says_that_it_was_not_run() -> None:
    for path in RECIPES:
        assert "Dry-run with this architecture, not run by us." in head_of(path), path
