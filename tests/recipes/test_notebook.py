"""The notebook runs in any folder, says nothing alarming, and its numbers are what they claim to be."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "recipes" / "notebooks" / "rlhf_in_ten_minutes.ipynb"

NUMBERS = """
import json
print(json.dumps({
    "kl_at_start": kl_at_start,
    "first": first,
    "kl": [update["kl_nats"] for update in history],
    "gold": [update["gold"] for update in history],
    "last_kl": [(rollout.logprobs - rollout.reference_logprobs)[i, :n].tolist()
                for i, n in enumerate(rollout.response_tokens.tolist())],
    "advantages": rollout.advantages[rollout.mask].tolist(),
    "base_loss": base["loss"],
    "vocabulary": base["vocabulary"],
    "sft_loss": [json.loads(line).get("loss") for line in (RUN / "sft" / "metrics.jsonl").open()],
    "train_scores": [score for r in train for score in reward_model([r.prompt] * len(r.responses), r.responses)],
    "prompts": [[prompt.columns["family"], prompt.columns["facts"]] for prompt in eval_prompts],
    "before": [before.responses, gold_before],
    "after": [after.responses, gold_after],
    "win_rate": win_rate,
    "updates": size["updates"],
    "saved": sorted(path.name for path in (RUN / "ppo").iterdir()),
}))
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run at the small scale in an empty folder, a cell with its numbers appended."""
    folder = tmp_path_factory.mktemp("notebook")
    copied = folder / "copied"
    copied.mkdir()
    notebook = nbformat.read(FILE, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(NUMBERS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_NOTEBOOK_SCALE", "small")
        for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(folder))
        resources = {"metadata": {"path": str(copied)}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert not list(copied.iterdir()), "everything it writes goes into a temporary folder"
    return notebook


@pytest.fixture(scope="module")
def numbers(executed):
    return json.loads(executed.cells[-1].outputs[-1].text)


def outputs(notebook):
    return [(cell, output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_committed_clean():
    """Without outputs, so that a diff shows what changed, and none is stale."""
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    assert not outputs(notebook)
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert all(not line.startswith(("%", "!")) for cell in notebook.cells for line in cell.source.splitlines())


@pytest.mark.slow
def test_says_nothing_alarming(executed):
    for cell, output in outputs(executed):
        assert output.output_type != "error", cell.id
        assert output.get("name") != "stderr", f"{cell.id}: {output.get('text')}"
        assert "Warning" not in str(output.get("text")), f"{cell.id}: {output.text}"
        assert "\x1b[" not in str(output.get("text")), f"{cell.id}: a terminal's control codes"


@pytest.mark.slow
def test_training_shows_how_far_it_is(executed):
    """By itself: nothing was passed to the trainers for it."""
    text: dict[str, str] = {}
    for cell, output in outputs(executed):
        if output.get("name") == "stdout":
            text[cell.id] = text.get(cell.id, "") + output.text
    assert re.search(r"^sft +80/80  \d+", text["sft"], re.MULTILINE)
    assert re.search(r"^reward model +\d+/\d+  \d+", text["reward-model"], re.MULTILINE)


@pytest.mark.slow
def test_one_plot(executed):
    plots = [cell.id for cell, output in outputs(executed) if "image/png" in output.get("data", {})]
    assert plots == ["plot"]


@pytest.mark.slow
def test_stages_start_exactly(numbers):
    assert numbers["kl_at_start"] == 0.0
    assert numbers["kl"][0] == 0.0
    assert numbers["first"]["step0_ratio_error"] == 0.0
    assert numbers["first"]["approx_kl_nats"] > 0.0  # and then it moved


@pytest.mark.slow
def test_loop_moves_the_policy(numbers):
    assert len(numbers["kl"]) == numbers["updates"]
    assert numbers["kl"][-1] > 0.01
    kl = [sum(row) for row in numbers["last_kl"]]
    assert numbers["kl"][-1] == pytest.approx(sum(kl) / len(kl), abs=1e-5)
    assert "model.safetensors" in numbers["saved"]
    assert "tokenizer.json" in numbers["saved"]


@pytest.mark.slow
def test_advantages_are_standardized(numbers):
    advantages = numbers["advantages"]
    mean = sum(advantages) / len(advantages)
    assert mean == pytest.approx(0.0, abs=1e-4)
    assert sum((x - mean) ** 2 for x in advantages) / len(advantages) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.slow
def test_models_learn(numbers):
    assert numbers["base_loss"] < 0.6 * math.log(numbers["vocabulary"])
    losses = [loss for loss in numbers["sft_loss"] if loss is not None]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.slow
def test_reward_model_is_normalised(numbers):
    """Its scores of all the responses that it was trained on: mean 0, spread 1 (fewer than normalizer_samples).

    To bfloat16's rounding: a CPU that is fast at it computes them so.
    """
    scores = numbers["train_scores"]
    mean = sum(scores) / len(scores)
    assert mean == pytest.approx(0.0, abs=0.02)
    assert sum((x - mean) ** 2 for x in scores) / len(scores) == pytest.approx(1.0, abs=0.02)


@pytest.mark.slow
def test_gold_and_win_rate(numbers, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "data" / "toy"))
    import toy_gold

    for responses, gold in (numbers["before"], numbers["after"]):
        for (family, facts), response, points in zip(numbers["prompts"], responses, gold, strict=True):
            parts = toy_gold.gold_parts(None, response, family=family, facts=facts)
            assert points == pytest.approx(sum(parts[p] for p in ("content", "relevance", "courtesy", "brevity")))
    pairs = list(zip(numbers["after"][1], numbers["before"][1], strict=True))
    wins = sum(1.0 if mine > theirs else 0.5 if mine == theirs else 0.0 for mine, theirs in pairs)
    assert numbers["win_rate"][0] == pytest.approx(wins / len(pairs))
