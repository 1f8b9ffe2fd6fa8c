"""The tasks by name, and what their models are judged by; what they do is in `tasks/`."""

from typing import Literal

TaskName = Literal["causal-lm"]

METRICS: dict[str, tuple[str, ...]] = {"causal-lm": ("perplexity", "accuracy")}
"""What `evaluation.json` says of each model of a task beside its loss."""
