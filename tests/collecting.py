"""The collection of a run on ranks of a test, without Ray."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranks import on_ranks

from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config
from mpruner_dist.similarity.collect import collect_job
from mpruner_dist.similarity.stage import write_cka
from mpruner_dist.similarity.sums import BatchSums


def collect_on_this_rank(
    folder: Path, config: Config, blocks: Path, is_settled: Callable[[BatchSums], bool] | None = None
) -> None:
    """The job of a worker; its sums lie in the folder."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    collect_job(Worker(rank, ranks, rank, ranks, "cpu", folder, "collect"), {
        "config": config, "model": Path(config.model.path), "blocks": blocks, "sums": folder, "deepspeed": {},
        "is_settled": is_settled,
    })  # fmt: skip


def collected(folder: Path, ranks: int, config: Config, blocks: Path, layers: list[str]) -> dict[str, Any]:
    """What `cka.json` says after so many ranks collected into this new folder."""
    folder.mkdir()
    on_ranks(ranks, collect_on_this_rank, folder, config, blocks)
    write_cka(folder, layers, folder / "cka.json", config.collect)
    content: dict[str, Any] = json.loads((folder / "cka.json").read_text())
    return content
