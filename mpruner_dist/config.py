"""What a run is asked to do, as frozen models: sections of the one YAML file, their defaults and their limits."""

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Dtype = Literal["float32", "bfloat16", "float16"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Section):
    """The checkpoint to prune."""

    path: str
    """A Hugging Face folder of safetensors files, or a hub id."""
    revision: str | None = None
    dtype: Dtype = "float32"
    """Number type of the weights in collection, evaluation and retraining."""
    trust_remote_code: bool = False


class SourceConfig(_Section):
    """One part of the text."""

    path: str
    """A file or folder of .txt, .jsonl, .json or .parquet files, or a `datasets` id."""
    name: str | None = None
    """Configuration of the `datasets` id, such as wikitext-103-raw-v1."""
    split: str = "train"
    """Split of a `datasets` id. Files have one split, called train."""
    text_field: str = "text"
    take: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Share of the records, in their order: [0.2, 0.8] takes those from 20 % to 80 %."""

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if self.take[0] >= self.take[1]:
            raise ValueError(f"take {list(self.take)} is empty: write [start, end] with start < end")
        return self

    def overlaps(self, other: "SourceConfig") -> bool:
        """Whether both take some record of the same source."""
        return (
            (self.path, self.name, self.split) == (other.path, other.name, other.split)
            and self.take[0] < other.take[1]
            and other.take[0] < self.take[1]
        )


class DataConfig(_Section):
    """The four parts of the text. They must not overlap: what is fitted to must not be tested on."""

    block_size: Annotated[int, Field(ge=8)] = 512
    """Tokens in a sequence."""
    pack: bool = True
    """True joins records into full blocks; false gives each record a block of its own, padded."""
    calibration: SourceConfig
    train: SourceConfig | None = None
    validation: SourceConfig | None = None
    test: SourceConfig

    def parts(self) -> dict[str, SourceConfig]:
        """The parts that are set, by name."""
        every = {
            "calibration": self.calibration,
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
        }
        return {name: source for name, source in every.items() if source is not None}

    @model_validator(mode="after")
    def _parts_are_disjoint(self) -> Self:
        parts = list(self.parts().items())
        for index, (name, source) in enumerate(parts):
            for other_name, other in parts[index + 1 :]:
                if source.overlaps(other):
                    raise ValueError(
                        f"{name} takes {list(source.take)} and {other_name} takes {list(other.take)} of the same "
                        f"{source.path!r}: give them ranges that do not overlap"
                    )
        return self


class CollectConfig(_Section):
    """How the similarity of the layers is measured."""

    batch_size: Positive = 8
    """Sequences in a batch, of which one HSIC estimate is made."""
    num_batches: Positive = 16
    until: Literal["all", "settled"] = "all"
    """settled: stop before num_batches once no cluster decision lies within `settled_z` standard errors of
    plan.threshold."""
    settled_z: Annotated[float, Field(gt=0)] = 2.0
    check_every: Annotated[int, Field(ge=4)] = 8
    """Batches between two looks at whether it is settled."""
    estimator: Literal["debiased", "biased", "sentence", "feature"] = "debiased"
    """debiased: HSIC_1 a batch. biased: HSIC_0 a batch. sentence: biased CKA within each sequence, averaged, as MPruner
    was released. feature: exact biased CKA of all samples, for narrow models."""
    unit: Literal["token", "sequence", "image", "patch"] = "token"
    """What is one sample: a token or the mean of a sequence (language); an image or a patch of it (vision)."""
    samples: Annotated[int, Field(ge=4)] = 256
    """Samples drawn from a batch; the unbiased estimator needs 4."""
    skip_tokens: NonNegative = 1
    """Positions left out at the start of each sequence: the first token is a massive activation."""
    outlier_norm: Annotated[float, Field(gt=1)] | None = 10.0
    """Samples whose norm in any layer exceeds this many times that layer's median are left out."""
    normalize: bool = True
    """Divide each vector by its root mean square, so that no token outweighs the others."""
    seed: int = 0
    save_every: Positive = 4
    """Batches between two saves of a worker's sums."""

    @model_validator(mode="after")
    def _samples_suffice(self) -> Self:
        if self.estimator == "sentence" and self.unit != "token":
            raise ValueError(
                f"estimator sentence compares the tokens of a sequence: unit must be token, not {self.unit}"
            )
        if self.unit in ("sequence", "image") and self.batch_size < 4:
            raise ValueError(
                f"batch_size {self.batch_size} gives {self.batch_size} samples of unit {self.unit}, 4 are needed"
            )
        return self


class PlanConfig(_Section):
    """Which layers go."""

    method: Literal["anchor", "partition", "file"] = "anchor"
    """anchor: clusters by threshold, as published. partition: the best clusters for a budget. file: as given."""
    measure: Literal["states", "updates"] = "states"
    """Whose CKA: of the states that blocks hand on, or of their updates of them."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.98
    stride: Annotated[int, Field(ge=1, le=3)] = 1
    """Of a cluster's layers 0, 1, 2, ... every stride-th after the first is removed."""
    keep_layers: Positive | None = None
    target_parameters: Positive | None = None
    protect_first: NonNegative = 1
    protect_last: NonNegative = 1
    preserve_pattern: bool = False
    """Only plans after which serving engines that know a layer's kind by its number are right; see mpruner verify."""
    file: Path | None = None

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> Self:
        budgets = [name for name in ("keep_layers", "target_parameters") if getattr(self, name) is not None]
        if self.method == "partition" and len(budgets) != 1:
            raise ValueError("method partition needs keep_layers or target_parameters, and just one of them")
        if self.method != "partition" and budgets:
            raise ValueError(f"{budgets[0]} is a budget: it goes with method partition, not {self.method}")
        if (self.method == "file") != (self.file is not None):
            raise ValueError("method file and plan.file go together: give both or neither")
        if self.method == "file" and self.preserve_pattern:
            raise ValueError("preserve_pattern changes a plan, method file takes it as given: choose one")
        return self


class DistillationConfig(_Section):
    """Learning from the unpruned model's logits."""

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the distillation loss; the language-model loss has the rest."""
    temperature: Annotated[float, Field(gt=0)] = 1.0


class RetrainConfig(_Section):
    """How the pruned model is healed."""

    steps: Positive = 100
    batch_size: Positive = 8
    """Sequences in an optimizer step, over all workers."""
    micro_batch_size: Positive = 1
    """Sequences in one forward and backward of one worker."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup_steps: NonNegative = 10
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    distillation: DistillationConfig | None = None
    zero_stage: Literal[1, 2, 3] = 1
    deepspeed: Path | None = None
    """A DeepSpeed JSON file; what it leaves out or calls "auto" is filled in from this section."""
    save_every: Positive = 50
    """Steps between two sharded checkpoints."""
    eval_every: Positive = 50
    """Steps between two looks at the validation loss."""
    seed: int = 0

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self


class EvaluateConfig(_Section):
    """How quality and speed are measured on the test part."""

    batch_size: Positive = 4
    max_blocks: Positive | None = None
    """At most so many sequences of the test part."""


class ClusterConfig(_Section):
    """Where and how wide the work runs. Nothing here changes a result."""

    workers: Positive = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs when the cluster has one for each worker."""
    cpus_per_worker: Positive | None = None
    """Without it, the CPUs of this machine divided among the workers."""
    zero_stage: Literal["auto", 0, 3] = "auto"
    """Collection and evaluation: 0 puts a replica on each worker, 3 divides the weights among them; auto takes 0 where
    the weights fit in a worker's free memory, else 3, on GPUs with the partitions in CPU memory if they must."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON file for collection and evaluation."""
    address: str | None = None
    """An existing Ray cluster. RAY_ADDRESS says the same. Without either, Ray is started on this machine."""
    max_restarts: NonNegative = 2
    """How often workers are started again after one of them was killed."""


class Config(_Section):
    """Everything that a run is asked to do."""

    model: ModelConfig
    data: DataConfig
    collect: CollectConfig = CollectConfig()
    plan: PlanConfig = PlanConfig()
    retrain: RetrainConfig | None = None
    """Left out, nothing is retrained."""
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _settled_has_a_threshold(self) -> Self:
        if self.collect.until == "settled" and self.plan.method != "anchor":
            raise ValueError(
                "collect.until settled compares with plan.threshold, which plan.method "
                f"{self.plan.method} does not use: set plan.method anchor, or collect.until all"
            )
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
