"""The script that makes the recipes' data: what it takes from the packages."""

import io
import json
import tarfile
from pathlib import Path

import prepare_recipes as recipes


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def packed(folder: Path, lines: list[str]) -> Path:
    """Scores in an archive in an archive, as in the package."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, recipes.SCORES, "\n".join(lines).encode("latin-1"))
    with tarfile.open(folder / "source.tar.gz", "w:gz") as archive:
        add(archive, "vaderSentiment-3.3.2/README.rst", b"")
        add(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return folder / "source.tar.gz"


def test_sentences_that_people_agree_on_are_taken_once(tmp_path: Path) -> None:
    lines = ["1\t2.5\tA fine caf\xe9", "2\t-3.1\tDreadful", "3\t0.4\tSo so", "4\t2.4\tA fine caf\xe9", "5\t-0.5\tDull"]
    target = tmp_path / "movies.jsonl"
    recipes.write_movies(target, packed(tmp_path, lines))
    records = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert sorted((record["text"], record["label"]) for record in records) == [
        ("A fine caf\xe9", "positive"), ("Dreadful", "negative"), ("Dull", "negative"),
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"movies.jsonl", "source.tar.gz"}


def test_what_is_there_is_left_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "movies.jsonl").touch()
    (tmp_path / "minilm-movies").mkdir()
    (tmp_path / "minilm-movies/model.safetensors").touch()
    (tmp_path / "fashion-mnist").mkdir()
    (tmp_path / "resnet-fashion").mkdir()
    (tmp_path / "resnet-fashion/preprocessor_config.json").touch()
    for prepare in recipes.RECIPES.values():
        prepare(tmp_path)
    assert capsys.readouterr().out.count("there already") == 2
    assert not (tmp_path / "download").exists()
