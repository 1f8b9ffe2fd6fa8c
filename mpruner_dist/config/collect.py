"""The section `collect`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mpruner_dist.config.base import NonNegative, Positive, Section


class CollectConfig(Section):
    """How the similarity of the layers is measured."""

    batch_size: Positive = 8
    """Sequences in a batch, of which one HSIC estimate is made."""
    num_batches: Positive = 16
    """Over all workers."""
    until: Literal["all", "settled"] = "all"
    """settled: stop before num_batches once no cluster decision lies within `settled_z` standard errors of
    plan.threshold."""
    settled_z: Annotated[float, Field(gt=0)] = 2.0
    check_every: Annotated[int, Field(ge=4)] = 8
    """Batches between two looks at whether it is settled."""
    estimator: Literal["debiased", "biased", "sentence", "feature"] = "debiased"
    """debiased: HSIC_1 a batch. biased: HSIC_0 a batch. sentence: biased CKA within each sequence, averaged, as MPruner
    was released. feature: exact biased CKA of all samples, for narrow models."""
    unit: Literal["token", "sequence", "image"] = "token"
    """What is one sample: a token or the mean of a sequence (language and speech); an image, also where it is left out
    (vision)."""
    samples: Annotated[int, Field(ge=4)] = 256
    """Samples drawn from a batch; of sequences, images and of estimator sentence all of them, where they are fewer. The
    unbiased estimator needs 4."""
    skip_tokens: NonNegative = 1
    """Positions left out at the start of each sequence: the first token is a massive activation."""
    outlier_norm: Annotated[float, Field(gt=1)] | None = 10.0
    """Samples whose norm in any layer exceeds this many times that layer's median are left out."""
    normalize: bool = True
    """Divide each vector by its root mean square, so that no token outweighs the others."""
    seed: int = 0
    """Draws the samples."""
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
