"""The mergeable statistic: how the work was divided and interrupted must not show in a single bit."""

import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mpruner_dist.errors import StageFailure, UserError
from mpruner_dist.similarity.finalise import cka
from mpruner_dist.similarity.sums import BatchSums, Floats, Terms


def batch_hsic(batch: int, layers: int = 4) -> Floats:
    """HSIC of a batch: symmetric, positive definite, of uneven size so that the order of adding matters."""
    draw = np.random.default_rng([batch, 17])
    half = draw.standard_normal((layers, 9))
    return half @ half.T * 10.0 ** draw.uniform(-3, 3)


def batch_terms(batch: int) -> Terms:
    return {"states.hsic": batch_hsic(batch), "samples": np.array(100.0 + batch)}


def sums_of(batches: list[int]) -> BatchSums:
    sums = BatchSums()
    for batch in batches:
        sums.update(batch, batch_terms(batch))
    return sums


def bits(sums: BatchSums) -> list[bytes]:
    """Everything that is made of sums, to the last bit."""
    total, spread = sums.total(), sums.jackknife(cka)
    assert spread is not None
    return [*(total[name].tobytes() for name in sorted(total)), cka(total).tobytes(), spread.tobytes()]


def test_the_order_of_plain_addition_would_show() -> None:
    """What the tests below prove is not true of any sum."""
    batches = list(range(20))
    plain = [sum(batch_hsic(batch) for batch in order) for order in (batches, batches[::-1])]
    assert np.asarray(plain[0]).tobytes() != np.asarray(plain[1]).tobytes()


@settings(max_examples=60)
@given(st.integers(2, 24), st.integers(1, 6), st.integers(0, 2**31))
def test_merging_in_any_division_and_order_gives_the_same_bits(count: int, workers: int, seed: int) -> None:
    draw = random.Random(seed)
    batches = draw.sample(range(1000), count)
    shares: list[list[int]] = [[] for _ in range(workers)]
    for batch in batches:
        draw.choice(shares).append(batch)
    merged = BatchSums()
    for share in draw.sample(shares, workers):
        merged.merge(sums_of(draw.sample(share, len(share))))
    assert bits(merged) == bits(sums_of(sorted(batches)))


@settings(max_examples=30)
@given(st.integers(2, 16), st.integers(1, 4), st.integers(0, 2**31))
def test_any_number_of_restarts_gives_the_same_bits(count: int, restarts: int, seed: int) -> None:
    draw = random.Random(seed)
    order = draw.sample(range(count), count)
    cuts = sorted(draw.choices(range(count + 1), k=restarts))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for begin, end in zip([0, *cuts], [*cuts, count], strict=True):
            done = BatchSums.load(folder)  # what an attempt after a restart sees
            assert sorted(done.terms) == sorted(order[:begin])
            if order[begin:end]:
                sums_of(order[begin:end]).save(folder)
        assert bits(BatchSums.load(folder)) == bits(sums_of(list(range(count))))


def test_a_folder_without_files_is_empty(tmp_path: Path) -> None:
    assert BatchSums.load(tmp_path).terms == {}
    assert BatchSums().total() == {}


def test_the_batches_before_an_end_are_those_of_a_shorter_run() -> None:
    assert bits(sums_of([4, 0, 7, 2, 1]).before(4)) == bits(sums_of([0, 1, 2]))


def test_stderr_is_a_jackknife_written_out() -> None:
    batches = list(range(7))
    values = []
    for left_out in batches:
        total = np.sum([batch_hsic(batch) for batch in batches if batch != left_out], axis=0)
        values.append(total / np.sqrt(np.outer(np.diagonal(total), np.diagonal(total))))
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) * (len(batches) - 1) / len(batches)
    spread = sums_of(batches).jackknife(cka)
    assert spread is not None
    np.testing.assert_allclose(spread, np.sqrt(variance), rtol=1e-9, atol=1e-14)
    assert (spread[~np.eye(4, dtype=bool)] > 0).all()


def test_the_jackknife_of_a_mean_is_its_textbook_error() -> None:
    values = np.random.default_rng(1).standard_normal(12)
    sums = BatchSums()
    for batch, value in enumerate(values):
        sums.update(batch, {"value": np.array(value), "count": np.array(1.0)})
    spread = sums.jackknife(lambda total: np.asarray(total["value"] / total["count"]))
    np.testing.assert_allclose(spread, values.std(ddof=1) / 12**0.5, rtol=1e-12)


def test_the_stderr_of_one_batch_is_unknown() -> None:
    assert sums_of([3]).jackknife(cka) is None


def test_a_layer_that_needs_every_batch_has_no_stderr() -> None:
    """Without the last batch its HSIC is negative: no number is made up for that."""
    sums = sums_of([0])
    for batch, value in ((1, -1.0), (2, 100.0)):
        hsic = batch_hsic(0).copy()
        hsic[2, 2] = value * hsic[2, 2] * 1.5
        sums.update(batch, {"states.hsic": hsic, "samples": np.array(8.0)})
    assert np.isfinite(cka(sums.total())).all()
    with pytest.raises(StageFailure, match=r"too few batches for standard errors.*the HSIC of layer 2 with itself"):
        sums.jackknife(cka)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_term_that_is_not_finite_is_never_counted(value: float) -> None:
    sums = sums_of([1])
    terms = batch_terms(2)
    terms["states.hsic"][0, 3] = value
    with pytest.raises(ValueError, match=r"batch 2: states\.hsic is not finite"):
        sums.update(2, terms)
    assert sorted(sums.terms) == [1]


def test_a_batch_counts_once() -> None:
    sums = sums_of([1, 2])
    with pytest.raises(ValueError, match="batch 2 is counted already"):
        sums.update(2, batch_terms(2))
    with pytest.raises(ValueError, match="batch 1 is counted already"):
        sums.merge(sums_of([5, 1]))


def test_a_batch_in_two_files_is_refused_by_the_name_of_the_file(tmp_path: Path) -> None:
    sums_of([1, 4]).save(tmp_path)
    sums_of([2, 4]).save(tmp_path)
    with pytest.raises(UserError, match=r"from-00000002\.safetensors are damaged.*batch 4 is counted alr.*delete that"):
        BatchSums.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids=["empty", "no header", "part of the header", "last byte gone"])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    sums_of([0, 1]).save(tmp_path)
    sums_of([2, 3]).save(tmp_path)
    path = tmp_path / "from-00000002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"from-00000002\.safetensors are damaged"):
        BatchSums.load(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"states.hsic": np.ones((2, 3, 3))},
        {"batches": np.array([1, 2]), "samples": np.array([4.0]), "states.hsic": np.ones((2, 3, 3))},
        {"batches": np.array([1, 2]), "states.hsic": np.full((2, 3, 3), np.nan)},
    ],
    ids=["no batch ids", "too few entries", "not finite"],
)
def test_a_file_with_the_wrong_content_is_named(tmp_path: Path, tensors: dict[str, Floats]) -> None:
    save_file(tensors, tmp_path / "from-00000001.safetensors")
    with pytest.raises(UserError, match=r"from-00000001\.safetensors are damaged"):
        BatchSums.load(tmp_path)
