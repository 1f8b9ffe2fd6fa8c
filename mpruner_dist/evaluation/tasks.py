"""A task of the lm-evaluation-harness on a model in a DeepSpeed engine. The harness is the optional extra `eval`."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mpruner_dist.config import TaskConfig
from mpruner_dist.data.model_folder import load_tokenizer
from mpruner_dist.errors import StageFailure, UserError


def run_task(engine: Any, folder: Path, task: TaskConfig, batch_size: int, trust_remote_code: bool) -> dict[str, Any]:
    """Run a task on every worker, for under ZeRO stage 3 all must take part in every forward pass.

    Args:
        engine: only runs forward.
        folder: of the model, for its tokenizer.
        task: which one, and how much of it.
        batch_size: questions at a time.
        trust_remote_code: run code that lies in the folder.

    Returns:
        `task`, the value of the metric; `task_metric`, its name; `task_less_is_better`. Empty on workers that the
        harness gives no results.

    Raises:
        UserError: the harness does not know the task, or the task has not the metric or not it alone.
        StageFailure: the value is not finite.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if task.folder is None else str(task.folder))
    if task.name not in manager.all_tasks:
        where = "" if task.folder is None else f" nor {task.folder}"
        raise UserError(f"neither the lm-evaluation-harness{where} has a task {task.name!r}: check its name")
    if task.name in manager.all_tags:
        raise UserError(f"{task.name} is a tag that several tasks of the harness have: name the tasks themselves")
    model = HFLM(
        pretrained=engine.module,
        tokenizer=load_tokenizer(folder, trust_remote_code),
        backend="causal",
        batch_size=batch_size,
    )
    with generating_together(engine):
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[task.name],
            num_fewshot=task.fewshot,
            limit=task.limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    return {} if found is None else read_value(found, task)


@contextmanager
def generating_together(engine: Any) -> Iterator[None]:
    """Inside, where weights are divided, a worker whose text has ended takes part until those of all others have.

    Each generates the same; but one that rounds otherwise may find an end earlier, and the others would wait for it.
    """
    if not engine.zero_optimization_partition_weights():
        yield
        return
    model = engine.module
    model.generate = partial(model.generate, synced_gpus=True)
    try:
        yield
    finally:
        del model.generate


def read_value(found: Any, task: TaskConfig) -> dict[str, Any]:
    """The metric's value among the harness's results, whose keys are `METRIC,FILTER`.

    Raises:
        UserError: the task has not the metric, or has it behind several filters and none is named.
        StageFailure: the value is not finite.
    """
    values = {
        key: float(value)
        for key, value in found["results"][task.name].items()
        if isinstance(value, int | float) and "_stderr" not in key and "," in key
    }
    asked = task.metric or next(iter(values), "").partition(",")[0]
    keys = [key for key in values if asked in (key, key.partition(",")[0])]
    if not values:
        raise UserError(f"the task {task.name} reports no value of its own: name the tasks that it is made of")
    if len(keys) != 1:
        trouble = f"reports {asked} behind several filters" if keys else f"has no metric {asked!r}"
        raise UserError(f"the task {task.name} {trouble}: set its metric to one of {_names(values)}")
    value, name = values[keys[0]], keys[0].partition(",")[0]
    if not math.isfinite(value):
        raise StageFailure(f"{asked} of the task {task.name} is {value}: check the task and the model")
    more_is_better = found["higher_is_better"].get(task.name, {}).get(name, True)
    return {"task": value, "task_metric": asked, "task_less_is_better": more_is_better is False}


def _names(keys: Iterable[str]) -> str:
    """What may be asked for: a metric alone where it has one filter, in quotes where a comma is in the name."""
    metrics = Counter(key.partition(",")[0] for key in keys)
    names = (key.partition(",")[0] if metrics[key.partition(",")[0]] == 1 else f'"{key}"' for key in keys)
    return ", ".join(names)
