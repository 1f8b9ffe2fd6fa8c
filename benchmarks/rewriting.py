"""Rewriting beside a copy of the same bytes, and beside mergekit.

    .venv/bin/python benchmarks/rewriting.py 3B [--mergekit PATH]     # 20 GB of disk
    .venv/bin/python benchmarks/rewriting.py 7B                       # 45 GB of disk

Makes a bfloat16 llama of that size with random weights in a temporary folder and leaves every fifth layer out, by the
command line, in turn with `cp` of the files that come out, both with everything on disk at the end (fsync, `sync`), the
source in the page cache. Memory is what the process has for itself (RssAnon), sampled every 10 ms, over that of an
interpreter with the same modules imported. PATH is the mergekit-yaml of an environment of its own with
mergekit==0.1.5; it gets the plan that `mpruner rewrite --export` writes.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from memory import own_memory
from random_checkpoint import SIZES, make_checkpoint

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.plan import format_layers

ROUNDS = 5
IMPORTS = "import mpruner_dist.rewriting.rewrite, time; time.sleep(3)"
COPY_ONLY = """
import sys, time
from pathlib import Path
from mpruner_dist.checkpoints.formats import open_checkpoint
from mpruner_dist.plan import parse_layers
from mpruner_dist.rewriting.layout import copy_shard, plan_copies
from mpruner_dist.rewriting.rewrite import Options, prepare, run_here
source, target = Path(sys.argv[1]), Path(sys.argv[2])
checkpoint = open_checkpoint(source)
rewrite = prepare(checkpoint, parse_layers(sys.argv[3]), Options())
target.mkdir()
begun = time.perf_counter()
run_here(copy_shard, plan_copies(checkpoint, rewrite.renamed, target, None))
print(time.perf_counter() - begun)
"""


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the peak of its RssAnon in bytes."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, own_memory(process.pid))
        except OSError:
            break
        time.sleep(0.01)
    if process.wait() != 0:
        raise SystemExit(f"failed: {command}")
    return time.perf_counter() - begun, peak


def warm(folder: Path) -> None:
    """Read every file once."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as content:
            while content.read(1 << 24):
                pass


def digest_of_tensors(folder: Path) -> str:
    """Of the bytes of all tensors, in the order of their names."""
    state = hashlib.sha256()
    checkpoint = read_checkpoint(folder)
    where = {name: folder / shard for shard, header in checkpoint.shards.items() for name in header.tensors}
    for name, info in sorted(checkpoint.tensors.items()):
        state.update(name.encode())
        with where[name].open("rb") as file:
            file.seek(info.begin)
            state.update(file.read(info.num_bytes))
    return state.hexdigest()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("--mergekit")
    arguments = parser.parse_args()
    layers = SIZES[arguments.size][2]
    keep = format_layers([layer for layer in range(layers) if layer % 5 != 4])
    with tempfile.TemporaryDirectory() as folder:
        source, small, copied = Path(folder) / "source", Path(folder) / "small", Path(folder) / "copied"
        make_checkpoint(source, arguments.size)
        warm(source)
        rewrite = [sys.executable, "-m", "mpruner_dist", "rewrite", str(source), str(small), "--keep", keep]
        cp = f"mkdir {copied} && cp {small}/*.safetensors {copied} && sync {copied}/*"
        seconds: dict[str, list[float]] = {"rewrite": [], "copying alone": [], "cp": [], "cp and sync": []}
        peaks = []
        for _ in range(ROUNDS):
            shutil.rmtree(small, ignore_errors=True)
            took, peak = timed(rewrite)
            seconds["rewrite"].append(took)
            peaks.append(peak)
            seconds["cp and sync"].append(timed(["sh", "-c", cp])[0])
            shutil.rmtree(copied)
            alone = [sys.executable, "-c", COPY_ONLY, str(source), str(copied), keep]
            seconds["copying alone"].append(float(subprocess.run(alone, check=True, capture_output=True).stdout))
            shutil.rmtree(copied)
            seconds["cp"].append(timed(["sh", "-c", cp.partition(" && sync")[0]])[0])
            shutil.rmtree(copied)
        again, _ = timed(rewrite)
        _, interpreter = timed([sys.executable, "-c", IMPORTS])
        whole, written = read_checkpoint(source).num_bytes, read_checkpoint(small).num_bytes
        print(f"{whole / 1e9:.2f} GB, {written / 1e9:.2f} GB of them kept, {ROUNDS} rounds\n")
        print("| | seconds (median) | GB/s |\n|---|--:|--:|")
        for name, values in seconds.items():
            print(f"| {name} | {np.median(values):.2f} | {written / 1e9 / np.median(values):.2f} |")
        for ours, theirs in (("copying alone", "cp"), ("rewrite", "cp and sync")):
            ratios = np.array(seconds[theirs]) / np.array(seconds[ours])
            spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            print(f"\n{ours}: {spread} of the throughput of {theirs}")
        more = max(peaks) - interpreter
        print(f"\npeak memory over the interpreter's {interpreter / 1e6:.0f} MB: {more / 1e6:.0f} MB")
        print(f"the same command again: {again:.2f} s")
        if arguments.mergekit:
            beside_mergekit(arguments.mergekit, source, small, Path(folder), seconds["rewrite"])
        shutil.rmtree(small)
        subprocess.run([*rewrite[:-1], f"0-{layers - 1}"], check=True, stdout=subprocess.DEVNULL)
        same = digest_of_tensors(source) == digest_of_tensors(small)
        print(f"everything kept, tensors byte for byte: {'the same' if same else 'NOT THE SAME'}")


def beside_mergekit(mergekit: str, source: Path, small: Path, folder: Path, ours: list[float]) -> None:
    """The same plan as a passthrough merge."""
    plan, merged = folder / "plan.yaml", folder / "merged"
    keep = [sys.executable, "-m", "mpruner_dist", "rewrite", str(source), str(small), "--export", str(plan), "--keep"]
    layers = read_checkpoint(source).config["num_hidden_layers"]
    keep.append(format_layers([layer for layer in range(layers) if layer % 5 != 4]))
    subprocess.run(keep, check=True, stdout=subprocess.DEVNULL)
    seconds = []
    for _ in range(3):
        shutil.rmtree(merged, ignore_errors=True)
        seconds.append(timed(["sh", "-c", f"{mergekit} {plan} {merged} --lazy-unpickle && sync {merged}/*"])[0])
    same = digest_of_tensors(merged) == digest_of_tensors(small)
    theirs = float(np.median(seconds))
    print(f"\nmergekit passthrough: {theirs:.2f} s (3 rounds), {theirs / np.median(ours):.2f} times ours")
    print(f"its tensors: {'the same' if same else 'NOT THE SAME'}")


if __name__ == "__main__":
    main()
