"""How the pruned model was retrained, in the words of the report."""

from typing import Any

from mpruner_dist.config import Config, DistillationConfig
from mpruner_dist.config.task import FACTS
from mpruner_dist.reporting.table import parameters_text


def training(config: Config, data: dict[str, Any], weights: dict[str, Any] | None, rounds: int = 1) -> list[str]:
    """How the pruned model was retrained, one line a fact; nothing if it was not.

    Args:
        config: of the run.
        data: content of `data.json`.
        weights: what `retrain.json` says of the exported tensors; None if it says nothing.
        rounds: how many were accepted.
    """
    retrain = config.retrain
    if retrain is None:
        return []
    reads = FACTS[config.model.task].reads
    rows, of_tokens = "recordings" if reads == "speech" else "images", ""
    if reads == "text":
        rows, of_tokens = "sequences", f" of {'' if data['packed'] else 'at most '}{config.data.block_size} tokens"
    lines = [
        f"{retrain.steps} steps of {retrain.batch_size} {rows}{of_tokens}: "
        f"{retrain.steps * retrain.batch_size:,} {rows} from a train part of "
        f"{data['parts']['train']['blocks']:,}" + (f", in each of {rounds} accepted rounds" if rounds > 1 else ""),
        f"learning rate {retrain.learning_rate:g}, {retrain.warmup_steps} warm-up steps, down to "
        f"{retrain.min_lr_ratio:g} of it at the end; weight decay {retrain.weight_decay:g}, gradient norm at most "
        f"{retrain.max_grad_norm:g}; weights in {config.model.dtype}",
    ]
    if retrain.deepspeed is not None:
        lines.append(f"settings in {retrain.deepspeed.name} go before these")
    if retrain.lora is not None:
        targets = retrain.lora.targets if isinstance(retrain.lora.targets, str) else ", ".join(retrain.lora.targets)
        lines.append(
            f"LoRA adapters of rank {retrain.lora.rank}, alpha {retrain.lora.alpha:g}, dropout "
            f"{retrain.lora.dropout:g}, on {targets}; merged into the weights at the end"
        )
    if retrain.trainable == "neighbours":
        lines.append("only the layers beside a gap were trained, as MPruner publishes it")
    if weights is not None and weights["proved_tensors"]:
        lines.append(
            f"{weights['trained_tensors']} tensors ({parameters_text(weights['trained_parameters'])} parameters) were "
            f"to change and {weights['changed_tensors']} of them did; {weights['frozen_tensors']} "
            f"({parameters_text(weights['frozen_parameters'])}) are byte for byte those of the pruned model"
        )
    return lines + _distillation(retrain.distillation)


def _distillation(config: DistillationConfig | None) -> list[str]:
    if config is None:
        return []
    who = "the original model" if config.teacher is None else config.teacher
    parts = []
    if config.weight:
        words = "" if config.top_k is None else f" over its {config.top_k} likeliest words and all others as one"
        cached = ", asked once before the training" if config.cache else ""
        parts.append(f"predictions{words}, weight {config.weight:g}, temperature {config.temperature:g}{cached}")
    if config.hidden_weight:
        parts.append(f"hidden states of the kept layers, weight {config.hidden_weight:g}")
    return [
        f"distillation from {who}: {'; '.join(parts)}; the training loss holds all terms, the validation loss only "
        "that of the task itself"
    ]
