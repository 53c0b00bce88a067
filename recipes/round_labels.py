"""A flywheel round's labels: who judges its items, and what the playground's users say beside them.

`config` is a FlywheelConfig of `flywheel`, which imports this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import config as configs
from rlhf.rows.jsonl import read_rows
from rlhf.rows.records import HELD_OUT, prompt_key, read_prompts, write_jsonl
from rlhf.run import console
from rlhf.run.checkpoint import remove
from rlhf_recipes.stage import open_stage

if TYPE_CHECKING:
    from rlhf.collection.store import Store


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What decides a round's items, or its labels."""

    output_dir: str
    """Its folder."""
    seed: int
    """Decides what is drawn."""
    settings: dict[str, Any]
    """All else that decides its result."""
    overwrite: bool
    """Replace another run's output."""


def label_items(config: Any, number: int, round_folder: Path) -> int:
    """Have a round's items judged and write the rankings of all rounds so far; returns how many there are.

    Only this run's items count: a store may hold other items. What an overwritten run's labeler or grader said of the
    same items is deleted first."""
    from rlhf.collection import assign
    from rlhf.collection.export import export
    from rlhf.collection.incoming import read_candidates
    from rlhf.collection.measured import snapshot
    from rlhf.collection.store import Store

    turn, folder, source = config.flywheel, round_folder / "labels", f"round {number}"
    settings = {"labels": turn.labels, "overlap": turn.overlap, "labeler": config.data.labeler, "grader": None}
    step = StepConfig(output_dir=str(folder), seed=config.data.seed, settings=settings, overwrite=config.overwrite)
    earlier = Path(config.output_dir) / f"round_{number - 1}" / "labels" / "rankings.jsonl" if number > 1 else None
    sources = {"items": round_folder / "items", "earlier": earlier, "rubric": turn.rubric, "grader": turn.grader}
    stage = open_stage("labels", step, sources)
    if stage.complete:
        return int(stage.outputs["labels"])
    with Store(turn.store or Path(config.output_dir) / "labels.db") as store:
        items = [replace(item, source=source) for item in read_candidates(round_folder / "items" / "items.jsonl")]
        numbers = store.add_items(items, turn.overlap)
        if not stage.resuming:
            with store.writing() as db:
                assign.take_back(db, numbers)
        stage.begin()  # only now: killed before it, the stage begins anew again
        judge_items(config, store, numbers)
        own = [row for row in export(snapshot(store), "rankings").rows if row["item"] in set(numbers)]
    rows = [*(row for _, row in (read_rows(earlier) if earlier else ())), *own]
    write_jsonl(folder / "rankings.jsonl", rows)
    stage.finish({"labels": len(rows), "items": len(numbers)})
    return len(rows)


def judge_items(config: Any, store: Store, numbers: Sequence[int]) -> None:
    """Let functions or a grader judge all open items, or wait until people have."""
    from rlhf.collection.desk import StoreDesk, label
    from rlhf.collection.rounds import wait_for_people

    turn = config.flywheel
    if turn.labels == "people":
        console.stage_line("labels", f"people label at: rlhf label --store {store.path} --annotators '[NAME, ...]'")
        tell = partial(console.stage_line, "labels")
        wait_for_people(store, numbers, turn.overlap, turn.enough * len(numbers), turn.wait_seconds, tell)
        return
    if turn.labels == "grader":
        label(StoreDesk(store, Path(str(turn.grader)).name, "model"), grading(turn), config.data.seed)
        return
    labeler = configs.import_function(str(config.data.labeler))
    for person in range(turn.overlap):
        label(StoreDesk(store, f"simulated-{person + 1}", "simulated"), labeler, config.data.seed + person)


def grading(turn: Any) -> Callable[..., list[tuple[float, ...]]]:
    """Return a labeler that ranks responses by the grader's scores; equal scores are a tie."""
    from reward_models.grader import RubricGrader
    from rlhf.collection.rounds import ranks_of

    grader = RubricGrader.load(str(turn.grader), str(turn.rubric))

    def rank(prompts: Sequence[Any], responses: Sequence[Sequence[str]], seed: int, **columns: Any) -> list[Any]:
        flat = [(prompt, text) for prompt, texts in zip(prompts, responses, strict=True) for text in texts]
        scores = iter(grader([prompt for prompt, _ in flat], [text for _, text in flat]))
        return [ranks_of([float(next(scores)) for _ in texts]) for texts in responses]

    return rank


def playground_rows(config: Any, number: int, round_folder: Path) -> Path | None:
    """Write the playground's comparisons that a round's reward model learns from beside its labels; None: there are
    none.

    What a training began with stays, but for what has been erased or has expired since: then it begins again without.
    A reward model that is complete keeps what it learned."""
    from rlhf.collection import playground
    from rlhf.collection.store import Store

    turn, folder = config.flywheel, round_folder / "feedback"
    if turn.feedback is None:
        return None
    settings = {"feedback_share": turn.feedback_share}
    seed = config.seed + number
    step = StepConfig(output_dir=str(folder), seed=seed, settings=settings, overwrite=config.overwrite)
    stage, file = open_stage("feedback", step, {"rankings": round_folder / "rankings"}), folder / "rankings.jsonl"
    if stage.complete and (round_folder / "reward_model" / "manifest.json").is_file():
        return file if file.is_file() else None
    with Store(turn.feedback, create=False) as store:
        if stage.complete:
            _drop_gone(file, round_folder / "reward_model", playground.comparisons(store))
        else:
            stage.begin()
            said = playground.comparisons(store, held_out_prompts(config, round_folder))
            others = sum(1 for _ in read_rows(round_folder / "rankings" / "train.jsonl"))
            kept = playground.capped(said, others, turn.feedback_share, seed)
            if kept:
                write_jsonl(file, kept)
            stage.finish({"comparisons": len(kept), "over_the_share": len(said) - len(kept)})
    return file if file.is_file() else None


def _drop_gone(file: Path, model: Path, now: Sequence[dict[str, Any]]) -> None:
    """Take out of a file what is not among the rows that may be used now, and with it a training that saw it."""
    from rlhf.collection import playground

    began = [row for _, row in read_rows(file)] if file.is_file() else []
    kept = playground.still_usable(began, now)
    if len(kept) == len(began):
        return
    gone = f"{len(began) - len(kept):,} comparisons were erased or have expired"
    console.stage_line("feedback", f"{gone}: the reward model is trained without them")
    remove(model)
    if kept:
        write_jsonl(file, kept)
    else:
        remove(file)


def held_out_prompts(config: Any, round_folder: Path) -> set[str]:
    """Return the keys of prompts on which reward models or policies of a round are measured: no training sees them."""
    run, asked = round_folder.parent, config.evaluation.eval_data
    files = [round_folder / "rankings" / name for name in ("held_out.jsonl", "judge.jsonl")]
    files += [] if asked else [run / "data" / "eval_prompts.jsonl"]
    sources = [*map(str, filter(Path.is_file, files)), *([asked] if asked else [])]
    return {prompt_key(prompt.messages) for source in sources for prompt in read_prompts(source, HELD_OUT)}
