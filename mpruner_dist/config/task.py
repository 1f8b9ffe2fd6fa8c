"""The tasks by name, and the plain facts about each; what they do is in `tasks/`."""

from dataclasses import dataclass
from typing import Literal

TaskName = Literal[
    "causal-lm", "text-classification", "image-classification", "sequence-to-sequence", "automatic-speech-recognition"
]


@dataclass(frozen=True)
class TaskFacts:
    """What needs no torch to be known of a task."""

    auto_class: str
    """Name of the class of transformers that loads the model with its head."""
    unit: str
    """What its work and its predictions are counted in."""
    reads: Literal["text", "images", "speech"]
    metrics: tuple[str, ...]
    """What `evaluation.json` says of each model beside its loss, the most telling first."""
    of_generated: tuple[str, ...] = ()
    """Those of them that compare the texts that a model generates with the right ones."""

    @property
    def has_words(self) -> bool:
        """Whether the model reads or says words, of which a tokenizer knows the numbers."""
        return self.reads != "images"


GENERATED = ("bleu", "chrf", "rouge_l")
HEARD = ("word_error_rate", "bleu", "chrf")
LESS_IS_BETTER = ("perplexity", "word_error_rate")
IN_PERCENT = ("accuracy", "macro_f1", "word_error_rate")
FACTS: dict[str, TaskFacts] = {
    "causal-lm": TaskFacts("AutoModelForCausalLM", "token", "text", ("perplexity", "accuracy")),
    "text-classification": TaskFacts("AutoModelForSequenceClassification", "text", "text", ("accuracy", "macro_f1")),
    "image-classification": TaskFacts("AutoModelForImageClassification", "image", "images", ("accuracy", "macro_f1")),
    "sequence-to-sequence": TaskFacts(
        "AutoModelForSeq2SeqLM", "token", "text", (*GENERATED, "perplexity", "accuracy"), GENERATED
    ),
    "automatic-speech-recognition": TaskFacts(
        "AutoModelForSpeechSeq2Seq", "token", "speech", (*HEARD, "perplexity", "accuracy"), HEARD
    ),
}
UNITS = {"text": ("token", "sequence"), "images": ("image",), "speech": ("token", "sequence")}
"""What may be a sample of the similarity, by what a task reads."""
