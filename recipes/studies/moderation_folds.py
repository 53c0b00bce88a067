"""Measure `rlhf moderation` by five folds: each text is judged by a model that never saw it.

    python recipes/studies/moderation_folds.py --model sentence-transformers/all-MiniLM-L6-v2 \\
        --train_data moderation.jsonl --output_dir runs/moderation_folds

Flags are those of `rlhf moderation`. A fold that is done is not done again: run the same command after an interruption.
Writes folds.json, tables.md and, per fold, the model with its card; prints AUPRC per category beside a bag of words,
over all texts, with 95% intervals over texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from reward_models.labelled_texts import LabelledText, categories_of, labels_of, read_labelled
from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.jsonl import read_object
from rlhf.rows.records import prompt_key, write_jsonl
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.stages import Manifest
from rlhf_recipes.moderation import moderation
from rlhf_recipes.moderation_config import ModerationRecipe
from rlhf_recipes.stage import SECTIONS
from rlhf_recipes.studies import measured

FOLDS = 5


def fold_of(record: LabelledText, seed: int) -> int:
    """Return a text's fold: a function of the text and the seed alone, so that equal texts are in one fold."""
    digest = hashlib.sha256(f"{seed}|{prompt_key(record.prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % FOLDS


def run(config: ModerationRecipe) -> dict[str, Any]:
    """Train and judge fold by fold, then measure all texts together."""
    from reward_models.card.moderation import JudgedTexts, metrics_of, moderation_report
    from reward_models.moderation import Category

    if config.train_data is None or config.eval_data is not None:
        raise InputError("moderation_folds: name --train_data alone; each fold is held out in its turn")
    records = read_labelled(cast(Any, config.train_data), "train", config.categories)
    names = config.categories or categories_of(records)
    folds = np.array([fold_of(record, config.seed) for record in records])
    shape = (len(records), len(names))
    said, words = np.full(shape, np.nan), np.full(shape, np.nan)
    for fold in range(FOLDS):
        own = np.flatnonzero(folds == fold)
        train = [records[n] for n in np.flatnonzero(folds != fold)]
        found = one_fold(config, fold, names, train, [records[n] for n in own])
        said[own], words[own] = found["said"], found["words"]
    categories = [Category(name=name) for name in names]
    judged = JudgedTexts(records, categories, labels_of(records, names), said, words)
    report = moderation_report(judged, None, config.seed)
    result = {"metrics": metrics_of(report), "folds": FOLDS, "texts": len(records)}
    write_json_atomic(Path(config.output_dir) / "folds.json", result)
    rows = [
        [row["name"], f"{row['positives']} of {row['n']}",
         *(_shown(row[name]) for name in ("auprc", "auprc_bag_of_words", "lead"))]
        for row in report["categories"]
    ]  # fmt: skip
    head = ["category", "texts that have it", "AUPRC", "a bag of words", "lead"]
    settings = {"folds": FOLDS, "seed": config.seed, "trains": config.trains, "reads": config.reads}
    title = f"{len(records)} texts, {FOLDS} folds, {Path(str(config.model)).name}"
    measured.keep(Path(config.output_dir), settings, [(title, head, rows)])
    for name, *cells in rows:
        console.stage_line(name, "  ".join(cells))
    return result


def one_fold(
    config: ModerationRecipe,
    fold: int,
    names: Sequence[str],
    train: Sequence[LabelledText],
    held_out: Sequence[LabelledText],
) -> dict[str, Any]:
    """Return what the fold's model and its bag of words say of the held-out texts, [texts, categories]."""
    from reward_models.moderation import ModerationModel
    from reward_models.words import fit_words

    folder = Path(config.output_dir) / f"fold_{fold}"
    kept = Path(config.output_dir) / f"fold_{fold}.json"
    files = [Path(config.output_dir) / "data" / f"{name}_{fold}.jsonl" for name in ("train", "held_out")]
    for file, rows in zip(files, (train, held_out), strict=True):
        write_jsonl(file, [{"prompt": r.prompt, "labels": dict(r.labels), **r.columns} for r in rows])
    files_of_fold = {"train_data": str(files[0]), "eval_data": str(files[1]), "output_dir": str(folder)}
    own = replace(config, categories=list(names), **files_of_fold)
    moderation(own, f"fold {fold}")
    trained = Manifest.read(folder).fingerprint
    if kept.exists() and (known := read_object(kept)).get("trained") == trained:
        return known
    model = ModerationModel.load(folder)
    texts = [record.text for record in train]
    bag = fit_words(texts, labels_of(train, model.categories), model.categories, config.seed)
    judged = [record.text for record in held_out]
    found = {"trained": trained, "said": model.probabilities(judged).tolist(), "words": bag.logits(judged).tolist()}
    write_json_atomic(kept, found)
    return found


def _shown(estimate: dict[str, float] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def main(argv: list[str]) -> None:
    console.quiet()
    run(configs.load(ModerationRecipe, argv, section="moderation", known_sections=SECTIONS, description=__doc__ or ""))


if __name__ == "__main__":
    configs.run(main)
