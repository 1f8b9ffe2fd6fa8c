"""Texts with classes: read as they stand in the data, scored as a loop over them would."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import SIZES, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from mpruner_dist.config import CollectConfig, Config, SourceConfig
from mpruner_dist.data.labelled import LabelledTexts, label_names, numbered_alike
from mpruner_dist.data.parts import load_part, save_part
from mpruner_dist.data.prepare import prepare_data
from mpruner_dist.data.readers import make_reader
from mpruner_dist.data.sources import open_labelled, open_pairs
from mpruner_dist.errors import UserError
from mpruner_dist.models.loading import load_model
from mpruner_dist.similarity.collect import grouped
from mpruner_dist.tasks import TASKS

MOODS = ["sad", "glad", "neither"]
RECORDS = [{"text": f"w{number} w{number + 1}", "mood": MOODS[number % 3]} for number in range(60)]


def write(path: Path, records: list[dict[str, Any]]) -> SourceConfig:
    if path.suffix == ".csv":
        datasets.Dataset.from_list(records).to_csv(path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return SourceConfig(path=str(path), label_field="mood")


def read(source: SourceConfig, labels: list[str]) -> list[tuple[str, int]]:
    return list(open_labelled(source, labels)[0])


EXPECTED = [(record["text"], MOODS.index(record["mood"])) for record in RECORDS]


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.csv"])
def test_labels_are_names_or_numbers(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, RECORDS), MOODS) == EXPECTED
    numbered = [record | {"mood": MOODS.index(record["mood"])} for record in RECORDS]
    assert read(write(tmp_path / f"numbered-{name}", numbered), MOODS) == EXPECTED


def test_what_stands_in_a_csv_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text('text,mood\nNone,sad\nNA,1\n007,2\n,glad\n"a, b",glad\n')
    found = read(SourceConfig(path=str(tmp_path / "texts.csv"), label_field="mood"), MOODS)
    assert found == [("None", 0), ("NA", 1), ("007", 2), ("a, b", 1)]
    (tmp_path / "blank.csv").write_text("text,mood\na,1\nb,\n")
    with pytest.raises(UserError, match=r"mood of record 1 of .*blank\.csv is '', which is no class"):
        read(SourceConfig(path=str(tmp_path / "blank.csv"), label_field="mood"), MOODS)


def test_numbers_in_text_fields_are_text(tmp_path: Path) -> None:
    records = [{"text": "three", "target": 3}, {"text": 4, "target": 7}, {"text": None, "target": 1}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pairs, _ = open_pairs(SourceConfig(path=str(tmp_path / "sums.jsonl"), target_field="target"))
    assert list(pairs) == [("three", "3"), ("4", "7")]


def test_names_of_a_saved_set_count_where_the_model_has_names(tmp_path: Path) -> None:
    """The set numbers its classes in another order than the model."""
    other = ["neither", "sad", "glad"]
    features = datasets.Features({"text": datasets.Value("string"), "mood": datasets.ClassLabel(names=other)})
    datasets.Dataset.from_list(RECORDS, features=features).save_to_disk(tmp_path / "saved")
    source = SourceConfig(path=str(tmp_path / "saved"), label_field="mood")
    assert read(source, MOODS) == EXPECTED
    unnamed = read(source, ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert [label for _, label in unnamed] == [other.index(record["mood"]) for record in RECORDS]


def test_numbers_count_where_all_but_a_few_names_are_the_models(tmp_path: Path) -> None:
    """As of ImageNet: models have two classes called crane, of which `datasets` calls the second crane2."""
    model, saved = ["tench", "crane", "crate", "crane", "crib"], ["tench", "crane", "crate", "crane2", "crib"]
    features = datasets.Features({"text": datasets.Value("string"), "mood": datasets.ClassLabel(names=saved)})
    records = [{"text": name, "mood": name} for name in saved]
    datasets.Dataset.from_list(records, features=features).save_to_disk(tmp_path / "saved")
    source = SourceConfig(path=str(tmp_path / "saved"), label_field="mood")
    assert read(source, model) == [(name, number) for number, name in enumerate(saved)]
    for other in (["sad", "happy"], ["a", "b", "c", "e", "d"], ["a", "b", "c"]):  # too few, elsewhere, fewer
        assert not numbered_alike(other, ["sad", "glad"] if len(other) == 2 else ["a", "b", "c", "d", "e"])


def test_a_picture_beside_texts_is_no_matter(tmp_path: Path) -> None:
    source = write(tmp_path / "texts.jsonl", RECORDS)
    (tmp_path / "figure.png").write_bytes(b"")
    assert read(source.model_copy(update={"path": str(tmp_path)}), MOODS) == EXPECTED


def test_what_is_no_class_is_refused_by_record_and_name(tmp_path: Path) -> None:
    for label in ("angry", 3, -1, None, True, 0.5):
        source = write(tmp_path / "texts.jsonl", [{"text": "w1", "mood": label}])
        with pytest.raises(UserError, match=r"mood of record 0 of .*jsonl is .* no class of the model.*0 sad, 1 glad"):
            read(source, MOODS)
    with pytest.raises(UserError, match=r"no field 'label': set label_field to one of text, mood"):
        open_labelled(SourceConfig(path=source.path), MOODS)


def test_the_names_of_classes_are_the_models(tmp_path: Path) -> None:
    def names(**content: Any) -> list[str]:
        (tmp_path / "config.json").write_text(json.dumps(content))
        return label_names(tmp_path)

    assert names(id2label={"1": "glad", "0": "sad"}) == ["sad", "glad"]
    assert names() == ["LABEL_0", "LABEL_1"]
    with pytest.raises(UserError, match="has the numbers"):
        names(id2label={"1": "glad", "2": "sad"})


def test_parts_hold_ids_lengths_and_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tokenizer(tmp_path / "model")
    transformers.BertConfig(id2label=dict(enumerate(MOODS))).save_pretrained(tmp_path / "model")
    longer = [record | {"text": " ".join(["w5"] * (1 + number % 20))} for number, record in enumerate(RECORDS)]
    path = write(tmp_path / "texts.jsonl", longer).path
    only_sad = write(tmp_path / "sad.jsonl", [record for record in RECORDS if record["mood"] == "sad"]).path
    config = Config.model_validate({
        "model": {"path": "m", "task": "text-classification"},
        "data": {
            "block_size": 8,
            "calibration": {"path": path, "label_field": "mood", "take": [0, 0.5]},
            "test": {"path": only_sad, "label_field": "mood"},
        },
        "collect": {"num_batches": 2, "batch_size": 5},
    })  # fmt: skip
    with caplog.at_level("WARNING"):
        prepare_data(config, tmp_path / "model", tmp_path / "data", tmp_path / "progress.json")
    assert "data.test has nothing of the class 'glad'" in caplog.text
    parts = json.loads((tmp_path / "data/data.json").read_text())["parts"]
    assert parts["calibration"]["labels"] == {"sad": 4, "glad": 3, "neither": 3}
    part = load_part(tmp_path / "data/calibration.safetensors")
    assert part.lengths.tolist() == [min(1 + number % 20, 8) for number in range(10)]  # longer texts are cut
    assert part.labels.tolist() == [number % 3 for number in range(10)]
    some = part.rows([1, 4])
    assert some.ids.shape == (2, 5)  # padded only to the longest
    assert some.mask().tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert some.labels.tolist() == [1, 1]
    save_part(tmp_path / "again.safetensors", some)
    assert load_part(tmp_path / "again.safetensors").labels.tolist() == [1, 1]


CLASSIFY = TASKS["text-classification"]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_quality_is_a_loop_over_the_texts(pairs: list[tuple[int, int]]) -> None:
    """Whatever the batches; macro F1 as scikit-learn defines it, over the classes that occur or are predicted."""
    logits = torch.nn.functional.one_hot(torch.tensor([said for _, said in pairs]), 4) * 3.0
    labels = np.array([right for right, _ in pairs], np.int32)
    part = LabelledTexts(np.ones((len(pairs), 2), np.int32), np.full(len(pairs), 2, np.int32), labels)
    tallies = [
        CLASSIFY.tally(logits[begin:end], CLASSIFY.batch(part.rows(range(begin, end)), torch.device("cpu")))
        for begin, end in ((0, len(pairs) // 2), (len(pairs) // 2, len(pairs)))
        if end > begin
    ]
    total = sum(tallies[1:], tallies[0]).tolist()
    assert len(total) == 2 + 3 * 4  # numbers a class, not pairs of classes: a head may have 20,000
    nll = -sum(float(logits[row].log_softmax(-1)[label]) for row, label in enumerate(labels))
    assert total[:2] == [pytest.approx(nll, rel=1e-5), len(pairs)]
    scores = []
    for label in range(4):
        hits = sum(pair == (label, label) for pair in pairs)
        wrong = sum((label in pair) and pair[0] != pair[1] for pair in pairs)
        if hits + wrong:
            scores.append(2 * hits / (2 * hits + wrong))
    quality = CLASSIFY.quality(total)
    assert quality["accuracy"] == pytest.approx(sum(right == said for right, said in pairs) / len(pairs))
    assert quality["macro_f1"] == pytest.approx(sum(scores) / len(scores))
    assert CLASSIFY.predictions(part).tolist() == [1] * len(pairs)


def test_every_token_of_a_text_counts_alike_where_states_are_compared() -> None:
    ids = np.ones((2, 4), np.int32)
    batch = CLASSIFY.batch(LabelledTexts(ids, np.array([4, 2]), np.array([0, 1])), torch.device("cpu"))
    assert batch.state_weights_BT.tolist() == [[0.25] * 4, [0.5, 0.5, 0, 0]]


HEAD = TASKS["text-classification"].facts.auto_class


def test_a_decoder_says_the_class_at_the_end_of_each_text_whatever_the_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, "float32", kind=HEAD)
    ids = np.random.default_rng(0).integers(3, 128, (3, 9)).astype(np.int32)
    part = LabelledTexts(ids, np.array([9, 4, 6]), np.array([0, 1, 0]))
    for row, length in enumerate(part.lengths):
        ids[row, length:] = 0
    with torch.no_grad():
        together = model(**CLASSIFY.batch(part, torch.device("cpu")).inputs).logits
        alone = [model(**CLASSIFY.batch(part.rows([row]), torch.device("cpu")).inputs).logits for row in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_model_without_the_head_of_its_task_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=128
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"classifier\.bias is missing.*set model\.task to what it was trained for"):
        load_model(tmp_path, "float32", kind=HEAD)


def test_batches_of_other_lengths_in_one_forward_pass_give_the_same_samples() -> None:
    """As under ZeRO stage 3: all are padded to the longest text, and padding is no sample."""
    lengths = np.array([3, 5, 4, 12, 9, 11, 4, 6], np.int32)
    ids = np.zeros((8, 12), np.int32)
    for row, length in enumerate(lengths):
        ids[row, :length] = 100 * row + np.arange(1, length + 1)  # each token is told from every other
    part = LabelledTexts(ids, lengths, np.zeros(8, np.int32))
    for unit, count in (("token", 7), ("sequence", 4)):
        config = CollectConfig(unit=unit, batch_size=4, samples=count, skip_tokens=1)
        group, (together,) = grouped(part, [0, 1], config)
        hidden = torch.from_numpy(group.ids)[:, :, None].float()
        for batch, samples, of_batch in zip((0, 1), together, hidden.split(4), strict=True):
            alone, ((expected,),) = grouped(part, [batch], config)
            taken = expected.take(torch.from_numpy(alone.ids)[:, :, None].float())
            assert torch.equal(samples.take(of_batch), taken)
            assert torch.equal(samples.groups_N, expected.groups_N)
            assert (taken > 0).all()


def test_texts_are_padded_with_the_models_own_token(tmp_path: Path) -> None:
    """The tokenizer's is 0. A decoder finds the end of a text by the token, an encoder does not need one."""
    path = write(tmp_path / "texts.jsonl", [{"text": "w1 w2 w3", "mood": "sad"}, {"text": "w1", "mood": "glad"}]).path
    config = Config.model_validate({
        "model": {"path": "m", "task": "text-classification"},
        "data": {part: {"path": path, "label_field": "mood", "take": take}
                 for part, take in (("calibration", [0, 0.5]), ("test", [0.5, 1]))},
    })  # fmt: skip
    source = SourceConfig(path=path, label_field="mood")
    make_tokenizer(tmp_path)

    def ids(kind: Any, pad: int | None) -> list[list[int]]:
        kind(pad_token_id=pad, id2label=dict(enumerate(MOODS))).save_pretrained(tmp_path)
        part = make_reader(config, tmp_path).read(source, None, lambda records, *_: records)
        return part.ids.tolist()

    assert ids(transformers.LlamaConfig, 2) == ids(transformers.BertConfig, 2) == [[5, 6, 7], [5, 2, 2]]
    assert ids(transformers.BertConfig, None) == [[5, 6, 7], [5, 0, 0]]
    for pad in (None, -1):
        with pytest.raises(UserError, match="set pad_token_id"):
            ids(transformers.LlamaConfig, pad)
