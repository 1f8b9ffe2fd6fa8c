"""How near the texts that a model generates come to the right ones. Needs the extra `generation`."""

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

    Words are chosen greedily, at most as many as the longest target has.

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
            [ids[:length] for ids, length in zip(part.target_ids.tolist(), part.target_lengths, strict=True)],
        )
    ]
    return compared(*texts)


def generate(worker: Worker, engine: Any, part: Pairs, config: Config, tell: Tell) -> torch.Tensor:
    """Tokens that follow from each text, int64 [pairs, longest target], padded; the same on every worker."""
    model, size = engine.module, config.evaluate.batch_size
    longest = part.target_ids.shape[1] - 1
    batches = num_batches(len(part), size)
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
                synced_gpus=worker.world_size > 1,  # a worker that is done goes on as long as any other is not
            )[:, 1:]
        if counted:
            said[rows.start : rows.stop] = model.config.pad_token_id
            said[rows.start : rows.stop, : tokens.shape[1]] = tokens
        tell(min((turn + 1) * worker.world_size, batches))
    return worker.sum_over_workers(said)


def compared(said: list[str], right: list[str]) -> dict[str, float]:
    """BLEU and chrF of all texts together (sacrebleu's defaults), and the mean F of ROUGE-L, all from 0 to 1."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return {
        "bleu": sacrebleu.corpus_bleu(said, [right]).score / 100,
        "chrf": sacrebleu.corpus_chrf(said, [right]).score / 100,
        "rouge_l": fmean(scorer.score(*pair)["rougeL"].fmeasure for pair in zip(right, said, strict=True)),
    }
