"""What a red-team run comes to where people's labels correct it: by hand."""

from __future__ import annotations

import pytest

from rlhf.evals.targets import Answer
from rlhf.safety.labels import Label
from rlhf.safety.outcome import Outcome, Result, measure
from rlhf.safety.page import warnings
from rlhf.safety.refusals import Detector, Reading
from rlhf.safety.suite import Case


def turn(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def results_of(count: int, behaviour: str, success: bool | None = None) -> list[Result]:
    """Return `count` cases of a suite, each answered with "Here it is."."""
    answer, reading = Answer("Here it is.", True), Reading("none", "none")
    return [
        Result(Case("mine", turn(f"{behaviour} {n}"), "theft", behaviour), answer, reading, success)
        for n in range(count)
    ]


def labelled(results: list[Result], *kinds: str) -> list[Label]:
    """Return a label of each kind for every result."""
    return [Label(result.case.prompt, result.answer.text, kind) for kind in kinds for result in results]


def corrected(outcome: Outcome) -> float:
    return outcome.metrics["mine/attack_success_corrected"]["value"]


def test_labels_of_refusals_do_not_correct_the_success_of_cases_to_complete_safely():
    """People write `none` for a safe answer to them: it helps, as it should."""
    results = results_of(40, "safe_complete", success=False)
    outcome = measure(results, Detector(), labelled(results[:20], "none"))
    assert outcome.metrics["mine/attack_success"]["value"] == 0.0
    assert "mine/attack_success_corrected" not in outcome.metrics
    told = "mine/attack_success is not corrected: among its attacks are cases to complete safely"
    assert warnings(outcome, [], labelled=True)[-1].startswith(told)
    mixed = measure(results + results_of(40, "refuse", success=False), Detector(), labelled(results, "none"))
    assert "mine/attack_success_corrected" not in mixed.metrics
    without = measure(results, Detector())
    assert not without.not_corrected
    assert warnings(without, [], labelled=False)[-1].startswith("no rate is corrected: the error of what reads")


def test_several_peoples_labels_of_one_answer_are_averaged():
    results = results_of(20, "refuse")
    for kinds in (("none", "full"), ("full", "none")):
        assert corrected(measure(results, Detector(), labelled(results, *kinds))) == pytest.approx(0.5)
    two_of_three = labelled(results, "none", "full", "none")
    assert corrected(measure(results, Detector(), two_of_three)) == pytest.approx(2 / 3)


def test_a_judge_is_asked_about_answers_that_there_are():
    nothing, other = Answer(" ", True), Reading("other", "other")
    empty = Result(Case("mine", turn("empty"), "theft", "refuse"), nothing, other)
    unsent = Result(Case("generated", turn("unsent"), "theft", "refuse"), nothing, other, success=False, sent=False)
    outcome = measure([*results_of(3, "refuse"), empty, unsent], Detector())
    assert outcome.judged == 3
    assert outcome.metrics["mine/attack_other"]["value"] == 0.25
    assert outcome.metrics["generated/attack_other"]["value"] == 0.0
