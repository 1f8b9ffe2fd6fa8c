"""What a run is asked to do, as frozen models: sections of the one YAML file, their defaults and their limits."""

from mpruner_dist.config.collect import CollectConfig
from mpruner_dist.config.data import DataConfig, ModelConfig, SourceConfig
from mpruner_dist.config.evaluate import EvaluateConfig, TaskConfig
from mpruner_dist.config.plan import CLUSTERED, PlanConfig
from mpruner_dist.config.retrain import DistillationConfig, LoraConfig, RetrainConfig
from mpruner_dist.config.rounds import RoundsConfig
from mpruner_dist.config.run import ClusterConfig, Config, Device

__all__ = [
    "CLUSTERED",
    "ClusterConfig",
    "CollectConfig",
    "Config",
    "DataConfig",
    "Device",
    "DistillationConfig",
    "EvaluateConfig",
    "LoraConfig",
    "ModelConfig",
    "PlanConfig",
    "RetrainConfig",
    "RoundsConfig",
    "SourceConfig",
    "TaskConfig",
]
