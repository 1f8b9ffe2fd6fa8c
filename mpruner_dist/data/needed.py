"""How much text a run needs."""

from mpruner_dist.config import Config


def blocks_needed(config: Config) -> dict[str, int | None]:
    """Blocks of each part that the run can use; None is all of them."""
    train = config.retrain.steps * config.retrain.batch_size if config.retrain else None
    return {
        "calibration": config.collect.num_batches * config.collect.batch_size,
        "train": train,
        "validation": config.evaluate.max_blocks,
        "test": config.evaluate.max_blocks,
    }
