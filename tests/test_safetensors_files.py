"""Headers and checkpoint folders: every damage is told by the name of the file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from mpruner_dist.checkpoints.folder import INDEX_NAME, SINGLE_NAME, index_json, read_checkpoint, shard_name
from mpruner_dist.checkpoints.formats import open_checkpoint
from mpruner_dist.checkpoints.header import TensorInfo, build_header, read_header
from mpruner_dist.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.sampled_from('abz.é"\\ 漢'), min_size=1, max_size=8)
LAYOUTS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), min_size=1, max_size=6)
METADATA = st.dictionaries(NAMES, NAMES, max_size=2)


def filled(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    count = torch.empty(shape, dtype=DTYPES[dtype]).nbytes
    raw = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return raw.view(DTYPES[dtype]).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=80)
@given(LAYOUTS, METADATA)
def test_what_the_library_writes_is_read(
    tmp_path_factory: Any, layout: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "theirs.safetensors"
    tensors = {name: filled(*kind) for name, kind in layout.items()}
    path.write_bytes(save(tensors, metadata))
    header = read_header(path)
    assert header.metadata == metadata
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == layout
    content = path.read_bytes()
    for name, info in header.tensors.items():
        assert content[info.begin : info.end] == bytes_of(tensors[name])
        assert info.num_elements == tensors[name].numel()
        assert info.num_bytes == tensors[name].nbytes


@settings(max_examples=80)
@given(LAYOUTS, METADATA)
def test_what_is_written_the_library_reads(
    tmp_path_factory: Any, layout: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    tensors = {name: filled(*kind, seed=3) for name, kind in layout.items()}
    infos = [TensorInfo(name, *kind, begin=7, end=7 + tensors[name].nbytes) for name, kind in layout.items()]
    header = build_header(infos, metadata)
    assert len(header) % 8 == 0
    content = header + b"".join(bytes_of(tensors[name]) for name in layout)
    found = load(content)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes_of(found[name]) == bytes_of(tensor)
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    path.write_bytes(content)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
    assert read_header(path).tensors.keys() == layout.keys()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_rarer_dtypes_of_the_library_are_known(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.ones(3).to(dtype)}, tmp_path / "rare.safetensors")
    assert read_header(tmp_path / "rare.safetensors").tensors["a"].num_elements == 3


def with_header(path: Path, content: Any, data: int) -> Path:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def entry(begin: Any, end: Any, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor b begins at byte"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "tensor b begins at byte"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "tensor b begins at byte"),
        ({"a": entry(4, 12)}, 12, "tensor a begins at byte"),
        ({"a": entry(-8, 0)}, 0, "tensor a begins at byte"),
        ({"a": entry(0, 8)}, 7, "is truncated: its tensors end at byte"),
        ({"a": entry(0, 8)}, 9, "is truncated: its tensors end at byte"),
        ({}, 1, "is truncated: its tensors end at byte"),
        ({"a": entry(0, 8, "F64")}, 8, r"tensor a of shape \[2\] and dtype F64 cannot fill 8 bytes"),
        ({"a": entry(0, 8, shape=[3])}, 8, r"tensor a of shape \[3\]"),
        ({"a": entry(0, 8, shape=[-1, -2])}, 8, r"tensor a of shape \[-1, -2\]"),
        ({"a": entry(8, 0)}, 8, "tensor a of shape"),
        ({"a": entry(0, 8, "F31")}, 8, "tensor a has the unknown dtype 'F31'"),
        ({"a": entry(0, 8, ["F32"])}, 8, "unknown dtype|entry for a is damaged"),
        ({"a": entry(0, float("inf"))}, 8, "entry for a is damaged"),
        ({"a": entry(0, 8, shape=[float("nan")])}, 8, "entry for a is damaged"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "entry for a is damaged"),
        ({"a": entry(0, None)}, 8, "entry for a is damaged"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, "entry for a is damaged"),
        ({"a": 3}, 8, "entry for a is damaged"),
        ([1, 2], 8, "its header is not a table of tensors"),
        (b"{not json", 8, "its header is not JSON"),
        (b"\xff\xfe\xfd", 8, "its header is not JSON"),
        (b"[" * 20_000, 8, "its header is"),
        (
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            8,
            "'a' comes twice",
        ),
        ({"__metadata__": ["a"], "a": entry(0, 8)}, 8, "its header|metadata"),
    ],
)
def test_a_damaged_header_is_refused_by_the_name_of_the_file(
    tmp_path: Path, content: Any, data: int, message: str
) -> None:
    path = with_header(tmp_path / "bad.safetensors", content, data)
    with pytest.raises(UserError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 8, (10**12).to_bytes(8, "little") + b"{}"])
def test_an_absurd_length_of_the_header_is_refused_before_it_is_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.safetensors is truncated or no safetensors file"):
        read_header(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    whole = save({"a": filled("F32", (2, 3)), "b": filled("BF16", (3,))}, {"format": "pt"})
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.safetensors"):
            read_header(path)
    path.write_bytes(whole)
    assert sorted(read_header(path).tensors) == ["a", "b"]


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.safetensors: No such file"):
        read_header(tmp_path / "none.safetensors")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards, an index and a configuration."""
    folder = tmp_path / "model"
    folder.mkdir()
    shards = {
        shard_name(1, 2): {"embed": filled("F32", (4, 3)), "layers.0.w": filled("BF16", (3, 3))},
        shard_name(2, 2): {"layers.1.w": filled("BF16", (3, 3), 1), "scale": filled("F32", (), 2)},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    headers = {name: read_header(folder / name) for name in shards}
    (folder / INDEX_NAME).write_text(json.dumps(index_json(headers)))
    return folder


def test_a_whole_checkpoint_is_read(checkpoint: Path) -> None:
    read = read_checkpoint(checkpoint)
    assert list(read.shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(read.tensors) == ["embed", "layers.0.w", "layers.1.w", "scale"]
    assert read.num_parameters == 12 + 9 + 9 + 1
    assert read.num_bytes == 48 + 18 + 18 + 4
    assert read.config == {"model_type": "llama"}
    index = json.loads((checkpoint / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_parameters": 31, "total_size": 88}
    assert index["weight_map"]["scale"] == "model-00002-of-00002.safetensors"


def test_a_single_file_needs_no_index(checkpoint: Path) -> None:
    for path in [*checkpoint.glob("*.safetensors"), checkpoint / INDEX_NAME]:
        path.unlink()
    save_file({"a": filled("F32", (2,))}, checkpoint / shard_name(1, 1))
    assert list(read_checkpoint(checkpoint).tensors) == ["a"]


def test_of_a_single_file_and_an_index_the_file_is_taken_as_transformers_does(checkpoint: Path) -> None:
    """Either is left over where a model was saved into a folder twice."""
    save_file({"a": filled("F32", (2,))}, checkpoint / SINGLE_NAME)
    assert list(read_checkpoint(checkpoint).tensors) == list(open_checkpoint(checkpoint).tensors) == ["a"]
    next(checkpoint.glob("model-*.safetensors")).unlink()
    assert list(read_checkpoint(checkpoint).tensors) == ["a"]


def change_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX_NAME).read_text())
        change(index["weight_map"])
        (folder / INDEX_NAME).write_text(json.dumps(index))

    return damage


def outside(folder: Path) -> None:
    shutil.copy(folder / shard_name(1, 2), folder.parent / "x.safetensors")
    change_index(lambda names: names.update({"embed": "../x.safetensors"}))(folder)


def twice(folder: Path) -> None:
    text = (folder / INDEX_NAME).read_text()
    entry = f'"embed": "{shard_name(1, 2)}"'
    (folder / INDEX_NAME).write_text(text.replace('"weight_map": {', f'"weight_map": {{{entry}, {entry}, '))


def cut_by_one(folder: Path) -> None:
    path = folder / shard_name(2, 2)
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, r"model does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), r"model holds no config\.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"cannot read .*config\.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json does not hold a JSON object"),
    "no index": (lambda f: (f / INDEX_NAME).unlink(), r"holds neither model\.safetensors\.index\.json nor model\.safe"),
    "index is no JSON": (lambda f: (f / INDEX_NAME).write_text(""), r"cannot read .*index\.json"),
    "index is empty": (lambda f: (f / INDEX_NAME).write_text("{}"), r"index\.json has no weight_map"),
    "index has no tensors": (change_index(dict.clear), r"index\.json has no weight_map"),
    "shard is missing": (lambda f: (f / shard_name(2, 2)).unlink(), r"lacks the shard model-00002-of-00002\.safet"),
    "shard is cut": (cut_by_one, r"model-00002-of-00002\.safetensors is truncated"),
    "outside": (outside, r"index\.json names '\.\./x\.safetensors', which is not a file of its own folder"),
    "far outside": (change_index(lambda n: n.update(embed="../../x")), r"index\.json names '\.\./\.\./x'"),
    "absolute": (change_index(lambda n: n.update(embed="/etc/passwd")), r"index\.json names '/etc/passwd'"),
    "parent": (change_index(lambda n: n.update(embed="..")), r"index\.json|lacks"),
    "no name": (change_index(lambda n: n.update(embed="")), r"index\.json|lacks"),
    "number": (change_index(lambda n: n.update(embed=3)), r"index\.json"),
    "only in the index": (change_index(lambda n: n.update(more=shard_name(1, 2))), r"only in the index: \[\('more'"),
    "only in a shard": (change_index(lambda n: n.pop("scale")), r"only in the shards: \[\('scale'"),
    "a tensor twice": (twice, r"cannot read .*index\.json: 'embed' comes twice"),
    "in another shard": (change_index(lambda n: n.update(embed=shard_name(2, 2))), r"index\.json and its shards disag"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(checkpoint: Path, damage: str) -> None:
    harm, message = DAMAGES[damage]
    read_checkpoint(checkpoint)
    harm(checkpoint)
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_the_fingerprint_follows_values_names_and_configuration(checkpoint: Path) -> None:
    first = read_checkpoint(checkpoint).fingerprint()
    assert read_checkpoint(checkpoint).fingerprint() == first
    copied = checkpoint.with_name("copied")
    shutil.copytree(checkpoint, copied)
    assert read_checkpoint(copied).fingerprint() == first
    path = copied / shard_name(2, 2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    second = read_checkpoint(copied).fingerprint()
    (copied / "config.json").write_text('{"model_type": "gpt2"}')
    seen = [first, second, read_checkpoint(copied).fingerprint()]
    for name in ("generation_config.json", "modeling_mine.py"):
        (copied / name).write_text("{}")
        seen += [read_checkpoint(copied).fingerprint(), open_checkpoint(copied).fingerprint()]
    (copied / "README.md").write_text("of no matter")
    assert len(set(seen)) == 5
    assert read_checkpoint(copied).fingerprint() == open_checkpoint(copied).fingerprint() == seen[-1]
