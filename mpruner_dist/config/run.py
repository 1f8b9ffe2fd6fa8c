"""The whole configuration: its sections, and what they ask of each other."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import model_validator

from mpruner_dist.config.base import NonNegative, Positive, Section
from mpruner_dist.config.collect import CollectConfig
from mpruner_dist.config.data import DataConfig, ModelConfig
from mpruner_dist.config.evaluate import EvaluateConfig
from mpruner_dist.config.plan import CLUSTERED, JUDGED, PlanConfig
from mpruner_dist.config.retrain import RetrainConfig
from mpruner_dist.config.rounds import RoundsConfig
from mpruner_dist.config.task import FACTS, UNITS

Device = Literal["auto", "cpu", "cuda"]


class ClusterConfig(Section):
    """Where and how wide the work runs.

    Nothing here changes a result, but for rounding, for dropout in retraining, which each worker draws for itself, and
    for a model with batch normalisation: how many workers share a step changes how often its running means move.
    """

    workers: Positive = 1
    """Processes that share each stage's work, one a GPU."""
    device: Device = "auto"
    """auto takes GPUs when the cluster has one for each worker, or for each of min_workers, and torch can use them."""
    min_workers: Positive | None = None
    """Go on with fewer workers, but at least so many, when after `wait_s` no more fit, as after a node was lost. Each
    stage and each restart begins with `workers` again. Without it, all must fit."""
    wait_s: NonNegative = 120
    """Seconds to wait for room for the workers on an existing Ray cluster."""
    cpus_per_worker: Positive | None = None
    """Without it, the CPUs of this machine divided among the workers; on an existing Ray cluster as many as let all
    workers fit on its nodes, and on GPUs a node's CPUs divided by its GPUs, on the node where that is least."""
    zero_stage: Literal["auto", 0, 3] = "auto"
    """Collection and evaluation: 0 puts a replica on each worker, 3 divides the weights among them; auto takes 0 where
    the weights fit in a worker's free memory, else 3, on GPUs with the partitions in CPU memory if they must."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON file for collection and evaluation, of ZeRO stage 0 or 3; what is of training is left out."""
    address: str | None = None
    """An existing Ray cluster. RAY_ADDRESS says the same. Without either, Ray is started on this machine."""
    max_restarts: NonNegative = 2
    """How often workers are started again after one of them was killed, or its node lost."""

    @model_validator(mode="after")
    def _few_are_not_more(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} must be at most workers {self.workers}")
        return self


class Config(Section):
    """Everything that a run is asked to do."""

    model: ModelConfig
    data: DataConfig
    collect: CollectConfig = CollectConfig()
    plan: PlanConfig = PlanConfig()
    retrain: RetrainConfig | None = None
    """Left out, nothing is retrained."""
    rounds: RoundsConfig | None = None
    """Left out, the road is walked once."""
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _a_sample_is_what_the_task_reads(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Where nobody says what one sample is, it follows from the task."""
        model, collect = (content.get(name) or {} for name in ("model", "collect"))
        if not isinstance(model, dict) or not isinstance(collect, dict):
            return content  # which is refused later, with all other mistakes
        task = FACTS.get(str(model.get("task", "causal-lm")))
        return content | {"collect": {"unit": UNITS[task.reads][0]} | collect} if task else content

    @property
    def goes_by_threshold(self) -> bool:
        """Whether plan.threshold decides which layers go; with rounds, a budget is only where they end."""
        budget = self.plan.keep_layers or self.plan.target_parameters
        return self.plan.method in CLUSTERED and (self.rounds is not None or not budget)

    @model_validator(mode="after")
    def _settled_has_a_threshold(self) -> Self:
        if self.collect.until == "settled" and (self.plan.method != "anchor" or not self.goes_by_threshold):
            budget = " with a budget" if self.plan.method == "anchor" else ""
            raise ValueError(
                f"collect.until settled compares with plan.threshold, which plan.method {self.plan.method}{budget} "
                "does not use: set plan.method anchor without a budget, or "
                "collect.until all"
            )
        return self

    @model_validator(mode="after")
    def _rounds_have_what_they_need(self) -> Self:
        if self.rounds is None:
            return self
        if self.data.validation is None:
            raise ValueError("rounds are judged on data.validation: give it")
        if self.plan.method == "file":
            raise ValueError("rounds make a plan each: plan.method file gives only one")
        if self.plan.target_parameters is not None:
            raise ValueError("with rounds, plan.keep_layers is the budget: give it instead of plan.target_parameters")
        if (self.plan.method in CLUSTERED) == (self.rounds.remove is not None):
            how = "is decided by plan.threshold" if self.rounds.remove else "must be given as rounds.remove"
            raise ValueError(f"how many layers a round removes {how} where plan.method is {self.plan.method}")
        if self.plan.stride != 1:
            raise ValueError(
                f"rounds begin at stride 1 and raise it themselves: leave plan.stride {self.plan.stride} out"
            )
        if self.plan.keep == "medoid" and self.rounds.max_stride > 1:
            raise ValueError(
                "a stride counts from an end of a cluster: with plan.keep medoid, rounds.max_stride must be 1"
            )
        protected = self.plan.protect_first + self.plan.protect_last
        if self.plan.method not in CLUSTERED and (self.plan.keep_layers or 0) < protected:
            raise ValueError(
                f"rounds go on to plan.keep_layers {self.plan.keep_layers}, and the {protected} layers of "
                "plan.protect_first and plan.protect_last always stay: raise the one or lower the others"
            )
        return self

    @model_validator(mode="after")
    def _the_task_has_what_is_asked_for(self) -> Self:
        task, metrics = self.model.task, FACTS[self.model.task].metrics
        units = UNITS[FACTS[task].reads]
        if self.collect.unit not in units:
            unit = self.collect.unit
            raise ValueError(f"collect.unit {unit} is not measured with model.task {task}: set {' or '.join(units)}")
        by_harness = self.rounds is not None and self.rounds.metric == "task" and task == "causal-lm"
        if self.rounds is not None and self.rounds.metric not in metrics and not by_harness:
            raise ValueError(f"rounds.metric {self.rounds.metric} is none of model.task {task}: {', '.join(metrics)}")
        if self.evaluate.tasks and task != "causal-lm":
            raise ValueError(f"evaluate.tasks asks for the next words, and model.task is {task}: leave it out")
        if self.data.target_size is not None and not FACTS[task].of_generated:
            raise ValueError(
                f"data.target_size is of model.task sequence-to-sequence and automatic-speech-recognition, not {task}: "
                "leave it out"
            )
        if self.data.language is not None and FACTS[task].reads != "speech":
            raise ValueError(f"data.language is of model.task automatic-speech-recognition, not {task}: leave it out")
        distillation = self.retrain and self.retrain.distillation
        if distillation and distillation.top_k and FACTS[task].unit != "token":
            raise ValueError(f"retrain.distillation.top_k is of words, and model.task {task} has classes: leave it out")
        if distillation and distillation.cache and task != "causal-lm":
            raise ValueError(f"retrain.distillation.cache holds blocks of text, and model.task is {task}: leave it out")
        if distillation and distillation.hidden_weight and FACTS[task].of_generated:
            raise ValueError(
                "retrain.distillation.hidden_weight compares states at the places of one series, and an encoder and a "
                "decoder have two: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _plans_are_judged_on_text(self) -> Self:
        if self.plan.method in JUDGED and self.data.validation is None:
            raise ValueError(f"plan.method {self.plan.method} measures the loss of plans: it needs data.validation")
        return self

    @model_validator(mode="after")
    def _retraining_has_text(self) -> Self:
        if self.retrain is None:
            return self
        missing = [name for name in ("train", "validation") if getattr(self.data, name) is None]
        if missing:
            raise ValueError(f"retrain needs data.{' and data.'.join(missing)}")
        sequences = self.cluster.workers * self.retrain.micro_batch_size
        if self.retrain.batch_size % sequences:
            raise ValueError(
                f"retrain.batch_size {self.retrain.batch_size} must be a multiple of cluster.workers "
                f"{self.cluster.workers} x retrain.micro_batch_size {self.retrain.micro_batch_size} = {sequences}"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved configuration, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
