"""What README.md and CONTRIBUTING.md name is there."""

import re

from conftest import ROOT

from mpruner_dist import cli
from mpruner_dist.submission import commands


def commands_in_the_readme() -> list[str]:
    lines = (ROOT / "README.md").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("    ")]


def test_the_readmes_commands_exist() -> None:
    known = {item.callback.__name__ for item in cli.app.registered_commands if item.callback}
    submitting = {item.callback.__name__ for item in commands.app.registered_commands if item.callback}
    used = [line for line in commands_in_the_readme() if re.search(r"\b(mpruner|mpruner_dist) ", line)]
    assert len(used) >= 12
    for line in used:
        words = re.split(r"\b(?:mpruner|mpruner_dist) ", line)[1].split()
        assert words[0] in known | {"submit"}, line
        assert words[0] != "submit" or words[1] in submitting, line
    for script in re.findall(r"bash (launch/\S+)", (ROOT / "README.md").read_text()):
        assert (ROOT / script).is_file()
    assert len((ROOT / "README.md").read_text().splitlines()) < 320


def test_the_readmes_files_exist() -> None:
    text = "".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    for name in re.findall(r"`((?:mpruner_dist|configs|tests|launch|benchmarks|slurm)/[\w/.]+)`", text):
        assert (ROOT / name).exists() or name == "slurm/site.env", name  # which a site makes for itself
    inner = [folder.name for folder in (ROOT / "mpruner_dist").iterdir() if (folder / "__init__.py").is_file()]
    for name in re.findall(rf"`((?:{'|'.join(inner)})/(?:\w+\.py)?)`", text):
        assert (ROOT / "mpruner_dist" / name).exists(), name
