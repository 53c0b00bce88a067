"""recipes/report.py: a page for a run, a stage, a reward model's card; what other folders get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reference import recipe

from reward_models.card.report import reward_report, save_reward_report
from rlhf.rows.records import Ranking
from rlhf.run.stages import Manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two stages, one of them a reward model with its card."""
    for name in ("sft", "reward_model"):
        (tmp_path / name).mkdir()
        Manifest(stage=name, inputs={}, seed=0, outputs={"loss": 0.5}).write(tmp_path / name)
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.5}\n')
    rows = [Ranking([{"role": "user", "content": f"{n}?"}], ("yes" * (n + 1), "no"), (1, 2)) for n in range(12)]
    score = lambda completions, **columns: [float(len(c[0]["content"])) for c in completions]  # noqa: E731
    card = reward_report(score, rows, sensitivity_pairs=0)
    save_reward_report(card, tmp_path / "reward_model", {"reward_model": "rm"})
    return tmp_path


def test_a_stage_that_ran_again_counts_and_not_the_last_chains_summary(run: Path) -> None:
    entry = {"win_rate_vs_sft": 0.75, "win_rate_ci": [0.7, 0.8], "score": 1.0, "prompts": 300}
    (run / "evaluation").mkdir()
    (run / "summary.json").write_text(json.dumps({"evaluation": {"sft": {"score": 0.0}, "ppo": entry}}))
    entry = entry | {"win_rate_vs_sft": 0.3, "win_rate_ci": [0.25, 0.35]}
    outputs = {"evaluation": {"sft": {"score": 0.0}, "ppo": entry}, "reward_model": {}}
    Manifest(stage="evaluation", inputs={}, seed=0, outputs=outputs).write(run / "evaluation")
    assert recipe.run("report", run).code == 0
    text = (run / "report.md").read_text()
    assert "30.0%" in text
    assert "75.0%" not in text


def test_a_run_and_its_card_lead_to_each_other(run: Path) -> None:
    card = run / "reward_model" / "reward_report.html"
    assert "report.html" not in card.read_text()
    result = recipe.run("report", run)
    assert (result.code, result.err) == (0, "")
    assert result.out.split() == ["report", str(run / "report.html")]
    page = (run / "report.html").read_text()
    assert 'href="reward_model/reward_report.html"' in page
    assert "The training loss went from 0.70 to 0.50 nats in 2 steps." in page
    assert 'href="../report.html"' in card.read_text()
    assert json.loads((card.parent / "reward_report.json").read_text())["about"]["made"]["command"]


def test_a_stage_has_a_page_that_leads_to_the_run(run: Path) -> None:
    assert recipe.run("report", run).code == 0
    assert recipe.run("report", run / "sft").code == 0
    page = (run / "sft" / "report.html").read_text()
    assert "Stage sft" in page
    assert 'href="../report.html"' in page
    assert (run / "sft" / "report.md").exists()


def test_a_folder_with_a_card_alone(run: Path) -> None:
    folder = run / "elsewhere"
    folder.mkdir()
    (folder / "reward_report.json").write_bytes((run / "reward_model" / "reward_report.json").read_bytes())
    result = recipe.run("report", folder)
    assert result.out.split() == ["report", str(folder / "reward_report.html")]
    assert not (folder / "report.html").exists()
    (folder / "reward_report.json").write_text('{"accuracy": 0.5}')
    assert "not drawn again" in recipe.run("report", folder).out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "name the run's folder first: rlhf report RUN"),
        (("{run}/nowhere",), "nowhere: no such folder; name a run's folder or a stage's"),
        (("{run}/empty",), "empty: holds no stage"),
        (("{run}", "--what", "1"), "unknown flag --what"),
    ],
)
def test_other_folders_get_one_line(run: Path, words: tuple[str, ...], says: str) -> None:
    (run / "empty").mkdir()
    result = recipe.run("report", *(word.format(run=run) for word in words))
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert says in line
