"""The sections `model` and `data`."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from mpruner_dist.config.base import Dtype, Positive, Section
from mpruner_dist.config.task import TaskName


class ModelConfig(Section):
    """The checkpoint to prune."""

    path: str
    """A Hugging Face folder of safetensors files, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    task: TaskName = "causal-lm"
    """What it is for, which says how data are read, what is minimised and how quality is measured."""
    dtype: Dtype = "float32"
    """Number type of the weights in collection, evaluation and retraining."""
    trust_remote_code: bool = False
    """Run the code that lies in the model's folder."""


class SourceConfig(Section):
    """One part of the data."""

    path: str
    """A file or folder of .txt, .jsonl, .json, .csv or .parquet, a saved `datasets` folder, or a `datasets` id; of
    images also a folder with a folder of files for each class, or of IDX files such as Fashion-MNIST's."""
    name: str | None = None
    """Configuration of the `datasets` id, such as wikitext-103-raw-v1."""
    split: str = "train"
    """Split of a `datasets` id, a saved DatasetDict or an image folder, or train or test of IDX files. Other files have
    one split, called train."""
    text_field: str = "text"
    """The field of a record that holds the text; the following likewise."""
    label_field: str = "label"
    """Of classification: the class of a record, by the name or the number that it has in the model's config.json."""
    target_field: str = "target"
    """Of sequence-to-sequence and automatic-speech-recognition: what should be said of the text, or is said in the
    recording."""
    image_field: str = "image"
    audio_field: str = "audio"
    """Of automatic-speech-recognition: a recording, or the path of its file, from the folder on that `path` names or
    lies in."""
    take: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Share of the records, in their order: [0.2, 0.8] takes those from 20 % to 80 %."""

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if self.take[0] >= self.take[1]:
            raise ValueError(f"take {list(self.take)} is empty: write [start, end] with start < end")
        return self

    def overlaps(self, other: "SourceConfig") -> bool:
        """Whether both take some record of the same source."""
        mine, theirs = (
            (Path(source.path).expanduser().resolve(), source.name, source.split) for source in (self, other)
        )
        return mine == theirs and self.take[0] < other.take[1] and other.take[0] < self.take[1]


class DataConfig(Section):
    """The four parts of the data. They must not overlap: what is fitted to must not be tested on."""

    block_size: Annotated[int, Field(ge=8)] = 512
    """Tokens in a sequence; of text-classification and sequence-to-sequence, at most so many, and longer texts are
    cut."""
    target_size: Positive | None = None
    """Of sequence-to-sequence and automatic-speech-recognition: at most so many tokens of a target; without it,
    block_size, or what the decoder has positions for."""
    language: str | None = None
    """Of automatic-speech-recognition: what is spoken, such as english; without it, what the tokenizer is set to."""
    pack: bool = True
    """Of causal-lm: true joins records into full blocks; false gives each record a block of its own, padded."""
    calibration: SourceConfig
    """Similarities are measured on it."""
    train: SourceConfig | None = None
    """For retraining."""
    validation: SourceConfig | None = None
    """Plans and rounds are judged on it, and retraining is watched."""
    test: SourceConfig
    """The three models are measured on it, at the end."""

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
