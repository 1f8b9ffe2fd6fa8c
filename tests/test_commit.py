"""Files and folders that are whole or not there, and digests of what they hold."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import names
from hypothesis import given, settings
from hypothesis import strategies as st

from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.runs.commit import commit_folder, disk_errors, require_space, write_bytes, write_json, write_text
from mpruner_dist.runs.digest import content_digest, digest, file_digest, spot_digest
from mpruner_dist.runs.folder import begin_run

FAILING_WRITE = """
import resource, sys
from pathlib import Path
from mpruner_dist.runs.commit import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_bytes(Path(sys.argv[1]), b"new" * 1000)
"""


def test_a_write_that_fails_midway_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "cka.json"
    write_bytes(path, b"old")
    done = subprocess.run([sys.executable, "-c", FAILING_WRITE, path], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large"
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["cka.json"]
    write_bytes(path, b"new" * 1000)
    assert path.read_bytes() == b"new" * 1000
    assert names(tmp_path) == ["cka.json"]


def test_json_that_holds_nan_is_not_written(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"x": [1, 2]})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "deep" / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"x": [1, 2]}


def test_commit_folder_replaces_whole(tmp_path: Path) -> None:
    final = tmp_path / "pruned"
    for number, files in enumerate([["a", "b"], ["b", "deep/c"]]):
        temporary = tmp_path / ".pruned.tmp"
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(f"{name} {number}")
        commit_folder(temporary, final)
    assert names(tmp_path) == ["pruned", "pruned/b", "pruned/deep", "pruned/deep/c"]
    assert (final / "b").read_text() == "b 1"


def test_a_commit_that_was_killed_between_its_renames_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / ".pruned.old").mkdir()
    (tmp_path / ".pruned.old" / "old").touch()
    (tmp_path / "new").mkdir()
    commit_folder(tmp_path / "new", tmp_path / "pruned")
    assert names(tmp_path) == ["pruned"]


@pytest.mark.parametrize(("number", "message"), [(28, "no space left while writing"), (122, "no space left"),
                                                 (13, "may not write"), (30, "may not write")])  # fmt: skip
def test_disk_errors_say_what_to_do(tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(StageFailure, match=message) as caught, disk_errors(tmp_path / "not" / "there"):
        raise OSError(number, "reason")
    assert str(tmp_path / "not" / "there") in str(caught.value)


def test_a_path_through_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (lambda path: begin_run(path).close(), lambda path: write_text(path, "")):
        with pytest.raises(UserError, match=r"file/below: a part of that path is a file"):
            write(tmp_path / "file/below")


def test_a_disk_that_is_full_for_torch_says_what_to_do(tmp_path: Path) -> None:
    """As in a sharded checkpoint: torch.save tells of positions in its file, not of the disk."""
    with pytest.raises(StageFailure, match=r"torch could not write .* if the disk is full"), disk_errors(tmp_path):
        torch.save(torch.zeros(100_000), "/dev/full")


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "none").read_bytes()
    with pytest.raises(RuntimeError, match="other"), disk_errors(tmp_path):
        raise RuntimeError("other")


def test_space_is_asked_for_before_the_first_byte(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(StageFailure, match=r"needs 1000000000000 MB and \d+ MB are free"):
        require_space(tmp_path, 10**18)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=3), JSON, min_size=1, max_size=4), JSON)
def test_digests_follow_content_not_the_order_of_keys(content: dict[str, Any], other: Any) -> None:
    assert digest(dict(reversed(content.items()))) == digest(content)
    assert (digest(other) == digest(content)) == (
        json.dumps(other, sort_keys=True) == json.dumps(content, sort_keys=True)
    )


def test_data_are_digested_whole_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label that is put right between the spots of a larger file must be noticed."""
    content = bytearray(4_000_000)
    path = tmp_path / "labels.csv"

    def digests() -> set[str]:
        found = set()
        for value in (0, 1):
            content[200_000] = value
            path.write_bytes(content)
            found.add(content_digest(path))
        return found

    assert len(digests()) == 2
    monkeypatch.setattr("mpruner_dist.runs.digest.WHOLE_BYTES", 10**6)
    assert len(digests()) == 1


@pytest.mark.parametrize("of_file", [file_digest, spot_digest])
def test_file_digests_see_every_byte_of_a_small_file(tmp_path: Path, of_file: Callable[[Path], str]) -> None:
    content = bytes(range(256)) * 40
    path = tmp_path / "a"
    seen = set()
    for changed in (None, 0, 5000, len(content) - 1):
        now = bytearray(content)
        if changed is not None:
            now[changed] ^= 1
        path.write_bytes(now)
        seen.add(of_file(path))
    path.write_bytes(content[:-1])
    seen.add(of_file(path))
    assert len(seen) == 5
    path.write_bytes(b"")
    assert of_file(path) not in seen
