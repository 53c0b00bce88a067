"""Judge texts by a trained moderation model or a guard, divide them, and write the card of what is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models.filtering import flagged_by, talks_in, verdicts_of
from reward_models.labelled_texts import LabelledText, categories_in, labels_in, labels_of
from rlhf.errors import InputError
from rlhf.rows.records import HELD_OUT, write_jsonl
from rlhf.rows.sources import rows
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype
from rlhf.run.stages import Manifest
from rlhf_recipes.moderation_config import ModerationRecipe
from rlhf_recipes.stage import check_model, open_stage

if TYPE_CHECKING:
    from reward_models.card.moderation import JudgedTexts
    from reward_models.moderation import Category
    from rlhf.serving.app import Verdict


def judge(config: ModerationRecipe) -> dict[str, Any]:
    """Judge eval_data, divide it into kept.jsonl and flagged.jsonl, and measure where labels are known."""
    return by_main(lambda: _judge(config))


def _judge(config: ModerationRecipe) -> dict[str, Any]:
    folder, source = Path(config.output_dir), str(config.eval_data)
    if (folder / "manifest.json").is_file() and Manifest.read(folder).stage == "moderation":  # even with --overwrite
        raise InputError(f"output_dir {folder}: holds a trained model; name another folder for what it judges")
    stage = open_stage("judged", config, {"model": config.model, "eval_data": source, "policy": config.policy})
    if stage.complete:
        return stage.outputs
    import numpy as np

    from reward_models.card.moderation import JudgedTexts
    from reward_models.guards import NO_ANSWER

    found = list(rows(source, HELD_OUT))
    _check(found)
    moderator = judge_of(config)
    records, categories = _labelled(config, found, moderator)  # before hours of judging: a wrong label ends it
    verdicts = verdicts_of([row for _, row in found], moderator)
    flags = [flagged_by(own) for own in verdicts]
    scores = [_highest(own) for own in verdicts]
    told = [{"flagged": names, "scores": said} for names, said in zip(flags, scores, strict=True)]
    stage.begin()
    write_jsonl(folder / "judged.jsonl", told)
    write_jsonl(folder / "kept.jsonl", [row for (_, row), names in zip(found, flags, strict=True) if not names])
    bad = [{**_object(row), "moderation": more} for (_, row), more in zip(found, told, strict=True) if more["flagged"]]
    write_jsonl(folder / "flagged.jsonl", bad)
    console.stage_line("judged", f"{len(bad):,} of {len(found):,} rows are flagged: flagged.jsonl; kept.jsonl")
    if config.guard is not None and (outside := sum(NO_ANSWER in names for names in flags)):
        seen = f"{outside:,} of these rows are flagged because the guard answered outside its format"
        console.stage_line("warning", f"{seen}: is it the guard that --guard names?")
    shown = [category.name for category in categories]
    said = [[max(own.values())] if config.guard else [own[name] for name in shown] for own in scores]
    judged = JudgedTexts(records, categories, labels_of(records, shown), np.array(said))
    about = {"moderation_model": Path(config.model).name, "guard": config.guard, "judged": f"{len(found):,} rows"}
    wanted = None if config.guard else moderator.about.wanted_false_positive_rate
    outputs: dict[str, Any] = {"rows": len(found), "flagged": len(bad)}
    return stage.finish(outputs | write_card(judged, wanted, config.seed, folder, about))


def _highest(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return each category's highest score over a row's responses."""
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.scores)
    return {name: max(verdict.scores[name] for verdict in verdicts if name in verdict.scores) for name in names}


def _check(found: Sequence[tuple[str, object]]) -> None:
    """Raise InputError, with its place, for a row that cannot be judged; before a model is read."""
    if not found:
        raise InputError("eval_data: no rows; hand in at least one")
    for where, row in found:
        try:
            talks_in(row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def judge_of(config: ModerationRecipe) -> Any:
    """Load what judges."""
    if config.guard is None:
        check_model(config.model, ("moderation",))
        from reward_models.moderation import ModerationModel

        return ModerationModel.load(config.model, dtype=compute_dtype(config.bf16))
    from reward_models.guards import load_guard

    policy = None if config.policy is None else _policy(config.policy)
    given = {"threshold": config.threshold, "served_as": config.served_as}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return load_guard(config.model, config.guard, policy, dtype=compute_dtype(config.bf16), **settings)


def _policy(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"policy: {file} can't be read as text ({error}); check the path") from None


def _labelled(
    config: ModerationRecipe, found: Sequence[tuple[str, Any]], moderator: Any
) -> tuple[list[LabelledText], Sequence[Category]]:
    """Return what is measured, and on which categories. A guard's is one, of being unsafe, as are the labels: unsafe
    where a known category is there, safe where every known one is not. A row of several responses has no label.
    Raises InputError, with its place, for a label that is none."""
    from reward_models.moderation import Category

    if config.guard is None:
        categories: Sequence[Category] = moderator.about.categories
        names = [category.name for category in categories]
    else:
        categories = (Category(name="unsafe", threshold=moderator.threshold),)
        names = config.categories or _names([row for _, row in found])
    records = []
    for where, row in found:
        talks = talks_in(row)
        try:
            known = labels_in(row, names) if isinstance(row, dict) and len(talks) == 1 else {}
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if config.guard is not None:
            known = {"unsafe": any(known.values())} if known else {}
        columns = dict(row) if isinstance(row, dict) else {}
        records.append(LabelledText(talks[0], known, columns, where))
    return records, categories


def _names(found: Sequence[object]) -> list[str]:
    try:
        return categories_in(found, "eval_data")
    except InputError:  # texts alone
        return []


def _object(row: object) -> dict[str, Any]:
    return dict(row) if isinstance(row, dict) else {"text": row}


def write_card(
    judged: JudgedTexts, wanted: float | None, seed: int, folder: Path, about: dict[str, str | None]
) -> dict[str, Any]:
    """Write moderation.json and the card; return the main numbers."""
    from reward_models.card.moderation import metrics_of, moderation_report
    from reward_models.card.moderation_page import save_moderation_report, verdict

    report = moderation_report(judged, wanted, seed)
    metrics = metrics_of(report)
    write_json_atomic(folder / "moderation.json", {"metrics": metrics, "report": report})
    save_moderation_report(report, folder, about)
    console.stage_line("moderation", verdict(report))
    shown = {name: metric["value"] for name, metric in metrics.items()}
    return shown | {f"{name}_ci": [metric["low"], metric["high"]] for name, metric in metrics.items()}


def named(config: ModerationRecipe, records: Sequence[LabelledText]) -> str:
    """Say what the model is measured on."""
    return f"{len(records):,} texts of {Path(config.eval_data).name if config.eval_data else 'a fifth of the data'}"
