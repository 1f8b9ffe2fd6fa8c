"""Damage of any kind: a rewrite says what is wrong or does what it should, and never writes outside its target."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mpruner_dist.checkpoints.formats import open_checkpoint
from mpruner_dist.errors import MPrunerError
from mpruner_dist.rewriting.rewrite import rewrite_checkpoint

KEPT = [0, 2]
ODD_VALUES = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**70, 1.5, "", "x", "../x", "../../x", "/etc/passwd", [], [1], [-8, 8], {},
    {"dtype": 1},
]  # fmt: skip
FUZZ = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few files."""
    folder = tmp_path_factory.mktemp("fuzz")
    model = make_model("llama", folder / "model", num_hidden_layers=3)
    model.save_pretrained(folder / "model", max_shard_size="40KB")
    (folder / "model" / "model.safetensors").unlink()
    make_model("llama", folder / "bin", num_hidden_layers=3)
    (folder / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    return folder


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder with nothing beside it and nothing beside the one above."""
    folder = tmp_path / "above" / "room"
    folder.mkdir(parents=True)
    return folder


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def expect_no_harm(source: Path, room: Path, original: Path) -> None:
    """Rewrite a damaged copy: it is refused, or all that was to stay is there; nothing else was touched."""
    before = tree(source)
    target = room / "target"
    try:
        rewrite_checkpoint(source, target, KEPT)
    except MPrunerError:
        refused = True
    else:
        refused = False
        asked = {n: t for shard in original.glob("*.safetensors") for n, t in load_file(shard).items()}
        found = {n: t for shard in target.glob("*.safetensors") for n, t in load_file(shard).items()}
        renamed = {n.replace("layers.2.", "layers.1."): t for n, t in asked.items() if ".layers.1." not in n}
        assert renamed.keys() <= found.keys()
        assert all(found[name].shape == tensor.shape for name, tensor in renamed.items())
    assert target.exists() != refused
    assert tree(source) == before
    assert {path.name for path in room.iterdir()} <= {"source", "target", *[p.name for p in room.glob(".target.*")]}
    assert list(room.parent.iterdir()) == [room]  # where ../x would be
    assert list(room.parent.parent.iterdir()) == [room.parent]  # and ../../x


def damaged_copy(folder: Path, room: Path) -> Path:
    for left in room.iterdir():
        shutil.rmtree(left)
    return Path(shutil.copytree(folder, room / "source"))


@FUZZ
@given(seed=st.integers(0, 2**32))
def test_bytes_of_a_header(whole: Path, room: Path, seed: int) -> None:
    draw = random.Random(seed)
    source = damaged_copy(whole / "model", room)
    shard = draw.choice(sorted(source.glob("*.safetensors")))
    content = bytearray(shard.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(length)
        kind = draw.randrange(3)
        if kind == 0:
            content[place] = draw.randrange(256)
        elif kind == 1:
            del content[place : place + draw.randint(1, 20)]
        else:
            content[place:place] = draw.randbytes(draw.randint(1, 20))
    shard.write_bytes(bytes(content))
    expect_no_harm(source, room, whole / "model")


@FUZZ
@given(seed=st.integers(0, 2**32))
def test_values_of_a_header(whole: Path, room: Path, seed: int) -> None:
    """The header stays JSON of the right length; its entries are odd."""
    draw = random.Random(seed)
    source = damaged_copy(whole / "model", room)
    shard = draw.choice(sorted(source.glob("*.safetensors")))
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    name = draw.choice(sorted(header))
    change = draw.randrange(4)
    if change == 0:
        header[name] = draw.choice(ODD_VALUES)
    elif change == 1 and name != "__metadata__":
        header[name][draw.choice(["dtype", "shape", "data_offsets"])] = draw.choice(ODD_VALUES)
    elif change == 2:
        header[draw.choice(["model.layers.99.x", "../../x", "", name + ".more", "model.layers.-1.x"])] = header[name]
    else:
        header[draw.choice(sorted(header))] = header.pop(name)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    expect_no_harm(source, room, whole / "model")


@FUZZ
@given(seed=st.integers(0, 2**32))
def test_values_of_an_index(whole: Path, room: Path, seed: int) -> None:
    draw = random.Random(seed)
    source = damaged_copy(whole / "model", room)
    path = source / "model.safetensors.index.json"
    index: dict[str, Any] = json.loads(path.read_text())
    names = sorted(index["weight_map"])
    change = draw.randrange(5)
    if change == 0:
        index["weight_map"][draw.choice(names)] = draw.choice(ODD_VALUES)
    elif change == 1:
        del index["weight_map"][draw.choice(names)]
    elif change == 2:
        index["weight_map"][draw.choice(["ghost", "model.layers.7.w", "../x"])] = index["weight_map"][names[0]]
    elif change == 3:
        index["weight_map"] = draw.choice(ODD_VALUES)
    else:
        index = draw.choice(ODD_VALUES)
    path.write_text(json.dumps(index))
    expect_no_harm(source, room, whole / "model")


@FUZZ
@given(seed=st.integers(0, 2**32))
def test_bytes_of_a_file_of_torch_save(whole: Path, room: Path, seed: int) -> None:
    """Opening is enough: nothing is run, and what cannot be understood is an error of ours."""
    draw = random.Random(seed)
    source = damaged_copy(whole / "bin", room)
    path = source / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    begin = content.index(b"data.pkl")
    region = draw.choice([range(begin, begin + 3000), range(len(content) - 3000, len(content)), range(len(content))])
    for _ in range(draw.randint(1, 4)):
        content[draw.choice(region)] = draw.randrange(256)
    if draw.random() < 0.2:
        del content[draw.randrange(len(content)) :]
    path.write_bytes(bytes(content))
    try:
        checkpoint = open_checkpoint(source)
    except MPrunerError:
        pass
    else:
        size = path.stat().st_size
        for tensor in checkpoint.tensors.values():
            assert all(0 <= piece.begin <= piece.end <= size for piece in tensor.pieces)
