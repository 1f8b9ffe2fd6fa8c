"""How near the texts that a model generates come to the right ones. Needs the extras `generation` and `speech`."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mpruner_dist.cluster.engine import in_its_number_type
from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config
from mpruner_dist.config.task import FACTS
from mpruner_dist.data.blocks import batch_rows, num_batches, turns_of
from mpruner_dist.data.model_folder import load_tokenizer
from mpruner_dist.models.generating import continued
from mpruner_dist.tasks import task_of

Tell = Callable[[int], None]


def generated_quality(
    worker: Worker, engine: Any, part: Any, folder: Path, config: Config, tell: Tell
) -> dict[str, float]:
    """Generate what should be said of every text of a part, on all workers, and compare; the same on every worker.

    Words are chosen greedily, at most as many as the longest target has. The right texts are those of the targets'
    tokens: what the tokenizer does not know, and what `data.target_size` cut off, is in neither.

    Args:
        worker: this one.
        engine: only runs forward.
        part: Pairs or Speech: the texts or recordings, and what should be said.
        folder: of the model, for its tokenizer.
        config: of the run.
        tell: hears how many batches are done.
    """
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
    generated = generate(worker, engine, part, config, tell).tolist()
    targets = zip(part.target_ids.tolist(), part.target_lengths.tolist(), strict=True)
    asked = [ids[part.prompt : length] for ids, length in targets]
    said, right = (tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in (generated, asked))
    return {metric: COMPARE[metric](said, right) for metric in FACTS[config.model.task].of_generated}


def generate(worker: Worker, engine: Any, part: Any, config: Config, tell: Tell) -> torch.Tensor:
    """Tokens that follow from each text, int64 [pairs, longest target], padded; the same on every worker."""
    model, size = engine.module, config.evaluate.batch_size
    longest = part.target_ids.shape[1] - part.prompt
    batches = num_batches(len(part), size)
    divided = worker.world_size > 1 and engine.zero_optimization_partition_weights()
    said = torch.zeros(len(part), longest, dtype=torch.int64, device=worker.device)
    worker.begin_progress("generate", "batches", batches)
    for turn, (batch, counts) in enumerate(turns_of(range(batches), worker.rank, worker.world_size)):
        rows = batch_rows(batch, size, len(part))
        inputs = task_of(config.model).batch(part.rows(rows), worker.device).inputs
        tokens = continued(model, in_its_number_type(model, inputs), part.prompt, longest, together=divided)
        if counts:
            said[rows.start : rows.stop] = model.config.pad_token_id
            said[rows.start : rows.stop, : tokens.shape[1]] = tokens
        tell(min((turn + 1) * worker.world_size, batches))
    return worker.sum_over_workers(said)


def bleu(said: list[str], right: list[str]) -> float:
    """BLEU of all texts together, from 0 to 1, with sacrebleu's defaults."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(said, [right]).score / 100)


def chrf(said: list[str], right: list[str]) -> float:
    """ChrF of all texts together, from 0 to 1, with sacrebleu's defaults."""
    import sacrebleu

    return float(sacrebleu.corpus_chrf(said, [right]).score / 100)


def rouge_l(said: list[str], right: list[str]) -> float:
    """The mean over the texts of the F of ROUGE-L over words, from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=Words())  # its own knows the letters a to z alone
    return fmean(scorer.score(*pair)["rougeL"].fmeasure for pair in zip(right, said, strict=True))


def word_error_rate(said: list[str], right: list[str]) -> float:
    """Words wrong, too many or missing, of all texts together, as a share of the right words: from 0, and beyond 1.

    Without regard to capitals and punctuation. What has no spaces, as Chinese has none, counts as one word.
    """
    import jiwer

    plain_right, plain_said = ([" ".join(Words().tokenize(text)) for text in texts] for texts in (right, said))
    return float(jiwer.wer(plain_right, plain_said))


class Words:
    """Splits a text into words of any script that sets them apart, as RougeScorer wants it."""

    def tokenize(self, text: str) -> list[str]:
        """The words, without regard to capitals: letters, the marks on them, and numbers."""
        plain = unicodedata.normalize("NFC", text.lower())
        return "".join(sign if unicodedata.category(sign)[0] in "LMN" else " " for sign in plain).split()


COMPARE = {"bleu": bleu, "chrf": chrf, "rouge_l": rouge_l, "word_error_rate": word_error_rate}
"""What is said of the texts that a model generates and the right ones, in this order, by the name of the metric."""
