"""The driver's side of `collect`: `cka.json` from the saved sums. No torch."""

from pathlib import Path
from typing import Any

from mpruner_dist.runs.commit import write_json
from mpruner_dist.similarity.sums import HsicSums


def write_cka(sums_folder: Path, layers: list[str], target: Path) -> dict[str, Any]:
    """Reduce the saved sums to `cka.json` and return its content.

    Raises:
        StageFailure: the HSIC of some layer with itself is not positive.
    """
    sums = HsicSums.load(sums_folder)
    content = {
        "layers": layers,
        "cka": sums.cka().tolist(),
        "stderr": sums.stderr().tolist(),
        "num_batches": len(sums.hsic),
        "num_samples": sum(sums.samples.values()),
        "estimator": "unbiased HSIC per batch, summed before the ratio",
    }
    write_json(target, content)
    return content
