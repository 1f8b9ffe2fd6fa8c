"""How much text a run needs."""

from mpruner_dist.config import Config


def blocks_needed(config: Config) -> dict[str, int | None]:
    """Blocks of each part that the run can use; None is all of them."""
    train = config.retrain.steps * config.retrain.batch_size if config.retrain else None
    validation = config.evaluate.max_blocks
    if validation is not None and config.plan.judge_blocks is not None:  # whatever the method: another needs no more
        validation = max(validation, config.plan.judge_blocks)
    return {
        "calibration": config.collect.num_batches * config.collect.batch_size,
        "train": train,
        "validation": validation,
        "test": config.evaluate.max_blocks,
    }
