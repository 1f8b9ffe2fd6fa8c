"""How far the CKA matrix moves with the number of workers, the ZeRO stage and the number type.

    .venv/bin/python benchmarks/invariance.py configs/demo.yaml

Collects the demo's similarities with several clusters, in folders that are deleted afterwards, and prints the largest
difference of an entry from the matrix that one worker without partitioning gives in the same number type.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SHAPES = {"float32": [(1, 0), (2, 0), (2, 3), (3, 0)], "bfloat16": [(1, 0), (2, 3)]}


def collect(config: str, folder: Path, dtype: str, workers: int, zero_stage: int) -> np.ndarray:
    """The CKA matrix [L, L] of one `mpruner collect`."""
    options = {
        "model.dtype": dtype,
        "collect.num_batches": 5,  # not a multiple of two or three workers
        "cluster.workers": workers,
        "cluster.zero_stage": zero_stage,
        "cluster.cpus_per_worker": 1,
        "retrain": "null",
    }
    settings = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "mpruner_dist", "collect", config, "--run-dir", str(folder), *settings]
    subprocess.run(command, check=True, capture_output=True)
    return np.array(json.loads((folder / "cka.json").read_text())["cka"])


def main() -> None:
    """Print one row for each cluster and number type."""
    config = sys.argv[1]
    print("| dtype | workers | ZeRO stage | largest difference of a CKA entry |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        matrices = {
            (dtype, *shape): collect(config, Path(folder) / f"{dtype}-{shape[0]}-{shape[1]}", dtype, *shape)
            for dtype, shapes in SHAPES.items()
            for shape in shapes
        }
    for (dtype, workers, zero_stage), matrix in matrices.items():
        difference = np.abs(matrix - matrices[dtype, 1, 0]).max()
        print(f"| {dtype} | {workers} | {zero_stage} | {difference:.1e} |")
    between = np.abs(matrices["bfloat16", 1, 0] - matrices["float32", 1, 0]).max()
    print(f"\nbfloat16 against float32, one worker: {between:.1e}")


if __name__ == "__main__":
    main()
