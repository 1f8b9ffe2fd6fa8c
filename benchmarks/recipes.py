"""A recipe of configs/ over several seeds, beside baselines that remove as many layers and are trained as long.

    .venv/bin/python benchmarks/recipes.py configs/resnet_fashion.yaml FOLDER [--seeds 0,1,2]
        [--baselines influence,last,random,original]

after launch/prepare_recipes.py. For each seed the recipe is run as it is, then each baseline: a method of plan.method
that keeps as many layers as the recipe's plan did, or `original`, which removes nothing and is only retrained, so that
what more training brings is not taken for the merit of pruning. Prints what was measured on the test part, what is
published of the nearest network, and the targets. Each run has a folder of its own, FOLDER/VARIANT-seedN: the same
command goes on from what is there.
"""

import argparse
from pathlib import Path

from recipe_runs import BASELINES, caption, measure, original
from recipe_tables import published_table, result_table, verdict

from mpruner_dist.config_file import load_config
from mpruner_dist.logs import set_up_logging
from mpruner_dist.plan import parse_layers


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--baselines", default=",".join(BASELINES), help="some of %(default)s")
    arguments = parser.parse_args()
    baselines = [name for name in arguments.baselines.split(",") if name]
    if unknown := sorted(set(baselines) - set(BASELINES)):
        parser.error(f"--baselines {unknown[0]}: choose from {', '.join(BASELINES)}")
    set_up_logging()
    measured = measure(arguments.config, arguments.folder, parse_layers(arguments.seeds), baselines)
    asked = load_config(arguments.config, [])
    task = asked.model.task
    print(f"{caption(arguments.config, asked, measured)}\n\n{result_table(measured.found, task)}\n")
    for note in measured.notes:
        print(f"- {note}")
    print(
        "\nPublished of the nearest network: other data and another size, one run each, without baselines.\n\n"
        f"{published_table(task)}\n"
    )
    # of vision models, those with batch normalisation
    is_cnn = any(name.endswith(".running_mean") for name in original(asked).tensors)
    print(verdict(measured.found, task, is_cnn))


if __name__ == "__main__":
    main()
