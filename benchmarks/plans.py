"""All planners at equal depth on a real model: perplexity on held-out text, and what judging costs.

    python benchmarks/plans.py configs/demo.yaml FOLDER [--depths 2,4,6,8,10] [--retrain STEPS]

after launch/demo.sh. FOLDER is a run folder with all losses that were measured: the same command goes on from them.
Search is given a third of the forward passes that greedy takes to the same depth. `--retrain` then gives all plans that
are not hopeless the same training, at every depth or at `--retrain-depths`, and prints perplexities before and after.
"""

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

from mpruner_dist.config import Config
from mpruner_dist.config_file import load_config
from mpruner_dist.logs import set_up_logging
from mpruner_dist.pipeline import compare_plans, run
from mpruner_dist.plan import Plan, parse_layers
from mpruner_dist.planning.greedy import greedy_passes
from mpruner_dist.runs.commit import write_json

JUDGED, HELD_OUT = 32, 48  # blocks of the validation part
SETTINGS = (
    "model.dtype=bfloat16", "data.train.take=[0.25, 0.7]", "data.validation.take=[0.7, 0.88]",
    f"evaluate.max_blocks={JUDGED + HELD_OUT}", f"plan.judge_blocks={JUDGED}",
    f"evaluate.batch_size={JUDGED // 4}",
)  # fmt: skip
"""Settings over those of the file: plans are judged on four batches."""
HOPELESS = 1.25
"""Plans of more than so many times the lowest perplexity at their depth are not retrained."""


def configuration(file: Path, *overrides: str) -> Config:
    """The file's, with a validation part that is large enough to judge on and to hold out from."""
    return load_config(file, [*SETTINGS, *overrides])


def perplexity(loss: float | None) -> str:
    """As text."""
    if loss is None:
        return "not finite"
    value = math.exp(min(loss, 700.0))
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def compare(file: Path, folder: Path, depths: list[int]) -> dict[int, dict[str, Any]]:
    """Content of `compare.json` for each depth, search with a third of greedy's passes."""
    found = {}
    for depth in sorted(depths, reverse=True):  # greedy measures on its way what the others need
        config = configuration(file)
        path = folder / f"compare-{depth}.json"
        if not path.exists():
            free = layers(config) - config.plan.protect_first - config.plan.protect_last
            passes = max(greedy_passes(free, depth) // 3, 4)
            compare_plans(configuration(file, f"plan.passes={passes}"), folder / "run", [depth])
            write_json(path, json.loads((folder / "run/compare.json").read_text()))
        found[depth] = json.loads(path.read_text())
    return {depth: found[depth] for depth in depths}


def layers(config: Config) -> int:
    """Of the model."""
    return int(json.loads((Path(config.model.path) / "config.json").read_text())["num_hidden_layers"])


def print_tables(found: dict[int, dict[str, Any]]) -> None:
    """Perplexities of all planners; passes of greedy and search, and how search compares with the best other."""
    first = next(iter(found.values()))
    print(f"judged on {first['judged_on_tokens']:,} tokens, compared on {first['held_out_tokens']:,} others; "
          f"perplexity of the whole model {perplexity(first['loss_of_the_whole_model'])}\n")  # fmt: skip
    print(f"| planner | {' | '.join(f'{depth} removed' for depth in found)} |")
    print(f"|---|{'--:|' * len(found)}")
    for name in first["planners"]:
        entries = [content["planners"][name][str(depth)] for depth, content in found.items()]
        print(f"| {name} | {' | '.join(perplexity(entry['loss']) for entry in entries)} |")
    print(f"\n| | {' | '.join(f'{depth} removed' for depth in found)} |")
    print(f"|---|{'--:|' * len(found)}")
    for name in ("greedy", "search"):
        entries = [content["planners"][name][str(depth)] for depth, content in found.items()]
        passes = [f"{entry['passes']:.1f}" for entry in entries]
        print(f"| passes of {name} | {' | '.join(passes)} |")
    ratios = []
    for depth, content in found.items():
        losses = {name: by_depth[str(depth)]["loss"] for name, by_depth in content["planners"].items()}
        best = min(loss for name, loss in losses.items() if name != "search" and loss is not None)
        ratios.append(f"{math.exp(losses['search'] - best):.3f}")
    print(f"| perplexity of search / the lowest of all others | {' | '.join(ratios)} |")


def retrain(file: Path, folder: Path, content: dict[str, Any], depth: int, steps: int) -> None:
    """Give all plans that are not hopeless the same training and print what comes of it."""
    print(f"\n| {depth} removed, {steps} steps | perplexity | retrained |\n|---|--:|--:|")
    done: dict[tuple[int, ...], dict[str, Any]] = {}
    losses = {name: by_depth[str(depth)]["loss"] for name, by_depth in content["planners"].items()}
    limit = min(loss for loss in losses.values() if loss is not None) + math.log(HOPELESS)
    for name, loss in losses.items():
        if loss is None or loss > limit:
            continue
        dropped = content["planners"][name][str(depth)]["dropped"]
        if tuple(dropped) not in done:
            where = folder / f"retrained-{'-'.join(map(str, dropped))}"
            given = folder / f"{where.name}.json"
            kept = [layer for layer in range(content["layers"]) if layer not in dropped]
            write_json(given, Plan.keeping(content["layers"], kept).model_dump())
            config = configuration(
                file, "plan.method=file", f"plan.file={given}", "plan.keep_layers=null", f"retrain.steps={steps}",
                f"retrain.warmup_steps={min(steps // 10, 10)}", f"retrain.eval_every={steps}",
            )  # fmt: skip
            if not (where / "evaluation.json").exists():
                run(config, where, last="evaluate", collected=folder / "run")
            for weights in ("pruned", "retrain", "retrained"):  # gigabytes a plan
                shutil.rmtree(where / weights, ignore_errors=True)
            done[tuple(dropped)] = json.loads((where / "evaluation.json").read_text())
        evaluation = done[tuple(dropped)]
        print(f"| {name} | {evaluation['pruned']['perplexity']:.2f} | {evaluation['retrained']['perplexity']:.2f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--depths", default="2,4,6,8,10")
    parser.add_argument("--retrain", type=int, metavar="STEPS")
    parser.add_argument("--retrain-depths", metavar="DEPTHS", help="those of --depths, if not given")
    arguments = parser.parse_args()
    set_up_logging()
    depths = parse_layers(arguments.depths)
    found = compare(arguments.config, arguments.folder, depths)
    print_tables(found)
    if arguments.retrain:
        for depth in parse_layers(arguments.retrain_depths or arguments.depths):
            retrain(arguments.config, arguments.folder, found[depth], depth, arguments.retrain)


if __name__ == "__main__":
    main()
