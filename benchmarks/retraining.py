"""Retraining beside the Trainer of transformers: the same model, blocks and DeepSpeed configuration, step by step.

    .venv/bin/python benchmarks/retraining.py        # one worker with all cores; or with a GPU, where one is
    .venv/bin/python benchmarks/retraining.py 2      # two workers of one thread

Both train the demo's SmolLM2 in float32, on a GPU a llama of 1.1 B parameters (random weights) in bfloat16, in the same
process, a step of the one and then a step of the other. A step's time is all that passes in it: for the Trainer from
the end of our step before to its own `on_step_end`, so with its data loader; for ours with reading the blocks and
writing `metrics.jsonl`. The first steps are left out.
"""

import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_checkpoint import make_checkpoint

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "build/demo/SmolLM2-135M-Instruct"
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", "bfloat16") if GPU else ("cpu", "float32")
BATCH, MICRO_BATCH, TOKENS = (16, 8, 1024) if GPU else (4, 2, 256)
WARM_UP, PAIRS = 2, 12
DEEPSPEED: dict[str, Any] = {
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    ),
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
}


def one_rank(rank: int, size: int, port: int, folder: str) -> None:
    """Time the steps of both; the first worker prints."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": DEVICE, "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    torch.set_num_threads(max((os.cpu_count() or 1) // size, 1))
    torch.distributed.init_process_group("nccl" if GPU else "gloo")
    import transformers

    from mpruner_dist.data.blocks import Blocks

    steps = WARM_UP + PAIRS
    ids = np.random.default_rng(0).integers(0, 32_000, (steps * BATCH, TOKENS)).astype(np.int32)
    blocks = Blocks(ids, np.full(len(ids), TOKENS, np.int32))
    if GPU:
        make_checkpoint(Path(folder) / "model", "1B")
    source = Path(folder) / "model" if GPU else MODEL
    ours = our_step(rank, size, blocks, source, Path(folder))
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    losses: list[float] = []

    class InTurn(transformers.TrainerCallback):  # type: ignore[misc]
        begun = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begun = now()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            begun, between = self.begun, now()
            losses.append(ours(len(losses)))
            self.begun = now()
            times["transformers"].append(between - begun)
            times["ours"].append(self.begun - between)

    arguments = transformers.TrainingArguments(
        output_dir=f"{folder}/transformers", max_steps=steps, per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=BATCH // MICRO_BATCH // size, learning_rate=1e-5, warmup_steps=1, report_to=[],
        deepspeed=DEEPSPEED, use_cpu=not GPU, save_strategy="no", disable_tqdm=True, logging_strategy="no", bf16=GPU,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, DTYPE))
    model.config.use_cache = False
    data = [{"input_ids": row, "attention_mask": np.ones_like(row), "labels": row} for row in ids.astype(np.int64)]
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[InTurn()]).train()
    if rank == 0:
        report(times, size)


def our_step(rank: int, size: int, blocks: Any, source: Path, folder: Path) -> Any:
    """A function that does the step of a number, as the stage does."""
    from mpruner_dist.cluster.engine import make_engine, start_deepspeed
    from mpruner_dist.cluster.worker import Worker
    from mpruner_dist.config import RetrainConfig
    from mpruner_dist.data.model_folder import read_config
    from mpruner_dist.models.loading import load_model
    from mpruner_dist.retraining.job import Trainer
    from mpruner_dist.retraining.settings import DataOrder, most_overflows, training_settings
    from mpruner_dist.tasks import TASKS

    config = RetrainConfig(
        steps=WARM_UP + PAIRS, batch_size=BATCH, micro_batch_size=MICRO_BATCH, learning_rate=1e-5, warmup_steps=1
    )
    start_deepspeed(torch.device(DEVICE, 0) if GPU else torch.device("cpu"))
    settings = training_settings(DEEPSPEED, config, DTYPE, size, read_config(source).hidden_size)
    model = load_model(source, DTYPE)
    model.train()
    engine = make_engine(model, settings, list(model.parameters()))
    worker = Worker(rank, size, rank, size, DEVICE, folder, "retrain")
    trainer = Trainer(worker, engine, TASKS["causal-lm"], None, config, folder / "ours", most_overflows(settings))
    trainer.metrics.begin(0, ())
    order = DataOrder(len(blocks), BATCH, 0)
    predictions = trainer.task.predictions(blocks)

    def step(number: int) -> float:
        loss = trainer._step(number, blocks, order, int(predictions[order.rows(number)].sum()))
        trainer.metrics.record({"step": number + 1, "loss": loss, "lr": engine.get_lr()[0]})
        return loss

    return step


def now() -> float:
    """Seconds, once the GPU has done what it was told."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def report(times: dict[str, list[float]], size: int) -> None:
    """A table of medians, and the ratios of the pairs."""
    where = torch.cuda.get_device_name() if GPU else "CPU"
    print(
        f"\n{size} worker(s), {where}, {DTYPE}, {BATCH} x {TOKENS} tokens a step in micro-batches of {MICRO_BATCH}, "
        f"{PAIRS} pairs\n"
    )
    print("| | seconds a step (median) | tokens/s |\n|---|--:|--:|")
    for name in ("transformers", "ours"):
        median = statistics.median(times[name][WARM_UP:])
        print(f"| {name} | {median:.3f} | {BATCH * TOKENS / median:.0f} |")
    ratios = [theirs / mine for theirs, mine in zip(times["transformers"], times["ours"], strict=True)][WARM_UP:]
    print(
        f"\nours / transformers in tokens/s: {statistics.median(ratios):.3f} "
        f"(median of the pairs; {min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(one_rank, (size, port, folder), nprocs=size)
