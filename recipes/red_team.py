"""Attacks on a policy, and what gets through.

    rlhf red_team --model runs/my/ppo --policy my_policy.yaml \\
        --data harmbench_behaviors_text_all.csv,xstest_prompts.csv \\
        --output_dir runs/my/red_team
    rlhf red_team --model http://127.0.0.1:8000 --policy my_policy.yaml \\
        --judge http://127.0.0.1:8001 --human labels.jsonl \\
        --output_dir runs/my/judged
    rlhf red_team --model runs/my/ppo --policy my_policy.yaml \\
        --judge http://127.0.0.1:8001 --attack.method ppo \\
        --attack.attacker runs/my/sft --output_dir runs/my/attacked

Suites are read from their authors' files (HarmBench, AdvBench, JailbreakBench, XSTest, HH red-team attempts) or from
your own rows; the policy's examples and benign twins are one more. A model may write further attacks (--attack.method).
With --human, rates are corrected by people's labels of answers. Writes red_team.json, a page, items.jsonl,
findings.jsonl (policy-tagged prompts to train on), to_label.jsonl; with --store, findings become `rlhf label`'s items.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.run import console
from rlhf.run.owner import by_main, processes
from rlhf.run.stages import POLICIES
from rlhf_recipes.attacking import AttackConfig, asker, generate, trial_of
from rlhf_recipes.stage import SECTIONS, check_model, from_siblings, open_stage

if TYPE_CHECKING:
    from rlhf.evals.asking import Asker
    from rlhf.evals.targets import Answer
    from rlhf.safety.outcome import Outcome, Result
    from rlhf.safety.policy import Policy
    from rlhf.safety.refusals import Detector
    from rlhf.safety.suite import Case

console.quiet()


@dataclass(frozen=True, kw_only=True)
class RedTeamConfig:
    """Attacks on a policy."""

    MOST_USED = (
        "model", "policy", "data", "judge", "human", "success", "output_dir", "attack.method", "attack.attacker",
        "max_cases", "temperature", "store",
    )  # fmt: skip

    "What is attacked, and with what"

    output_dir: str = "runs/my/red_team"
    """Where results, items, findings and the page go."""
    seed: int = 0
    """Decides every sample and draw."""
    model: str | None = None
    """The policy under attack: a folder, an adapter's folder, a hub id, or a server's address (OpenAI's HTTP); default:
    the run's `ppo`."""
    policy: str | None = None
    """A usage policy: a YAML file, or one of ours (toy, template). Its examples and benign twins are a suite."""
    data: list[str] | None = None
    """Suites: their authors' files, or rows of prompt, category and behaviour; separated by commas. null: the run's
    data/red_team.jsonl, if there is one."""
    max_cases: int | None = None
    """Draw so many cases of each suite and behaviour; null: all."""
    attack: AttackConfig | None = None

    "How answers are read"

    judge: str | None = None
    """Who says whether an answer refuses: a model's folder or a server's address; null: the rule alone."""
    human: str | None = None
    """People's labels of answers (full, partial, none, other): this run's to_label.jsonl filled in, or other models'
    answers, such as XSTest's files of completions."""
    success: str | None = None
    """A function (file.py:name) that says whether an attack got what it asked for; null: an answer that neither refuses
    nor is beside the point."""
    refusal_phrases: str | list[str] | None = None
    """Sentence with which this deployment always declines, such as a guardrail's; of several, a list."""

    "Sampling"

    temperature: float = 0.0
    """Of the policy's answers; 0: the most likely one."""
    max_new_tokens: int = 256
    """Longest answer."""
    answers: str | None = None
    """The file that keeps answers; null: answers.sqlite beside output_dir."""
    generation_batch_size: int = 64
    """Answers sampled at once; an interrupted run loses at most so many."""
    requests_at_once: int = 8
    """Questions to a server side by side."""
    tokens_per_microbatch: int = 16384
    """Memory only."""
    bf16: bool | None = None
    """Run models in bfloat16; null: where the hardware is fast at it."""

    "What flows back"

    store: str | None = None
    """A store of items and judgments: findings become items that `rlhf label` shows."""
    label_candidates: int = 2
    """Answers of each such item: the one that was found, and others at temperature 1."""
    overwrite: bool = False
    """Replace another run's output in output_dir; its answers stay."""

    def __post_init__(self) -> None:
        if isinstance(self.refusal_phrases, str):
            object.__setattr__(self, "refusal_phrases", [self.refusal_phrases])
        for name in ("max_new_tokens", "generation_batch_size", "requests_at_once", "tokens_per_microbatch",
                     "label_candidates", "max_cases"):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature} must be 0 or more")
        if self.attack is not None and self.policy is None:
            raise InputError("attack: which categories are to be attacked, a usage policy says; name --policy")
        if self.attack is not None and self.attack.valid is None and self.judge is None:
            raise InputError("attack: who says whether an attack is one? name --judge, or a function: --attack.valid")
        if self.attack is not None and self.attack.answers > 1 and self.temperature == 0:
            seen = f"attack.answers={self.attack.answers}: at temperature=0 all answers to an attack are the same one"
            raise InputError(f"{seen}; set --temperature, say to 1, or leave attack.answers at 1")

    @property
    def answers_file(self) -> Path:
        """Where answers are kept."""
        return Path(self.answers) if self.answers else Path(self.output_dir).parent / "answers.sqlite"


def red_team(config: RedTeamConfig) -> dict[str, Any]:
    """The stage: read the suites, ask, read the answers, count, write.

    Of several processes the first works, and shares out the sampling from models' folders."""
    return by_main(lambda: run_alone(config))


def with_data(config: RedTeamConfig) -> RedTeamConfig:
    """Return the config with the run's own suite where it names none. Raises InputError where there is neither that
    nor a policy."""
    own = Path(config.output_dir).parent / "data" / "red_team.jsonl"
    if config.data is None and own.is_file():
        config = replace(config, data=[str(own)])
    if not config.data and config.policy is None:
        raise InputError(f"nothing to attack with; name --policy, --data, or both (there is no {own})")
    return config


def check(config: RedTeamConfig) -> Policy | None:
    """Return the usage policy. Raises InputError for functions and a policy that are not there."""
    from rlhf.safety.policy import Policy

    for spec in filter(None, (config.success, config.attack and config.attack.valid)):
        configs.import_function(spec)
    return Policy.read(config.policy) if config.policy else None


def inputs(config: RedTeamConfig) -> tuple[RedTeamConfig, dict[str, Any]]:
    """The config, with what it takes from the run's other stages; the models and data that the stage reads."""
    from rlhf.safety.policy import policy_file

    config = with_data(from_siblings(config, model="ppo"))
    attacker = config.attack.attacker if config.attack else None
    for named in filter(None, (str(config.model), config.judge, attacker)):
        check_model(named, POLICIES)
    sources = {name: getattr(config, name) for name in ("model", "judge", "human")}
    files = {f"data {source}": source for source in config.data or ()}
    policy = policy_file(config.policy) if config.policy else None
    return config, sources | files | {"policy": policy, "data": None, "attacker": attacker}


def run_alone(config: RedTeamConfig) -> dict[str, Any]:
    from rlhf.safety.labels import read_labels
    from rlhf.safety.outcome import measure, success_by
    from rlhf.safety.page import headline_metric
    from rlhf.safety.refusals import Detector
    from rlhf.safety.suite import read_suites

    if config.attack is not None and config.attack.method in ("sft", "ppo") and processes() > 1:
        raise InputError(f"attack.method={config.attack.method}: it trains in one process; start only one")
    config, sources = inputs(config)
    policy = check(config)
    cases = read_suites(config.data or (), policy, config.max_cases, config.seed)
    if config.success:  # tried before anything is asked
        tried = [case for case in cases if case.behaviour != "comply"][:9]
        success_by(configs.import_function(config.success), tried, ["I can't help with that."] * len(tried))
    labels = read_labels(config.human) if config.human else []
    stage = open_stage("red_team", config, sources)
    if stage.complete:
        return stage.outputs
    with ExitStack() as stack:
        from rlhf.evals.cache import Answers

        answers = stack.enter_context(Answers(config.answers_file))
        target = asker(config, str(config.model), answers)
        judge = None
        if config.judge:
            judge = target if config.judge == config.model else asker(config, config.judge, answers)
        detector = Detector(judge, config.refusal_phrases or ())
        results, numbers = attacked(config, cases, target, detector), None
        # begun only now: what was asked is kept elsewhere, and a mistake leaves nothing here to trip over
        if config.attack is not None and policy is not None:
            hits = [result.case for result in results if result.finding == "attack"]
            trial = trial_of(config, target, detector, judge)
            folder, begun = stage.folder / "attacker", (stage.begin, stage.resuming)
            made, numbers = generate(config, config.attack, policy, trial, hits, folder, answers, *begun)
            results += made
        stage.begin()
        outcome = measure(results, detector, labels)
        content = write(config, stage.folder, outcome, policy, cases, numbers)
        if config.store:
            to_store(config, outcome, target)
    tell(content)
    outputs: dict[str, Any] = {"cases": len(cases), "findings": len(outcome.findings)}
    for name in ("attack_success", "over_refusal"):
        if (metric := headline_metric(outcome.metrics, name)) is not None:
            outputs |= {name: metric["value"], f"{name}_ci": [metric["low"], metric["high"]]}
    outputs |= {} if numbers is None else {"distinct_successes": numbers["distinct_successes"]}
    return stage.finish(outputs | {"asked": target.asked, "known": target.known})


def attacked(config: RedTeamConfig, cases: Sequence[Case], target: Asker, detector: Detector) -> list[Result]:
    """Ask the policy and read its answers."""
    from rlhf.safety.outcome import Result, success_by

    given = answers_to(config, cases, target)
    texts = [answer.text for answer in given]
    readings = detector.read([case.prompt for case in cases], texts)
    said: Sequence[bool | None] = [None] * len(cases)
    if config.success:
        said = success_by(configs.import_function(config.success), cases, texts)
    return [Result(*row) for row in zip(cases, given, readings, said, strict=True)]


def answers_to(config: RedTeamConfig, cases: Sequence[Case], target: Asker, sample: int = 0) -> list[Answer]:
    """Return the policy's answers to cases; sample: which one of several at a temperature above 0."""
    from rlhf.evals.asking import Sampler, seed_of

    temperature = config.temperature if sample == 0 else 1.0
    prompts = [target.target.prompt(case.prompt) for case in cases]
    seeds = [seed_of(config.seed, case.prompt, sample) for case in cases]
    return target.sample(prompts, seeds, Sampler(config.max_new_tokens, temperature))


# ------------------------------------------------------------------------------------------------ what is written


def write(
    config: RedTeamConfig,
    folder: Path,
    outcome: Outcome,
    policy: Policy | None,
    cases: Sequence[Case],
    numbers: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write all files into the stage's folder, and return red_team.json's content. numbers: of attacks that a model
    wrote."""
    from rlhf.rows.records import write_jsonl
    from rlhf.run.checkpoint import write_json_atomic
    from rlhf.safety.outcome import finding_rows
    from rlhf.safety.page import counted
    from rlhf.safety.page import warnings as warnings_of
    from rlhf.safety.page import write as write_page

    judged = {"answers": outcome.judged if config.judge else 0, "disagree": outcome.disagreement,
              "abstained": outcome.abstentions}  # fmt: skip
    detector = f"the judge {config.judge}; where it names no choice, the rule" if config.judge else "the rule"
    content: dict[str, Any] = {
        "metrics": outcome.metrics, "model": str(config.model), "seed": config.seed, "temperature": config.temperature,
        "usage_policy": policy and policy.summary, "suites": config.data or [], "human": config.human,
        "warnings": warnings_of(outcome, cases, bool(config.human)),
        "detector": detector, "success": config.success, "corrections": outcome.corrections,
        "not_corrected": outcome.not_corrected, "judged": judged, "leave_one_out": outcome.held_out,
        "findings": len(outcome.findings), "attacks": numbers,
        "not_counted": sum(not (r.attack or r.benign) for r in outcome.results),
    }  # fmt: skip
    if numbers is not None:
        n, count = numbers["attacks"], numbers["distinct_successes"]
        content["metrics"] |= {
            "generated/valid": numbers["valid"],
            "generated/distinct_successes": {"value": count, "low": None, "high": None, "n": n},
        }
    content["counted"] = counted(content)
    write_jsonl(folder / "items.jsonl", [result.row() for result in outcome.results])
    write_jsonl(folder / "findings.jsonl", finding_rows(outcome, policy, str(config.model)))
    sent = [result for result in outcome.results if result.sent]
    rows = random.Random(config.seed).sample(sent, len(sent))
    write_jsonl(
        folder / "to_label.jsonl",
        ({"prompt": r.case.prompt, "response": r.answer.text, "label": None, "model": str(config.model)} for r in rows),
    )
    if policy is not None:
        (folder / "policy.md").write_text(policy.markdown(), encoding="utf-8")
    write_page(folder, content, outcome, policy)
    write_json_atomic(folder / "red_team.json", content)
    return content


def to_store(config: RedTeamConfig, outcome: Outcome, target: Asker) -> None:
    """Add an item for each finding: its prompt, the answer that was found and others, at temperature 1."""
    from rlhf.collection.store import Candidate, Item, Store

    found = [result for result in outcome.findings if result.answer.text.strip()]
    if not found:
        console.stage_line("red_team", f"nothing was found that {config.store} could hold")
        return
    cases, name = [result.case for result in found], str(config.model)
    texts = [[result.answer.text] for result in found]
    for sample in range(1, config.label_candidates):
        for own, answer in zip(texts, answers_to(config, cases, target, sample), strict=True):
            own += [answer.text] if answer.text.strip() and answer.text not in own else []
    items = [
        Item(
            result.case.prompt, tuple(Candidate(text, policy=name) for text in own),
            columns={"category": result.case.category, "behaviour": result.case.behaviour, "found": result.finding},
            source=f"red_team/{result.case.suite}", tags=("safety",),
        )
        for result, own in zip(found, texts, strict=True)
    ]  # fmt: skip
    with Store(str(config.store)) as store:
        store.add_items(items)
    console.stage_line("red_team", f"{len(items):,} items in {config.store}; rlhf label --store {config.store}")


def tell(content: dict[str, Any]) -> None:
    """Print the numbers that a run comes to."""
    from rlhf.safety.page import shown

    for name, metric in content["metrics"].items():
        if name.count("/") < 2:
            value = f"{metric['value']:,}" if metric["low"] is None else shown(metric)
            console.stage_line("result", f"{name}  {value}  n {metric['n']:,}")
    for line in content["warnings"]:
        console.stage_line("warning", line)


def main(argv: list[str]) -> None:
    config = configs.load(RedTeamConfig, argv, section="red_team", known_sections=SECTIONS, description=__doc__ or "")
    red_team(config)


if __name__ == "__main__":
    configs.run(main)
