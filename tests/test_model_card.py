"""The model cards of a run, as the hub reads them."""

from pathlib import Path

import pytest
import yaml
from finished_run import STAGES, make_config, make_run

from mpruner_dist.reporting.report import CARD_MARKER, write_report


def front_matter(card: Path) -> dict:
    before, matter, after = card.read_text().split("---\n", 2)
    assert not before
    assert after.startswith(CARD_MARKER)
    return yaml.safe_load(matter)


def test_the_model_card_can_be_read_by_the_hub(tmp_path):
    config = make_config(model={"path": "owner/little-model", "trust_remote_code": True})
    write_report(make_run(tmp_path), config, STAGES)
    for folder in ("pruned", "retrained"):
        assert front_matter(tmp_path / folder / "README.md") == {
            "base_model": "owner/little-model",
            "library_name": "transformers",
            "tags": ["pruned", "mpruner-dist"],
        }
    card = (tmp_path / "retrained/README.md").read_text()
    for expected in ("layers kept: 0-1, 3, 5", "layers removed: 2, 4", "| retrained (this one) | 4 (-33.3 %)"):
        assert expected in card
    assert "from_pretrained(folder, trust_remote_code=True)" in card
    assert "## Retraining" in card
    assert "## Retraining" not in (tmp_path / "pruned/README.md").read_text()


@pytest.mark.parametrize("path", ["owner/little-model", "/models/little-model", "little-model"])
def test_a_folder_is_no_base_model(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/little-model").mkdir(parents=True)
    write_report(make_run(tmp_path), make_config(model={"path": path}), STAGES)
    assert "base_model" not in front_matter(tmp_path / "pruned/README.md")


def test_the_card_of_the_original_model_is_kept(tmp_path):
    run = make_run(tmp_path)
    (run / "pruned/README.md").write_text("---\nlicense: mit\n---\n# The original\n")
    write_report(run, make_config(), STAGES)
    card = (run / "pruned/README.md").read_text()
    assert "ORIGINAL_README.md" in card
    assert "ORIGINAL_README.md" not in (run / "retrained/README.md").read_text()
    write_report(run, make_config(), STAGES)
    assert (run / "pruned/README.md").read_text() == card
    assert (run / "pruned/ORIGINAL_README.md").read_text() == "---\nlicense: mit\n---\n# The original\n"
    (run / "pruned/README.md").write_text("# Rewritten by a person\n")
    write_report(run, make_config(), STAGES)
    assert (run / "pruned/README.md").read_text() == "# Rewritten by a person\n"
