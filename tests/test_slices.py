"""Parts of tensors, read from a file to where they belong."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mpruner_dist.checkpoints import slices
from mpruner_dist.checkpoints.header import TensorInfo, read_header
from mpruner_dist.checkpoints.slices import read_slice
from mpruner_dist.errors import UserError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], dict[str, TensorInfo]]:
    """One tensor of each dtype, none at the start of the data."""
    path = tmp_path_factory.mktemp("slices") / "model.safetensors"
    draw = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randn(7, 11, generator=draw).to(dtype) for dtype in DTYPES}
    save_file({"a": torch.zeros(5)} | tensors, path)
    return path, tensors, read_header(path).tensors


@settings(max_examples=60)
@given(st.data(), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(1, 40))
def test_any_slice_in_any_dtype(file, data: st.DataObject, stored, wanted, chunk: int) -> None:
    path, tensors, infos = file
    begin = data.draw(st.integers(0, 77))
    end = data.draw(st.integers(begin, 77))
    target = torch.full((end - begin,), 99.0, dtype=wanted)
    original, slices.CHUNK = slices.CHUNK, chunk
    try:
        read_slice(path, infos[str(stored)], begin, target)
    finally:
        slices.CHUNK = original
    assert torch.equal(target, tensors[str(stored)].flatten()[begin:end].to(wanted))


def test_only_the_target_is_written(file) -> None:
    path, tensors, infos = file
    whole = torch.full((20,), -1.0)
    read_slice(path, infos["torch.float32"], 70, whole[5:12])
    assert torch.equal(whole[5:12], tensors["torch.float32"].flatten()[70:77])
    assert (whole[:5] == -1).all()
    assert (whole[12:] == -1).all()


def test_a_file_that_ends_early_is_named(file, tmp_path: Path) -> None:
    path, _, infos = file
    short = tmp_path / "short.safetensors"
    short.write_bytes(path.read_bytes()[:-20])
    last = max(infos.values(), key=lambda info: info.end)
    with pytest.raises(UserError, match=rf"short\.safetensors ends inside the tensor {last.name}: it is truncated"):
        read_slice(short, last, 0, torch.empty(77, dtype=slices.TORCH_DTYPES[last.dtype]))
