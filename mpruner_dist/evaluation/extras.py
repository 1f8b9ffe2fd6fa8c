"""What measuring needs beside the package itself: told before anything begins. No torch."""

from importlib.util import find_spec

from mpruner_dist.config import Config
from mpruner_dist.config.task import FACTS
from mpruner_dist.errors import UserError


def require_extras(config: Config) -> None:
    """Refuse metrics and tasks whose packages are not installed.

    Raises:
        UserError: with the command that installs them.
    """
    task, rounds = config.model.task, config.rounds
    needs: list[tuple[str, str, tuple[str, ...]]] = []
    if metrics := FACTS[task].of_generated:
        needs.append((f"model.task {task}, for {', '.join(metrics)},", "generation", ("sacrebleu", "rouge_score")))
    if FACTS[task].reads == "speech":
        needs.append((f"model.task {task}", "speech", ("soundfile", "soxr", "jiwer")))
    if rounds is not None and rounds.task is not None:
        needs.append(("rounds.metric task", "eval", ("lm_eval",)))
    if config.evaluate.tasks:
        needs.append(("evaluate.tasks", "eval", ("lm_eval",)))
    for asked, extra, packages in needs:
        if any(find_spec(package) is None for package in packages):
            raise UserError(f"{asked} needs the extra {extra}: pip install '.[{extra}]' in the repository's folder")
