"""What one node sees: of folders that must be shared, and of the packages that it would run.

Ray carries these functions to the node by value, for the node may lack this package, or have another one. So they use
the standard library only, and nothing of `mpruner_dist` by name.
"""

import hashlib
import importlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "ray", "deepspeed", "transformers")
WEIGHTS = (".safetensors", ".bin", ".json")
NVCC = "CUDA's compiler (nvcc)"
PATIENCE_S = 5.0
"""So long may a network file system take to show what another machine wrote."""


def look(place: Path, word: str, name: str, folders: list[Path]) -> dict[str, Any]:
    """Everything that a node is asked: `exchange`, `contents` of each folder and `versions`."""
    return {
        "exchange": exchange(place, word, name),
        "contents": {str(folder): contents(folder) for folder in folders},
        "versions": versions(),
    }


def exchange(place: Path, word: str, name: str) -> str | None:
    """Read the driver's word from a folder that it made in the shared one, and leave one's own; or what is wrong."""
    shared = place.parent
    until = time.monotonic() + PATIENCE_S
    try:
        if not shared.is_dir():
            return f"the folder {shared} does not exist there"
        while not (place / "driver").is_file():
            if time.monotonic() > until:
                return f"{shared} is another folder there, or stale: it lacks what was just written to it here"
            time.sleep(0.1)
        if (place / "driver").read_text() != word:
            return f"{shared} is stale there: it shows other content than was just written to it here"
    except OSError as error:
        return f"{shared} cannot be read there: {error.strerror}"
    try:
        with (place / name).open("w") as file:
            file.write(f"{word} {name}")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{shared} cannot be written to from there: {error.strerror}"
    return None


def contents(folder: Path) -> dict[str, Any]:
    """Sizes of the weights and tables in a folder, and the digest of its config.json; or what is wrong with it."""
    try:
        if not folder.is_dir():
            return {"wrong": f"the folder {folder} does not exist there"}
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.suffix in WEIGHTS}
        config = folder / "config.json"
        return {"sizes": sizes, "config": hashlib.sha256(config.read_bytes()).hexdigest() if sizes else ""}
    except OSError as error:
        return {"wrong": f"{error.filename or folder} cannot be read there: {error.strerror}"}


def versions() -> dict[str, str | None]:
    """Versions without their build tags (2.9.0+cu128 and 2.9.0+cpu compute the same); None where not installed."""
    found: dict[str, str | None] = {"Python": platform.python_version(), "mpruner_dist": _version_of_this_package()}
    return found | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        text = importlib.metadata.distribution(name).read_text("METADATA")
    except importlib.metadata.PackageNotFoundError:
        return None
    lines = (text or "").splitlines()  # no text: what is left where an installation or removal was cut off
    number = next((line.removeprefix("Version: ") for line in lines if line.startswith("Version: ")), None)
    return number and number.partition("+")[0]


def _version_of_this_package() -> str | None:
    """With a digest of its source: between two releases, the number alone says nothing."""
    try:
        package = importlib.import_module("mpruner_dist")
    except ImportError:
        return None
    folder = Path(str(package.__file__)).parent
    source = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        source.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return f"{package.__version__} (source {source.hexdigest()[:8]})"


def tools(interpreter_folder: str) -> dict[str, bool]:
    """What DeepSpeed compiles its operations with, by whether it is there.

    Args:
        interpreter_folder: where a worker looks besides its PATH.
    """
    path = os.pathsep.join([interpreter_folder, os.environ.get("PATH", os.defpath)])
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"  # as torch looks for it
    return {
        "a C++ compiler (c++)": shutil.which(compiler, path=path) is not None,
        "ninja": shutil.which("ninja", path=path) is not None,
        "Python's headers (Python.h)": headers.is_file(),
        NVCC: shutil.which("nvcc", path=os.pathsep.join([str(cuda), path])) is not None,
    }
