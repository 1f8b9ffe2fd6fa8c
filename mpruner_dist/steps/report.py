"""The stage `report`: `report.html`, and a model card in each output folder."""

from mpruner_dist.road import Road, Step
from mpruner_dist.runs.digest import file_digest
from mpruner_dist.runs.folder import Inputs


def report(road: Road) -> Step:
    """`report.html`, and a model card in each output folder."""
    names = ["data/data.json", "cka.json", "plan.json", "evaluation.json"]
    names += [name for name in ("retrain.json", "rounds.json", "compare.json") if (road.folder / name).exists()]
    inputs: Inputs = {name: file_digest(road.folder / name) for name in names}
    inputs["config"] = road.config.model_dump(mode="json", exclude={"cluster"})

    def make() -> None:
        from mpruner_dist.reporting.report import write_report

        write_report(road.folder.path, road.config, road.folder.stages)

    return inputs, ("report.html",), make
