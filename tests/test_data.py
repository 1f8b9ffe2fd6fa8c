"""Text to blocks: nothing lost, nothing shared, nothing twice."""

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mpruner_dist.config import Config, SourceConfig
from mpruner_dist.data.blocks import (
    Blocks,
    batch_rows,
    make_blocks,
    num_batches,
    turns_of,
)
from mpruner_dist.data.parts import load_part, save_part
from mpruner_dist.data.prepare import prepare_data
from mpruner_dist.data.sources import open_source
from mpruner_dist.errors import UserError
from mpruner_dist.runs.digest import file_digest

WORDS = [f"w{number}" for number in range(50)]
FIRST_WORD, END = 3, 1  # ids


def word_tokenizer() -> Any:
    """One id a word: what comes out can be told by eye."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


TOKENIZER = word_tokenizer()


@pytest.fixture(autouse=True)
def _bars_as_before() -> Iterator[None]:
    yield
    datasets.enable_progress_bars()


def text_of(numbers: list[int]) -> str:
    return " ".join(WORDS[number] for number in numbers)


def blocks_of(records: list[list[int]], size: int, pack: bool, **changes: Any) -> Blocks:
    options: dict[str, Any] = {"separator": None, "limit": None} | changes
    return make_blocks((text_of(record) for record in records), TOKENIZER, size, pack, **options)


RECORDS = st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=12), max_size=12)


@settings(max_examples=60)
@given(RECORDS, st.integers(2, 9))
def test_packing_loses_no_token_but_the_tail(records: list[list[int]], size: int) -> None:
    stream = [token for record in records for token in [*(number + FIRST_WORD for number in record), END]]
    blocks = blocks_of(records, size, pack=True)
    assert len(blocks) == len(stream) // size
    assert blocks.ids.flatten().tolist() == stream[: len(blocks) * size]
    assert blocks.lengths.tolist() == [size] * len(blocks)
    assert blocks.ids.dtype == blocks.lengths.dtype == np.int32
    running = blocks_of(records, size, pack=True, separator="\n\n")  # one text: nothing between its paragraphs
    plain = [number + FIRST_WORD for record in records for number in record]
    assert running.ids.flatten().tolist() == plain[: len(plain) // size * size]


@settings(max_examples=60)
@given(RECORDS, st.integers(2, 9))
def test_unpacked_records_have_blocks_of_their_own(records: list[list[int]], size: int) -> None:
    blocks = blocks_of(records, size, pack=False)
    usable = [record for record in records if len(record) > 1]  # one token alone predicts nothing
    for record, ids, length, mask in zip(usable, blocks.ids, blocks.lengths, blocks.mask(), strict=True):
        tokens = [number + FIRST_WORD for number in record][:size]
        assert length == len(tokens)
        assert ids.tolist() == tokens + [0] * (size - len(tokens))
        assert mask.tolist() == [1] * len(tokens) + [0] * (size - len(tokens))


@pytest.mark.parametrize("pack", [True, False])
def test_each_block_begins_as_the_tokenizer_begins_a_text(pack: bool) -> None:
    """Gemma's does, SmolLM2's does not."""
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "<end>"
    assert make_blocks([text_of([1, 2, 3])], tokenizer, 3, pack, "", None).ids.tolist() == [[4, 5, 6]]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<end> $A", special_tokens=[("<end>", END)]
    )
    blocks = make_blocks([text_of([1, 2, 3]), text_of([4, 5])], tokenizer, 3, pack, "", None)
    assert blocks.ids.tolist() == [[END, 4, 5], [END, 6, 7] if pack else [END, 7, 8]]
    assert blocks.lengths.tolist() == [3, 3]


def test_the_limit_holds_and_no_more_records_are_read_than_needed() -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for read in itertools.count(1):
            yield text_of([read % 50] * 4)

    for pack in (True, False):
        assert len(make_blocks(endless(), TOKENIZER, 10, pack, None, 7)) == 7
        assert read <= 256


@settings(max_examples=100)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 7), st.data())
def test_every_batch_is_done_once_in_equally_many_turns(
    num_blocks: int, batch_size: int, world_size: int, data: st.DataObject
) -> None:
    count = num_batches(num_blocks, batch_size)
    rows = [list(batch_rows(batch, batch_size, num_blocks)) for batch in range(count)]
    assert list(itertools.chain.from_iterable(rows)) == list(range(num_blocks))
    assert all(len(row) == batch_size for row in rows[:-1])
    assert 1 <= len(rows[-1]) <= batch_size
    todo = data.draw(st.permutations(range(count)))[: data.draw(st.integers(0, count))]
    turns = [list(turns_of(todo, rank, world_size)) for rank in range(world_size)]
    assert sorted(batch for mine in turns for batch, counts in mine if counts) == sorted(todo)
    assert {batch for mine in turns for batch, counts in mine if not counts} <= set(todo[:1])
    assert {len(mine) for mine in turns} == {-(-len(todo) // world_size)}


def test_blocks_are_saved_and_read_or_refused_by_name(tmp_path: Path) -> None:
    blocks = blocks_of([[1, 2, 3], [4, 5]], 4, pack=False)
    path = tmp_path / "part.safetensors"
    save_part(path, blocks)
    read = load_part(path)
    assert (read.ids == blocks.ids).all()
    assert (read.lengths == blocks.lengths).all()
    assert read.rows([1, 0]).ids.tolist() == blocks.ids[::-1].tolist()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"cannot read .*part\.safetensors"):
        load_part(path)
    with pytest.raises(UserError, match=r"cannot read .*none"):
        load_part(tmp_path / "none")


TEXTS = [text_of([number, number + 1]) for number in range(10)]


def write_texts(folder: Path, kind: str, texts: list[str] = TEXTS) -> Path:
    table = datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})
    path = folder / f"texts.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(texts) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "saved":
        table.save_to_disk(path)
    elif kind == "saved with splits":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(path)
    else:
        path.mkdir()
        for half, name in ((texts[:4], "a"), (texts[4:], "b")):
            (path / name).mkdir()
            write_texts(path / name, "jsonl", half)
    return path


def taken(**source: Any) -> list[str]:
    return list(open_source(SourceConfig(**source))[0])


KINDS = ["txt", "jsonl", "json", "csv", "parquet", "saved", "saved with splits", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_its_records_in_order(tmp_path: Path, kind: str) -> None:
    path = write_texts(tmp_path, kind)
    records, number, separator = open_source(SourceConfig(path=str(path)))
    assert [record.strip() for record in records] == TEXTS
    assert number == 10
    assert separator == ("\n\n" if kind == "txt" else None)


def test_a_split_of_a_saved_set_is_taken(tmp_path: Path) -> None:
    path = str(write_texts(tmp_path, "saved with splits"))
    assert taken(path=path, split="test") == TEXTS[:1]
    with pytest.raises(UserError, match=r"cannot read .*split nosuch"):
        open_source(SourceConfig(path=path, split="nosuch"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "saved with splits"])
def test_what_has_no_splits_gives_none(tmp_path: Path, kind: str) -> None:
    """Else a test part that asks for split test would get all that was trained on."""
    path = write_texts(tmp_path, kind)
    with pytest.raises(UserError, match="has one split, called train: leave split test out"):
        open_source(SourceConfig(path=str(path), split="test"))


def test_ranges_are_disjoint_and_leave_nothing_out(tmp_path: Path) -> None:
    path = str(write_texts(tmp_path, "jsonl"))
    for cuts in ([0.25, 0.55, 0.65], [0.1, 0.15, 0.9], [0.05, 0.33, 0.34]):
        edges = [0.0, *cuts, 1.0]
        parts = [taken(path=path, take=pair) for pair in itertools.pairwise(edges)]
        assert list(itertools.chain.from_iterable(parts)) == TEXTS
    assert taken(path=path, take=(0.2, 0.5)) == TEXTS[2:5]
    path = str(write_texts(tmp_path, "jsonl", TEXTS * 10))
    assert len(taken(path=path, take=(0, 0.29))) == 29  # 100 * 0.29 is less than 29


def test_empty_records_are_no_records(tmp_path: Path) -> None:
    path = write_texts(tmp_path, "jsonl", ["w1 w2", "", "  \n", "w3 w4"])
    assert taken(path=str(path)) == ["w1 w2", "w3 w4"]


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    def refusal(path: Path | str, **changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            open_source(SourceConfig(path=str(path), **changes))
        assert str(path) in str(caught.value)
        return str(caught.value)

    parquet = write_texts(tmp_path, "parquet")
    assert "has no field 'body': set text_field to one of text, number" in refusal(parquet, text_field="body")
    assert "there is no text at" in refusal(tmp_path / "none.jsonl")
    assert "there is no text at" in refusal("none.parquet")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("w1")
    write_texts(tmp_path / "mixed", "jsonl")
    assert "it holds .jsonl, .txt" in refusal(tmp_path / "mixed")
    (tmp_path / "empty").mkdir()
    assert "it holds nothing" in refusal(tmp_path / "empty")
    (tmp_path / "a.xml").write_text("<text>w1</text>")
    assert "it holds .xml" in refusal(tmp_path / "a.xml")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.parquet", b"PAR1"), ("bad.jsonl", b'{"text": '), ("bad.txt", b"\xff\xfe\xff"),
        ("empty.parquet", b""), ("empty.jsonl", b""), ("empty.txt", b""),
    ],
)  # fmt: skip
def test_a_damaged_or_empty_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        open_source(SourceConfig(path=str(tmp_path / name)))


def config_for(folder: Path, **changes: Any) -> Config:
    path = str(write_texts(folder, "jsonl", [text_of([n % 50, n % 7, n % 3]) for n in range(100)]))
    data = {
        "block_size": 8,
        "calibration": {"path": path, "take": [0, 0.5]},
        "validation": {"path": path, "take": [0.5, 0.7]},
        "test": {"path": path, "take": [0.7, 1]},
    }
    collect = {"num_batches": 3, "batch_size": 4, "samples": 8}
    TOKENIZER.save_pretrained(folder / "model")
    return Config.model_validate({"model": {"path": "m"}, "data": data | changes, "collect": collect})


def prepare(config: Config, model: Path, target: Path) -> None:
    prepare_data(config, model, target, target.with_name("progress.json"))


def test_parts_are_written_with_their_counts(tmp_path: Path) -> None:
    prepare(config_for(tmp_path), tmp_path / "model", tmp_path / "data")
    summary = json.loads((tmp_path / "data" / "data.json").read_text())
    assert (summary["block_size"], summary["packed"]) == (8, True)
    assert {part: entry["blocks"] for part, entry in summary["parts"].items()} == {
        "calibration": 12,  # all that three batches of four need
        "validation": 20 * 4 // 8,
        "test": 30 * 4 // 8,
    }
    for part, entry in summary["parts"].items():
        path = tmp_path / "data" / f"{part}.safetensors"
        assert (entry["tokens"], entry["digest"]) == (load_part(path).lengths.sum(), file_digest(path))
        assert set(entry["records_also_in"].values()) <= {0}


def test_records_in_two_parts_are_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared, own = [text_of([n, 1, 2]) for n in range(3)], [text_of([n, 3, 4]) for n in range(40)]
    other = write_texts(tmp_path, "parquet", own[:20] + shared)
    mine = write_texts(tmp_path, "json", own[20:] + [f" {text}\n" for text in shared])
    with caplog.at_level(logging.WARNING, "mpruner_dist"):
        config = config_for(tmp_path, validation={"path": str(other)}, test={"path": str(mine)})
        prepare(config, tmp_path / "model", tmp_path / "data")
    parts = json.loads((tmp_path / "data" / "data.json").read_text())["parts"]
    assert parts["test"]["records_also_in"] == {"calibration": 0, "validation": 3}
    assert "3 records of data.test also stand in data.validation" in caplog.text


def test_too_little_text_is_told_with_both_counts(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    path = config.data.test.path
    less = config_for(tmp_path, calibration={"path": path, "take": [0, 0.2]})
    with pytest.raises(UserError, match=r"data\.calibration: .*take \[0\.0, 0\.2\] gives 10 blocks of 8 tokens, 12 n"):
        prepare(less, tmp_path / "model", tmp_path / "data")
    none = config_for(tmp_path, test={"path": path, "take": [0.99, 1]})
    with pytest.raises(UserError, match=r"data\.test: .* gives 0 blocks of 8 tokens, 1 needed"):
        prepare(none, tmp_path / "model", tmp_path / "data")


def test_a_folder_without_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"bare holds no tokenizer"):
        prepare(config_for(tmp_path), tmp_path / "bare", tmp_path / "data")
