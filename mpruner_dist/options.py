"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")]
RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="Folder for everything that is made. Default: runs/NAME of the config."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Override one value; may be given many times."),
]
