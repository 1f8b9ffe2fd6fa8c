"""What torch says of itself and its devices, as JSON: run as a process of its own, for a broken torch may end it."""

import json
from typing import Any

import torch


def torch_facts() -> dict[str, Any]:
    """Versions that torch was built with, and the devices that it sees."""
    facts: dict[str, Any] = {"built for CUDA": torch.version.cuda, "built for ROCm": torch.version.hip}
    facts["threads"] = torch.get_num_threads()
    facts["CPU capability"] = torch.backends.cpu.get_cpu_capability()
    facts["devices"] = []
    if torch.cuda.is_available():
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            capability = f"compute capability {device.major}.{device.minor}"
            facts["devices"].append(f"{device.name}, {device.total_memory / 1e9:.1f} GB, {capability}")
    return facts


if __name__ == "__main__":
    print(json.dumps(torch_facts()))
