"""Distributed depth pruning of large models: global CKA on Ray and DeepSpeed, sharded rewriting, retraining."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "cka_matrix": "mpruner_dist.similarity.hsic",
    "unbiased_hsic": "mpruner_dist.similarity.hsic",
    "make_plan": "mpruner_dist.planning.planner",
    "rewrite_checkpoint": "mpruner_dist.rewriting.rewrite",
    "run": "mpruner_dist.pipeline",
}
__all__ = ["cka_matrix", "make_plan", "rewrite_checkpoint", "run", "unbiased_hsic"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `import mpruner_dist` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
