"""The monitor: what it reads of a log, what alarms, and that no text leaves the log."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf.collection.store import Conversation, Feedback, Store
from rlhf.errors import InputError
from rlhf.safety.drift import Counted
from rlhf.safety.logged import Log, Request, read_log
from rlhf.safety.monitor import Reference, Rules, after, metrics_of, monitor_report, reference_of, watched
from rlhf.safety.monitor_page import page

HOSTILE = "<script>alert(1)</script>"
RULES = Rules(reference_requests=60, window=40, horizon=200)


def conversation(n: int, answer: str, **more) -> Conversation:
    given = {"source": "log", "scrubbed": True, "expires": 10_000.0, "created": 100.0 + n, "policy": "ppo",
             "fingerprint": "f" * 64, "sampler": {"temperature": 1.0}, "seed": n}  # fmt: skip
    talk = [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": answer}]
    return Conversation(id=f"c{n:05}", messages=talk, person="anonymous", **(given | more))


def bad_words(conversations):
    return [["insult"] if "fool" in talk[-1]["content"] else [] for talk in conversations]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "log.db", clock=lambda: 5_000.0) as opened:
        yield opened


def test_what_is_read(store):
    store.add_conversation(conversation(0, "I'm sorry, I can't do that."))
    store.add_conversation(conversation(1, "You fool."))
    store.add_conversation(conversation(2, "not looked through", scrubbed=False))
    store.add_conversation(conversation(3, "gone", expires=4_999.0))
    store.add_conversation(conversation(4, "of the chat page", source="playground", consent=True))
    for n, thumb in enumerate((1, -1)):
        store.add_feedback(Feedback(id=f"feedback-{n}", person="p", kind="thumb", thumb=thumb, created=50.0 + n))
    store.add_feedback(Feedback(id="feedback-9", person="p", kind="thumb", thumb=1, expires=4_000.0))
    log = read_log(store, flags=bad_words)
    assert [(r.refused, r.flagged, r.characters, r.seed) for r in log.requests] == [
        (True, (), 27, 0), (False, ("insult",), 9, 1),
    ]  # fmt: skip
    assert (log.unscrubbed, log.expired) == (1, 1)
    assert log.thumbs == ((50.0, True), (51.0, False))
    assert [r.id for r in read_log(store, "playground").requests] == ["c00004"]
    assert read_log(store).requests[0].flagged is None


def filled(store, after_reference) -> None:
    """Log 60 quiet answers, then others."""
    draw = np.random.default_rng(0)
    for n in range(60):
        store.add_conversation(conversation(n, "You fool." if n % 20 == 0 else "word " * int(draw.integers(5, 50))))
    for n, answer in enumerate(after_reference, start=60):
        store.add_conversation(conversation(n, answer))


def test_changes_alarm_and_are_told_with_advice(store):
    filled(store, ["You fool! I cannot say more." if n % 2 else "I can't. " + "long " * 200 for n in range(80)])
    log = read_log(store, flags=bad_words)
    report = monitor_report(log, reference_of(log, RULES), RULES)
    told = {alarm["signal"]: alarm for alarm in report["alarms"]}
    assert set(told) == {"flag_rate", "refusal_rate", "length_psi", "length_ks_p"}
    assert told["flag_rate"]["line"].startswith("flag_rate=0.5")
    assert "above 0.05, the reference's: what people ask" in told["flag_rate"]["line"]  # 3 of 60
    assert told["length_psi"]["at"] == 40
    metrics = metrics_of(report)
    assert metrics["flag_rate"]["value"] == 0.5
    assert metrics["refusal_rate"]["n"] == 80
    assert metrics["alarms"]["value"] == 4
    assert report["categories"] == {"insult": 40}
    assert report["not_compared"] == []
    shown = page(report, "log.db")
    assert "Changed against the reference: " in shown
    assert "lengths (PSI), lengths (KS test)" in shown
    assert "<td>flag rate, rise</td><td>5.0%</td>" in shown


def test_a_quiet_log_is_quiet_and_thumbs_that_fall_are_not(store):
    draw = np.random.default_rng(1)
    filled(store, ["word " * int(draw.integers(5, 50)) for _ in range(80)])
    for n in range(90):
        up = n < 50 and n % 10 != 0
        given = {
            "person": "p",
            "kind": "thumb",
            "thumb": 1 if up else -1,
            "created": 100.0 + n + (20 if n >= 50 else 0),
        }
        store.add_feedback(Feedback(id=f"feedback-{n}", **given))
    log = read_log(store, flags=bad_words)
    report = monitor_report(log, reference_of(log, RULES), RULES)
    assert [alarm["signal"] for alarm in report["alarms"]] == ["thumbs_up_rate"]
    assert "No alarm" not in page(report, "log.db")


def test_a_kept_reference_goes_on_when_the_log_has_expired(store):
    filled(store, ["word " * 20] * 10)
    log = read_log(store, flags=bad_words)
    first = reference_of(log, RULES)
    again = Reference.from_json(json.loads(json.dumps(first.to_json())), "monitor.json")
    assert again == first
    assert [request.id for request in after(log, again)] == [f"c{n:05}" for n in range(60, 70)]
    for broken in (None, {}, {**first.to_json(), "refused": None}, {**first.to_json(), "lengths": []}):
        with pytest.raises(InputError, match=r"monitor\.json: (holds no reference|its reference is empty)"):
            Reference.from_json(broken, "monitor.json")
    store.add_conversation(conversation(70, "not looked through", scrubbed=False))
    with pytest.raises(
        InputError, match=r"70 answers may be read \(1 may not: personal data .*, the reference needs 500"
    ):
        reference_of(read_log(store), Rules())


def test_what_makes_a_short_reference_longer_depends_on_the_source(store):
    store.add_conversation(conversation(0, "Yes."))
    store.add_conversation(conversation(1, "Yes.", source="playground", consent=True))
    for source, advice in (("log", "log more"), ("playground", "wait until more people agree on the chat page")):
        with pytest.raises(InputError, match=rf"1 answers .*, the reference needs 60; {advice} .*, or lower it"):
            reference_of(read_log(store, source), RULES)


def test_what_is_not_compared_is_told(store):
    filled(store, ["word " * 20] * 10)
    judged, unjudged = read_log(store, flags=bad_words), read_log(store)
    few = "lengths: 10 answers are not yet a window of 40"
    for log, reference, line in (
        (judged, reference_of(unjudged, RULES), "flag_rate: the reference was made without a moderator"),
        (unjudged, reference_of(judged, RULES), "flag_rate: the reference has one, and no moderator judged"),
    ):
        report = monitor_report(log, reference, RULES)
        assert [told.split(";")[0][: len(line)] for told in report["not_compared"]] == [line, few]
        assert few in page(report, "log.db")
    assert monitor_report(unjudged, reference_of(unjudged, RULES), RULES)["not_compared"] == [few]


def test_rates_that_others_read_are_not_compared(store):
    """All answers behind the reference are flagged and refuse, by a moderator and a rule that it did not know."""
    filled(store, ["I can't help, you fool."] * 40)
    read_by = {"moderator": "a", "refusals": "b"}
    before = reference_of(read_log(store, flags=bad_words, read_by=read_by), RULES)
    kept = Reference.from_json(json.loads(json.dumps(before.to_json())), "monitor.json")
    for changed, signal in (("moderator", "flag_rate"), ("refusals", "refusal_rate")):
        report = monitor_report(read_log(store, flags=bad_words, read_by=read_by | {changed: "c"}), kept, RULES)
        (told,) = report["not_compared"]
        assert told.startswith(f"{signal}: the reference was made with another --{changed}; ")
        both = {"flag_rate", "refusal_rate"}
        assert both & {alarm["signal"] for alarm in report["alarms"]} == both - {signal}
        assert signal not in {chart["signal"] for chart in report["charts"]}
        assert report[signal]["value"] == 1.0
        page(report, "log.db")
    older = before.to_json()
    del older["read_by"]
    log = read_log(store, flags=bad_words, read_by=read_by)
    assert monitor_report(log, Reference.from_json(older, "monitor.json"), RULES)["not_compared"] == []


def test_a_chart_whose_level_is_0_is_shown(store):
    """Nothing in 20,000 answers is flagged, and an alarm may be false in three of ten runs."""
    filled(store, ["word " * 20] * 40)
    log = read_log(store, flags=bad_words)
    report = monitor_report(log, reference_of(log, RULES), RULES)
    report["charts"][0] |= {"level": 0.0, "highest": 0.0}
    assert "0%" in page(report, "log.db")
    report["charts"][0]["highest"] = 0.1
    assert "alarm" in page(report, "log.db")


def test_numbers_of_a_window_are_the_last_full_ones(store):
    filled(store, ["word " * 20] * 40 + ["word " * 200] * 3)
    log = read_log(store)
    report = monitor_report(log, reference_of(log, RULES), RULES)
    assert [row["answers"] for row in report["windows"]] == [40, 3]
    for name in ("length_psi", "mix_psi"):
        found = metrics_of(report)[name]
        assert (found["value"], found["n"]) == (report["windows"][0][name], 40)
    short = Rules(reference_requests=100, window=40, horizon=200)
    assert not {"length_psi", "mix_psi"} & metrics_of(monitor_report(log, reference_of(log, short), short)).keys()


def test_a_function_of_refusals_says_yes_or_no(store):
    store.add_conversation(conversation(0, "No."))
    for wrong in ([True], None, "yes"):
        with pytest.raises(InputError, match=r"refusals: <lambda> returned .* for an answer; return True where"):
            read_log(store, refused=lambda answer, said=wrong: said)
    assert read_log(store, refused=lambda answer: np.bool_(True)).requests[0].refused is True


def test_no_text_leaves_the_log_and_names_are_inert(store):
    for n in range(130):
        policy = HOSTILE if n > 100 else "ppo"
        store.add_conversation(conversation(n, f"secret {n} {HOSTILE}", policy=policy, sampler={"stop": [HOSTILE]}))

    def hostile(conversations):
        return [[HOSTILE] if n % 3 else [] for n, _ in enumerate(conversations)]

    log = read_log(store, flags=hostile)
    report = monitor_report(log, reference_of(log, RULES), RULES)
    assert report["windows"][-1]["mix_psi"] > report["windows"][0]["mix_psi"]
    assert len(report["policies"]) == 2
    for written in (json.dumps(report), page(report, HOSTILE, {})):
        assert "secret" not in written
        assert "question" not in written
    assert "<script" not in page(report, HOSTILE, {})


@pytest.mark.parametrize(("signal", "direction", "line"), [
    ("refusal_rate", "rise", "refusal_rate=1 is above 0.5, "),  # though of the last 200 answers no more than 0.15
    ("refusal_rate", "fall", "refusal_rate=0 is below 0.5, "),
    ("thumbs_up_rate", "fall", "thumbs_up_rate=0 is below 0.167, "),  # none of 2, half a case of either kind added
])  # fmt: skip
def test_an_alarm_tells_the_rate_since_its_chart_left_zero(signal, direction, line):
    happened = [direction == "fall"] * 170 + [direction == "rise"] * 400
    requests = tuple(Request(f"{n:03}", n, "ppo", "f", "{}", 0, 1, up) for n, up in enumerate(happened))
    log = Log(requests, tuple((float(n), up) for n, up in enumerate(happened)))
    reference = Reference(
        until=-1.0, last="", flagged=None, refused=Counted(250, 500), thumbs_up=Counted(0, 2), lengths=[1.0]
    )
    charts = {(one.signal, one.direction): one for one in watched(log, reference, Rules(horizon=50))}
    alarm = charts[signal, direction].alarm
    assert alarm.at > 171
    assert alarm.line.startswith(line)
