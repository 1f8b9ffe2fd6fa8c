"""Checkpoints of any size with random weights, made in the time that it takes to write them: for speed and memory.

.venv/bin/python benchmarks/random_checkpoint.py FOLDER 3B
"""

import json
import random
import sys
from pathlib import Path
from typing import BinaryIO

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from mpruner_dist.checkpoints.folder import index_json, shard_name
from mpruner_dist.checkpoints.header import Header, TensorInfo, build_header
from mpruner_dist.models.loading import empty_model

SHARD_BYTES = 2_000_000_000
WORDS = [f"w{number}" for number in range(4000)]
SIZES = {  # of llama models: hidden, intermediate, layers, heads, key-value heads, vocabulary
    "1B": (2048, 5632, 22, 32, 4, 32000),
    "3B": (3072, 8192, 26, 24, 8, 32000),
    "7B": (4096, 11008, 32, 32, 32, 32000),
}


def make_checkpoint(folder: Path, size: str) -> int:
    """Write a llama in bfloat16 with a tokenizer of whole words; returns its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    settings = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
    }  # fmt: skip
    config = transformers.LlamaConfig(**settings, max_position_embeddings=4096, dtype="bfloat16", pad_token_id=0)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_parameters()}
    groups: list[list[TensorInfo]] = [[]]
    for name, shape in shapes.items():
        info = TensorInfo(name, "BF16", shape, 0, 2 * torch.Size(shape).numel())
        if groups[-1] and sum(other.num_bytes for other in groups[-1]) + info.num_bytes > SHARD_BYTES:
            groups.append([])
        groups[-1].append(info)
    values = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    noise = memoryview(values.view(torch.uint8).numpy())
    for number, group in enumerate(groups, 1):
        with (folder / shard_name(number, len(groups))).open("wb") as file:
            file.write(build_header(group, {"format": "pt"}))
            for info in group:
                if len(info.shape) == 1:  # the scale of a norm
                    file.write(torch.ones(info.shape, dtype=torch.bfloat16).view(torch.uint8).numpy().data)
                else:
                    _write_noise(file, noise, info)
    if len(groups) > 1:
        headers = {
            shard_name(number, len(groups)): Header({info.name: info for info in group})
            for number, group in enumerate(groups, 1)
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_json(headers)))
    _write_tokenizer(folder)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _write_noise(file: BinaryIO, noise: memoryview, info: TensorInfo) -> None:
    position = 2 * random.Random(info.name).randrange(len(noise) // 4)  # elsewhere for each tensor
    left = info.num_bytes
    while left:
        part = noise[position : position + left]
        file.write(part)
        left -= len(part)
        position = 0


def _write_tokenizer(folder: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def write_text(path: Path, records: int) -> None:
    """Records of random words, 100 to 300 each."""
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(100, 300)))}) for _ in range(records)]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    print(f"{make_checkpoint(Path(sys.argv[1]), sys.argv[2]):,} parameters")
