"""The mergeable statistic: how the work was divided and interrupted must not show in a single bit."""

import random
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.similarity.stage import write_cka
from mpruner_dist.similarity.sums import HsicSums, cka_of

Floats = npt.NDArray[np.float64]


def batch_hsic(batch: int, layers: int = 4) -> Floats:
    """HSIC of a batch: symmetric, positive definite, of uneven size so that the order of adding matters."""
    draw = np.random.default_rng([batch, 17])
    half = draw.standard_normal((layers, 9))
    return half @ half.T * 10.0 ** draw.uniform(-3, 3)


def sums_of(batches: list[int]) -> HsicSums:
    sums = HsicSums()
    for batch in batches:
        sums.update(batch, batch_hsic(batch), 100 + batch)
    return sums


def assert_same(one: HsicSums, other: HsicSums) -> None:
    assert one.total().tobytes() == other.total().tobytes()
    assert one.cka().tobytes() == other.cka().tobytes()
    assert one.stderr().tobytes() == other.stderr().tobytes()
    assert one.samples == other.samples


def test_the_order_of_plain_addition_would_show() -> None:
    """What the tests below prove is not true of any sum."""
    batches = list(range(20))
    plain = [sum(batch_hsic(batch) for batch in order) for order in (batches, batches[::-1])]
    assert np.asarray(plain[0]).tobytes() != np.asarray(plain[1]).tobytes()


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 24), st.integers(1, 6), st.integers(0, 2**31))
def test_merging_in_any_division_and_order_gives_the_same_bits(count: int, workers: int, seed: int) -> None:
    draw = random.Random(seed)
    batches = draw.sample(range(1000), count)
    shares: list[list[int]] = [[] for _ in range(workers)]
    for batch in batches:
        draw.choice(shares).append(batch)
    merged = HsicSums()
    for share in draw.sample(shares, workers):
        merged.merge(sums_of(draw.sample(share, len(share))))
    assert_same(merged, sums_of(sorted(batches)))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 16), st.integers(1, 4), st.integers(0, 2**31))
def test_any_number_of_restarts_gives_the_same_bits(count: int, restarts: int, seed: int) -> None:
    draw = random.Random(seed)
    order = draw.sample(range(count), count)
    cuts = sorted(draw.choices(range(count + 1), k=restarts))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for begin, end in zip([0, *cuts], [*cuts, count], strict=True):
            done = HsicSums.load(folder)  # what an attempt after a restart sees
            assert sorted(done.hsic) == sorted(order[:begin])
            if order[begin:end]:
                sums_of(order[begin:end]).save(folder)
        assert_same(HsicSums.load(folder), sums_of(list(range(count))))


def test_a_folder_without_files_is_empty(tmp_path: Path) -> None:
    assert HsicSums.load(tmp_path).hsic == {}


def test_cka_is_the_ratio_of_the_sums() -> None:
    sums = sums_of(list(range(6)))
    total = np.sum([batch_hsic(batch) for batch in range(6)], axis=0)
    for i in range(4):
        for j in range(4):
            expected = total[i, j] / (total[i, i] * total[j, j]) ** 0.5
            assert sums.cka()[i, j] == pytest.approx(expected, rel=1e-12)
    assert (np.diagonal(sums.cka()) == 1).all()
    assert (sums.cka() == sums.cka().T).all()


def test_stderr_is_a_jackknife_written_out() -> None:
    batches = list(range(7))
    values = []
    for left_out in batches:
        total = np.sum([batch_hsic(batch) for batch in batches if batch != left_out], axis=0)
        values.append(total / np.sqrt(np.outer(np.diagonal(total), np.diagonal(total))))
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) * (len(batches) - 1) / len(batches)
    np.testing.assert_allclose(sums_of(batches).stderr(), np.sqrt(variance), rtol=1e-9, atol=1e-14)
    assert (sums_of(batches).stderr()[~np.eye(4, dtype=bool)] > 0).all()


def test_stderr_of_one_batch_is_zero() -> None:
    assert (sums_of([3]).stderr() == np.zeros((4, 4))).all()


@pytest.mark.parametrize("value", [0.0, -1e-9, float("nan")])
def test_a_self_hsic_that_is_not_positive_names_its_layer(value: float) -> None:
    hsic = batch_hsic(0)
    hsic[2, 2] = value
    with pytest.raises(StageFailure, match=r"the HSIC of layer 2 with itself is .*collect\.samples"):
        cka_of(hsic)


def test_a_batch_counts_once() -> None:
    sums = sums_of([1, 2])
    with pytest.raises(ValueError, match="batch 2 is counted already"):
        sums.update(2, batch_hsic(2), 100)
    with pytest.raises(ValueError, match="batch 1 is counted already"):
        sums.merge(sums_of([5, 1]))


def test_a_batch_in_two_files_is_refused_by_the_name_of_the_file(tmp_path: Path) -> None:
    sums_of([1, 4]).save(tmp_path)
    sums_of([2, 4]).save(tmp_path)
    with pytest.raises(UserError, match=r"from-00000002\.safetensors.*batch 4 is counted already.*delete that file"):
        HsicSums.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids=["empty", "no header", "part of the header", "last byte gone"])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    sums_of([0, 1]).save(tmp_path)
    sums_of([2, 3]).save(tmp_path)
    path = tmp_path / "from-00000002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"from-00000002\.safetensors are damaged"):
        HsicSums.load(tmp_path)


def test_a_file_without_its_tensors_is_named(tmp_path: Path) -> None:
    save_file({"batches": np.array([1, 2])}, tmp_path / "from-00000001.safetensors")
    with pytest.raises(UserError, match=r"from-00000001\.safetensors are damaged"):
        HsicSums.load(tmp_path)
    tensors = {"batches": np.array([1, 2]), "samples": np.array([4]), "hsic": np.ones((2, 3, 3))}
    save_file(tensors, tmp_path / "from-00000001.safetensors")
    with pytest.raises(UserError, match=r"from-00000001\.safetensors are damaged"):
        HsicSums.load(tmp_path)


def test_write_cka_reduces_the_folder_to_one_file(tmp_path: Path) -> None:
    sums_of([2, 0]).save(tmp_path / "stats")
    sums_of([1]).save(tmp_path / "stats")
    names = [f"model.layers.{layer}" for layer in range(4)]
    content = write_cka(tmp_path / "stats", names, tmp_path / "cka.json")
    expected = sums_of([0, 1, 2])
    assert content["layers"] == names
    assert content["cka"] == expected.cka().tolist()
    assert content["stderr"] == expected.stderr().tolist()
    assert (content["num_batches"], content["num_samples"]) == (3, 303)
