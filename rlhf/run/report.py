"""A report of a run or of one stage: report.html (one file, no network: verdict, tables, curves, samples), report.md.

It is made from what lies in the folder: the stages' manifests and `metrics.jsonl`, samples. Parts that
are not there are left out. Text from models and users is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.metrics import left_healthy_range, read_metrics
from rlhf.rows.jsonl import read_rows
from rlhf.run import page as html
from rlhf.run import verdict
from rlhf.run.curves import curves, frontier, is_ppo
from rlhf.run.page import Table
from rlhf.run.stages import Manifest
from rlhf.run.tables import (
    Json,
    duration,
    families,
    gold_parts,
    headline,
    notes,
    number,
    percent,
    stage_results,
    with_interval,
    words,
)

__all__ = [
    "families", "gold_parts", "headline", "notes", "number", "percent", "stage_results", "summary_of", "with_interval",
    "write_report",
]  # fmt: skip

SAMPLES = 12
ORDER = (
    "data", "base", "sft", "rankings", "reward_model", "judge", "process_reward", "ppo", "evaluation", "run_evals_sft",
    "run_evals", "judge_card_reward_model", "judge_card", "contamination",
)  # fmt: skip
MEASURES = ("gold_score", "judge_score", "score")
"""What a sample's gain is measured by: the first of them that it has."""


@dataclass(frozen=True)
class StageFiles:
    """What a stage has left in its folder: its manifest, once it is complete, and its logged lines."""

    name: str
    folder: Path
    manifest: Manifest | None
    rows: list[dict[str, float]]

    @classmethod
    def of(cls, folder: Path) -> StageFiles:
        manifest = Manifest.read(folder) if (folder / "manifest.json").is_file() else None
        metrics = folder / "metrics.jsonl"
        return cls(folder.name, folder, manifest, read_metrics(metrics) if metrics.is_file() else [])


def write_report(run_folder: str | Path, summary: Json | None = None) -> Path:
    """Write ``report.html`` and ``report.md`` into a run's folder or a stage's; return the path of ``report.html``.

    summary: as `summary_of` gives it; None: gather it from the stages' manifests.
    """
    folder = Path(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    stages = list(find_stages(folder))
    summary = summary_of(folder, stages) if summary is None else summary
    title = f"{'Stage' if is_stage(folder) else 'RLHF run'} {folder.resolve().name}"
    sentence = verdict.of_run(summary, {stage.name: stage.rows for stage in stages})
    advice = {stage.name: found for stage in stages if (found := left_healthy_range(stage.rows))}
    html.write(folder / "report.md", _markdown(title, sentence, summary, stages, advice))
    return html.write(folder / "report.html", _page(folder, title, sentence, summary, stages, advice))


def is_stage(folder: Path) -> bool:
    """Return whether a folder is a stage's own, and not a run of several."""
    return any((folder / name).is_file() for name in ("manifest.json", "inputs.json", "metrics.jsonl"))


def find_stages(folder: Path) -> Iterator[StageFiles]:
    """Find the stages of a run in their order, or the stage that a folder is."""
    if is_stage(folder):
        yield StageFiles.of(folder)
        return
    found = [inner for inner in folder.iterdir() if inner.is_dir() and is_stage(inner)]
    for inner in sorted(found, key=lambda inner: (ORDER.index(inner.name) if inner.name in ORDER else 99, inner.name)):
        yield StageFiles.of(inner)


def summary_of(folder: Path, stages: Sequence[StageFiles]) -> Json:
    """Gather a run's summary from the stages' manifests: its summary.json is of the last chain, and a stage may have
    been run again since."""
    done = [(stage.name, stage.manifest) for stage in stages if stage.manifest]
    outputs = {name: dict(manifest.outputs) for name, manifest in done}
    compared = next((outputs.pop(name) for name, manifest in done if manifest.stage == "evaluation"), {})
    if compared.get("reward_model") and "reward_model" in outputs:
        outputs["reward_model"] = compared["reward_model"] | outputs["reward_model"]
    seconds = {name: round(manifest.seconds, 1) for name, manifest in done}
    return {"stages": outputs, "evaluation": compared.get("evaluation", {}), "seconds": seconds}


# ---------------------------------------------------------------- how it was made


def origins(stages: Sequence[StageFiles]) -> tuple[Table, Table]:
    """Make two tables: each stage's state, end, time and seed; and the commands, versions and machines."""
    rows, about = [], {"command": {}, "versions": {}, "machine": {}}  # type: ignore[var-annotated]
    for stage in stages:
        made = stage.manifest
        if made is None:
            rows.append([stage.name, "not complete", "", ""])
            continue
        rows.append([stage.name, made.created.replace("T", " ")[:16] + " UTC", duration(made.seconds), str(made.seed)])
        versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
        for name, value in (("command", made.command), ("versions", versions), ("machine", made.machine)):
            if value:
                about[name].setdefault(value, []).append(stage.name)
    facts = [
        [name if len(values) == 1 else f"{name} ({', '.join(of)})", value]
        for name, values in about.items()
        for value, of in values.items()
    ]
    return (["stage", "finished", "time", "seed"], rows), (["", ""], facts)


def pages_of(folder: Path) -> list[tuple[str, str]]:
    """Find the other pages of a run: (label, path from the run's folder)."""
    found = [*folder.glob("*.html"), *folder.glob("*/*.html")]
    paths = sorted(path.relative_to(folder).as_posix() for path in found if not path.name.startswith("row-"))
    shown = [(words(path.removesuffix(".html").removesuffix("/index")), path) for path in paths]
    above = folder.parent / "report.html"
    up = [("the run's report", "../report.html")] if is_stage(folder) and above.is_file() else []
    return up + [(text, path) for text, path in shown if path != "report.html"]


# ---------------------------------------------------------------- samples


def _lines(path: Path) -> list[Json]:
    """Read a samples.jsonl. Only "\\n" ends a line: a text may hold U+2028."""
    return [row for _, row in read_rows(path)] if path.is_file() else []


def _gain(row: Json) -> float | None:
    """Return how much better PPO's response is than SFT's."""
    for measure in MEASURES:
        before, after = row.get(f"{measure}_sft"), row.get(f"{measure}_ppo")
        if before is not None and after is not None:
            return float(after - before)
    return None


def _chosen(rows: Sequence[Json]) -> dict[str, list[Json]]:
    """Choose samples, the largest gains first, then the largest losses, then others, in the order of the file."""
    gains = sorted((row for row in rows if (_gain(row) or 0) > 0), key=lambda row: -(_gain(row) or 0))
    losses = sorted((row for row in rows if (_gain(row) or 0) < 0), key=lambda row: _gain(row) or 0)
    share = max(SAMPLES // 2, SAMPLES - len(losses))
    better = gains[:share]
    worse = losses[: SAMPLES - len(better)]
    rest = [row for row in rows if not _gain(row)][: SAMPLES - len(better) - len(worse)]
    return {"Largest gains": better, "Largest losses": worse, "Others": rest}


def _sample(row: Json) -> str:
    answers = []
    for name in ("sft", "ppo"):
        scores = {measure: row.get(f"{measure}_{name}") for measure in ("score", "gold_score", "judge_score")}
        facts = [f"{words(measure)} {number(score)}" for measure, score in scores.items() if score is not None]
        answers.append(html.Answer(name.upper(), " · ".join(facts), str(row.get(name, ""))))
    return html.compared(str(row.get("prompt", "")), answers, str(row.get("family") or ""))


def _rollout_samples(rows: Sequence[Json]) -> str:
    """Show the responses of the last logged update, the highest score first."""
    step = max((row.get("step", 0) for row in rows), default=0)
    last = [row for row in rows if row.get("step", 0) == step]
    shown = []
    for row in sorted(last, key=lambda row: -(row.get("score") or 0.0))[:SAMPLES]:
        turns = row.get("prompt") or []
        asked = turns if isinstance(turns, str) else "\n\n".join(f"{t.get('role')}: {t.get('content')}" for t in turns)
        facts = f"score {number(row.get('score'))} · KL {number(row.get('kl_nats'))} nats"
        shown.append(html.compared(asked, [html.Answer("PPO", facts, str(row.get("response", "")))]))
    return f"<h2>Samples of update {number(step)}</h2>{''.join(shown)}" if shown else ""


def _samples(folder: Path, stages: Sequence[StageFiles]) -> str:
    evaluated = next(
        (s.folder for s in stages if s.manifest and s.manifest.stage == "evaluation"), folder / "evaluation"
    )
    rows = _lines(evaluated / "samples.jsonl")
    if rows:
        parts = [
            f"<h3>{heading}</h3>{''.join(map(_sample, chosen))}" for heading, chosen in _chosen(rows).items() if chosen
        ]
        return f"<h2>Samples before and after PPO</h2>{''.join(parts)}"
    own = next((stage.folder for stage in stages if is_ppo(stage.rows)), None)
    return _rollout_samples(_lines(own / "samples.jsonl")) if own else ""


# ---------------------------------------------------------------- report.md


def _markdown(
    title: str, sentence: str, summary: Json, stages: Sequence[StageFiles], advice: Mapping[str, Sequence[str]]
) -> str:
    parts = [f"# {title}", f"**{sentence}**", _markdown_table(headline(summary))]
    parts.append("\n".join(f"- {line}" for line in notes(summary)))
    if advice:
        lines = [f"- {stage}: {line}" for stage, found in advice.items() for line in found]
        parts.append("## Look at these\n" + "\n".join(lines))
    ended, about = origins(stages)
    for heading, table in (("Stages", stage_results(summary)), ("Gold score", gold_parts(summary)),
                           ("Families of prompts", families(summary)), ("How it was made", ended)):  # fmt: skip
        if table[1]:
            parts.append(f"## {heading}\n{_markdown_table(table)}")
    parts.append("\n".join(f"- {name}: {value}" for name, value in about[1]))
    parts.append("Curves and samples: report.html")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table) -> str:
    headers, rows = table
    if not rows:
        return ""
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---------------------------------------------------------------- report.html


def _page(
    folder: Path,
    title: str,
    sentence: str,
    summary: Json,
    stages: Sequence[StageFiles],
    advice: Mapping[str, Sequence[str]],
) -> str:
    compared = headline(summary)
    parts = [html.verdict(sentence), html.links(pages_of(folder))]
    parts.append(html.table(compared, "headline") if compared[1] else html.note("No evaluation yet."))
    parts += map(html.note, notes(summary))
    for name, found in advice.items():
        parts.append(html.warning(f"{words(name)}: outside the healthy range at the end", found))
    for stage in sorted(stages, key=lambda stage: not is_ppo(stage.rows)):
        judged = summary if stage.name == "ppo" else {}
        if drawn := curves(stage.rows, judged):
            heading = html.text({"ppo": "PPO", "sft": "SFT"}.get(stage.name, words(stage.name)))
            parts.append(f"<h2>{heading}, {'update by update' if is_ppo(stage.rows) else 'step by step'}</h2>{drawn}")
        if is_ppo(stage.rows):
            parts.append(html.note("Dashed: the edge of the healthy range."))
            parts.append(f"<h2>Score against KL</h2>{frontier(stage.rows, judged)}")
    parts.append(_samples(folder, stages))
    for heading, content in (("Gold score", gold_parts(summary)), ("Families of prompts", families(summary)),
                             ("Stages", stage_results(summary))):  # fmt: skip
        if content[1]:
            parts.append(f"<h2>{heading}</h2>{html.table(content)}")
    ended, about = origins(stages)
    if ended[1]:
        parts.append(f"<h2>How it was made</h2>{html.table(ended)}{html.table(about) if about[1] else ''}")
    return html.page(title, "\n".join(filter(None, parts)))
