"""The stages of a run, a module each: what it is made from, what it makes, and how.

What a stage needs is imported where it is made: a run that only plans anew imports no torch.
"""

from collections.abc import Callable

from mpruner_dist.road import Road, Step
from mpruner_dist.steps.collect import collect
from mpruner_dist.steps.data import data
from mpruner_dist.steps.evaluate import baseline, evaluate, gate
from mpruner_dist.steps.plan import plan
from mpruner_dist.steps.report import report
from mpruner_dist.steps.result import result
from mpruner_dist.steps.retrain import retrain
from mpruner_dist.steps.rewrite import rewrite

STEPS: dict[str, Callable[[Road], Step]] = {
    "data": data,
    "collect": collect,
    "plan": plan,
    "rewrite": rewrite,
    "retrain": retrain,
    "evaluate": evaluate,
    "report": report,
}
"""In the order of the road."""
ROUND_STEPS: dict[str, Callable[[Road], Step]] = {"baseline": baseline, "gate": gate, "result": result}
"""What rounds do besides: before them, in each, and after them."""
