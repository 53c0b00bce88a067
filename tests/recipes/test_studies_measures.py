"""What the studies measure, against hand arithmetic."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reward_models.labelled_texts import LabelledText
from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.records import Ranking
from rlhf.run.stages import Manifest
from rlhf_recipes.moderation_config import ModerationRecipe
from rlhf_recipes.studies import (
    kl_or_stopping,
    labelers,
    length_bias,
    moderation_folds,
    overoptimisation,
    predict_toy,
    proxy_runs,
    root_kl,
    sentiment,
    serving_latency,
)
from rlhf_recipes.studies.study import Row

ASKED = [{"role": "user", "content": "Why?"}]


def test_the_share_of_a_gain_that_is_length():
    short, long = (0.0, 1), (1.0, 9)
    assert length_bias.length_share([short, short, long, long], [short, long, long, long], 4) == 1.0
    same_lengths = [(1.0, 1), (1.0, 2), (2.0, 9), (2.0, 9)]
    assert length_bias.length_share([short, short, long, long], same_lengths, 4) == 0.0
    # bin 0: 0.5 -> 1 (3 of 5 responses), bin 2: 1 -> 2 (2 of 5); within 0.7, whole 4/3 - 2/3
    before, after = [(0.0, 1), (1.0, 3), (1.0, 8)], [(1.0, 2), (2.0, 8), (1.0, 40)]
    assert length_bias.length_share(before, after, 4) == pytest.approx(1 - 0.7 / (4 / 3 - 2 / 3))


def test_ranked_by_length_the_longest_is_first():
    ranking = Ranking(ASKED, ("one", "one two three", "one two"), (1, 2, 3))
    assert length_bias.by_length(ranking).ranks == (-1.0, -3.0, -2.0)


def test_a_law_fits_what_it_made_and_the_other_does_not():
    d = np.linspace(0.1, 3.0, 20)
    made = d * (2.0 - 0.5 * d), d * (2.0 - 0.5 * np.log(d))
    for own, other, gain in (
        (overoptimisation.linear, overoptimisation.logarithm, made[0]),
        (overoptimisation.logarithm, overoptimisation.linear, made[1]),
    ):
        assert overoptimisation.fitted(d, gain, own) == pytest.approx(1.0)
        assert overoptimisation.fitted(d, gain, other) < 0.999
    assert np.isfinite(overoptimisation.fitted([0.0, *d], [0.0, *made[1]], overoptimisation.logarithm))


def test_a_run_is_read_at_the_kl_of_the_grid_that_it_reached():
    updates = [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    found = proxy_runs.at_grid(updates, [0.0, 1.0, 0.8, 4.0])  # the third counts at 1.0, too
    assert list(found) == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0]
    assert found[0.25].value == pytest.approx(0.5)
    assert found[2.0].value == pytest.approx(2.0 + (2**0.5 - 1.0))
    assert found[4.0].value == 3.0


def test_updates_come_in_their_order(tmp_path):
    lines = ['{"step": 2, "kl_nats": 3}', '{"step": 1, "kl_nats": 1}', '{"step": 2, "kl_nats": 5}']
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    assert proxy_runs.kl_of(proxy_runs.samples(tmp_path)) == [1.0, 4.0]


def test_two_runs_are_apart_where_both_have_been():
    free = [Row(kl_or_stopping.FREE, value, x) for x, value in ((0.0, 5.0), (1.0, 6.0), (2.0, 7.0))]
    other = [Row("penalty 0.2", value, x) for x, value in ((0.0, 9.0), (1.0, 6.5), (2.0, 6.9), (4.0, 1.0))]
    again = [Row(kl_or_stopping.AGAIN, value, x) for x, value in ((0.0, 0.0), (1.0, 6.2), (2.0, 6.6), (8.0, 1.0))]
    rows = [*free, *other, *again, Row(kl_or_stopping.FREE, 8.0, 8.0)]  # no penalised run came as far as 8
    assert kl_or_stopping.apart(rows) == pytest.approx((0.5 + 0.1) / 2)
    assert kl_or_stopping.apart(rows, again=True) == pytest.approx((0.2 + 0.4) / 2)
    margins = [check.margin(rows) for check in kl_or_stopping.STUDY.checks]
    assert margins == pytest.approx([0.3 - 0.3, 0.3 - (0.3 - 0.3)])
    with pytest.raises(InputError, match=r"no run \(penalised\) came as far as 1 nats"):
        kl_or_stopping.apart([*free, other[0], *again])
    with pytest.raises(InputError, match=r"no run \(no penalty, PPO's other seed\) came as far as 1 nats"):
        kl_or_stopping.apart([*free, *other, again[0]], again=True)


def test_what_is_nearly_one_run_is_not_compared():
    """Below a nat the penalised and the free run are the same few updates."""
    gold = ((0.25, 5.0), (0.5, 5.0), (0.75, 5.0), (1.0, 6.0), (2.0, 7.0))
    rows = [Row(kl_or_stopping.FREE, value, x) for x, value in gold]
    rows += [Row("penalty 0.2", value + (0.4 if x >= 1.0 else 0.0), x) for x, value in gold]
    assert kl_or_stopping.STUDY.checks[0].margin(rows) == pytest.approx(0.3 - 0.4)


def curve(gold: np.ndarray) -> list[Row]:
    """Return the rows that study 4 checks, of gold by update [32, responses]."""
    means = gold.mean(axis=1)
    ends = [Row(overoptimisation.PPO, value, float(x), value - 0.196, value + 0.196, panel=overoptimisation.KL)
            for x, value in enumerate(means)]  # fmt: skip
    ends += [Row("gold, at its peak", means.max(), panel=overoptimisation.END)]
    return [*ends, Row("gold, at the end", means[-1], panel=overoptimisation.END)]


def test_flat_gold_does_not_fall_from_its_peak():
    """The highest of 32 noisy means lies above the last in nearly every run, 4 standard errors (0.1) above it in 4%."""
    draw = np.random.default_rng(0)
    margins = [overoptimisation.fallen(curve(draw.normal(5.0, 1.0, (32, 100)))) for _ in range(300)]
    assert 0.01 < np.mean(np.array(margins) > 0) < 0.08
    falling = np.linspace(5.0, 4.0, 32)[:, None] * np.ones((1, 100))
    assert overoptimisation.fallen(curve(falling)) == pytest.approx(1.0 - 4 * 0.1)
    assert overoptimisation.STUDY.checks[0].margin is overoptimisation.fallen


def test_a_straight_line():
    assert root_kl.straight([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert root_kl.straight([1, 2, 3], [1, 3, 1]) == pytest.approx(0.0)


def test_labelers_agree_where_neither_ties():
    one = [Ranking(ASKED, ("a", "b", "c"), (1, 2, 3))]
    other = [Ranking(ASKED, ("a", "b", "c"), (2, 1, 2))]  # b over a, a = c, b over c
    row = labelers.agreement("x", one, other)
    assert (row.value, row.n) == (0.5, 1)


def test_labelers_among_themselves_are_two_different_ones(monkeypatch):
    """Of two who never agree, so a labeler beside itself would show."""
    ranks = {"ada": (1.0, 2.0), "ben": (2.0, 1.0)}
    monkeypatch.setattr(
        labelers, "labelled", lambda rankings, names, seed: [replace(r, ranks=ranks[names[0]]) for r in rankings]
    )
    held_out = [Ranking([{"role": "user", "content": str(n)}], ("a", "b"), (1.0, 2.0)) for n in range(50)]
    assert labelers.among(held_out, ["ada", "ben"], 0).value == 0.0
    first, _ = labelers.two_labelers(held_out, ["ada", "ben"], 0)
    assert 10 < sum(r.ranks == ranks["ada"] for r in first) < 40


def test_distinct_pairs_of_words():
    assert sentiment.distinct(["a b a b", "a b", "c"], 2) == 0.5
    assert sentiment.distinct([""], 2) == 0.0


def test_a_wrong_baseline_is_told_before_the_chain_runs():
    with pytest.raises(InputError, match=r"--methods: expected a list of one of dpo, kto, grpo, rloo, got '\[gpo\]'"):
        configs.load(sentiment.SentimentConfig, ["--methods", "[gpo]"])


def test_generates_pace_is_of_all_batches_but_the_first(monkeypatch):
    """Batches of 4, then 1 and 7 tokens up to the stop, a second each: 8 tokens in 2 seconds."""
    stop, batches = 9, iter([[[1, 1, 1, 9, 0, 0, 0]], [[9, 0, 0, 0, 0, 0, 0]], [[1] * 7]])
    clock = iter(range(10))

    class Policy:
        def eval(self):
            return self

        def generate(self, prompt, **settings):
            return torch.cat([prompt, torch.tensor(next(batches))], dim=1)

    monkeypatch.setattr("rlhf.models.loading.load_policy", lambda model: Policy())
    monkeypatch.setattr("rlhf.models.loading.load_tokenizer", lambda model: None)
    monkeypatch.setattr("rlhf.chat.encode_prompt", lambda tokenizer, messages: [5, 5])
    monkeypatch.setattr("rlhf.chat.stop_ids", lambda tokenizer: [stop])
    monkeypatch.setattr("rlhf.chat.pad_id", lambda tokenizer: 0)
    monkeypatch.setattr(serving_latency.time, "perf_counter", lambda: float(next(clock)))
    settings = serving_latency.LatencyConfig(model="m", answers=2)
    assert serving_latency.of_generate("m", 1, settings) == (1.0, 4.0)


def test_a_seed_of_the_prediction_takes_nothing_of_another(tmp_path, monkeypatch):
    made, folders = [], []

    def make(data, seed, pretraining_documents):
        data.mkdir(parents=True)
        (data / "eval_prompts.jsonl").write_text("")
        made.append(seed)

    def train(size, data, folder, seed):
        folders.append(folder)
        compute = 1e10 * size.hidden**2 * size.layers * size.share
        loss = (1 + seed) * compute**-0.1
        return {"compute": compute, "loss": loss, "mean_log_pass_rate": -loss, "seconds": 1.0}

    monkeypatch.setattr(predict_toy, "import_function", lambda name: make)
    monkeypatch.setattr(predict_toy, "train", train)
    monkeypatch.setattr(predict_toy, "QUANTITIES", ("mean_log_pass_rate",))
    monkeypatch.setattr(predict_toy, "tables", lambda *given: [])
    for seed in ("0", "1", "1"):
        monkeypatch.setattr("sys.argv", ["predict_toy.py", "--output_dir", str(tmp_path), "--seed", seed])
        predict_toy.main()
    assert made == [0, 1]
    assert len(set(folders)) == 12
    first, second = (json.loads((tmp_path / f"seed-{n}/predicted_mean_log_pass_rate.json").read_text()) for n in (0, 1))
    assert second["value"] == pytest.approx(2 * first["value"], rel=1e-6)
    assert json.loads((tmp_path / "results.json").read_text())["config"]["seed"] == 1


def test_a_fold_that_is_trained_anew_is_judged_anew(tmp_path, monkeypatch):
    judged = []

    class Model:
        categories = ("rude",)

        def probabilities(self, texts):
            judged.append(len(texts))
            return np.full((len(texts), 1), 0.5)

    def moderation(config, name):
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        Manifest(stage="moderation", inputs={"epochs": config.epochs}, seed=0).write(folder)

    monkeypatch.setattr(moderation_folds, "moderation", moderation)
    monkeypatch.setattr("reward_models.moderation.ModerationModel.load", lambda folder: Model())
    monkeypatch.setattr("reward_models.words.fit_words", lambda *given: SimpleNamespace(logits=Model().probabilities))
    text = LabelledText(prompt=ASKED, labels={"rude": 1.0})
    config = ModerationRecipe(model="m", train_data="x", output_dir=str(tmp_path))
    for epochs, times in ((1.0, 2), (1.0, 2), (2.0, 4)):
        own = replace(config, epochs=epochs)
        found = moderation_folds.one_fold(own, 0, ["rude"], [text], [text])
        assert found["said"] == [[0.5]]
        assert len(judged) == times


def test_servings_table_has_medians_over_the_rounds_with_their_range(monkeypatch):
    numbers = iter([(1.0, 10.0), (4.0, 40.0), (3.0, 30.0), (6.0, 60.0), (2.0, 20.0), (5.0, 50.0)])

    @contextmanager
    def server(model):
        yield "http://own"

    monkeypatch.setattr(serving_latency, "own_server", server)
    for name in ("of_server", "of_generate"):
        monkeypatch.setattr(serving_latency, name, lambda *given, config: next(numbers))
    settings = serving_latency.LatencyConfig(model="m", clients=[8], rounds=3)
    ((_, _, rows),) = serving_latency.measure(settings)
    assert rows == [
        ["8", "rlhf serve_policy", "2.00 [1.00, 3.00]", "20 [10, 30]"],
        ["8", "transformers' generate, one batch", "5.00 [4.00, 6.00]", "50 [40, 60]"],
    ]
