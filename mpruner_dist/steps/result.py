"""The stage `result`: what the accepted rounds left, in the run folder as if it had been made in one go."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from mpruner_dist.checkpoints.folder import read_checkpoint
from mpruner_dist.plan import Plan, by_stack, read_plan
from mpruner_dist.rewriting.finished import layer_map
from mpruner_dist.road import Road, Step
from mpruner_dist.runs.commit import commit_folder, write_bytes, write_json
from mpruner_dist.runs.digest import file_digest
from mpruner_dist.runs.folder import Inputs


def result(road: Road) -> Step:
    """`plan.json` and `layer_map.json` in the original's layers, and the folders of the last accepted round."""
    rounds = json.loads((road.folder / "rounds.json").read_text())
    accepted = [entry for entry in rounds["rounds"] if entry["accepted"]]
    folders = ["pruned"] if road.config.retrain is None else ["pruned", "retrained"]
    files = [] if road.config.retrain is None else ["retrain.json"]
    outputs = ("cka.json", "plan.json", *(folders + files if accepted else ()))
    inputs: Inputs = {
        "cka": file_digest(road.folder / "round-01/cka.json"),
        "plans": [[entry["round"], file_digest(road.folder / entry["folder"] / "plan.json")] for entry in accepted],
    }
    if accepted:
        last = road.folder / accepted[-1]["folder"]
        inputs |= {name: read_checkpoint(last / name).fingerprint() for name in folders}
        inputs |= {name: file_digest(last / name) for name in files}

    def make() -> None:
        write_bytes(road.folder / "cka.json", (road.folder / "round-01/cka.json").read_bytes())
        plan = _plan_in_original_layers(road, accepted)
        write_json(road.folder / "plan.json", plan.model_dump())
        if not accepted:  # of an earlier result nothing may stay: it would be taken for this one's
            for name in ("pruned", "retrained"):
                shutil.rmtree(road.folder / name, ignore_errors=True)
            (road.folder / "retrain.json").unlink(missing_ok=True)
        else:
            for name in files:
                write_bytes(road.folder / name, (last / name).read_bytes())
            for name in folders:
                _link_folder(last / name, road.folder / name, layer_map(_kept_by_name(road, plan)))

    return inputs, outputs, make


def _plan_in_original_layers(road: Road, accepted: list[dict[str, Any]]) -> Plan:
    """The plans of the rounds, one after another, as one."""
    depth = len(json.loads((road.folder / "cka.json").read_text())["layers"])
    kept, reasons = list(range(depth)), {}
    for entry in accepted:
        plan = read_plan(road.folder / entry["folder"] / "plan.json", len(kept))
        for layer in plan.dropped:
            reason = plan.reasons.get(str(layer), "not stated")
            if isinstance(reason, dict):
                reason = reason | {"round": entry["round"]}
                if "like" in reason:
                    reason["like"] = kept[reason["like"]]
            reasons[str(kept[layer])] = reason
        kept = [kept[layer] for layer in plan.kept]
    return Plan.keeping(depth, kept, reasons=reasons, method=road.config.plan.method)


def _kept_by_name(road: Road, plan: Plan) -> dict[str, list[int]]:
    """The original's layers, by stack, in each counted from 0."""
    stacks = json.loads((road.folder / "cka.json").read_text())["stacks"] or {"": plan.num_layers}
    return dict(zip(stacks, by_stack(plan.kept, stacks.values()), strict=True))


def _link_folder(source: Path, target: Path, layer_map: dict[str, Any]) -> None:
    """A folder whose weights are the same files on disk as the round's, with a map from the original's layers."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link_weights)
    write_json(partial / "layer_map.json", layer_map)
    commit_folder(partial, target)


def _link_weights(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:  # a file system without links
            pass
    shutil.copyfile(source, target)
