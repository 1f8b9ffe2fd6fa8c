"""What retraining needs, looked at long before it begins."""

from pathlib import Path
from typing import Any

from mpruner_dist.checkpoints.source import resolve_source
from mpruner_dist.cluster.settings import read_deepspeed_config
from mpruner_dist.config import Config
from mpruner_dist.data.model_folder import read_config
from mpruner_dist.retraining.matching import require_fitting_teacher
from mpruner_dist.retraining.metrics import require_loggers
from mpruner_dist.retraining.settings import hidden_size, training_settings
from mpruner_dist.retraining.targets import require_targets


def require_retraining(config: Config, model: Path, content: dict[str, Any]) -> None:
    """Refuse what would stop retraining: layers, a DeepSpeed configuration, a logger or a teacher that will not do.

    Args:
        config: of the run.
        model: folder of the unpruned model.
        content: of its config.json.

    Raises:
        UserError: what is wrong.
    """
    section = config.retrain
    if section is None:
        return
    remote_code = config.model.trust_remote_code
    require_targets(section, read_config(model, remote_code), remote_code)
    given = read_deepspeed_config(section.deepspeed)
    training_settings(given, section, config.model.dtype, config.cluster.workers, hidden_size(content))
    require_loggers(section.log_to)
    if section.distillation is not None:
        named = section.distillation.teacher
        teacher = model if named is None else resolve_source(named, None)
        require_fitting_teacher(teacher, model, section.distillation, remote_code, config.model.task)
