"""The report and the final table: right numbers, all text escaped, nothing fetched, missing parts allowed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import InputError
from rlhf.run.console import StageBar, console, final_table, stage_line
from rlhf.run.report import families, gold_parts, headline, notes, number, write_report

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
    links = Links()
    links.feed(page)
    assert [address for address in links.addresses if not address.startswith("#")] == []
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
