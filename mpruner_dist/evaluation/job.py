"""What every worker does to measure models: in the stage `evaluate`, and in the baseline and the gate of rounds."""

import gc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.cluster.engine import let_go, start_deepspeed
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config, TaskConfig
from mpruner_dist.data.blocks import num_batches
from mpruner_dist.data.model_folder import read_config
from mpruner_dist.data.parts import load_part
from mpruner_dist.evaluation.generation import generated_quality
from mpruner_dist.evaluation.tasks import run_task
from mpruner_dist.models.engines import forward_settings, inference_engine, logits_bytes
from mpruner_dist.models.scoring import score_part
from mpruner_dist.models.stacks import run_blocks
from mpruner_dist.runs.commit import write_json
from mpruner_dist.tasks import task_of


def evaluate_job(worker: Worker, spec: dict[str, Any]) -> None:
    """Score each model on a part of the data and write `LABEL.json`; one that stands from an earlier attempt is kept.

    spec: config (Config), models (dict of label -> Path), original (Path), blocks (Path), tasks (of the harness, beside
    the one that rounds may go by), results (Path), deepspeed (dict).

    Raises:
        Preempted: a signal came; the results of the models before are saved.
    """

    def stop_if_told() -> None:
        if worker.must_stop():
            worker.stop("the results of the models before are saved")

    def tell(done: int) -> None:
        worker.tell(done)
        stop_if_told()

    config: Config = spec["config"]
    results = Path(spec["results"])
    todo = worker.select_on_first(spec["models"], lambda label: not (results / f"{label}.json").exists())
    start_deepspeed(worker.device)
    # one shape for all models, that of the largest, so that their speeds can be compared
    original = Path(spec["original"])
    logits = logits_bytes(config, read_config(original, config.model.trust_remote_code))
    settings = forward_settings(worker, spec["deepspeed"], config, original, logits)
    part, task = load_part(spec["blocks"]), task_of(config.model)
    for label in todo:
        folder = Path(spec["models"][label])
        engine = inference_engine(settings, folder, config.model, worker.log)
        worker.begin_progress(f"evaluate {label}", "batches", num_batches(len(part), config.evaluate.batch_size))
        if worker.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(worker.device)
        score = score_part(worker, engine, task, part, config.evaluate.batch_size, tell)
        memory = gpu_memory(worker)
        of_task: dict[str, Any] = {}
        if task.facts.of_generated:
            of_task = generated_quality(worker, engine, part, folder, config, tell)
        of_task |= of_harness(worker, engine, folder, config, spec["tasks"])
        if worker.is_first:
            checkpoint = read_checkpoint(folder)
            write_json(results / f"{label}.json", {
                "layers": len(run_blocks(engine.module)),
                "parameters": checkpoint.num_parameters,
                "bytes": checkpoint.num_bytes,
                "loss": score.loss,
                **score.quality,
                f"{task.facts.unit}s": score.predictions,
                f"{task.facts.unit}s_per_second": task.size(part) / score.seconds,
                "workers": worker.world_size,  # as many as there was room for
                "device": worker.device.type,
                **memory,
                **of_task,
            })  # fmt: skip
        let_go(engine)
        del engine  # nothing else may refer to it: the next model needs its room
        gc.collect()
        worker.barrier()
        stop_if_told()  # a signal may have come during the task


def of_harness(
    worker: Worker, engine: Any, folder: Path, config: Config, beside: Iterable[TaskConfig]
) -> dict[str, Any]:
    """What a model makes of tasks of the harness: the one that rounds may go by, and others beside it."""

    def ask(task: TaskConfig) -> dict[str, Any]:
        worker.log(f"task {task.name}")
        return run_task(engine, folder, task, config.evaluate.batch_size, config.model.trust_remote_code)

    found = ask(config.rounds.task) if config.rounds is not None and config.rounds.task is not None else {}
    if tasks := {task.name: ask(task) for task in beside}:
        found["tasks"] = tasks
    return found


def gpu_memory(worker: Worker) -> dict[str, int]:
    """Most bytes that tensors took on a worker's GPU since the peak was set back; all workers call it.

    Empty on CPUs: there the peak is one of the whole process, and cannot be set back between two models.
    """
    if worker.device.type != "cuda":
        return {}
    [least] = worker.least_over_workers(-torch.cuda.max_memory_allocated(worker.device))
    return {"gpu_bytes": -least}


def write_evaluation(results: Path, labels: list[str], target: Path) -> None:
    """Put the results together as `evaluation.json`."""
    write_json(target, {label: json.loads((results / f"{label}.json").read_text()) for label in labels})
