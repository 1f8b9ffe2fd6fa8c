"""How near the texts that a model generates come to the right ones. Needs the extra `generation`."""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mpruner_dist.cluster.worker import Worker
from mpruner_dist.config import Config
from mpruner_dist.data.blocks import batch_rows, num_batches, share_of_batches
from mpruner_dist.data.pairs import Pairs
from mpruner_dist.data.readers import load_tokenizer
from mpruner_dist.tasks import task_of

Tell = Callable[[int], None]


def generated_quality(
    worker: Worker, engine: Any, part: Pairs, folder: Path, config: Config, tell: Tell
) -> dict[str, float]:
    """Generate what should be said of every text of a part, on all workers, and compare; the same on every worker.

    Words are chosen greedily, at most as many as the longest target has. The right texts are those of the targets'
    tokens: what the tokenizer does not know, and what `data.target_size` cut off, is in neither.

    Args:
        worker: this one.
        engine: only runs forward.
        part: the texts and what should be said.
        folder: of the model, for its tokenizer.
        config: of the run.
        tell: hears how many batches are done.
    """
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
    texts = [
        tokenizer.batch_decode(rows, skip_special_tokens=True)
        for rows in (
            generate(worker, engine, part, config, tell).tolist(),
            [ids[1:length] for ids, length in zip(part.target_ids.tolist(), part.target_lengths, strict=True)],
        )
    ]
    return compared(*texts)


def generate(worker: Worker, engine: Any, part: Pairs, config: Config, tell: Tell) -> torch.Tensor:
    """Tokens that follow from each text, int64 [pairs, longest target], padded; the same on every worker."""
    model, size = engine.module, config.evaluate.batch_size
    longest = part.target_ids.shape[1] - 1
    batches = num_batches(len(part), size)
    divided = worker.world_size > 1 and engine.zero_optimization_partition_weights()
    mine, turns = share_of_batches(list(range(batches)), worker.rank, worker.world_size)
    said = torch.zeros(len(part), longest, dtype=torch.int64, device=worker.device)
    worker.begin_progress("generate", "batches", batches)
    for turn in range(turns):
        counted = turn < len(mine)  # else a turn taken only because ZeRO stage 3 needs everyone
        rows = batch_rows(mine[turn] if counted else 0, size, len(part))
        inputs = task_of(config.model).batch(part.rows(rows), worker.device).inputs
        with torch.no_grad():
            tokens = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=longest,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                return_dict_in_generate=False,
                min_length=0,  # no longer than the right texts must be possible
                synced_gpus=divided,  # a worker that is done goes on as long as any other is not
            )[:, 1:]
        if counted:
            said[rows.start : rows.stop] = model.config.pad_token_id
            said[rows.start : rows.stop, : tokens.shape[1]] = tokens
        tell(min((turn + 1) * worker.world_size, batches))
    return worker.sum_over_workers(said)


class Words:
    """Splits a text into words of any script, as RougeScorer wants it."""

    def tokenize(self, text: str) -> list[str]:
        """The words, without regard to capitals."""
        return re.findall(r"\w+", text.lower())


def compared(said: list[str], right: list[str]) -> dict[str, float]:
    """BLEU and chrF of all texts together (sacrebleu's defaults), and the mean F of ROUGE-L over words, from 0 to 1."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=Words())  # its own knows the letters a to z alone
    return {
        "bleu": sacrebleu.corpus_bleu(said, [right]).score / 100,
        "chrf": sacrebleu.corpus_chrf(said, [right]).score / 100,
        "rouge_l": fmean(scorer.score(*pair)["rougeL"].fmeasure for pair in zip(right, said, strict=True)),
    }
