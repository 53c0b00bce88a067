"""Write every result table and picture of README and guides from the committed results.

    python recipes/studies/write_results.py                 # verdicts of today's checks, README.md and the guides
    python recipes/studies/write_results.py runs/studies    # take over the results of that folder of studies first
    python recipes/studies/write_results.py runs/benchmark  # or the tables of a benchmark, under its folder's name

The results are recipes/studies/results/*.json, with their pictures beside them, and each seed's rows in its folder
seeds: seeds that other machines ran with the same settings stay in a study's result. A document has results between
`<!-- results: NAME -->` and `<!-- end of NAME -->`; a benchmark's tables are NAME_0, NAME_1 and so on.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.run.checkpoint import write_json_atomic
from rlhf_recipes.studies import study_page
from rlhf_recipes.studies.study import Row, Seed, Study, complete, result_of
from rlhf_recipes.studies.verdicts import RULE

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
DOCUMENTS = ("README.md", *sorted(f"recipes/guides/{file.name}" for file in (ROOT / "recipes/guides").glob("*.md")))
PICTURED = ("overoptimisation", "accuracy")
"""Studies whose first picture README shows."""
PATHS = ("output_dir", "model", "trl_folder", "toy_run", "before", "other", "agilerl_python", "vllm_python")
"""Settings of a benchmark that a committed result leaves out: folders and addresses of one machine."""
BY_SEED = ("sentiment", "hh", "qa_feedback")
"""Studies of people's labels, whose values a guide shows seed by seed."""
NOTHING = "No study has been run on three seeds yet."
MARK = re.compile(r"<!-- results: (\w+) -->\n(.*?)<!-- end of \1 -->", re.DOTALL)


def results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Read the committed results of studies, in the order of their numbers."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return {
        one["name"]: one for one in sorted((one for one in found if "checks" in one), key=lambda one: one["number"])
    }


def judged_again(result: dict[str, Any]) -> dict[str, Any]:
    """Return a committed result with the texts, checks and verdict that its study has now, from each seed's rows in
    seeds/; without them from its points, of which one that a seed lacks is no seed's."""
    study: Study = importlib.import_module(f"rlhf_recipes.studies.{result['name']}").STUDY
    files = [RESULTS / "seeds" / f"{study.name}-{number}.jsonl" for number in result["seeds"]]
    if all(file.is_file() for file in files):
        return result_of(study, [Seed.read(file) for file in files])
    whole = [point for point in result["points"] if len(point["by_seed"]) == len(files)]
    seeds = [
        Seed(
            seed=number, settings=result["settings"], seconds=result["seconds"][str(number)], machine=result["machine"],
            versions=result["versions"],
            rows=[Row(one["series"], one["by_seed"][place], one["x"], panel=one["panel"]) for one in whole],
        )
        for place, number in enumerate(result["seeds"])
    ]  # fmt: skip
    return {**result_of(study, seeds), "points": result["points"]}


def take_over(runs: Path) -> list[str]:
    """Copy the results and pictures of every study in a folder of studies, and of every table of measurements; their
    names."""
    names = []
    for file in sorted(runs.glob("*/*.json")):
        if file.stem == file.parent.name:
            if "checks" in json.loads(file.read_text(encoding="utf-8")):
                take_over_study(file.parent)
            else:
                RESULTS.mkdir(exist_ok=True)
                shutil.copyfile(file, RESULTS / file.name)
            names.append(file.stem)
    if not names:
        raise InputError(f"{runs}: holds no result of a study (NAME/NAME.json); run one, or `make studies`")
    return names


def take_over_study(folder: Path) -> None:
    """Put a study's complete seeds among those that are committed, and make its result of all that have their settings.

    Raises InputError where the committed result would lose a seed: one of other settings, or one without kept rows."""
    study: Study = importlib.import_module(f"rlhf_recipes.studies.{folder.name}").STUDY
    own = complete(study, folder)
    committed = {file: Seed.read(file) for file in (RESULTS / "seeds").glob(f"{study.name}-*.jsonl")}
    alike = {seed.seed: seed for seed in [*committed.values(), *own] if not seed.unlike(own[-1])}
    lost = sorted(set(results(RESULTS).get(study.name, {}).get("seeds", [])) - set(alike))
    if lost:
        raise InputError(
            f"{folder}: the result in {RESULTS} would lose seed {', '.join(map(str, lost))}, of other settings or "
            f"without rows in seeds/; run those seeds too, or delete {study.name}.json"
        )
    for file in committed:
        file.unlink()
    for seed in alike.values():
        seed.write(RESULTS / "seeds" / f"{study.name}-{seed.seed}.jsonl")
    study_page.write_result(result_of(study, sorted(alike.values(), key=lambda seed: seed.seed)), RESULTS)


def take_over_benchmark(run: Path) -> str:
    """Copy the tables of a benchmark, with the settings and the machine that they were made with; their name."""
    config = json.loads((run / "results.json").read_text(encoding="utf-8"))["config"]
    file = run / "tables.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    titles, *tables = re.split(r"^### (.*)\n", text, flags=re.MULTILINE)
    if titles.strip() or not tables:
        raise InputError(f"{run}/tables.md: holds no table; let the benchmark run to its end")
    made = {
        "machine": config["machine"],
        "settings": {name: value for name, value in config.items() if name not in (*PATHS, "machine")},
        "tables": [
            {"title": title, "text": text.strip()} for title, text in zip(tables[::2], tables[1::2], strict=True)
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    write_json_atomic(RESULTS / f"{run.name}.json", made)
    return run.name


def benchmark_blocks() -> dict[str, str]:
    """Return every table of the committed benchmarks, under NAME_0, NAME_1 and so on."""
    found = {}
    for file in sorted(RESULTS.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        for number, table in enumerate(content.get("tables", ())):
            found[f"{file.stem}_{number}"] = f"*{table['title']}* ({content['machine']})\n\n{table['text']}"
    return found


def blocks(found: Mapping[str, dict[str, Any]], document: str) -> dict[str, str]:
    """Return the content of every mark, as it stands in a document."""
    pictures = "../studies/results" if document.startswith("recipes/guides/") else "recipes/studies/results"
    rows = [
        [str(one["number"]), one["title"], one["source"], f"**{one['verdict']}**", ", ".join(map(str, one["seeds"]))]
        for one in found.values()
    ]
    table = study_page.markdown((["", "published finding", "source", "here", "seeds"], rows))
    return {
        "verdicts": table if rows else NOTHING,
        "studies": "\n\n".join(study_page.section(one, pictures) for one in found.values()),
        "rule": RULE,
        "summary": summary(found, pictures),
        "baselines": baselines(found),
        "demo": study_page.by_seed(found["demo"], without="time") if "demo" in found else NOTHING,
        **{name: study_page.by_seed(found[name]) if name in found else NOTHING for name in BY_SEED},
    } | benchmark_blocks()


def baselines(found: Mapping[str, dict[str, Any]]) -> str:
    """Write the table of the methods. Times are of a busy machine: their interval would say nothing."""
    return study_page.by_series(found["baselines_toy"], bare=("cost", "calls")) if "baselines_toy" in found else NOTHING


def summary(found: Mapping[str, dict[str, Any]], pictures: str) -> str:
    """Say in a few lines what came out, with two pictures."""
    decided = {name: one for name, one in found.items() if one["verdict"] in ("yes", "partly", "no")}
    if not decided:
        return NOTHING
    lines = [
        f"- {word}: {'; '.join(one['title'] for one in decided.values() if one['verdict'] == says)}"
        for says, word in (("yes", "come out"), ("partly", "come out in part"), ("no", "do not come out"))
        if any(one["verdict"] == says for one in decided.values())
    ]
    shown = " ".join(
        f"![{found[name]['title']}]({pictures}/{study_page.file_of(found[name], found[name]['panels'][0]['name'])})"
        for name in PICTURED
        if name in found
    )
    parts = [
        f"Of {len(decided)} published findings in miniature, on three seeds each (bands: 95% over the seeds):",
        "\n".join(lines),
        shown,
    ]
    return "\n\n".join(part for part in parts if part)


def written(text: str, document: str) -> str:
    """Return a document's text with every mark filled anew. Raises InputError for a mark of nothing."""
    made = blocks(results(), document)

    def fill(mark: re.Match[str]) -> str:
        name = mark[1]
        if name not in made:
            raise InputError(f"{document}: mark {name!r}: one of {', '.join(made)} was expected")
        return f"<!-- results: {name} -->\n{made[name]}\n<!-- end of {name} -->"

    return MARK.sub(fill, text)


def main(argv: list[str]) -> None:
    for folder in map(Path, argv):
        benchmark = (folder / "results.json").is_file()
        print(take_over_benchmark(folder) if benchmark else " ".join(take_over(folder)))
    for result in results(RESULTS).values():
        study_page.write_result(judged_again(result), RESULTS)
    for document in DOCUMENTS:
        path = ROOT / document
        path.write_text(written(path.read_text(encoding="utf-8"), document), encoding="utf-8")


if __name__ == "__main__":
    configs.run(main)
