"""What every study shares: a published finding in miniature, run once per seed, with intervals and a stated verdict.

A study is a script beside this file with a `Study`, a frozen config and a YAML of the script's name::

    python recipes/studies/accuracy.py                  # every seed that is missing, then the table and the page
    python recipes/studies/accuracy.py --seeds '[0]'    # one of them

Each seed's rows stay in <output_dir>/<study>/seed-<seed>/rows.jsonl, and the chain that several studies share in
<output_dir>/runs/<chain>-<seed>: run again, a study goes on where it stopped. The table is of all seeds that are
complete and were made as the newest one was. Seeds may be run on several machines: `write_results.py` joins them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.jsonl import read_object, read_rows
from rlhf.rows.records import write_jsonl
from rlhf.run import console
from rlhf.run.changes import Change, changes
from rlhf.run.fingerprint import data_fingerprint
from rlhf.run.lookup import look_up
from rlhf.run.stages import BEGUN, Manifest
from rlhf_recipes.stage import open_stage
from rlhf_recipes.studies.study_page import write
from rlhf_recipes.studies.verdicts import checked, over_prompts, over_seeds, verdict

console.quiet()

OWN = ("seeds", "chain", "chain_flags", "model", "train_data", "source", "encoder", "python")
"""Settings that a result's list leaves out: it has the seeds, and paths are nobody else's."""
NAMED = ("chain", "chain_flags", "model", "encoder")
"""Those of them that decide a seed's rows: they are kept without the folders of a machine."""
FILE = "_file"
"""Ends the name of an input that is the fingerprint of a file's content."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study's settings; its own class adds to them."""

    output_dir: str = "runs/studies"
    """Folder of all studies: each has one in it, and so have the runs that they share."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds to run, unless they are complete."""
    chain: str = "toy.yaml"
    """Config of the chain whose stages are shared with other studies."""
    chain_flags: list[str] = field(default_factory=list)
    """Further flags of that chain, as ["--sft.model=FOLDER"]."""
    overwrite: bool = False
    """Replace rows that were made with other settings."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds={self.seeds}: write different whole numbers, such as [0, 1, 2]")

    def check(self) -> None:
        """Raise InputError for what else would be found out only after hours. Called for one seed, before anything is
        written."""

    @property
    def seed(self) -> int:
        """Return the seed of a config that has one."""
        return self.seeds[0]

    @property
    def files(self) -> dict[str, str]:
        """Return the files that decide a seed's rows, by name: configs, what the chain's flags name, and what a study
        adds to them."""
        given = [flag.removeprefix("--").partition("=") for flag in self.chain_flags]
        flagged = {name.replace(".", "_"): path for name, _, path in given if path and Path(path).is_file()}
        return {"chain": self.chain, **flagged}

    @property
    def shared(self) -> Path:
        """Return the folder of the seed's chain, for a config of one seed: runs/<chain>-<seed> beside the studies'."""
        return Path(self.output_dir).parents[1] / "runs" / f"{Path(self.chain).stem}-{self.seed}"


@dataclass(frozen=True)
class Row:
    """One number of one seed: of a curve (series) in a panel at x, with its interval over prompts, if it has one."""

    series: str
    value: float
    x: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    panel: str = ""


@dataclass(frozen=True)
class Panel:
    """One picture of a study: its axes. Of series without x it shows a value each, one below the other."""

    name: str = ""
    x: str = ""
    y: str = ""
    scale: Literal["linear", "log", "sqrt"] = "linear"


@dataclass(frozen=True)
class Check:
    """One statement that the claim makes, as a number per seed that is above 0 where the seed bears it out."""

    text: str
    margin: Callable[[Sequence[Row]], float]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A published finding and its miniature here."""

    name: str
    number: int
    title: str
    claim: str
    source: str
    miniature: str
    panels: Sequence[Panel]
    checks: Sequence[Check]
    run: Callable[[Any], Iterable[Row]]
    """Called with the study's config for one seed (`config.seed`, `config.shared`, `config.output_dir`)."""


def at(rows: Sequence[Row], series: str, x: float | None = None, panel: str = "") -> float:
    """Return the value of a series at x. Raises InputError where a seed lacks it."""
    found = [row.value for row in rows if (row.series, row.x, row.panel) == (series, x, panel)]
    if len(found) != 1:
        raise InputError(f"rows.jsonl: {len(found)} values of {series!r} at {x} in panel {panel!r}, expected one")
    return found[0]


# ---------------------------------------------------------------- running


def main(study: Study, config_class: type[StudyConfig], file: str, argv: list[str]) -> None:
    """Run a study as its script's command line says; its YAML is read unless another is named."""
    own = [] if any(word.partition("=")[0] == "--config" for word in argv) else ["--config", f"{file[:-3]}.yaml"]
    config = configs.load(config_class, [*own, *argv], description=f"{study.title}: {study.claim}")
    for seed in config.seeds:
        run_seed(study, config, seed)
    result = result_of(study, complete(study, Path(config.output_dir) / study.name))
    console.stage_line(study.name, f"{result['verdict']}: {study.title}")
    console.stage_line("", str(write(result, Path(config.output_dir) / study.name)))


def run_seed(study: Study, config: StudyConfig, seed: int) -> list[Row]:
    """Return a seed's rows: run the study, or read what it left."""
    folder = Path(config.output_dir) / study.name / f"seed-{seed}"
    own = replace(config, output_dir=str(folder), seeds=[seed])
    stage = open_stage(study.name, own, fingerprints(own, folder))
    if not stage.complete:
        own.check()
        stage.begin()
        try:
            rows = list(study.run(own))
        finally:
            (folder / BEGUN).touch()  # the time until here counts where the seed goes on later
        write_jsonl(folder / "rows.jsonl", map(asdict, rows))
        stage.finish({"rows": len(rows)})
    return read(folder)


def fingerprints(config: StudyConfig, folder: Path) -> dict[str, str]:
    """Return the fingerprint of each of a seed's files that is there, as <name>_file: of a YAML what it says, without
    its comments. {} where the seed began before fingerprints were kept, unless it may be overwritten."""
    begun = folder / "inputs.json"
    if begun.is_file() and not config.overwrite and not any(name.endswith(FILE) for name in read_object(begun)):
        return {}
    found = {}
    for name, path in config.files.items():
        if Path(path).suffix in (".yaml", ".yml"):
            settings, _ = configs.read_yaml(look_up(path, f"{path}: no such file", "configs"))
            found[name + FILE] = data_fingerprint([settings])
        elif path and Path(path).exists():
            found[name + FILE] = data_fingerprint(path)
    return found


def read(folder: Path) -> list[Row]:
    """Read the rows of a complete seed."""
    return [Row(**row) for _, row in read_rows(folder / "rows.jsonl")]


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, kw_only=True)
class Seed:
    """A complete seed: its rows, and how they were made."""

    seed: int
    settings: dict[str, Any]
    seconds: int
    machine: str
    versions: dict[str, str]
    rows: list[Row]
    inputs: dict[str, Any] = field(default_factory=dict)
    """The chain, its flags and its models without their folders, and the files' fingerprints; what an older seed did
    not keep is missing."""

    @classmethod
    def of_run(cls, folder: Path) -> Seed:
        """Read what a run left in seed-<seed>."""
        made = Manifest.read(folder)
        given = made.inputs["config"]
        inputs = {name: anywhere(given[name]) for name in NAMED if given.get(name) is not None}
        inputs |= {name: value for name, value in made.inputs.items() if name.endswith(FILE)}
        return cls(
            seed=int(folder.name[5:]), settings={name: given[name] for name in given if name not in OWN},
            seconds=round(made.seconds), machine=made.machine, versions=made.versions, rows=read(folder), inputs=inputs,
        )  # fmt: skip

    def unlike(self, other: Seed) -> list[Change]:
        """Return how another seed was made in another way; what only one of them kept is not compared."""
        first, second = ({"config": {**one.settings, **one.inputs}} for one in (self, other))
        return changes(first, second)

    def write(self, file: Path) -> None:
        """Write the seed as it is committed: a line that says how it was made, then a line per row."""
        head = {name: value for name, value in vars(self).items() if name != "rows"}
        write_jsonl(file, [head, *map(asdict, self.rows)])

    @classmethod
    def read(cls, file: Path) -> Seed:
        """Read what `write` wrote."""
        head, *rows = (row for _, row in read_rows(file))
        return cls(**head, rows=[Row(**row) for row in rows])


def anywhere(value: Any) -> Any:
    """Return a setting without the folders in it: a model has another one on every machine."""
    if isinstance(value, list):
        return [anywhere(item) for item in value]
    return re.sub(r"[^\s={}\[\],'\":]*/", "", str(value))


def complete(study: Study, folder: Path) -> list[Seed]:
    """Read the complete seeds of a study's folder that were made as the newest was, in their order; a line names the
    others. Raises InputError where there is none."""
    files = sorted(folder.glob("seed-*/manifest.json"), key=lambda file: int(file.parent.name[5:]))
    if not files:
        raise InputError(f"{folder}: no seed is complete; run the study")
    seeds = [Seed.of_run(file.parent) for file in files]
    newest = seeds[files.index(max(files, key=lambda file: file.stat().st_mtime_ns))]
    left_out = {seed.seed: found for seed in seeds if (found := seed.unlike(newest))}
    for number, found in left_out.items():
        seen = ", ".join(str(change).removeprefix("config.") for change in found)
        console.stage_line(study.name, f"seed {number} is left out, seed {newest.seed} is newer: {seen}")
    return [seed for seed in seeds if seed.seed not in left_out]


def result_of(study: Study, seeds: Sequence[Seed]) -> dict[str, Any]:
    """Make the study's result, as it is committed: texts, points, checks, verdict, seconds."""
    by_seed = {seed.seed: seed.rows for seed in seeds}
    checks = [checked(check.text, [check.margin(rows) for rows in by_seed.values()]) for check in study.checks]
    texts = {name: getattr(study, name) for name in ("name", "number", "title", "claim", "source", "miniature")}
    return {
        **texts,
        "metrics": {check["text"]: {key: check[key] for key in ("value", "low", "high", "n")} for check in checks},
        "verdict": verdict(checks),
        "seeds": list(by_seed),
        "panels": [asdict(panel) for panel in study.panels],
        "points": points(by_seed),
        "checks": checks,
        "settings": seeds[-1].settings,
        "seconds": {str(seed.seed): seed.seconds for seed in seeds},
        "machine": joined(seed.machine for seed in seeds),
        "versions": {
            name: joined(seed.versions[name] for seed in seeds if name in seed.versions)
            for name in dict.fromkeys(name for seed in seeds for name in seed.versions)
        },
    }


def joined(texts: Iterable[str]) -> str:
    """Return the different texts of several seeds as one."""
    return " and ".join(dict.fromkeys(texts))


def points(by_seed: Mapping[int, Sequence[Row]]) -> list[dict[str, Any]]:
    """Average every point over the seeds that have it; in the order of the rows, with x rising.

    `seeds` is Student's interval over the seeds' values: what another seed would give. `prompts` is over the prompts of
    these very seeds: of their mean, with the seeds' intervals taken as independent."""
    found: dict[tuple[str, str, float | None], list[Row]] = {}
    for rows in by_seed.values():
        for row in rows:
            found.setdefault((row.panel, row.series, row.x), []).append(row)
    order = {key[:2]: place for place, key in reversed(list(enumerate(found)))}
    keys = sorted(found, key=lambda key: (order[key[:2]], -1e300 if key[2] is None else key[2]))
    return [_point(key, found[key]) for key in keys]


def _point(key: tuple[str, str, float | None], rows: Sequence[Row]) -> dict[str, Any]:
    panel, series, x = key
    values = [row.value for row in rows]
    return {
        "panel": panel, "series": series, "x": x, "value": fmean(values), "seeds": over_seeds(values),
        "prompts": over_prompts([(row.value, row.low, row.high) for row in rows]),
        "n": sum(row.n for row in rows), "by_seed": values,
    }  # fmt: skip
