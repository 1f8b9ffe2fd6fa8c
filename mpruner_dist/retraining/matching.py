"""Whether a teacher can teach a model: looked at in its files, before anything is loaded."""

from pathlib import Path
from typing import Any

from mpruner_dist.config import DistillationConfig
from mpruner_dist.config.task import FACTS
from mpruner_dist.data.images import pixel_format
from mpruner_dist.data.model_folder import load_tokenizer, read_config
from mpruner_dist.errors import UserError


def require_fitting_teacher(
    teacher: Path, model: Path, config: DistillationConfig, trust_remote_code: bool = False, task: str = "causal-lm"
) -> None:
    """Compare vocabularies, classes, and what the hidden states need.

    Args:
        teacher: its folder.
        model: folder of the unpruned model.
        config: what is to be learnt.
        trust_remote_code: run code that lies in the folders.
        task: of both; classes are compared where there are any.

    Raises:
        UserError: the teacher's words, or the layers that are asked for, are not the model's.
    """
    mine = read_config(model, trust_remote_code).get_text_config()
    if config.top_k is not None and config.top_k > mine.vocab_size:
        raise UserError(
            f"retrain.distillation.top_k {config.top_k} is more than the {mine.vocab_size} words of the vocabulary"
        )
    if teacher == model:
        return
    where = f"retrain.distillation.teacher {teacher}"
    theirs = read_config(teacher, trust_remote_code).get_text_config()
    if FACTS[task].unit != "token" and theirs.id2label != mine.id2label:
        raise UserError(
            f"{where} has the classes {list(theirs.id2label.values())}, the model {list(mine.id2label.values())}: "
            "their predictions cannot be compared"
        )
    if FACTS[task].has_words and theirs.vocab_size != mine.vocab_size:
        raise UserError(
            f"{where} has a vocabulary of {theirs.vocab_size} words, the model one of {mine.vocab_size}: their "
            "predictions cannot be compared; take a teacher of the same family"
        )
    if FACTS[task].has_words:
        vocabularies = [load_tokenizer(folder, trust_remote_code).get_vocab() for folder in (teacher, model)]
        _require_same_ids(where, *vocabularies)
    if FACTS[task].reads == "speech":
        ears = ("num_mel_bins", "max_source_positions", "max_target_positions")
        _require_equal(where, theirs, mine, ears, "both must hear the same")
    if FACTS[task].reads == "images":
        pixels = pixel_format(teacher)
        fields = ("channels", "mean", "std", *(["size"] if pixels.size else []))
        _require_equal(where, pixels, pixel_format(model), fields, "both are given the same pixels")
    if config.hidden_weight:
        depths = ("hidden_size", "num_hidden_layers", "hidden_sizes", "depths")  # the latter of models of stages
        why = (
            "hidden states can be compared layer by layer only where both are equal; set "
            "retrain.distillation.hidden_weight 0"
        )
        _require_equal(where, theirs, mine, depths, why)


def _require_equal(where: str, theirs: Any, mine: Any, fields: tuple[str, ...], why: str) -> None:
    for name in fields:
        there, here = (getattr(config, name, None) for config in (theirs, mine))
        if there != here:
            raise UserError(f"{where} has {name} {there}, the model {here}: {why}")


def _require_same_ids(where: str, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    different = sorted(token for token in theirs.keys() | mine.keys() if theirs.get(token) != mine.get(token))
    if different:
        token = different[0]
        raise UserError(
            f"{where} numbers {len(different)} words otherwise than the model, such as {token!r}: "
            f"{theirs.get(token)} there, {mine.get(token)} here; take a teacher with the same tokenizer"
        )
