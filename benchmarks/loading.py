"""Loading under ZeRO-3: each rank reading its own slices, beside transformers' own path.

    .venv/bin/python benchmarks/loading.py 3B

Makes a bfloat16 llama of that size with random weights in a temporary folder and loads it on two ranks, one way after
the other and then again, each time in fresh processes of one thread. Time is that of the slower rank, from a started
process group to partitioned weights, with the files in the page cache. Memory is what the process has for itself
(RssAnon), sampled every 10 ms; of it, the growth since before the load.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from memory import own_memory
from random_checkpoint import make_checkpoint

RANKS, ROUNDS = 2, 2


def one_rank(way: str, folder: Path) -> None:
    """Load, compare a tensor with the file, print what was measured."""
    import torch
    from safetensors import safe_open

    from mpruner_dist.checkpoints.folder import read_checkpoint
    from mpruner_dist.cluster.engine import gathered, start_deepspeed
    from mpruner_dist.models.loading import load_model
    from mpruner_dist.models.streaming import stream_model

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    start_deepspeed(torch.device("cpu"))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    before, peak, running = own_memory(), 0, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, own_memory())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    if way == "slices":
        model = stream_model(folder, "bfloat16", settings, head=True, trust_remote_code=False)
    else:
        model = load_model(folder, "bfloat16", partition=settings)
    seconds = time.perf_counter() - begun
    running = False
    watcher.join()
    name = "model.layers.1.self_attn.q_proj.weight"
    with gathered(model.get_parameter(name)):
        shard = next(file for file, header in read_checkpoint(folder).shards.items() if name in header.tensors)
        with safe_open(folder / shard, "pt") as file:
            if not torch.equal(model.get_parameter(name), file.get_tensor(name)):
                raise RuntimeError(f"{way}: {name} is not what the file has")
    partition = sum(p.ds_tensor.numel() * p.ds_tensor.itemsize for p in model.parameters())
    facts = {"seconds": seconds, "peak": peak, "growth": peak - before, "partition": partition}
    print("RESULT", json.dumps(facts), flush=True)


def on_ranks(way: str, folder: Path) -> list[dict[str, float]]:
    """What each rank printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", way, str(folder)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    results = []
    for rank in ranks:
        output, errors = rank.communicate()
        if rank.returncode:
            raise RuntimeError(errors)
        results.append(json.loads(output.partition("RESULT")[2]))
    return results


def main() -> None:
    """Print one row for each way."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_checkpoint(folder, sys.argv[1])
        print(f"{parameters / 1e9:.2f} B parameters, {2 * parameters / 1e9:.1f} GB, {RANKS} ranks\n")
        on_ranks("slices", folder)  # everything into the page cache, and compiled
        found: dict[str, list[list[dict[str, float]]]] = {"transformers": [], "slices": []}
        for _ in range(ROUNDS):
            for way, results in found.items():
                results.append(on_ranks(way, folder))
    print("| | seconds | peak of a rank, GB | growth, GB | growth / partition |\n|---|--:|--:|--:|--:|")
    seconds = {}
    for way, results in found.items():
        seconds[way] = min(max(rank["seconds"] for rank in result) for result in results)
        worst = max((rank for result in results for rank in result), key=lambda rank: rank["growth"])
        print(
            f"| {way} | {seconds[way]:.1f} | {worst['peak'] / 1e9:.2f} | {worst['growth'] / 1e9:.2f} | "
            f"{worst['growth'] / worst['partition']:.2f} |"
        )
    print(f"\nslices are {seconds['transformers'] / seconds['slices']:.1f} times as fast")


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        one_rank(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
