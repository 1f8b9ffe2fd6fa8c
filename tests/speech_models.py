"""Small Whispers with their tokenizers, recordings, and a configuration that prunes them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from conftest import WORDS, settings_for
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mpruner_dist.config import Config
from mpruner_dist.data.prepare import Watcher
from mpruner_dist.data.readers import make_reader
from mpruner_dist.data.speech import Speech
from mpruner_dist.models.stacks import run_blocks

ENCODER, DECODER = 4, 3
IDLE = [1, 5]  # the second block of the encoder, and the second of the decoder
SAID = 6  # words in a recording
PROMPT = ["<s>", "<en>"]
SPECIAL = ["<pad>", *PROMPT, "</s>", "<unk>"]
RECORDINGS = 60
WHISPER_TOKENS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
WHISPER = transformers.WhisperConfig(
    vocab_size=len(SPECIAL) + len(WORDS), d_model=32, encoder_layers=ENCODER, decoder_layers=DECODER,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
    max_source_positions=50, max_target_positions=48, pad_token_id=0, bos_token_id=1, eos_token_id=3,
    decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=None,
)  # fmt: skip


def make_words(folder: Path) -> None:
    """A tokenizer that puts the beginning and a language in front of every text, as Whisper's does."""
    numbers = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <en> $A </s>", special_tokens=[(token, numbers[token]) for token in (*PROMPT, "</s>")]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=["<en>"],
    ).save_pretrained(folder)  # fmt: skip


def make_whisper_tokenizer(folder: Path) -> Any:
    """Whisper's own class, of letters alone, set to no language, as OpenAI's are."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = transformers.WhisperTokenizer({letter: n for n, letter in enumerate(letters)}, [])
    tokenizer.add_special_tokens({"additional_special_tokens": WHISPER_TOKENS})
    tokenizer.save_pretrained(folder)
    return transformers.WhisperTokenizer.from_pretrained(folder)  # what it begins with is made of its special tokens


def make_whisper(folder: Path) -> Any:
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(WHISPER).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        for layer in IDLE:
            for name, parameter in run_blocks(model)[layer].named_parameters():
                if name.endswith(("out_proj.weight", "fc2.weight", "out_proj.bias", "fc2.bias")):
                    parameter.mul_(1e-3)
    model.save_pretrained(folder)
    make_words(folder)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return model


def sound(seed: int, seconds: float, rate: int) -> Any:
    draw = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * draw.uniform(100, 3000) * time + draw.uniform(0, 6)) for _ in range(4))
    return (0.1 * tones).astype(np.float32)


def make_recordings(folder: Path) -> None:
    """A Whisper, and recordings with what it says of each: WAV files beside a list of them."""
    model = make_whisper(folder / "model")
    (folder / "sounds").mkdir()
    draw, records, heard = random.Random(0), [], []
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder / "model")
    for number in range(RECORDINGS):
        samples = sound(number, draw.uniform(0.3, 0.95), 16000)
        soundfile.write(folder / f"sounds/{number}.wav", samples, 16000, subtype="FLOAT")
        heard.append(extractor(samples, sampling_rate=16000, return_tensors="pt")["input_features"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    said = transformers.GenerationMixin.generate(
        model, input_features=torch.cat(heard), decoder_input_ids=torch.tensor([[1, 2]] * RECORDINGS),
        max_new_tokens=SAID, min_new_tokens=SAID, do_sample=False, suppress_tokens=list(range(len(SPECIAL))),
    )[:, 2:]  # fmt: skip
    for number, text in enumerate(tokenizer.batch_decode(said)):
        records.append({"audio": f"sounds/{number}.wav", "target": text})
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, records)))


def settings(folder: Path) -> dict[str, Any]:
    settings = settings_for(folder)
    settings["model"]["task"] = "automatic-speech-recognition"
    for part in ("calibration", "train", "validation", "test"):
        settings["data"][part]["path"] = str(folder / "list.jsonl")
    settings["collect"] |= {"batch_size": 3, "num_batches": 4, "samples": 24, "skip_tokens": 0, "outlier_norm": None}
    settings["retrain"] |= {"steps": 8, "learning_rate": 1e-3, "save_every": 8, "eval_every": 8}
    settings["plan"] = {"method": "greedy", "keep_layers": 5, "protect_first": 0, "protect_last": 0}
    settings["evaluate"] = {"batch_size": 5}
    return settings


def config_of(folder: Path, **changes: Any) -> Config:
    return Config.model_validate(settings(folder) | changes)


def read(folder: Path, path: Path, limit: int | None = None, **fields: Any) -> Speech:
    config = config_of(folder)
    source = config.data.test.model_copy(update={"path": str(path), "take": (0.0, 1.0), **fields})
    return make_reader(config, folder / "model").read(source, limit, Watcher("test", folder / "progress.json"))
