"""What a run would do: everything is checked, nothing is made, no worker starts."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mpruner_dist.checkpoints.folder import CheckpointFolder, read_checkpoint
from mpruner_dist.checkpoints.naming import layer_parameters
from mpruner_dist.checkpoints.source import resolve_source
from mpruner_dist.cluster.settings import Settings, given_stage, inference_settings, read_deepspeed_config, zero_stage
from mpruner_dist.config import Config, RetrainConfig
from mpruner_dist.config.plan import JUDGED
from mpruner_dist.config.task import FACTS
from mpruner_dist.data.model_folder import read_config
from mpruner_dist.data.parts import Part
from mpruner_dist.data.prepare import make_part
from mpruner_dist.data.readers import make_reader
from mpruner_dist.errors import UserError
from mpruner_dist.evaluation.extras import require_extras
from mpruner_dist.logs import show_progress
from mpruner_dist.models.engines import logits_bytes
from mpruner_dist.models.loading import quiet_transformers
from mpruner_dist.models.naming import layer_names
from mpruner_dist.models.positions import require_positions
from mpruner_dist.planning.budget import Budget, require_budget
from mpruner_dist.planning.greedy import greedy_passes
from mpruner_dist.retraining.requirements import require_retraining
from mpruner_dist.retraining.settings import hidden_size, training_settings
from mpruner_dist.rounds import Base, round_config
from mpruner_dist.similarity.collect import require_pairs, require_samples
from mpruner_dist.tasks import task_of

Rows = list[tuple[str, str]]


def describe(config: Config) -> Rows:
    """Rows of a table: model, text, work, disk and memory.

    Memory counts weights, gradients, optimizer state, Gram matrices and logits; the activations of a few layers and the
    framework come on top.

    Raises:
        UserError: whatever a run would stumble over.
    """
    quiet_transformers()
    source = resolve_source(config.model.path, config.model.revision)
    checkpoint = read_checkpoint(source)
    model_config = read_config(source, config.model.trust_remote_code)
    stacks = layer_names(checkpoint.tensors, model_config, config.model.trust_remote_code)
    require_pairs(stacks)
    require_positions(model_config, config)
    layers = [layer for of_stack in stacks.values() for layer in of_stack]
    depth, sizes = len(layers), layer_parameters(checkpoint, layers)
    depths = [len(of_stack) for of_stack in stacks.values()]
    require_retraining(config, source, checkpoint.config)
    require_extras(config)
    reader, reads = make_reader(config, source), FACTS[config.model.task].reads
    with TemporaryDirectory() as folder:
        progress = Path(folder) / "progress.json"
        with show_progress(progress):
            parts = {
                part: make_part(config, part, text, reader, progress)[0] for part, text in config.data.parts().items()
            }
    require_samples(parts["calibration"], config.collect)
    given = read_deepspeed_config(config.cluster.deepspeed)
    chosen = given_stage(given, config.cluster.zero_stage)
    # with auto the workers choose by their own memory
    stages = (0, 3) if chosen == "auto" else (chosen,)
    inference = [inference_settings(given, stage, config.model.dtype) for stage in stages]
    stage = "auto: 0 if the weights fit in a worker's free memory, else 3" if chosen == "auto" else str(chosen)
    if config.rounds is None:
        require_budget(config.plan, depths, sizes, checkpoint.num_parameters - sum(sizes))
    elif config.plan.keep_layers == depth:
        raise UserError(f"plan.keep_layers {depth}: the model has {depth} layers, so that none would go")
    round_one = (
        config if config.rounds is None else round_config(config, Base(0, config.model.path, list(range(depth))), 1)
    )
    return [
        ("model", f"{config.model.path} ({model_config.model_type}, {config.model.dtype})"),
        ("layers", f"{depth}, {layers[0]} to {layers[-1]}, at most {max(sizes) / 1e6:.2f} M parameters each"),
        ("parameters", f"{checkpoint.num_parameters:,}"),
        ("to read", f"{_bytes(checkpoint.num_bytes)} in {len(checkpoint.shards)} file(s)"),
        ("to write", _to_write(round_one, checkpoint, sizes)),
        *(
            (f"{part} {reads}", f"{len(made)} {reader.unit}, {_facts(reader.facts(made))}")
            for part, made in parts.items()
        ),
        ("workers", f"{_workers(config)}, device {config.cluster.device}, ZeRO stage {stage}"),
        ("collection", _collection(config, checkpoint, inference, depth)),
        *_planning(round_one, checkpoint, sizes, depths, parts),
        *_retraining(round_one, source, checkpoint, layers, sizes, parts.get("train")),
        *_rounds(config),
        ("evaluation", _evaluation(config, checkpoint, inference, model_config, parts["test"])),
    ]  # fmt: skip


def _workers(config: Config) -> str:
    """Their number, and the fewest that will do; what follows is reckoned for all of them."""
    workers, least = config.cluster.workers, config.cluster.min_workers
    return str(workers) if least in (None, workers) else f"{workers} (at least {least} when no more fit)"


def _to_write(config: Config, checkpoint: CheckpointFolder, sizes: list[int]) -> str:
    outputs = 1 if config.retrain is None else 2
    if config.plan.keep_layers is not None:
        left = 1 - (len(sizes) - config.plan.keep_layers) * (sum(sizes) / len(sizes)) / checkpoint.num_parameters
        return f"about {_bytes(outputs * left * checkpoint.num_bytes)} in {outputs} checkpoint(s)"
    return f"at most {_bytes(outputs * checkpoint.num_bytes)} in {outputs} checkpoint(s), less what the plan removes"


def _collection(config: Config, checkpoint: CheckpointFolder, settings: list[Settings], depth: int) -> str:
    collect = config.collect
    # two streams of triangles of Gram matrices, and as much again while one is permuted
    grams = depth * collect.samples**2 * 4 * 2
    tokens = collect.num_batches * collect.batch_size * config.data.block_size
    in_all = f" ({tokens:,})" if config.model.task == "causal-lm" else ""
    turns = math.ceil(collect.num_batches / config.cluster.workers)
    return (
        f"{collect.num_batches} batches of {_sequences(config, collect.batch_size)}{in_all}, "
        f"{turns} turns a worker, {_inference_memory(config, checkpoint, settings, grams)}"
    )


def _planning(
    config: Config, checkpoint: CheckpointFolder, sizes: list[int], depths: list[int], parts: dict[str, Part]
) -> Rows:
    """What a plan that is judged by its loss takes; nothing for others, which are instant."""
    plan = config.plan
    if plan.method == "file" or (plan.keep_layers is None and plan.target_parameters is None):
        return []
    budget = Budget(plan, depths, sizes, checkpoint.num_parameters - sum(sizes))
    remove = budget.least()
    if plan.method not in JUDGED:
        return [("plan", f"{plan.method}: {remove} layers go")]
    passes = f"at most {plan.passes}" if plan.method == "search" else str(greedy_passes(budget.most, remove))
    task, validation = task_of(config.model), parts["validation"]
    size = task.size(validation.rows(range(min(len(validation), plan.judge_blocks or len(validation)))))
    each = f"{size:,} validation {task.facts.unit}s each"
    return [("plan", f"{plan.method}: {remove} layers go, {passes} forward passes over {each}")]


def _evaluation(
    config: Config, checkpoint: CheckpointFolder, settings: list[Settings], model_config: Any, test: Part
) -> str:
    memory = _inference_memory(config, checkpoint, settings, logits_bytes(config, model_config))
    models, task = 2 if config.retrain is None else 3, task_of(config.model)
    return f"{models} models on {task.size(test):,} {task.facts.unit}s, {memory}"


def _facts(facts: dict[str, Any]) -> str:
    """What is known of a part, such as its number of tokens and of each class."""
    tokens = [f"{facts['tokens']:,} tokens"] if "tokens" in facts else []
    return ", ".join(tokens + [f"{count:,} {name}" for name, count in facts.get("labels", {}).items()])


def _sequences(config: Config, count: int) -> str:
    """So many of what a batch is made of."""
    if (reads := FACTS[config.model.task].reads) != "text":
        return f"{count} {'recordings' if reads == 'speech' else reads}"
    most = "" if config.model.task == "causal-lm" else "at most "
    return f"{count} x {most}{config.data.block_size} tokens"


def _retraining(
    config: Config, source: Path, checkpoint: CheckpointFolder, layers: list[str], sizes: list[int], train: Part | None
) -> Rows:
    retrain = config.retrain
    if retrain is None or train is None:
        return [("retraining", "none")]
    given, workers = read_deepspeed_config(retrain.deepspeed), config.cluster.workers
    settings = training_settings(given, retrain, config.model.dtype, workers, hidden_size(checkpoint.config))
    trained = _trained(config, checkpoint, layers, sizes)
    epochs = retrain.steps * retrain.batch_size / len(train)
    return [
        (
            "retraining",
            f"{retrain.steps} steps of {_sequences(config, retrain.batch_size)} ({epochs:.1f} epochs), "
            f"{settings['gradient_accumulation_steps']} micro-batches of {retrain.micro_batch_size} a worker, "
            f"ZeRO stage {zero_stage(settings)}, at most {trained / 1e6:.2f} M parameters trained, at most "
            f"{_training_memory(config, settings, checkpoint, trained)}; activations, logits and buffers on top",
        ),
        (
            "its checkpoints",
            _training_checkpoints(retrain, settings, checkpoint.num_parameters, trained, _width(config)),
        ),
    ]


def _rounds(config: Config) -> Rows:
    rounds = config.rounds
    if rounds is None:
        return []
    judged = f"the task {rounds.task.name}" if rounds.task else f"{rounds.metric} on the validation part"
    return [
        (
            "rounds",
            f"at most {rounds.max_rounds}, the first as above; judged by {judged}, tolerance {rounds.tolerance:g} from "
            f"the original; at least {config.plan.keep_layers or 1} layers stay; what each round writes is kept",
        )
    ]


def _trained(config: Config, checkpoint: CheckpointFolder, names: list[str], sizes: list[int]) -> int:
    """Parameters that the optimizer has, at most: the plan is not made yet."""
    retrain, layers = config.retrain, len(sizes)
    if retrain is None:
        return 0
    if retrain.trainable == "neighbours" and config.plan.keep_layers is not None:
        layers = min(config.plan.keep_layers, 2 * (layers - config.plan.keep_layers))
    if retrain.lora is not None:
        within = tuple(f"{name}." for name in names)
        matrices = [info for name, info in checkpoint.tensors.items() if name.startswith(within)]
        sides = sum(sum(info.shape) for info in matrices if len(info.shape) == 2)
        return sides * retrain.lora.rank * layers // len(sizes)
    return checkpoint.num_parameters if retrain.trainable == "all" else layers * max(sizes)


SUB_GROUP = int(1e9)
"""Parameters that ZeRO stage 3 steps at a time, if the JSON says nothing."""


def _training_memory(config: Config, settings: Settings, checkpoint: CheckpointFolder, trained: int) -> str:
    """Weights, gradients, optimizer state and the teacher's weights, and what of them is offloaded."""
    stage, workers, width = zero_stage(settings), config.cluster.workers, _width(config)
    zero, distillation = settings["zero_optimization"], config.retrain and config.retrain.distillation
    parameters = checkpoint.num_parameters
    if distillation and not distillation.cache:  # a cached teacher is gone before training begins
        given = distillation.teacher
        teacher = read_checkpoint(resolve_source(given, None)) if given else checkpoint
        parameters += teacher.num_parameters
    weights = parameters * width / (workers if stage == 3 else 1)
    gradients = trained * width / (workers if stage >= 2 else 1)
    optimizer = trained * 12 / workers  # DeepSpeed keeps float32 weights of its own also where the model's are such
    if width < 4 or stage == 3:  # in a step, gradients in float32
        optimizer += 4 * min(trained / workers, zero.get("sub_group_size", SUB_GROUP) if stage == 3 else trained)
    away: dict[str, float] = {}
    for name, size in (("offload_optimizer", optimizer), ("offload_param", weights)):
        device = (zero.get(name) or {}).get("device", "none")
        away[device] = away.get(device, 0) + size
    told = [f"{_bytes(size)} on {device}" for device, size in away.items() if device != "none"]
    return f"{_bytes(weights + gradients + optimizer)} a worker" + (f", {', '.join(told)} of it" if told else "")


def _training_checkpoints(retrain: RetrainConfig, settings: Settings, parameters: int, trained: int, width: int) -> str:
    """Of what is trained the weights in float32 and two moments; the weights, of which stage 3 adds the frozen ones."""
    model = parameters - trained if zero_stage(settings) == 3 else parameters
    saved = math.ceil(retrain.steps / retrain.save_every)
    stay = min(saved, retrain.keep_checkpoints)
    more = ", and one more while it is saved" if saved > stay else ""
    return f"at most {_bytes(trained * 12 + model * width)} each on disk; {stay} stay{more}"


def _width(config: Config) -> int:
    """Bytes of a weight in memory."""
    return int(getattr(torch, config.model.dtype).itemsize)


def _inference_memory(config: Config, checkpoint: CheckpointFolder, settings: list[Settings], more: float) -> str:
    """Weights and what else a worker holds; under each of the ZeRO stages that may be chosen."""
    told = []
    for one in settings:
        share = config.cluster.workers if zero_stage(one) == 3 else 1
        told.append(f"{_bytes(checkpoint.num_parameters * _width(config) / share + more)} a worker")
    return told[0] if len(set(told)) == 1 else f"{told[0]} with a replica on each, {told[1]} with divided weights"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"
