"""The statistics alone: time, error and memory of CKA of all pairs of layers, beside published libraries.

    .venv/bin/pip install --no-deps torch_cka==0.21 ckatorch==1.0.3 pytorch-cka==1.1.3 tqdm seaborn pandas
    .venv/bin/python benchmarks/cka_statistics.py

All sides get the same features, float32 [batches, samples, width] of every layer, and are called through their public
interface with a model that only hands these features on. The reference is equation 5 of Song et al. 2012 in float64,
summed over batches before the ratio.

Shape suffixes: B batches, N samples, D features, L layers.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpruner_dist.config import CollectConfig
from mpruner_dist.similarity.estimators import make_estimator
from mpruner_dist.similarity.finalise import cka
from mpruner_dist.similarity.samples import draw_samples
from mpruner_dist.similarity.sums import BatchSums
from mpruner_dist.similarity.tap import BatchStatistics

LAYERS, SAMPLES, MEAN = 32, 256, 3.0
Matrix = np.ndarray


class Replay(torch.nn.Module):
    """A model of identity layers, through which stored features pass."""

    def __init__(self, features_LBND: list[Tensor]) -> None:
        super().__init__()
        self.features_LBND = features_LBND
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in features_LBND)
        self.names = [f"layers.{layer}" for layer in range(len(features_LBND))]

    def forward(self, x: Tensor) -> Tensor:
        """`x` [N, 1] holds the number of the batch."""
        for layer, features_BND in zip(self.layers, self.features_LBND, strict=True):
            layer(features_BND[int(x[0, 0])])
        return x


def ours(features_LBND: list[Tensor]) -> Matrix:
    """The default estimator, without the null, as far as the matrix that the others give."""
    sums = BatchSums()
    for batch in range(len(features_LBND[0])):
        estimator = make_estimator("debiased", len(features_LBND))
        for features_BND in features_LBND:
            estimator.keep(features_BND[batch][None])
        samples = features_LBND[0].shape[1]
        no_order = torch.empty(0, samples, dtype=torch.int64)
        terms = estimator.terms(torch.arange(samples), torch.zeros(samples), no_order)
        sums.update(batch, {f"states.{name}": value.numpy() for name, value in terms.items()})
    return cka(sums.total())


def everything(features_LBND: list[Tensor]) -> Matrix:
    """All that one pass measures: states, updates, their nulls, block influence, angles, checks."""
    sums = BatchSums()
    config = CollectConfig(samples=features_LBND[0].shape[1], skip_tokens=0, normalize=False, outlier_norm=None)
    for batch in range(len(features_LBND[0])):
        samples = draw_samples(torch.ones(1, config.samples), config, batch)
        statistics = BatchStatistics(batch, samples, config, len(features_LBND))
        before = torch.zeros_like(features_LBND[0][batch])
        for features_BND in features_LBND:
            statistics.observe(before, features_BND[batch])
            before = features_BND[batch]
        sums.update(batch, {name: value.numpy() for name, value in statistics.terms().items()})
    return cka(sums.total())


def torch_cka(features_LBND: list[Tensor]) -> Matrix:
    """Version 0.21."""
    from torch_cka import CKA

    model = Replay(features_LBND)
    both = CKA(model, model, "one", "other", model.names, model.names)
    both.compare(batches(features_LBND))
    return both.export()["CKA"].numpy()


def pytorch_cka(features_LBND: list[Tensor]) -> Matrix:
    """Version 1.1.3."""
    from cka import compute_cka

    model = Replay(features_LBND)
    found = compute_cka(model, model, batches(features_LBND), layers=model.names, device="cpu", progress=False)
    return found[0].numpy()


def ckatorch(features_LBND: list[Tensor]) -> Matrix:
    """Version 1.0.3, by the function that its CKA class calls: the class keeps only the last of several batches."""
    from ckatorch import cka_batch

    return np.array([[float(cka_batch(one, other)) for other in features_LBND] for one in features_LBND])


def batches(features_LBND: list[Tensor]) -> torch.utils.data.DataLoader:
    """Numbers of batches, each as often as there are samples."""
    count, samples = features_LBND[0].shape[:2]
    numbers = torch.arange(count).repeat_interleave(samples).unsqueeze(1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(numbers), batch_size=samples)


def reference(features_LBND: list[Tensor]) -> Matrix:
    """Minibatch CKA in float64 by Song's three terms."""
    n = features_LBND[0].shape[1]
    total = np.zeros((len(features_LBND),) * 2)
    for batch in range(len(features_LBND[0])):
        grams = np.stack([(x := f[batch].double().numpy()) @ x.T for f in features_LBND])
        for gram in grams:
            np.fill_diagonal(gram, 0)
        rows = grams.sum(2)
        sums = rows.sum(1)
        flat = grams.reshape(len(grams), -1)
        three = flat @ flat.T + np.outer(sums, sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T
        total += three / (n * (n - 3))
    root = np.sqrt(np.diagonal(total))
    return total / root[:, None] / root[None, :]


def make_features(count: int, width: int, mean: float) -> list[Tensor]:
    """A residual stream: each layer adds to the one before; `mean` is a vector that all samples share."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(count, SAMPLES, width, generator=draw) + mean * torch.randn(width, generator=draw)
    features = []
    for _ in range(LAYERS):
        states = states + 0.3 * torch.randn(count, SAMPLES, width, generator=draw)
        features.append(states)
    return features


def timed(function: Callable[[list[Tensor]], Matrix], features_LBND: list[Tensor], repeats: int) -> tuple[float, float]:
    """Median seconds a batch, and the median ratio to ours, run in turn with it; the first round does not count."""
    seconds, ratios = [], []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        ours(features_LBND)
        between = time.perf_counter()
        function(features_LBND)
        seconds.append((time.perf_counter() - between) / len(features_LBND[0]))
        ratios.append((time.perf_counter() - between) / (between - begun))
    return float(np.median(seconds[1:])), float(np.median(ratios[1:]))


def error_of(function: Callable[[list[Tensor]], Matrix], features_LBND: list[Tensor], truth: Matrix) -> str:
    """Largest difference of an entry from the reference, or what the library says instead."""
    try:
        return f"{np.abs(function(features_LBND) - truth).max():.1e}"
    except (AssertionError, ValueError) as error:
        return str(error)


def table_of_times(width: int) -> None:
    """Time and error of every side on the same features."""
    noise, shifted = make_features(1, width, 0.0), make_features(2, width, MEAN)
    truths = reference(noise), reference(shifted)
    print(f"\n{LAYERS} layers, {SAMPLES} samples a batch, width {width}, float32, {torch.get_num_threads()} threads; "
          f"the common mean is {MEAN:g} times as large as the first layer's spread\n")  # fmt: skip
    print("| | ms a batch | times ours | largest error | with a common mean |\n|---|--:|--:|--:|--:|")
    for name, function, repeats in (
        ("ours", ours, 15), ("pytorch-cka 1.1.3", pytorch_cka, 15), ("torch_cka 0.21", torch_cka, 5),
        ("ckatorch 1.0.3", ckatorch, 1), ("ours, everything that a pass measures", everything, 5),
    ):  # fmt: skip
        seconds, ratio = timed(function, noise, repeats)
        errors = [error_of(function, f, truth) for f, truth in zip((noise, shifted), truths, strict=True)]
        print(f"| {name} | {1000 * seconds:.1f} | {ratio:.1f} | {errors[0]} | {errors[1]} |", flush=True)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(count: int, layers: int, samples: int, width: int) -> None:
    """Print the peak over what was there before, of `count` batches whose layers come one after another."""
    config = CollectConfig(samples=samples, skip_tokens=0)
    peak, running = 0, True
    states = torch.randn(samples, width)
    after = torch.randn(samples, width)
    (states @ states.T).sum()  # the matrix product's own buffers

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, resident())
            time.sleep(0.002)

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    sums = BatchSums()
    for batch in range(count):
        statistics = BatchStatistics(batch, draw_samples(torch.ones(1, samples), config, batch), config, layers)
        for _ in range(layers):
            statistics.observe(states, after)
        sums.update(batch, {name: value.numpy() for name, value in statistics.terms().items()})
        del statistics
    running = False
    watcher.join()
    print(peak - before)


def table_of_memory(layers: int = 48, samples: int = 1024, width: int = 2048) -> None:
    """Peak memory of the statistics for more and more batches, each in a process of its own."""
    room = (layers * samples**2 + samples * width) * 4
    print(f"\n{layers} layers, {samples} samples a batch, width {width}: L n n + n d floats are {room / 1e6:.0f} MB\n")
    print("| batches | peak, MB | times L n n + n d floats |\n|--:|--:|--:|")
    for count in (1, 4, 16):
        command = [sys.executable, __file__, "--peak", *map(str, (count, layers, samples, width))]
        # every larger tensor gets memory of its own, and gives it back: holes in the C library's heap are not counted
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "200000"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peak = int(done.stdout)
        print(f"| {count} | {peak / 1e6:.0f} | {peak / room:.2f} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=4, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        peak_memory(*arguments.peak)
        return
    warnings.filterwarnings("ignore", message="Dataloader for Model 2 is not given")
    for width in (1024, 4096):
        table_of_times(width)
    table_of_memory()


if __name__ == "__main__":
    main()
