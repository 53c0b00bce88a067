"""Watch a policy in use by its server's log.

    rlhf serve_policy --model runs/my/ppo --store log.db --log true
    rlhf monitor --store log.db --moderator runs/my/moderation \\
        --output_dir runs/my/monitor
    rlhf monitor --store log.db --moderator runs/my/moderation \\
        --reference runs/my/monitor/monitor.json --review review.db \\
        --output_dir runs/my/monitor_2

Flag rate, refusal rate, thumbs and lengths are compared with the first answers of the log, or with those of an earlier
run, which is how a slow change is seen when the log has expired. With --review, flagged conversations and a share of
the others queue in a store for `rlhf label`; what people decide measures the moderator and becomes review_rows.jsonl,
rows for `rlhf moderation`. Writes monitor.json and monitor.html, in which no text of a conversation stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf import config as configs
from rlhf.errors import InputError, RunStopped
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.owner import by_main
from rlhf_recipes.stage import SECTIONS, function_file

console.quiet()


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Watching a policy in use."""

    MOST_USED = ("store", "output_dir", "moderator", "reference", "reference_requests", "review", "on_alarm")

    store: str
    """The policy server's store, with its log."""
    output_dir: str
    """Where monitor.json, its page and review_rows.jsonl go."""
    source: Literal["log", "playground"] = "log"
    """log: every answer that a server with --log true kept; playground: conversations that people agreed to keep."""
    moderator: str | None = None
    """A moderation model's folder, or a function (file.py:name) from texts to verdicts; null: no flag rate."""
    refusals: str | None = None
    """A function (file.py:name) from an answer's text to whether it refuses; null: red_team's rule, for English."""
    reference: str | None = None
    """monitor.json of an earlier run, whose reference is used; null: the log's first reference_requests answers."""
    reference_requests: int = 500
    """Answers at the beginning of the log that the others are compared with."""
    window: int = 200
    """Answers whose lengths are compared with the reference's at a time."""
    factor: float = 4.0
    """The change of a rate's odds that is to be found soonest; above 1. A small one needs a long reference."""
    false_alarms: float = 0.02
    """Probability of an alarm in `horizon` answers of which nothing has changed."""
    horizon: int = 2000
    """Answers that `false_alarms` speaks of."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """At an alarm: warn: tell it; stop: also end with exit code 1, once everything is written."""
    review: str | None = None
    """Store in which flagged conversations queue for `rlhf label`; made where it is missing; null: none queues."""
    review_share: float = 0.01
    """Share of the conversations without a flag that queues, too: without them nobody sees what is missed."""
    review_overlap: int = 1
    """People who decide about each conversation."""
    categories: list[str] | None = None
    """Categories that people choose among, at most nine; null: those of the moderator's verdicts."""
    bf16: bool | None = None
    """Run a moderation model in bfloat16; null: where the hardware is fast at it."""
    seed: int = 0
    """Decides which conversations without a flag queue, and the simulation that alarms are set by."""

    def __post_init__(self) -> None:
        for name in ("reference_requests", "window", "horizon", "review_overlap"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.horizon < self.window:
            raise InputError(f"horizon={self.horizon} must be at least window={self.window}")
        if not self.factor > 1:
            raise InputError(f"factor={self.factor} must be above 1, say 4")
        for name in ("false_alarms", "review_share"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be above 0 and below 1")
        if self.categories is not None:
            from rlhf.collection.review import project_of

            project_of(self.categories)  # now, not once the log has been judged
        if self.review is not None and self.moderator is None:
            raise InputError("review: nothing is flagged without a moderator; name one")


def monitor(config: MonitorConfig) -> dict[str, Any]:
    """Read the log, compare, write; returns monitor.json's content."""
    from rlhf.collection.store import Store
    from rlhf.rows.jsonl import read_object
    from rlhf.run import page as html
    from rlhf.safety import logged
    from rlhf.safety import monitor as watch
    from rlhf.safety.monitor_page import page, verdict

    names = ("reference_requests", "window", "factor", "false_alarms", "horizon", "seed")
    rules = watch.Rules(**{name: getattr(config, name) for name in names})
    earlier = read_object(config.reference, "name monitor.json of an earlier run") if config.reference else None
    refused = configs.import_function(config.refusals) if config.refusals else logged.refuses
    flags, known = flags_of(config)
    with Store(config.store, create=False) as store:
        if gone := store.expire():
            console.stage_line("monitor", f"{gone:,} rows of {config.store} had expired and were erased")
        log = logged.read_log(store, config.source, flags, refused, read_by(config))
        reference = watch.reference_of(log, rules) if earlier is None else (
            watch.Reference.from_json(earlier.get("reference"), str(config.reference))
        )  # fmt: skip
        if reference.differs(log, "source"):
            seen = f"its reference is of source={reference.read_by['source']}, and this is {config.source}"
            raise InputError(f"{config.reference}: {seen}; leave --reference out, or name another")
        report = watch.monitor_report(log, reference, rules)
        reviewed = review(config, store, log, known) if config.review else {}
    folder = Path(config.output_dir)
    result = {"metrics": {**watch.metrics_of(report), **reviewed}, **report}
    write_json_atomic(folder / "monitor.json", result)
    written = html.write(folder / "monitor.html", page(report, Path(config.store).name, reviewed))
    console.stage_line("monitor", verdict(report))
    for line in report["not_compared"]:
        console.stage_line("warning", f"not compared: {line}")
    for alarm in report["alarms"]:
        console.stage_line("alarm", alarm["line"])
    console.stage_line("", str(written))
    if report["alarms"] and config.on_alarm == "stop":
        raise RunStopped(f"{len(report['alarms'])} alarms, the first: {report['alarms'][0]['line']}")
    return result


def read_by(config: MonitorConfig) -> dict[str, str]:
    """Return the fingerprints of the moderator and of the function of refusals: of their files, else of their names."""
    from rlhf.run.fingerprint import of_path

    named = {"moderator": config.moderator, "refusals": config.refusals or "rlhf.safety.refusals:rule"}
    found = {}
    for name, spec in named.items():
        if spec is not None:
            file = function_file(spec)
            found[name] = of_path(spec) if file is None else f"{of_path(file)}:{spec.rpartition(':')[2]}"
    return found


def flags_of(config: MonitorConfig) -> tuple[Callable[[Sequence[Any]], list[list[str]]] | None, list[str]]:
    """Return the function from conversations to flagged categories, and the categories that the moderator has."""
    if config.moderator is None:
        return None, []
    from reward_models.filtering import flagged_by, load_moderator, verdicts_of

    moderator = load_moderator(config.moderator, config.bf16)
    known = list(getattr(moderator, "categories", ()))

    def flags(conversations: Sequence[Any]) -> list[list[str]]:
        verdicts = verdicts_of(conversations, moderator)
        known.extend(name for own in verdicts for verdict in own for name in verdict.flagged if name not in known)
        return [flagged_by(own) for own in verdicts]

    return flags, known


def review(config: MonitorConfig, store: Any, log: Any, known: Sequence[str]) -> dict[str, Any]:
    """Queue conversations for people, and measure by what they have decided."""
    from rlhf.collection import review as reviews
    from rlhf.collection.store import Store
    from rlhf.rows.records import write_jsonl
    from rlhf.safety.logged import readable

    categories = list(config.categories or known)
    flags = {request.id: request.flagged or () for request in log.requests}
    conversations = [c for c in readable(store, config.source)[0] if c.id in flags]  # the server may go on writing
    with Store(str(config.review)) as queue:
        queue.expire()
        reviews.set_project(queue, categories)
        put = reviews.queue(
            queue, conversations, [flags[c.id] for c in conversations], config.review_share, config.seed,
            config.review_overlap,
        )  # fmt: skip
        decisions, none = reviews.decisions_in(queue)
    line = f"{put.flagged:,} flagged and {put.others:,} other conversations are in {config.review}"
    console.stage_line("review", f"{line}; rlhf label --store {config.review} --annotators '[anna]'")
    if put.empty:
        console.stage_line("review", f"{put.empty:,} have no answer to show")
    rows, left = reviews.training_rows(decisions, categories)
    if none or left:
        why = "their senders did not agree to it (nobody does in a log), or no category is named"
        told = f"{none:,} judgments are no decision; {left:,} decisions become no training row: {why}"
        console.stage_line("review", told if left else f"{none:,} judgments are no decision")
    if rows:
        write_jsonl(Path(config.output_dir) / "review_rows.jsonl", rows)
    else:  # those of an earlier run may be of somebody who has been erased since
        (Path(config.output_dir) / "review_rows.jsonl").unlink(missing_ok=True)
    return reviews.measured(decisions)


def main(argv: list[str]) -> None:
    config = configs.load(MonitorConfig, argv, section="monitor", known_sections=SECTIONS, description=__doc__ or "")
    by_main(lambda: monitor(config))


if __name__ == "__main__":
    configs.run(main)
