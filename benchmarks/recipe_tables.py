"""What benchmarks/recipes.py measured, as Markdown: pure functions of what each run's evaluation.json holds."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpruner_dist.config.task import FACTS, GENERATED, LESS_IS_BETTER, TaskName
from mpruner_dist.reporting.table import metric_name, metrics_of

RECIPE, ORIGINAL = "recipe", "original"
LEAST_REMOVED = 0.50  # of the parameters in the blocks
MOST_LOST = 1.0  # points of the metric
CNN_LOST, CNN_REMOVED = 3.5, 0.47  # points and share of all parameters: ResNet152 at k = 1, threshold 0.99, below

# network, run, metric, its value of 100 before and after, blocks, millions of parameters. From the README of the
# authors' code, github.com/Lunawood/MPruner, because the paper's own tables (arXiv 2408.13482) were not at hand, hence
# no table numbers. Only runs that retrain the whole model; ResNets by the best of their three epochs.
Published = tuple[str, str, str, tuple[float, float], tuple[int, int], tuple[float, float]]
RESNET152 = "ResNet152, ILSVRC-2012"
RESNET50 = "ResNet50, ILSVRC-2012"
BERT = "BERT-base, Emotion"
T5 = "T5-base, SQuAD questions"
PUBLISHED: dict[TaskName, list[Published]] = {
    "image-classification": [
        (RESNET152, "k 1, threshold 0.99", "top-1", (76.824, 73.374), (50, 26), (60.193, 31.709)),
        (RESNET152, "k 1, threshold 0.98", "top-1", (76.824, 72.164), (50, 22), (60.193, 27.240)),
        (RESNET152, "k 2, threshold 0.99", "top-1", (76.824, 74.960), (50, 33), (60.193, 39.530)),
        (RESNET152, "k 2, threshold 0.98", "top-1", (76.824, 74.926), (50, 32), (60.193, 38.412)),
        (RESNET152, "k 1, threshold 0.99, twice", "top-1", (76.824, 70.53), (50, 20), (60.193, 25.843)),
        (RESNET152, "k 1, threshold 0.98, twice", "top-1", (76.824, 68.822), (50, 14), (60.193, 19.977)),
        (RESNET50, "k 1, threshold 0.98", "top-1", (77.2, 75.698), (16, 14), (25.557, 24.160)),
        (RESNET50, "k 1, threshold 0.95", "top-1", (77.2, 72.452), (16, 10), (25.557, 21.575)),
        (RESNET50, "k 1, threshold 0.98, twice", "top-1", (77.2, 74.75), (16, 13), (25.557, 23.880)),
        (RESNET50, "k 1, threshold 0.95, twice", "top-1", (77.2, 70.69), (16, 8), (25.557, 21.224)),
    ],
    "text-classification": [
        (BERT, "threshold 0.99", "accuracy", (92.0, 92.1), (12, 10), (109.487, 95.311)),
        (BERT, "threshold 0.98", "accuracy", (92.0, 93.4), (12, 8), (109.487, 81.135)),
        (BERT, "threshold 0.98, twice", "accuracy", (92.0, 92.8), (12, 6), (109.487, 66.960)),
        ("BERT-base, Yahoo Answers", "threshold 0.98", "accuracy", (70.47, 71.0), (12, 9), (109.490, 88.226)),
    ],
    "sequence-to-sequence": [
        (T5, "threshold 0.99", "BLEU", (22.68, 21.20), (24, 14), (222.904, 135.589)),
        # it says 7 blocks of the encoder and 3 of the decoder, but its number of parameters is that of 8 and 3
        (T5, "threshold 0.99, at the end", "BLEU", (22.68, 20.09), (24, 11), (222.904, 109.630)),
    ],
    "automatic-speech-recognition": [],
    "causal-lm": [],
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one variant came to at one seed."""

    evaluation: dict[str, Any]
    """Content of evaluation.json."""
    in_blocks: tuple[int, int]
    """Parameters inside the prunable blocks, before and after."""
    seconds: float | None
    """Of the run's stages; None where another variant's run, with the same plan, was taken."""

    def of(self, label: str) -> dict[str, Any]:
        """The measures of a model; where no round was accepted, the pruned and the retrained one are the original."""
        measures: dict[str, Any] = self.evaluation.get(label, self.evaluation["original"])
        return measures

    def ratio(self, field: str) -> float:
        """A number of the retrained model as a share of the original's."""
        return float(self.of("retrained")[field] / self.of("original")[field])


Outcomes = dict[int, Outcome]
"""By seed."""
Found = dict[str, Outcomes]
"""By variant: RECIPE, the methods beside it, ORIGINAL."""


def result_table(found: Found, task: TaskName) -> str:
    """One row a variant, averaged over its seeds."""
    rate, evaluation = f"{FACTS[task].unit}s_per_second", next(iter(found[RECIPE].values())).evaluation
    metrics = metrics_of(evaluation)
    names = [metric_name(metric) + ("" if metric in ("perplexity", *GENERATED) else ", %") for metric in metrics]
    headings = ["", "seeds", "blocks", "parameters, M", "in the blocks", "bytes, MB", *names, "loss", "speed"]
    with_memory = "gpu_bytes" in evaluation["original"]
    headings += [*(["GPU memory, MB"] if with_memory else []), "seconds"]
    lines = [f"| {' | '.join(headings)} |", f"|---|{'--:|' * (len(headings) - 1)}"]
    for variant, outcomes in found.items():
        if not outcomes:
            continue
        cells = [
            variant,
            str(len(outcomes)),
            before_after(outcomes, "layers", lambda value: f"{value:.4g}"),
            f"{before_after(outcomes, 'parameters', millions)} ({percent(mean_ratio(outcomes, 'parameters') - 1)})",
            percent(-mean_removed(outcomes)),
            before_after(outcomes, "bytes", millions),
            *(quality(outcomes, metric, 1 if metric == "perplexity" else 100) for metric in metrics),
            quality(outcomes, "loss", 1, digits=4),
            spread([outcome.ratio(rate) for outcome in outcomes.values()]),
            *([before_after(outcomes, "gpu_bytes", millions)] if with_memory else []),
            seconds(outcomes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def published_table(task: TaskName) -> str:
    """What is published of the nearest network."""
    if not PUBLISHED[task]:
        return f"Nothing is published of a network for {task}."
    lines = ["Published of the nearest network: other data and another size, one run each, without baselines.", ""]
    lines += ["| network | run | blocks | parameters, M | metric, of 100 | change |", "|---|---|--:|--:|--:|--:|"]
    for network, run, metric, (before, after), blocks, (large, small) in PUBLISHED[task]:
        sizes = f"{blocks[0]} → {blocks[1]} | {large:.3f} → {small:.3f} ({percent(small / large - 1)})"
        change = f"{metric} {before:.2f} → {after:.2f} | {after - before:+.2f} points"
        lines.append(f"| {network} | {run} | {sizes} | {change} |")
    return "\n".join(lines)


def verdict(found: Found, task: TaskName, is_cnn: bool) -> str:
    """Each target, what came of it, and whether that meets it."""
    recipe, metric = found[RECIPE], FACTS[task].metrics[0]
    removed = mean_removed(recipe)
    targets = [
        f"at least {100 * LEAST_REMOVED:.0f} % of the blocks' parameters removed: {100 * removed:.1f} %, "
        f"{judged(removed >= LEAST_REMOVED)}"
    ]
    before, after = mean_of(recipe, "original", metric), mean_of(recipe, "retrained", metric)
    change = change_text(metric, after, before)
    if metric == "perplexity":
        targets.append(f"at most {MOST_LOST:g} point lost: does not apply to perplexity, which changed by {change}")
    else:
        lost = 100 * (after - before if metric in LESS_IS_BETTER else before - after)
        targets.append(
            f"at most {MOST_LOST:g} point of {metric} lost on average: {change}{beside_original(found, metric)}, "
            f"{judged(lost <= MOST_LOST)}"
        )
        if is_cnn:
            share = 1 - mean_ratio(recipe, "parameters")
            targets.append(
                f"of a CNN less than {CNN_LOST:g} points at {percent(-CNN_REMOVED, 0)} of all parameters: {change} at "
                f"{percent(-share)}, {judged(lost < CNN_LOST and share >= CNN_REMOVED)}"
            )
    return f"Targets: {'; '.join([*targets, beside_baselines(found, metric)])}."


def beside_original(found: Found, metric: str) -> str:
    """The recipe's change against the original that was retrained alike; empty where there is none."""
    original = found.get(ORIGINAL, {})
    shared = {seed: outcome for seed, outcome in found[RECIPE].items() if seed in original}
    if not shared:
        return ""
    alike = mean_of({seed: original[seed] for seed in shared}, "retrained", metric)
    return f" ({change_text(metric, mean_of(shared, 'retrained', metric), alike)} to the original retrained alike)"


def beside_baselines(found: Found, metric: str) -> str:
    """Whether any baseline is better, by the means over the seeds that both have."""
    told, is_met = [], True
    for variant, outcomes in found.items():
        shared = [seed for seed in outcomes if seed in found[RECIPE]]
        if variant in (RECIPE, ORIGINAL) or not shared:
            continue
        ours, theirs = (
            mean_of({seed: of[seed] for seed in shared}, "retrained", metric) for of in (found[RECIPE], outcomes)
        )
        is_met &= theirs >= ours if metric in LESS_IS_BETTER else theirs <= ours
        told.append(f"{variant} {change_text(metric, theirs, ours)}")
    target = "never worse than a baseline at equal depth"
    return f"{target}: {', '.join(told)}, {judged(is_met)}" if told else f"{target}: none was run, not judged"


def judged(is_met: bool) -> str:
    """A missed target stands out."""
    return "met" if is_met else "**missed**"


def change_text(metric: str, value: float, before: float) -> str:
    """A change of perplexity as a share, of any other metric in points."""
    return percent(value / before - 1, 2) if metric == "perplexity" else f"{100 * (value - before):+.2f} points"


def percent(share: float, digits: int = 1) -> str:
    """A change as text."""
    return f"{100 * share + 0:+.{digits}f} %"  # -0.0 becomes 0.0


def millions(value: float) -> str:
    """As text, without the unit."""
    return f"{value / 1e6:.3f}"


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation of a sample; of one value it has none. Broken models have large perplexities."""

    def text(value: float) -> str:
        return f"{value:.{digits}f}" if value < 1e5 else f"{value:.3g}"

    return text(statistics.mean(values)) + (f" ± {text(statistics.stdev(values))}" if len(values) > 1 else "")


def quality(outcomes: Outcomes, metric: str, scale: float, digits: int = 2) -> str:
    """A measure of the original, of the pruned and of the retrained model."""
    return " → ".join(
        spread([scale * outcome.of(label)[metric] for outcome in outcomes.values()], digits)
        for label in ("original", "pruned", "retrained")
    )


def before_after(outcomes: Outcomes, field: str, text: Callable[[float], str]) -> str:
    """Means of a number of the original and of the retrained model."""
    return " → ".join(text(mean_of(outcomes, label, field)) for label in ("original", "retrained"))


def seconds(outcomes: Outcomes) -> str:
    """Mean over the runs of the variant's own."""
    own = [outcome.seconds for outcome in outcomes.values() if outcome.seconds is not None]
    return f"{statistics.mean(own):.0f}" if own else "none of its own"


def mean_of(outcomes: Outcomes, label: str, field: str) -> float:
    """Mean of a number over the seeds."""
    return statistics.mean(float(outcome.of(label)[field]) for outcome in outcomes.values())


def mean_ratio(outcomes: Outcomes, field: str) -> float:
    """Mean over the seeds of a number after as a share of that before."""
    return statistics.mean(outcome.ratio(field) for outcome in outcomes.values())


def mean_removed(outcomes: Outcomes) -> float:
    """Mean over the seeds of the share of the blocks' parameters that went."""
    return statistics.mean(1 - outcome.in_blocks[1] / outcome.in_blocks[0] for outcome in outcomes.values())
