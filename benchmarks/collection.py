"""What collection costs beside the forward pass that it needs anyway, and how that grows.

    .venv/bin/python benchmarks/collection.py overhead     # about 10 minutes, 6 GB of memory; on a GPU one minute
    .venv/bin/python benchmarks/collection.py growth       # about 3 minutes
    .venv/bin/python benchmarks/collection.py workers configs/demo.yaml     # after launch/demo.sh, about 6 minutes

`overhead` runs the same batches through a llama of 1.1 B parameters (random weights, float32), on a GPU one of 6.7 B in
bfloat16, with and without the statistics, in turn. `growth` times the statistics of one batch for several numbers of
layers and widths and sets beside them what follows from the number of operations and three rates, measured once; then
it puts the rates of a larger machine into the same formula. `workers` collects the demo's similarities with more and
more batches and workers.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from random_checkpoint import make_checkpoint

from mpruner_dist.config import CollectConfig
from mpruner_dist.models.loading import load_model
from mpruner_dist.models.stacks import run_blocks
from mpruner_dist.similarity.samples import PERMUTATIONS, draw_samples
from mpruner_dist.similarity.sums import BatchSums
from mpruner_dist.similarity.tap import BatchStatistics, LayerTap

TOKENS, ROUNDS = 512, 5
CONFIG = CollectConfig()  # the defaults: 8 sequences and 256 samples a batch, everything measured


def overhead() -> None:
    """Forward passes with and without the statistics."""
    gpu = torch.cuda.is_available()
    device, size, dtype = ("cuda", "7B", "bfloat16") if gpu else ("cpu", "1B", "float32")
    rounds = 4 * ROUNDS if gpu else ROUNDS
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_checkpoint(Path(folder), size)
        model = load_model(Path(folder), dtype, head=False).to(device)
    layers = model.config.num_hidden_layers
    tap = LayerTap(run_blocks(model))
    mask = torch.ones(CONFIG.batch_size, TOKENS, dtype=torch.int64)
    seconds: dict[str, list[float]] = {"forward": [], "collection": []}
    sums = BatchSums()
    for batch in range(-1, rounds):  # the first round warms up
        ids = torch.randint(4, 32000, mask.shape, generator=torch.Generator().manual_seed(batch + 1))
        for way in seconds:
            begun = time.perf_counter()
            if way == "collection":
                statistics = BatchStatistics(batch, draw_samples(mask, CONFIG, batch).to(device), CONFIG, layers)
                tap.begin([statistics])
            else:
                tap.begin([])
            with torch.no_grad():
                model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            if way == "collection":
                sums.update(batch, {name: value.numpy() for name, value in statistics.terms().items()})
            if gpu:
                torch.cuda.synchronize()
            if batch >= 0:
                seconds[way].append(time.perf_counter() - begun)
    ratios = [with_it / bare for bare, with_it in zip(seconds["forward"], seconds["collection"], strict=True)]
    flops = 2 * (parameters - 2 * model.get_input_embeddings().weight.numel()) * mask.numel()
    forward, collection = (float(np.median(seconds[way])) for way in seconds)
    where = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
    print(f"{parameters / 1e9:.2f} B parameters, {layers} layers, width {model.config.hidden_size}, {dtype}, "
          f"{where}, batches of {CONFIG.batch_size} x {TOKENS} tokens, {CONFIG.samples} samples, {rounds} rounds\n"
    )  # fmt: skip
    print("| | seconds a batch (median) |\n|---|--:|")
    print(f"| forward pass alone | {forward:.3f} ({flops / forward / 1e9:,.0f} GFLOP/s) |")
    print(f"| collection | {collection:.3f} |")
    print(f"| ratio, median of the rounds (smallest to largest) | {np.median(ratios):.3f} "
          f"({min(ratios):.3f} to {max(ratios):.3f}) |\n")  # fmt: skip
    one, every = sums.before(0).total(), sums.total()
    print("| all-reduced | bytes after one batch | after all |\n|---|--:|--:|")
    for name in ("states.hsic", "updates.hsic", "states.null", "updates.null", "angle", "cosine", "top_share"):
        print(f"| {name} {list(every[name].shape)} | {one[name].nbytes:,} | {every[name].nbytes:,} |")
    print(f"| everything | {sum(v.nbytes for v in one.values()):,} | {sum(v.nbytes for v in every.values()):,} |")


@dataclass(frozen=True)
class Rates:
    """Of a machine: float32 matrix products, operations a second; memory, bytes a second; arccos, a second."""

    products: float
    memory: float
    angles: float
    a_layer: float = 0.0  # seconds that the many small operators take to start, whatever their size


def predicted(layers: int, width: int, samples: int, rates: Rates) -> float:
    """Seconds of the statistics of one batch.

    Gram matrices of two streams, one product of all triangles with each other and one for each permutation, passes
    over features and Gram matrices in memory, and the angles between all pairs of states of some samples.
    """
    triangle = samples * (samples + 1) // 2
    angled = min(samples, max(4, samples**2 // (4 * width)))
    products = 2 * layers * 2 * samples**2 * width
    products += 2 * (1 + PERMUTATIONS) * 2 * layers**2 * triangle
    products += 2 * 2 * angled * layers**2 * width  # float64: half as fast
    moved = layers * samples * width * 4 * FEATURE_PASSES + 2 * layers * samples**2 * 4 * GRAM_PASSES
    moved += 2 * PERMUTATIONS * layers * triangle * 4 * SHUFFLE_PASSES
    return products / rates.products + moved / rates.memory + angled * layers**2 / rates.angles + layers * rates.a_layer


FEATURE_PASSES = 24  # reads and writes of a layer's features: select, check, scale, centre, of both streams
GRAM_PASSES = 14  # of a Gram matrix: centre in float64, pack
SHUFFLE_PASSES = 6  # of a triangle that is permuted: gathered entry by entry


def measured(layers: int, width: int, samples: int) -> float:
    """Seconds of the statistics of one batch, median of five."""
    config = CollectConfig(samples=samples, skip_tokens=0)
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(samples, width, generator=draw) for _ in range(4)]
    seconds = []
    for batch in range(6):
        begun = time.perf_counter()
        statistics = BatchStatistics(batch, draw_samples(torch.ones(1, samples), config, batch), config, layers)
        for layer in range(layers):
            statistics.observe(states[layer % 4], states[(layer + 1) % 4])
        statistics.terms()
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds[1:]))


def rate_of(function: Callable[[], object], work: float) -> float:
    """Work a second, the best of five."""
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return work / min(seconds[1:])


def growth() -> None:
    """Measured and predicted seconds, then the same formula for a larger machine."""
    features, large = torch.randn(256, 4096), torch.randn(1 << 26)
    target = torch.empty_like(large)
    cosines = torch.rand(1 << 22, dtype=torch.float64)
    rates = Rates(
        products=rate_of(lambda: features @ features.T, 2 * 256 * 256 * 4096),
        memory=rate_of(lambda: target.copy_(large), 2 * large.nbytes),
        angles=rate_of(cosines.arccos, len(cosines)),
    )
    print(f"rates: {rates.products / 1e9:.0f} GFLOP/s, {rates.memory / 1e9:.1f} GB/s, "
          f"{rates.angles / 1e6:.0f} M arccos/s, {torch.get_num_threads()} threads\n")  # fmt: skip
    shapes = [(16, 1024, 256), (32, 1024, 256), (64, 1024, 256), (128, 1024, 256)]
    shapes += [(32, 2048, 256), (32, 4096, 256), (32, 8192, 256), (32, 1024, 128), (32, 1024, 512)]
    first = shapes[0]
    lacking = measured(*first) - predicted(*first, rates)
    rates = replace(rates, a_layer=max(lacking, 0.0) / first[0])
    print(f"what the first line takes beyond its operations, {1000 * rates.a_layer:.1f} ms a layer, is taken for all\n")
    print("| layers | width | samples | ms a batch | predicted | measured / predicted |\n|--:|--:|--:|--:|--:|--:|")
    for layers, width, samples in shapes:
        found, expected = measured(layers, width, samples), predicted(layers, width, samples, rates)
        print(
            f"| {layers} | {width} | {samples} | {1000 * found:.0f} | {1000 * expected:.0f} | {found / expected:.2f} |"
        )
    on_paper()


def on_paper() -> None:
    """A 70B model (80 layers, width 8192, 70e9 parameters) on GPUs whose rates are assumed, not measured."""
    gpu = Rates(products=50e12, memory=2.5e12, angles=50e9, a_layer=0.5e-3)
    forward_rate, link = 400e12, {8: 300e9, 64: 40e9}
    statistics = predicted(80, 8192, 256, gpu)
    print("\nOn paper: 70 B parameters, 80 layers, width 8192, batches of 8 x 512 tokens, 256 samples; assumed "
          f"{forward_rate / 1e12:.0f} TFLOP/s in the forward pass, {gpu.products / 1e12:.0f} in float32, "
          f"{gpu.memory / 1e12:.1f} TB/s, 0.5 ms a layer to start operators, weights gathered at 300 GB/s among 8 "
          "GPUs, at 40 GB/s among 64\n")  # fmt: skip
    print(
        "| GPUs | batches in a pass | forward, s | gather, s | statistics, s | statistics / the rest | 1 M tokens, s |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for gpus, at_once in itertools.product((8, 64), (1, 4)):
        tokens = 8 * 512 * at_once
        forward = 2 * 70e9 * tokens / forward_rate
        gather = 140e9 * (gpus - 1) / gpus / link[gpus]
        rest = max(forward, gather)  # DeepSpeed prefetches: the longer of the two counts
        total = 1e6 / (tokens * gpus) * (rest + at_once * statistics)
        print(f"| {gpus} | {at_once} | {forward:.2f} | {gather:.2f} | {at_once * statistics:.3f} | "
              f"{at_once * statistics / rest:.3f} | {total:.1f} |")  # fmt: skip


def workers() -> None:
    """Seconds that each further batch takes with one and with two workers of one thread."""
    print("| workers | batches | seconds of the stage | seconds for each further batch |\n|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            before: tuple[int, float] | None = None
            for batches in (4, 8, 12):
                run = Path(folder) / f"{count}-{batches}"
                options = {
                    "collect.num_batches": batches, "cluster.workers": count, "cluster.cpus_per_worker": 1,
                    "retrain": "null",
                }  # fmt: skip
                words = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
                command = [sys.executable, "-m", "mpruner_dist", "collect", sys.argv[2], "--run-dir", str(run), *words]
                subprocess.run(command, check=True, capture_output=True)
                seconds = json.loads((run / "manifest.json").read_text())["stages"]["collect"]["seconds"]
                further = f"{(seconds - before[1]) / (batches - before[0]):.2f}" if before else ""
                print(f"| {count} | {batches} | {seconds:.1f} | {further} |", flush=True)
                before = (batches, seconds)


if __name__ == "__main__":
    {"overhead": overhead, "growth": growth, "workers": workers}[sys.argv[1]]()
