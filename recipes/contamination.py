"""Which eval items the training data hold.

    rlhf contamination --train_data sft.jsonl,rankings.jsonl \\
        --eval_data my_eval.jsonl --output_dir runs/my/contamination
    rlhf contamination --train_data sft.jsonl \\
        --eval_data runs/my/evals/run_evals.json \\
        --output_dir runs/my/contamination

GPT-4's method (three random substrings of 50 letters and digits), every such substring, and runs of eight words.
Training data are read in any shape that training reads. Eval data are JSONL with a prompt, OpenAI Evals' samples, or
the result of run_evals. Where items have a score, it is shown with and without what was found. Writes
contamination.json, contamination.html and items.jsonl. With a chain's YAML it takes both from the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.records import HELD_OUT, write_jsonl
from rlhf.rows.sources import require_there, rows
from rlhf.run import console
from rlhf.run.checkpoint import remove, write_json_atomic
from rlhf.run.owner import by_main
from rlhf_recipes.stage import SECTIONS

console.quiet()

Config = TypeVar("Config", bound="ContaminationConfig")
TRAINING = (
    "data/pretraining.jsonl", "data/demonstrations.jsonl", "data/steps.jsonl", "rankings/train.jsonl",
    "rankings/prompts.jsonl",
)  # fmt: skip
"""Files of a run that its policy and reward models learn from."""


@dataclass(frozen=True, kw_only=True)
class ContaminationConfig:
    """Looking for eval items in training data."""

    MOST_USED = ("train_data", "eval_data", "output_dir", "chars", "samples", "words", "coverage")

    train_data: list[str] | None = None
    """What the policy, reward model and PPO were trained on: files, folders, hub names, separated by commas. Default:
    the run's own files."""
    eval_data: list[str] | None = None
    """Evals: JSONL files with prompts, or run_evals.json; separated by commas. Default: the run's run_evals.json and
    evaluation prompts."""
    output_dir: str
    """Where contamination.json, its page and the items go."""
    chars: int = 50
    """Letters and digits in a row that count as copied."""
    samples: int = 3
    """Random substrings per item in GPT-4's method."""
    words: int = 8
    """Words in a row that count as copied."""
    coverage: float = 0.7
    """The share of an item's words in copied runs from which it counts as contaminated."""
    min_chars: int = 25
    """Items with fewer letters and digits are not checked: they are in too many texts by chance."""
    seed: int = 0
    """Decides the random substrings."""

    def __post_init__(self) -> None:
        for name, least in (("chars", 8), ("samples", 1), ("words", 2), ("min_chars", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 < self.coverage <= 1:
            raise InputError(f"coverage={self.coverage} must be above 0 and at most 1")
        for name in ("train_data", "eval_data"):
            if getattr(self, name) == []:
                raise InputError(f"{name} is empty; name a file")


def inputs(config: Config, also: Sequence[str] = ()) -> tuple[Config, dict[str, Any]]:
    """The config, with what it takes from the run's stages; the data that are read. also: training data beside the
    run's own files."""
    run = Path(config.output_dir).parent
    train, evals = config.train_data, config.eval_data
    if train is None:
        train = list(dict.fromkeys([*also, *_there(run, *TRAINING)]))
    if evals is None:
        asked = _there(run, "data/eval_prompts.jsonl", "rankings/eval_prompts.jsonl")[:1]
        evals = [*_there(run, "run_evals/run_evals.json"), *asked]
    for name, found in (("train_data", train), ("eval_data", evals)):
        if not found:
            raise InputError(f"--{name} is missing, and no earlier stage left such files in {run}; name them")
    config = replace(config, train_data=train, eval_data=evals)
    return config, {"train_data": train, "eval_data": evals}


def _there(run: Path, *files: str) -> list[str]:
    return [str(run / file) for file in files if (run / file).is_file()]


def check(config: ContaminationConfig) -> dict[str, Any]:
    """Read, search, count, write; returns contamination.json's content."""
    config, _ = inputs(config)
    return write(config, *searched(config))


def searched(config: ContaminationConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read, search, count; returns contamination.json's content and a row per item."""
    from rlhf.evals import contamination as methods

    train_data, eval_data = config.train_data or [], config.eval_data or []
    for source in (*train_data, *eval_data):
        require_there(source)
    items = _all_items(eval_data)
    count = 0

    def stream() -> Iterator[tuple[str, str]]:
        nonlocal count
        for source in train_data:
            for where, row in rows(source, "train"):
                count += 1
                yield from ((where, text) for text in methods.texts_in(row))

    names = ("chars", "samples", "words", "coverage", "min_chars", "seed")
    rules = methods.Rules(**{name: getattr(config, name) for name in names})
    found = methods.search(stream(), [item.text for item in items], rules, [item.eval for item in items])
    evals = methods.summary(items, found)
    metrics = {
        f"{name}/{measure}": entry[measure]["share"]
        for name, entry in evals.items()
        for measure in methods.METHODS
        if measure in entry
    }
    result = {
        "metrics": metrics, "train_data": train_data, "eval_data": eval_data, "rows": count,
        "rules": asdict(rules), "evals": evals, "not_found_by_these": methods.BLIND,
    }  # fmt: skip
    return result, [asdict(item) | asdict(one) for item, one in zip(items, found, strict=True)]


def write(config: ContaminationConfig, result: dict[str, Any], listed: list[dict[str, Any]]) -> dict[str, Any]:
    """Write contamination.json, its page and the items; returns the result."""
    from rlhf.evals.contamination_page import page
    from rlhf.run import page as html

    folder = Path(config.output_dir)
    remove(folder / "manifest.json")  # of a chain's stage: what it says is no longer what lies here
    write_json_atomic(folder / "contamination.json", result)
    write_jsonl(folder / "items.jsonl", listed)
    written = html.write(folder / "contamination.html", page(result, listed))
    _tell(result)
    console.stage_line("", str(written))
    return result


def _all_items(sources: Sequence[str]) -> list[Any]:
    """Read every source's items. Raises InputError where two have an eval of one name: they would count as one."""
    items, named = list[Any](), dict[str, str]()
    for source in sources:
        own = list(_items(source))
        for name in dict.fromkeys(item.eval for item in own):
            if name in named:
                both = f"{named[name]} and {source} both have an eval called {name!r}"
                raise InputError(f"eval_data: {both}; give one file another name, or check them into two folders")
            named[name] = source
        items += own
    return items


def _items(source: str) -> Iterator[Any]:
    from rlhf.evals.contamination import item_of

    path = Path(source)
    if path.name == "run_evals.json":
        path = path.with_name("items.jsonl")
        if not path.is_file():
            raise InputError(f"{path}: no such file; run_evals writes it beside run_evals.json")
    for where, row in rows(str(path), HELD_OUT):
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with a prompt, got {type(row).__name__}")
        yield item_of(row, path.stem, where)


def _tell(result: dict[str, Any]) -> None:
    for name, entry in result["evals"].items():
        parts = [
            f"{method} {100 * entry[method]['share']['value']:.1f}% of {entry[method]['share']['n']:,}"
            for method in ("sampled", "windows", "words")
            if method in entry
        ]
        parts += [f"{entry['unchecked']:,} too short or boilerplate"] if entry["unchecked"] else []
        console.stage_line("contamination", f"{name}: {', '.join(parts)}")
    console.stage_line("", result["not_found_by_these"])


def main(argv: list[str]) -> None:
    config = configs.load(
        ContaminationConfig, argv, section="contamination", known_sections=SECTIONS, description=__doc__ or ""
    )
    by_main(lambda: check(config))


if __name__ == "__main__":
    configs.run(main)
