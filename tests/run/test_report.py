"""The report and the final table: right numbers, all text escaped, nothing fetched, missing parts allowed."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf.errors import InputError
from rlhf.intervals import needed
from rlhf.run.console import StageBar, console, final_table, stage_line
from rlhf.run.report import write_report
from rlhf.run.stages import Manifest
from rlhf.run.tables import families, gold_parts, headline, notes, number
from rlhf.run.verdict import of_run

SUMMARY: dict[str, Any] = {
    "stages": {"reward_model": {"accuracy": 0.648, "accuracy_ci": [0.63, 0.665], "n": 2900, "length_baseline": 0.55}},
    "evaluation": {
        "sft": {
            "score": 0.05, "gold_score": 5.75, "kl_nats": 0.0, "response_tokens": 22.1, "eos_rate": 0.999,
            "gold_parts": {"content": 3.4}, "families": {"list": {"n": 50, "gold_score": 5.0, "refusal_rate": 0.02}},
        },
        "ppo": {
            "score": 1.21, "gold_score": 7.31, "win_rate_vs_sft": 0.731, "win_rate_ci": [0.701, 0.76],
            "kl_nats": 2.512, "response_tokens": 27.3, "eos_rate": 1.0, "gold_parts": {"content": 4.4},
            "families": {"list": {"n": 50, "gold_score": 7.0, "win_rate_vs_sft": 0.7, "refusal_rate": 0.04}},
        },
        "best_of_n": {"n": 4, "score": 0.8, "gold_score": 6.5, "win_rate_vs_sft": 0.63, "kl_nats": 0.636},
        "judge": {"kind": "reward_model", "name": "runs/judge", "accuracy": 0.62, "accuracy_ci": [0.6, 0.64]},
    },
    "seconds": {"sft": 14.2, "ppo": 118.0},
}  # fmt: skip
EVIL = '<script>alert("1")</script> & <|im_end|>'


class Links(HTMLParser):
    """A parser that collects every address that a page would fetch and every element that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "evaluation").mkdir()
    row = {"kl_nats": 1.0, "entropy_nats": 0.9, "clip_fraction": 0.4, "response_tokens": 20, "explained_variance": None}
    lines = [json.dumps({"step": step, "score": step / 10, **row}) for step in range(1, 6)]
    (tmp_path / "ppo" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    sample = {"prompt": EVIL, "sft": EVIL, "ppo": "", "score_sft": 0.125, "score_ppo": -1, "family": EVIL}
    (tmp_path / "evaluation" / "samples.jsonl").write_text((json.dumps(sample) + "\n") * 40)
    return tmp_path


def test_the_headline_has_every_policy_and_interval() -> None:
    headers, rows = headline(SUMMARY)
    assert headers == ["policy", "score", "gold score", "win rate vs SFT", "KL nats", "tokens", "EOS rate"]
    assert rows[0] == ["SFT", "0.05", "5.75", "", "0.00", "22.10", "99.9%"]
    assert rows[1] == ["PPO", "1.21", "7.31", "73.1% [70.1, 76.0]", "2.51", "27.30", "100.0%"]
    assert rows[2] == ["best of 4", "0.80", "6.50", "63.0%", "0.64", "", ""]


def test_the_judge_is_named_with_its_own_accuracy() -> None:
    judge, model, time = notes(SUMMARY)
    assert "reward model that PPO never saw (runs/judge), right on 62.0% [60.0, 64.0] of held-out pairs" in judge
    assert "64.8% [63.0, 66.5] of 2,900 held-out pairs; always taking the longer response: 55.0%." in model
    assert time == "Time: 2.2 min (sft 14 s, ppo 2.0 min)."


def test_parts_and_families_stand_side_by_side() -> None:
    assert gold_parts(SUMMARY) == (["part of the gold score", "SFT", "PPO"], [["content", "3.40", "4.40"]])
    assert families(SUMMARY)[1] == [["list", "50", "5.00", "7.00", "70.0%", "2.0%", "4.0%"]]


def test_the_page_fetches_nothing_and_escapes_everything(run: Path) -> None:
    path = write_report(run, SUMMARY)
    page = path.read_text()
    (run / "reward_model").mkdir()
    (run / "reward_model" / "reward_report.html").write_text("a card")
    page = write_report(run, SUMMARY).read_text()
    links = Links()
    links.feed(page)
    assert [address for address in links.addresses if not address.startswith("#")] == [
        "reward_model/reward_report.html"
    ]
    assert "script" not in links.tags
    assert "link" not in links.tags
    assert "url(http" not in page
    assert "@import" not in page
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &lt;|im_end|&gt;" in page
    assert links.tags.count("svg") == 6  # five curves that have numbers, and score against KL
    assert links.tags.count("article") == 12
    assert "clip_fraction=0.4 is above 0.2" in page
    assert "explained_variance is nan" in page
    assert "SFT <small>score 0.12</small>" in page
    assert "<em>(empty)</em>" in page


def test_the_short_report_is_markdown(run: Path) -> None:
    write_report(run, SUMMARY)
    text = (run / "report.md").read_text()
    assert "| PPO | 1.21 | 7.31 | 73.1% [70.1, 76.0] |" in text
    assert "clip_fraction=0.4" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    first = write_report(run, SUMMARY).read_text()
    assert write_report(run, SUMMARY).read_text() == first


def test_a_run_without_ppo_still_has_a_report(tmp_path: Path) -> None:
    page = write_report(tmp_path / "new", {"stages": {}, "evaluation": {}, "seconds": {}}).read_text()
    assert "No evaluation yet." in page
    assert write_report(tmp_path, {}).exists()


def test_broken_samples_are_named(run: Path) -> None:
    (run / "evaluation" / "samples.jsonl").write_text('{"prompt": "a"}\n{\n')
    with pytest.raises(InputError, match=r"samples\.jsonl:2"):
        write_report(run, SUMMARY)


def test_samples_hold_line_separators(run: Path) -> None:
    """JSON keeps U+2028 as it is; only a line break ends a line of samples.jsonl."""
    row = {"prompt": "Hi", "sft": "fine", "ppo": "one\u2028two", "score_ppo": 1.0, "score_sft": 0.0}
    (run / "evaluation" / "samples.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert "one\u2028two" in write_report(run, SUMMARY).read_text(encoding="utf-8")


def test_the_largest_gains_and_losses_come_first(run: Path) -> None:
    """By the judge's score, not by the reward model's, which PPO has optimised."""
    rows = [
        {"prompt": f"p{number}", "sft": "a", "ppo": "b", "gold_score_sft": 5.0, "gold_score_ppo": 5.0 + gain,
         "score_sft": 0.0, "score_ppo": -gain}
        for number, gain in enumerate([0.5, -3, 1, 4, -1, 0] + [0.25] * 14)
    ]  # fmt: skip
    (run / "evaluation" / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = write_report(run, SUMMARY).read_text()
    shown = re.findall(r"<h3>(.*?)</h3>|class=prompt>(p\d+)<", page)
    names = [heading or prompt for heading, prompt in shown]
    assert names[:4] == ["Largest gains", "p3", "p2", "p0"]
    assert names[names.index("Largest losses") :] == ["Largest losses", "p1", "p4"]
    assert len(names) == 12 + 2


def test_families_are_ordered_by_how_far_they_moved() -> None:
    def entry(**scores: float) -> dict[str, Any]:
        return {"families": {name: {"n": 10, "gold_score": score} for name, score in scores.items()}}

    summary = {"evaluation": {"sft": entry(a=5.0, b=5.0, c=5.0), "ppo": entry(a=5.5, b=3.0, c=6.0)}}
    assert [row[0] for row in families(summary)[1]] == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("rate", "interval", "says"),
    [
        (0.731, [0.701, 0.76], "PPO is better than SFT: the gold score prefers it on 73.1% [70.1, 76.0] of 400 "),
        (0.4, [0.35, 0.45], "PPO is worse than SFT: "),
        (0.52, [0.47, 0.57], "No clear difference between PPO and SFT: the gold score prefers it on 52.0% "),
    ],
)
def test_the_verdict_compares_ppo_with_sft(run: Path, rate: float, interval: list[float], says: str) -> None:
    entry = {"win_rate_vs_sft": rate, "win_rate_ci": interval, "prompts": 400}
    summary = {"evaluation": {"sft": {}, "ppo": entry, "judge": {"kind": "gold"}}}
    page = write_report(run, summary).read_text()
    sentence = re.search("<p class=verdict>(.*?)</p>", page)
    assert sentence
    assert sentence[1].startswith(says)
    assert page.index("<p class=verdict>") < page.index("<table")
    assert says in (run / "report.md").read_text().splitlines()[2]
    if rate == 0.52:  # a standard error of .1 / 3.92; (2.8 * .0255 / .02)^2 = 12.76 times 400 prompts
        assert sentence[1].endswith("; about 5,200 prompts would tell.")


def test_the_verdict_doubts_a_judge_that_is_a_coin() -> None:
    entry = {"win_rate_vs_sft": 0.7, "win_rate_ci": [0.6, 0.8], "prompts": 100}
    judge = {"kind": "reward_model", "name": "j", "accuracy": 0.52, "accuracy_ci": [0.46, 0.58]}
    sentence = of_run({"evaluation": {"sft": {}, "ppo": entry, "judge": judge}}, {})
    assert sentence.endswith("; but this judge is no better than a coin on held-out pairs.")


def test_how_many_would_tell_two_values_apart() -> None:
    """At the number that it names, the gap is 2.8 standard errors: a 95% interval leaves it out 4 times in 5."""
    for share, n in ((0.55, 100), (0.6, 40), (0.45, 250)):
        error = math.sqrt(share * (1 - share) / n)
        count = needed(n, share, 0.5, [share - 1.96 * error, share + 1.96 * error])
        assert count
        assert abs(share - 0.5) / math.sqrt(share * (1 - share) / count) == pytest.approx(2.8, rel=0.05)
        exact = (2.8 / (share - 0.5)) ** 2 * share * (1 - share)
        assert exact <= count <= 1.1 * exact
    assert needed(100, 0.5, 0.5, [0.4, 0.6]) is None
    assert needed(100, 0.501, 0.5, [0.4, 0.6]) is None, "more than anybody has"


# ---------------------------------------------------------------- stages and folders


def stage(folder: Path, name: str, outputs: dict[str, Any], rows: Sequence[dict[str, Any]] = ()) -> Path:
    """Write what a complete stage leaves."""
    place = folder / name
    place.mkdir(parents=True)
    made = {"command": "rlhf chain --config toy.yaml", "machine": "a machine", "versions": {"torch": "9.9"}}
    when = "2026-01-02T03:04:05+00:00"
    Manifest(stage=name, inputs={}, seed=7, outputs=outputs, seconds=12.0, created=when, **made).write(place)  # type: ignore[arg-type]
    if rows:
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


LOSSES = [{"step": step, "loss": 2.0 / step, "token_accuracy": 0.5, "learning_rate": 1e-3} for step in range(1, 9)]
PAIRS = [{"step": step, "loss": 0.7, "accuracy": 0.6, "margin": 0.1} for step in range(1, 9)]


def test_a_stage_has_a_report_of_its_own(tmp_path: Path) -> None:
    place = stage(tmp_path, "sft", {"loss": 0.4}, [*LOSSES, {"step": 8, "eval_loss": 0.5}])
    page = write_report(place).read_text()
    assert "The training loss went from 2.00 to 0.25 nats in 8 steps; on held-out data it ends at 0.50." in page
    assert page.count("<svg") == 3
    assert "held out" in page
    for fact in ("2026-01-02 03:04 UTC", "rlhf chain --config toy.yaml", "torch 9.9", "a machine", ">7<"):
        assert fact in page, fact


def test_a_run_without_a_summary_is_gathered_from_its_manifests(tmp_path: Path) -> None:
    stage(tmp_path, "sft", {"loss": 0.4}, LOSSES)
    stage(tmp_path, "reward_model", {"accuracy": 0.64, "accuracy_ci": [0.6, 0.68], "n": 500, "length_baseline": 0.55,
                                     "length_rule": "longer"}, PAIRS)  # fmt: skip
    page = write_report(tmp_path).read_text()
    sentence = (
        "The reward model is right on 64.0% [60.0, 68.0] of 500 held-out pairs, better than always taking the longer"
    )
    assert sentence in page
    assert "SFT, step by step" in page
    assert "reward model, step by step" in page
    assert page.count("<svg") == 3 + 3
    stage(tmp_path, "evaluation", {"evaluation": SUMMARY["evaluation"], "reward_model": {"gold_accuracy": 0.7}})
    assert "PPO is better than SFT" in write_report(tmp_path).read_text()


def test_a_stage_that_is_not_complete_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "inputs.json").write_text("{}")
    row = {"score": 0.5, "kl_nats": 1.0}
    (tmp_path / "ppo" / "metrics.jsonl").write_text("".join(json.dumps({"step": s, **row}) + "\n" for s in (1, 2)))
    samples = [
        {"step": 2, "prompt": [{"role": "user", "content": "Hi"}], "response": EVIL, "score": 1.0, "kl_nats": 0.1}
    ]
    (tmp_path / "ppo" / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    for folder in (tmp_path, tmp_path / "ppo"):
        page = write_report(folder).read_text()
        assert "in 2 updates, at 1.00 nats of KL; nothing has judged it yet." in page
        assert "not complete" in page
        assert "Samples of update 2" in page
        assert "<script" not in page


def test_evaluation_and_gold_are_drawn_on_the_score(tmp_path: Path) -> None:
    rows = [
        {"step": s, "score": s / 10, "kl_nats": 0.1 * s, "eval_score": s / 11, "score/gold": 5.0} for s in range(1, 6)
    ]
    stage(tmp_path, "ppo", {}, rows)
    stage(tmp_path, "evaluation", {"evaluation": SUMMARY["evaluation"]})
    page = write_report(tmp_path).read_text()
    figure = page[page.index("<figure>") : page.index("</figure>")]
    for name in ("training prompts", "held out", "evaluation", "gold score", "score/gold", "gold, held out"):
        assert f">{name}</text>" in figure, name


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (3, "3"), (12345.6, "12,346"), (0.0, "0.00"), (0.0012, "0.0012"), (-0.5, "-0.50")]
)
def test_numbers_are_short(value: Any, text: str) -> None:
    assert number(value) == text


# ---------------------------------------------------------------- console


@pytest.fixture
def plain_console(capsys: pytest.CaptureFixture) -> Any:
    console.cache_clear()
    yield capsys
    console.cache_clear()


def test_the_final_table_fits_a_log(plain_console: Any) -> None:
    final_table(SUMMARY)
    shown = plain_console.readouterr().out
    assert "73.1% [70.1, 76.0]" in shown
    assert "right on 62.0% [60.0, 64.0]" in shown
    assert max(map(len, shown.splitlines()[:8])) <= 120


def test_the_final_table_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("rlhf.run.console.console", lambda: Console(width=40, highlight=False))
    final_table(SUMMARY | {"stages": {}, "seconds": {}})
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].strip() == "Evaluation on held-out prompts"
    assert "  win rate vs SFT: 73.1% [70.1, 76.0]" in shown
    assert max(len(line) for line in shown[:16]) <= 40


@pytest.mark.parametrize("width", [30, 40, 60, 80, 90, 100, 110, 140])
def test_nothing_is_cut_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every column that there is, on a terminal: lines break between words, numbers stay whole."""
    shown = io.StringIO()
    made = Console(file=shown, width=width, highlight=False, force_terminal=True, color_system=None)
    monkeypatch.setattr("rlhf.run.console.console", lambda: made)
    policies = {
        name: dict(entry) | {"train_seconds": 345.0, "score_calls": 7168} if name == "ppo" else entry
        for name, entry in SUMMARY["evaluation"].items()
    }
    final_table(SUMMARY | {"evaluation": policies})
    text = shown.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert {"73.1%", "345.00", "7,168"} <= set(text.split())


def test_off_a_terminal_a_bar_is_few_plain_lines(plain_console: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("rlhf.run.console.time.monotonic", lambda: now[0])
    bar = StageBar("sft", total=100, done=20, every=10.0)
    for step in range(21, 101):
        now[0] += 0.5
        bar.update(step)
        bar.show({"loss": step / 1000})
    bar.close()
    bar.close()
    lines = plain_console.readouterr().out.splitlines()
    assert len(lines) == 4  # at 10, 20, 30 seconds, and at the end
    assert lines[0].split() == ["sft", "40/100", "30s", "left", "loss", "0.039"]
    assert lines[-1].split() == ["sft", "100/100", "40s", "loss", "0.1"]


def test_a_line_shows_brackets_as_they_are(plain_console: Any) -> None:
    stage_line("ppo", "accuracy [0.6, 0.7] [bold]")
    assert plain_console.readouterr().out == "ppo           accuracy [0.6, 0.7] [bold]\n"
