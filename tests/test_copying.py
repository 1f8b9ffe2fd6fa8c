"""Bytes from file to file, whichever way the kernel offers."""

import errno
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpruner_dist.checkpoints.copying import copy_tensors
from mpruner_dist.checkpoints.header import read_header
from mpruner_dist.checkpoints.stored import Piece, StoredTensor
from mpruner_dist.errors import StageFailure, UserError

CALLS = {
    "in the kernel": "copy_file_range", "small pieces": "copy_file_range", "by sendfile": "sendfile",
    "by reading and writing": "pread", "fails halfway": "pread", "copies nothing": "pread",
}  # fmt: skip
"""Every way in which the bytes may go, and what of the system must have moved some of them."""


@pytest.fixture(params=CALLS)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    way, moved = request.param, dict.fromkeys(CALLS.values(), 0)

    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(errno.EXDEV, "other device")

    def counted(name: str, most: int | None = None, fails_at: int | None = None) -> Callable[..., Any]:
        real, calls = getattr(os, name), itertools.count()

        def call(first: int, second: int, third: int, *rest: int, **where: int) -> Any:
            if next(calls) == fails_at:
                refuse()
            third = third if most is None else min(most, third)
            result = real(first, second, third, *rest, **where)
            moved[name] += len(result) if isinstance(result, bytes) else result
            return result

        return call

    (tmp_path / "probe").write_bytes(b"some")
    with (tmp_path / "probe").open("rb") as source, (tmp_path / "probed").open("wb") as target:
        try:
            if CALLS[way] == "copy_file_range" or way == "fails halfway":
                os.copy_file_range(source.fileno(), target.fileno(), 4)
            if CALLS[way] == "sendfile":
                os.sendfile(target.fileno(), source.fileno(), 0, 4)
        except OSError as error:
            pytest.skip(f"this file system does not copy so: {error}")
    kernel: dict[str, Callable[..., Any]] = {
        "in the kernel": counted("copy_file_range"), "small pieces": counted("copy_file_range", most=1000),
        "fails halfway": counted("copy_file_range", most=1000, fails_at=1), "copies nothing": lambda *_, **__: 0,
    }  # fmt: skip
    send = {"by sendfile": counted("sendfile"), "copies nothing": lambda *_: 0}
    read = counted("pread")
    monkeypatch.setattr(os, "copy_file_range", kernel.get(way, refuse))
    monkeypatch.setattr(os, "sendfile", send.get(way, refuse))
    monkeypatch.setattr(os, "pread", read)
    monkeypatch.setattr("mpruner_dist.checkpoints.copying.CHUNK_BYTES", 777)
    yield
    assert moved[CALLS[way]] > 0


def write_source(path: Path) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    tensors = {f"t{n}": torch.randn(30, 10 + n, generator=draw) for n in range(6)}
    tensors |= {"half": torch.randn(7, generator=draw).bfloat16(), "none": torch.empty(0, 4), "one": torch.tensor(3.0)}
    save_file(tensors, path, {"format": "pt"})
    return tensors


def stored_in(path: Path) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(info.dtype, info.shape, (Piece(path, info.begin, info.end),))
        for name, info in read_header(path).tensors.items()
    }


@pytest.mark.usefixtures("_way")
def test_a_tensor_in_pieces_of_several_files_comes_out_whole(tmp_path: Path) -> None:
    whole = torch.arange(100.0)
    for number, part in enumerate((whole[:33], whole[33:80], whole[80:])):
        (tmp_path / f"part{number}").write_bytes(b"head" + part.numpy().tobytes() + b"tail")
    pieces = [Piece(tmp_path / f"part{n}", 4, 4 + 4 * count) for n, count in enumerate((33, 47, 20))]
    copy_tensors(tmp_path / "target", [("whole", StoredTensor("F32", (100,), tuple(pieces)))], {})
    assert torch.equal(load_file(tmp_path / "target")["whole"], whole)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("seed", range(4))
def test_copied_tensors_are_the_same_bytes_under_their_new_names(tmp_path: Path, seed: int) -> None:
    tensors = write_source(tmp_path / "source.safetensors")
    stored = stored_in(tmp_path / "source.safetensors")
    draw = random.Random(seed)
    chosen = draw.sample(sorted(tensors), draw.randint(3, len(tensors)))
    if seed == 0:
        chosen = list(stored)  # in the order of the file, all of it: one stretch
    target = tmp_path / "target.safetensors"
    copy_tensors(target, [(f"new.{name}", stored[name]) for name in chosen], {"a": "b"})
    found = load_file(target)
    assert sorted(found) == sorted(f"new.{name}" for name in chosen)
    for name in chosen:
        assert found[f"new.{name}"].shape == tensors[name].shape
        assert found[f"new.{name}"].dtype == tensors[name].dtype
        assert torch.equal(found[f"new.{name}"], tensors[name])
    written = read_header(target)
    assert written.metadata == {"a": "b"}
    assert [info.num_bytes for info in written.tensors.values() if info.num_bytes] == [
        tensors[name].nbytes for name in chosen if tensors[name].nbytes
    ]


@pytest.mark.usefixtures("_way")
def test_a_source_that_ends_early_is_refused_by_name_and_byte(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    write_source(source)
    stored = stored_in(source)  # read while it was whole
    size = source.stat().st_size
    os.truncate(source, size - 100)
    with pytest.raises(UserError, match=rf"source\.safetensors ends at byte {size - 100}, {size} expected"):
        copy_tensors(tmp_path / "target", list(stored.items()), {})


def test_an_error_that_is_no_reason_to_go_another_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.safetensors"
    write_source(source)
    tensor = stored_in(source)["t0"]

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(StageFailure, match=rf"no space left while writing {tmp_path / 'target'}"):
        copy_tensors(tmp_path / "target", [("t0", tensor)], {})
