"""What the README names is there."""

import re

from conftest import ROOT

from mpruner_dist import cli


def commands_in_the_readme() -> list[str]:
    lines = (ROOT / "README.md").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("    ")]


def test_the_readmes_commands_exist() -> None:
    known = {item.callback.__name__ for item in cli.app.registered_commands if item.callback}
    used = [line for line in commands_in_the_readme() if "mpruner_dist " in line]
    assert len(used) >= 6
    for line in used:
        assert line.split("mpruner_dist ")[1].split()[0] in known, line
    for script in re.findall(r"bash (launch/\S+)", (ROOT / "README.md").read_text()):
        assert (ROOT / script).is_file()
    assert len((ROOT / "README.md").read_text().splitlines()) < 250


def test_the_readmes_files_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:mpruner_dist|configs|tests|launch)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:data|similarity|planning|rewriting|retraining|evaluation|reporting|models|checkpoints"
                           r"|cluster|runs)/(?:\w+\.py)?)`", text):  # fmt: skip
        assert (ROOT / "mpruner_dist" / name).exists(), name
