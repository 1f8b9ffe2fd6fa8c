"""Ranks of torch.distributed without Ray, for what Ray has no part in."""

import logging
import multiprocessing
import os
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mpruner_dist.cluster.engine import start_deepspeed
from mpruner_dist.cluster.worker import Job, Worker
from mpruner_dist.errors import MPrunerError

# ranks are forked from a server that has imported these once: each by itself would need several seconds for it
multiprocessing.set_forkserver_preload([
    "datasets", "deepspeed.runtime.zero.muon.muon_optimizer", "hypothesis", "mpruner_dist.rewriting.rewrite",
    "torch.utils.tensorboard", "transformers.models.llama.modeling_llama",
])  # fmt: skip


def on_ranks(count: int, job: Callable[..., None], *arguments: Any) -> None:
    """Run a function on so many ranks; each must return."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # DeepSpeed looks for devices when the server imports it
        torch.multiprocessing.start_processes(
            _one_rank, (count, port, job, arguments), nprocs=count, start_method="forkserver"
        )


def _one_rank(rank: int, count: int, port: int, job: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    start_deepspeed(torch.device("cpu"))
    job(*arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of torch and DeepSpeed that still run may abort a process whose interpreter ends


def run_workers(
    session: Any, job: Job, spec: dict[str, Any], stage: str, run_path: Path, *,
    usable: Callable[[int], bool] = lambda _: True, prepare: Callable[[int], None] = lambda _: None,
) -> None:  # fmt: skip
    """In the place of that of a RaySession; what a worker raises is raised here, and none is started again."""
    count, logs = session.config.workers, run_path / "logs"
    logging.getLogger("mpruner_dist").info("%d ranks without Ray", count)
    prepare(count)
    for error in logs.glob("*.error"):
        error.unlink()
    try:
        on_ranks(count, _work, logs, stage, job, spec)
    except torch.multiprocessing.ProcessRaisedException:
        for error in sorted(logs.glob("*.error")):
            raise pickle.loads(error.read_bytes()) from None
        raise


def _work(logs: Path, stage: str, job: Job, spec: dict[str, Any]) -> None:
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        Worker(rank, count, rank, count, "cpu", logs, stage).run(job, spec)
    except MPrunerError as error:
        (logs / f"{rank}.error").write_bytes(pickle.dumps(error))
        raise
