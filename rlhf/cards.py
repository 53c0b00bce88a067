"""Cards of a run: of the system, of each model, of the data. Every number is a fact bound to a file and its hash.

The system card follows the parts that published system cards have (GPT-4's, 2023; Mitchell et al. 2019 for models,
Gebru et al. 2021 for data), as far as a run's files speak of them. What was not measured says so, with the command
that would.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.artefacts import Artefacts, Fact, place_of, value_at
from rlhf.run.page import Answer, compared, note, page, table, text, write
from rlhf.run.stages import POLICIES

MODELS = ("base", "sft", "reward_model", "judge", *POLICIES[2:])
STAGES = ("data", "base", "sft", "rankings", "reward_model", "judge", *POLICIES[2:], "evaluation")
LAST = ("run_evals_sft", "run_evals", "judge_card_reward_model", "judge_card", "contamination")
BOUND = "Every value stands in the file that its row names; the files and their hashes are listed last."
FAILURES = 5  # samples of failures on a card


@dataclass(frozen=True)
class Sample:
    """A failure: the prompt, answers by name, and the file and line it stands in."""

    prompt: str
    answers: Mapping[str, str]
    source: str


@dataclass
class Section:
    """A part of a card."""

    heading: str
    facts: list[Fact] = field(default_factory=list)
    lacking: str = ""
    """What is said where there is no fact."""
    samples: list[Sample] = field(default_factory=list)


# ---------------------------------------------------------------- the system


def system_sections(artefacts: Artefacts) -> list[Section]:
    """Return the system card's parts."""
    return [
        Section("What it is", list(_identity(artefacts)), "Not known: no stage of this run has a manifest."),
        Section("Data", list(data_facts(artefacts)), "Not recorded: the run holds no data of its own."),
        Section("Training", list(_training(artefacts)), "Not recorded."),
        Section("Before and after", list(_policies(artefacts)), "Not measured: `rlhf evaluate_policy` does."),
        _measured(artefacts, "Evals", ("run_evals",), "`rlhf run_evals` asks what a set of items asks"),
        _measured(artefacts, "Judges", ("judge_card",), "`rlhf judge_card` sets a judge against people"),
        _measured(artefacts, "Safety", ("red_team", "moderation", "monitor"), "`rlhf red_team` attacks the policy"),
        Section("Calibration", list(_calibration(artefacts)),
                "Not measured: `rlhf run_evals --scoring likelihood` measures it, before and after."),
        _measured(artefacts, "Contamination", ("contamination",), "`rlhf contamination` compares evals with the data"),
        _measured(artefacts, "Prediction", ("predict_capability",), "`rlhf predict_capability` registers one"),
        Section("Failures", samples=list(failures(artefacts)), lacking="No samples were kept."),
        Section("Time and machine", list(_machine(artefacts)), "Not recorded."),
    ]  # fmt: skip


def _facts(*made: Fact | None) -> Iterator[Fact]:
    yield from (fact for fact in made if fact is not None)


def _identity(artefacts: Artefacts) -> Iterator[Fact]:
    last = next((name for name in ("ppo", "sft", "base") if artefacts.there(f"{name}/manifest.json")), None)
    if last is None:
        return
    file = f"{last}/manifest.json"
    yield from _facts(artefacts.fact("the policy's stage", file, "/stage"))
    for name in POLICIES:
        own = f"{name}/manifest.json"
        yield from _facts(
            artefacts.fact(f"{name}: starts from", own, "/base_model"),
            artefacts.fact(f"{name}: fingerprint of that", own, "/inputs/model"),
            artefacts.fact(f"{name}: rank of its LoRA adapter (none: full weights)", own, "/inputs/config/lora_rank"),
            artefacts.fact(f"{name}: parameters", own, "/outputs/parameters"),
        )
    yield from _facts(
        artefacts.fact("chat template's hash", file, "/template_hash"),
        artefacts.fact("tokenizer's hash", file, "/tokenizer_hash"),
    )


def data_facts(artefacts: Artefacts) -> Iterator[Fact]:
    """Yield what each stage was given as data, and each file of rows that the run made."""
    for stage in STAGES:
        file = f"{stage}/manifest.json"
        if not artefacts.there(file):
            continue
        for name in ("train_data", "eval_data", "prompts", "rankings", "seen_data"):
            yield from _facts(artefacts.fact(f"{stage}: fingerprint of {name}", file, f"/inputs/{name}"))
        yield from _facts(
            artefacts.fact(f"{stage}: made by", file, "/inputs/config/function"),
            artefacts.fact(f"{stage}: ranked by", file, "/inputs/config/labeler"),
        )
    for file in artefacts.files("data/*.jsonl", "rankings/*.jsonl"):
        yield artefacts.count(f"rows of {file}", file)


_SETTINGS = (
    "epochs", "updates", "batch_size", "prompts_per_batch", "rollout_size", "minibatch_size", "inner_epochs",
    "learning_rate", "lr_schedule", "kl_coef", "kl_target_nats", "temperature", "max_new_tokens", "lora_rank",
)  # fmt: skip


def _training(artefacts: Artefacts) -> Iterator[Fact]:
    for stage in MODELS:
        yield from stage_facts(artefacts, f"{stage}/manifest.json", f"{stage}: ")


def stage_facts(artefacts: Artefacts, file: str, prefix: str = "") -> Iterator[Fact]:
    """Yield a stage's settings and what it came to, from its manifest."""
    if not artefacts.there(file):
        return
    yield from _facts(artefacts.fact(f"{prefix}seed", file, "/seed"))
    fitted = value_at(artefacts.read(file), "/inputs/config/trains") == "head"  # in closed form, without a step
    for name in ("trains", "reads") if fitted else _SETTINGS:
        yield from _facts(artefacts.fact(f"{prefix}{name}", file, f"/inputs/config/{name}"))
    outputs = artefacts.read(file).get("outputs") or {}
    for name, value in outputs.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            place = place_of("outputs", name)
            ends = (f"{place}_ci/0", f"{place}_ci/1") if outputs.get(f"{name}_ci") else ()
            form = "{0} [{1}, {2}]" if ends else "{0}"
            yield from _facts(artefacts.fact(f"{prefix}result {name}", file, place, *ends, form=form))


def _policies(artefacts: Artefacts) -> Iterator[Fact]:
    for file in artefacts.files("*/evaluation.json"):
        content = artefacts.read(file)
        for policy in ("sft", "best_of_n", *POLICIES[2:]):
            for name in ("prompts", "score", "gold_score", "judge_score", "win_rate_vs_sft", "win_rate_vs_best_of_n",
                         "kl_nats", "response_tokens", "eos_rate", "refusal_rate"):  # fmt: skip
                place = place_of(policy, name)
                ci = "win_rate_ci" if name == "win_rate_vs_sft" else f"{name}_ci"
                ends = tuple(place_of(policy, ci, n) for n in (0, 1)) if value_at(content, place_of(policy, ci)) else ()
                form = "{0} [{1}, {2}]" if ends else "{0}"
                yield from _facts(artefacts.fact(f"{policy}: {name}", file, place, *ends, form=form))
        yield from _facts(
            artefacts.fact("judged by", file, "/judge/name"),
            artefacts.fact(
                "that judge's accuracy on held-out rankings", file, "/judge/accuracy", "/judge/accuracy_ci/0",
                "/judge/accuracy_ci/1", form="{0} [{1}, {2}]",
            ),
        )  # fmt: skip


def _measured(artefacts: Artefacts, heading: str, commands: Sequence[str], command: str) -> Section:
    """Return a section of the metrics that commands have left in the run."""
    facts = []
    for name in commands:
        for file in artefacts.files(f"*/{name}.json"):
            folder, content = file.partition("/")[0], artefacts.read(file)
            facts += list(_facts(*(artefacts.fact(f"{folder}: {n}", file, f"/{n}") for n in ("model", "usage_policy"))))
            metrics = content.get("metrics") if isinstance(content.get("metrics"), Mapping) else {}
            for metric in metrics or {}:
                if not metric.rpartition("/")[2].startswith(("choice_", "confidence", "calibration")):
                    place = place_of("metrics", metric)
                    facts += list(_facts(artefacts.measured(f"{folder}: {metric}", file, place)))
    return Section(heading, facts, f"Not measured: {command}.")


def _calibration(artefacts: Artefacts) -> Iterator[Fact]:
    for file in artefacts.files("*/run_evals.json"):
        for metric in artefacts.read(file).get("metrics") or {}:
            if metric.endswith("/calibration_error"):
                what = f"{file.partition('/')[0]}: {metric}"
                yield from _facts(artefacts.measured(what, file, place_of("metrics", metric)))
    for file in artefacts.files("*/reward_report.json"):
        what = f"{file.partition('/')[0]}: expected calibration error on held-out pairs"
        yield from _facts(artefacts.fact(what, file, "/calibration/ece"))


def _machine(artefacts: Artefacts) -> Iterator[Fact]:
    for stage in (*STAGES, *LAST):
        file = f"{stage}/manifest.json"
        yield from _facts(
            artefacts.fact(f"{stage}: seconds", file, "/seconds"),
            artefacts.fact(f"{stage}: finished", file, "/created"),
            artefacts.fact(f"{stage}: machine", file, "/machine"),
            artefacts.fact(f"{stage}: versions", file, "/versions"),
            artefacts.fact(f"{stage}: command", file, "/command"),
        )


def failures(artefacts: Artefacts) -> Iterator[Sample]:
    """Yield samples of failures: where the policy lost most against where it began, and wrong items of evals."""
    for file in artefacts.files("*/samples.jsonl"):
        rows = artefacts.rows(file)
        lost = [
            (change, number) for number, row in enumerate(rows) if (change := _change(row)) is not None and change < 0
        ]
        for _, number in sorted(lost)[:FAILURES]:
            row = rows[number]
            answers = {"before": str(row["sft"]), "after": str(row["ppo"])}
            yield Sample(str(row.get("prompt", "")), answers, f"{file}, row {number + 1}")
    for file in artefacts.files("*/items.jsonl"):
        if not artefacts.there(f"{file.rpartition('/')[0]}/run_evals.json"):
            continue
        about = artefacts.read(f"{file.rpartition('/')[0]}/run_evals.json").get("evals") or {}
        for number, row in [(n, row) for n, row in enumerate(artefacts.rows(file)) if _wrong(row, about)][:FAILURES]:
            asked = "\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
            answers = {str(name): str(answer) for name, answer in row["trials"][0]["answers"].items()}
            texts = "forbidden" if about[row["eval"]].get("class") == "Excludes" else "right"
            yield Sample(asked, {texts: " | ".join(row["ideal"]), **answers}, f"{file}, row {number + 1}")


def _change(row: Mapping[str, Any]) -> float:
    """Return how much better the policy's answer is than the one it began with; 0 where nobody has judged both."""
    for measure in ("gold_score", "judge_score", "score"):
        before, after = row.get(f"{measure}_sft"), row.get(f"{measure}_ppo")
        if before is not None and after is not None and "sft" in row and "ppo" in row:
            return float(after) - float(before)
    return 0.0


def _wrong(row: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    one = about.get(str(row.get("eval"))) or {}
    low = (one.get("bounds") or [0.0])[0]
    return all(trial["numbers"].get(one.get("metric")) == low for trial in row["trials"])


def metrics_of(artefacts: Artefacts) -> dict[str, Any]:
    """Return the metrics that the run's commands have left, named <folder>/<metric>."""
    found: dict[str, Any] = {}
    for file in [name for name in artefacts.hashes if name.endswith(".json")]:
        metrics = artefacts.read(file).get("metrics")
        if isinstance(metrics, Mapping):
            found |= {f"{file.partition('/')[0]}/{name}": metric for name, metric in metrics.items()}
    return found


# ---------------------------------------------------------------- writing


def markdown(title: str, sections: Sequence[Section], artefacts: Artefacts, header: Mapping[str, Any]) -> str:
    """Write a card as the hub reads it: a YAML header (huggingface_hub's ModelCardData), then a table per section."""
    from huggingface_hub import ModelCard, ModelCardData

    parts = [f"# {title}", BOUND]
    for section in sections:
        parts.append(f"## {section.heading}")
        if section.facts:
            rows = [[fact.what, fact.text, fact.source] for fact in section.facts]
            parts.append(_table(["what", "value", "from"], rows))
        parts += [_sample(sample) for sample in section.samples]
        if not section.facts and not section.samples:
            parts.append(section.lacking)
    parts += ["## Files", _table(["file", "sha256"], [[f, digest] for f, digest in sorted(artefacts.hashes.items())])]
    data = ModelCardData(**header).to_yaml()
    return str(ModelCard(f"---\n{data}\n---\n\n" + "\n\n".join(parts) + "\n"))


def as_page(title: str, sections: Sequence[Section], artefacts: Artefacts) -> str:
    """Write a card as a page."""
    parts = [note(BOUND)]
    for section in sections:
        parts.append(f"<h2>{text(section.heading)}</h2>")
        if section.facts:
            rows = [[fact.what, fact.text, fact.source] for fact in section.facts]
            parts.append(table((["what", "value", "from"], rows), "card"))
        for sample in section.samples:
            answers = [Answer(name, "", said) for name, said in sample.answers.items()]
            parts.append(compared(sample.prompt, answers, sample.source))
        if not section.facts and not section.samples:
            parts.append(note(section.lacking.replace("`", "")))
    files = [[file, digest] for file, digest in sorted(artefacts.hashes.items())]
    return page(title, "\n".join([*parts, f"<h2>Files</h2>{table((['file', 'sha256'], files), 'card')}"]))


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: str) -> str:
    """Write a value so that it stays one cell and no markup."""
    return re.sub(r"([\\`*<>|~]|(?<!\w)_|_(?!\w)|\](?=[(\[:]))", r"\\\1", " ".join(value.split()))


def _sample(sample: Sample) -> str:
    """Write a failure as quoted text: a fence longer than any in it."""
    said = "\n\n".join(
        [f"prompt:\n{sample.prompt}", *(f"{name}:\n{answer}" for name, answer in sample.answers.items())]
    )
    longest = max((len(run) for run in re.findall(r"`+", said)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{_cell(sample.source)}\n\n{fence}text\n{said}\n{fence}"


# ---------------------------------------------------------------- of one model


def holds_model(folder: Path) -> bool:
    """Return whether a complete stage's folder holds a model or an adapter."""
    there = [name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
    return bool(there) and (folder / "manifest.json").is_file()


def write_model_card(folder: Path) -> None:
    """Write a model's card as its folder's README.md, in place of peft's placeholder; a card that is there stays."""
    readme = folder / "README.md"
    if holds_model(folder) and not (readme.is_file() and BOUND in readme.read_text(encoding="utf-8", errors="replace")):
        write(readme, model_card(folder))


def model_card(folder: str | Path) -> str:
    """Write the card of one saved model from its stage's manifest, in place of peft's and trl's placeholder. Raises
    InputError where there is no manifest."""
    artefacts = Artefacts(folder)
    manifest = artefacts.read("manifest.json")
    stage = str(manifest.get("stage"))
    base = manifest.get("base_model")
    adapter = artefacts.there("adapter_config.json")
    header: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "tags": ["rlhf", stage]}
    header["pipeline_tag"] = "text-generation" if stage in POLICIES else "text-classification"
    if isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        header["base_model"] = base
    identity = _facts(
        artefacts.fact("stage", "manifest.json", "/stage"),
        artefacts.fact("starts from", "manifest.json", "/base_model"),
        artefacts.fact("fingerprint of that", "manifest.json", "/inputs/model"),
    )
    data = [
        fact
        for name in ("train_data", "eval_data", "reward_model")
        if (fact := artefacts.fact(f"fingerprint of {name}", "manifest.json", f"/inputs/{name}"))
    ]
    machine = _facts(
        *(artefacts.fact(name, "manifest.json", f"/{name}") for name in ("seconds", "created", "machine", "versions"))
    )
    sections = [
        Section("What it is", list(identity), "Not recorded."),
        Section("Data", data, "Not recorded."),
        Section("Training", list(stage_facts(artefacts, "manifest.json")), "Not recorded."),
        Section("Evaluation", lacking="In the run's system card: `rlhf system_card RUN`."),
        Section("Time and machine", list(machine), "Not recorded."),
    ]
    return markdown(f"A model of stage {stage}", sections, artefacts, header)
