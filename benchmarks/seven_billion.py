"""A 7B checkpoint on two workers that together have less memory than two copies of it.

    .venv/bin/python benchmarks/seven_billion.py [FOLDER]     # 14 GB of disk, 22 GB of memory

Makes the checkpoint (random weights, bfloat16, sharded) in a temporary folder, collects its similarities with two
workers under ZeRO stage 3, and prints seconds, tokens a second, the peak of each worker's own memory (RssAnon, sampled
every 50 ms), and the time that the operations of the forward pass alone would take at this machine's rate of bfloat16
matrix products, both workers at once.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
import yaml
from memory import own_memory
from random_checkpoint import make_checkpoint, write_text

BATCHES, SEQUENCES, TOKENS, WORKERS = 4, 2, 128, 2
RATE = """
import sys, time, torch
torch.set_num_threads(1)
states, weights = torch.randn(512, 4096).bfloat16(), torch.randn(11008, 4096).bfloat16()
seconds = []
for _ in range(6):
    begun = time.perf_counter()
    states @ weights.T
    seconds.append(time.perf_counter() - begun)
print(2 * 512 * 4096 * 11008 / min(seconds))
"""


def rate_of_products() -> float:
    """Operations a second of all workers at the same time, one thread each, on the shapes of the model."""
    command = [sys.executable, "-c", RATE]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(WORKERS)]
    return sum(float(process.communicate()[0]) for process in running)


def watch(parent: psutil.Process, peaks: dict[int, int], stop: threading.Event) -> None:
    """Note the largest RssAnon of each worker."""
    while not stop.wait(0.05):
        try:
            for child in parent.children(recursive=True):
                if "RayTrainWorker" in " ".join(child.cmdline()):
                    peaks[child.pid] = max(peaks.get(child.pid, 0), own_memory(child.pid))
        except (psutil.NoSuchProcess, OSError):
            continue


def main() -> None:
    """Make, collect, print."""
    rate = rate_of_products()
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        parameters = make_checkpoint(folder / "model", "7B")
        write_text(folder / "text.jsonl", 200)
        text = str(folder / "text.jsonl")
        config = {
            "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
            "data": {
                "block_size": TOKENS,
                "calibration": {"path": text, "take": [0.0, 0.5]},
                "test": {"path": text, "take": [0.5, 1.0]},
            },
            "collect": {"batch_size": SEQUENCES, "num_batches": BATCHES, "samples": 200},
            "cluster": {"workers": WORKERS, "device": "cpu", "cpus_per_worker": 1, "zero_stage": 3},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "mpruner_dist", "collect", str(folder / "config.yaml"), "--run-dir"]
        begun = time.perf_counter()
        process = subprocess.Popen([*command, str(folder / "run")], stderr=subprocess.PIPE, text=True)
        peaks: dict[int, int] = {}
        stop = threading.Event()
        watcher = threading.Thread(target=watch, args=(psutil.Process(process.pid), peaks, stop))
        watcher.start()
        errors = process.communicate()[1]
        stop.set()
        watcher.join()
        if process.returncode:
            raise SystemExit(errors)
        total = time.perf_counter() - begun
        stage = json.loads((folder / "run/manifest.json").read_text())["stages"]["collect"]["seconds"]
        log = (folder / "run/logs/collect-rank0.log").read_text()
        cka = torch.tensor(json.loads((folder / "run/cka.json").read_text())["cka"])
    tokens = BATCHES * SEQUENCES * TOKENS
    needed = 2 * (parameters - 2 * 32000 * 4096) * tokens / rate
    print(log)
    print(f"{parameters / 1e9:.2f} B parameters, {2 * parameters / 1e9:.1f} GB, {WORKERS} workers of one thread, "
          f"{psutil.virtual_memory().total / 2**30:.1f} GiB, {tokens} tokens")  # fmt: skip
    print(f"everything {total:.0f} s, the stage collect {stage:.0f} s: {tokens / stage:.2f} tokens/s")
    print(f"bfloat16 products at {rate / 1e9:.0f} GFLOP/s would take {needed:.0f} s: {needed / stage:.0%} of the stage")
    print("peak memory of the workers, GB: " + ", ".join(f"{peak / 1e9:.2f}" for peak in sorted(peaks.values())))
    print(f"CKA is finite: {bool(torch.isfinite(cka).all())}, {list(cka.shape)}")


if __name__ == "__main__":
    main()
