"""The frame of the studies: seeds that are run once, intervals by hand, the verdict's rule; documents and results
agree."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from reference.documents import ROOT

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf_recipes.studies import all_studies, study, study_page, write_results
from rlhf_recipes.studies.study import (
    Check,
    Panel,
    Row,
    Seed,
    Study,
    StudyConfig,
    anywhere,
    at,
    main,
    result_of,
    run_seed,
)
from rlhf_recipes.studies.verdicts import checked, over_prompts, over_seeds, verdict

STUDIES = [script.stem for script in all_studies.studies()]


@dataclass(frozen=True, kw_only=True)
class SlopeConfig(StudyConfig):
    """Settings of a study that computes nothing."""

    slope: float = 1.0
    """Of its line."""


RUNS: list[int] = []


def run(config: SlopeConfig) -> Iterator[Row]:
    RUNS.append(config.seed)
    assert config.shared == Path(config.output_dir).parents[1] / "runs" / f"{Path(config.chain).stem}-{config.seed}"
    for x in (4, 1, 2):
        yield Row(series="<b>line", x=x, value=config.slope * x + config.seed, low=0.0, high=9.0, n=10)


STUDY = Study(
    name="slope", number=1, title="A line", claim="It rises | always", source="Nobody 2026", miniature="A line.",
    panels=[Panel(x="x", y="y", scale="log")], run=run,
    checks=[Check("it rises", lambda rows: at(rows, "<b>line", 4) - at(rows, "<b>line", 1))],
)  # fmt: skip


def started(folder: Path, *flags: str) -> dict:
    (folder / "slope.yaml").write_text("seeds: [0, 1, 2]\n")
    main(STUDY, SlopeConfig, str(folder / "slope.py"), ["--output_dir", str(folder / "out"), *flags])
    return json.loads((folder / "out/slope/slope.json").read_text())


def test_a_seed_is_run_once_and_the_table_is_of_all_seeds(tmp_path):
    RUNS.clear()
    assert started(tmp_path, "--seeds", "[1]")["verdict"] == "too few seeds"
    result = started(tmp_path)
    assert RUNS == [1, 0, 2]
    assert result["seeds"] == [0, 1, 2]
    assert [(point["x"], point["value"]) for point in result["points"]] == [(1, 2.0), (2, 3.0), (4, 5.0)]
    assert result["points"][0]["by_seed"] == [1.0, 2.0, 3.0]
    assert result["points"][0]["n"] == 30
    assert result["verdict"] == "yes"
    assert result["metrics"]["it rises"] == {"value": 3.0, "low": 3.0, "high": 3.0, "n": 3}
    page = (tmp_path / "out/slope/slope.html").read_text()
    assert "Does it come out? Yes." in page
    assert "<b>" not in page
    assert (tmp_path / "out/slope/slope.svg").read_text().startswith("<svg")


def test_other_settings_are_refused_unless_they_may_overwrite(tmp_path):
    config = SlopeConfig(output_dir=str(tmp_path / "out"))
    first = run_seed(STUDY, config, 1)
    with pytest.raises(InputError, match=r"slope was 1\.0, now 2\.0"):
        run_seed(STUDY, replace(config, slope=2.0), 1)
    again = run_seed(STUDY, replace(config, slope=2.0, overwrite=True), 1)
    assert [row.value for row in first] == [5.0, 2.0, 3.0]
    assert [row.value for row in again] == [9.0, 3.0, 5.0]


def chained(folder: Path, text: str, *flags: str) -> dict:
    (folder / "toy.yaml").write_text(text)
    return started(folder, "--chain", str(folder / "toy.yaml"), *flags)


def test_a_seed_whose_files_changed_is_not_taken_for_complete(tmp_path):
    """The chain's config by what it says, and data that a flag of the chain names."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}\n")
    flags = ["--seeds", "[1]", "--chain_flags", json.dumps([f"--data.rankings={data}"])]
    RUNS.clear()
    chained(tmp_path, "seed: 0\n", *flags)
    chained(tmp_path, "# another comment\nseed: 0\n", *flags)
    assert RUNS == [1]
    with pytest.raises(InputError, match=r"slope/seed-1 belongs to another run: chain_file was \w{12}, now \w{12};"):
        chained(tmp_path, "seed: 1\n", *flags)
    data.write_text("[]\n")
    with pytest.raises(InputError, match=r"data_rankings_file was \w{12}, now \w{12};"):
        chained(tmp_path, "seed: 0\n", *flags)
    chained(tmp_path, "seed: 1\n", *flags, "--overwrite")
    assert RUNS == [1, 1]


def forget_files(folder: Path) -> None:
    """Make a complete seed one of the time before the fingerprints of its files were kept."""
    for name in ("inputs", "manifest"):
        content = json.loads((folder / f"{name}.json").read_text())
        (content if name == "inputs" else content["inputs"]).pop("chain_file")
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_seed_without_fingerprints_of_its_files_stays_complete(tmp_path):
    RUNS.clear()
    chained(tmp_path, "seed: 0\n", "--seeds", "[0]")
    forget_files(tmp_path / "out/slope/seed-0")
    assert chained(tmp_path, "seed: 1\n", "--seeds", "[0, 1]")["seeds"] == [0, 1]
    chained(tmp_path, "seed: 1\n", "--seeds", "[0]", "--overwrite")
    assert RUNS == [0, 1, 0]


def test_the_table_is_of_seeds_that_were_made_alike(tmp_path, capsys):
    started(tmp_path, "--seeds", "[0, 2]")
    result = started(tmp_path, "--seeds", "[1]", "--slope", "2.0")
    assert (result["seeds"], result["settings"]) == ([1], {"slope": 2.0})
    assert "seed 2 is left out, seed 1 is newer: slope was 1.0, now 2.0" in capsys.readouterr().out
    result = started(tmp_path, "--seeds", "[1]", "--chain", "smoke.yaml", "--overwrite")
    assert result["seeds"] == [1]
    assert re.search(r"seed 0 is left out.*: chain was \"toy.yaml\", now \"smoke.yaml\"", capsys.readouterr().out)


def test_folders_of_a_machine_tell_no_seeds_apart():
    flags = ["--sft.model=/work/models/Smol-135M", "--data.options={source: /tmp/a b.gz}", "--ppo.kl_coef=0.1"]
    assert anywhere(flags) == ["--sft.model=Smol-135M", "--data.options={source: a b.gz}", "--ppo.kl_coef=0.1"]
    assert anywhere("owner/Smol-135M") == "Smol-135M"


def test_intervals_by_hand():
    assert over_seeds([0.5]) is None
    low, high = over_seeds([1.0, 2.0, 3.0]) or (0, 0)  # Student's t of 2 degrees: 4.302653
    assert low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    joined = over_prompts([(0.5, 0.4, 0.6), (0.7, 0.5, 0.8)])
    assert joined == pytest.approx([0.6 - math.sqrt(0.01 + 0.04) / 2, 0.6 + math.sqrt(0.01 + 0.01) / 2])
    assert over_prompts([(0.5, 0.4, 0.6), (0.7, None, None)]) is None


def test_the_rule_of_the_verdict():
    sure, alike, mixed = [1.0, 1.1, 0.9], [0.1, 2.0, 5.0], [1.0, -0.1, 1.0]
    assert [checked("", margins)["says"] for margins in (sure, alike, mixed)] == ["yes", "partly", "no"]
    assert checked("", [0.2])["says"] == "partly"
    assert verdict([checked("", sure), checked("", sure)]) == "yes"
    assert verdict([checked("", mixed), checked("", mixed)]) == "no"
    assert verdict([checked("", sure), checked("", mixed)]) == "partly"
    assert verdict([checked("", sure[:2])]) == "too few seeds"


def test_a_value_that_is_missing_or_there_twice_is_named():
    with pytest.raises(InputError, match="0 values of 'gold' at 2"):
        at([Row("gold", 1.0, x=1)], "gold", 2)
    with pytest.raises(InputError, match="2 values"):
        at([Row("gold", 1.0, x=1), Row("gold", 2.0, x=1)], "gold", 1)


# ---------------------------------------------------------------- the studies themselves


def loaded(name: str) -> tuple[Study, StudyConfig]:
    module = importlib.import_module(f"rlhf_recipes.studies.{name}")
    own = next((v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__
                and isinstance(v, type) and issubclass(v, StudyConfig)), StudyConfig)  # fmt: skip
    return module.STUDY, configs.load(own, ["--config", str(ROOT / f"recipes/studies/{name}.yaml")])


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_what_it_is(name):
    found, config = loaded(name)
    assert found.name == name
    assert found.claim.endswith(".")
    assert found.miniature.endswith(".")
    assert found.checks
    assert len(config.seeds) >= 3
    assert (ROOT / "recipes/configs" / config.chain).is_file()
    assert replace(config, seeds=[2]).seed == 2


def test_each_number_is_one_study():
    numbers = [loaded(name)[0].number for name in STUDIES]
    assert len(set(numbers)) == len(numbers)


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize("document", write_results.DOCUMENTS)
def test_documents_show_the_committed_results(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert write_results.written(text, document) == text, "run: python recipes/studies/write_results.py"


@pytest.mark.parametrize("result", write_results.results().values(), ids=lambda result: result["name"])
def test_a_committed_verdict_is_that_of_todays_checks(result):
    again = json.loads(json.dumps(write_results.judged_again(result)))
    assert again == result, "run: python recipes/studies/write_results.py"


def test_a_verdict_without_seeds_rows_is_of_the_points_that_every_seed_has(tmp_path, monkeypatch):
    monkeypatch.setattr(write_results.importlib, "import_module", lambda name: SimpleNamespace(STUDY=STUDY))
    monkeypatch.setattr(write_results, "RESULTS", tmp_path)
    result = started(tmp_path)
    point = result["points"][0] | {"x": 8.0, "by_seed": [3.0]}
    kept = result | {"points": [*result["points"], point], "checks": [], "verdict": "no", "claim": "It falls."}
    assert write_results.judged_again(kept) == result | {"points": kept["points"]}


MEASURED = re.compile(r"\[-?\d*\.\d+, -?\d*\.\d+\]|s/update")


@pytest.mark.parametrize("document", write_results.DOCUMENTS)
def test_no_table_of_measurements_is_typed_by_hand(document):
    """A table with an interval or seconds per update in it stands between the marks of a committed result."""
    text = write_results.MARK.sub("", (ROOT / document).read_text(encoding="utf-8"))
    typed = [line for line in text.splitlines() if line.startswith("|") and MEASURED.search(line)]
    assert not typed


def test_a_benchmark_is_taken_over_without_its_folders(tmp_path, monkeypatch):
    run = tmp_path / "speed_here"
    run.mkdir()
    config = {"output_dir": str(run), "model": "/somewhere", "updates": 3, "machine": "one CPU"}
    (run / "results.json").write_text(json.dumps({"config": config}))
    for text in (None, ""):
        if text is not None:
            (run / "tables.md").write_text(text)
        with pytest.raises(InputError, match="holds no table"):
            write_results.take_over_benchmark(run)
    (run / "tables.md").write_text("### A, b\n\n| x |\n| --- |\n\n### C\n\n| y |\n")
    monkeypatch.setattr(write_results, "RESULTS", tmp_path / "results")
    assert write_results.take_over_benchmark(run) == "speed_here"
    written = (tmp_path / "results/speed_here.json").read_text()
    assert "/" not in written
    assert json.loads(written)["settings"] == {"updates": 3}
    found = write_results.benchmark_blocks()
    assert found == {"speed_here_0": "*A, b* (one CPU)\n\n| x |\n| --- |", "speed_here_1": "*C* (one CPU)\n\n| y |"}


@pytest.mark.slow
def test_seeds_of_several_machines_make_one_result(tmp_path, monkeypatch):
    """Where they have the same settings; a machine's own seed replaces the committed one."""
    monkeypatch.setattr(write_results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(write_results.importlib, "import_module", lambda name: SimpleNamespace(STUDY=STUDY))
    for machine, seeds in (("here", "[0, 2]"), ("there", "[1, 2]")):
        (tmp_path / machine).mkdir()
        started(tmp_path / machine, "--seeds", seeds)
        assert write_results.take_over(tmp_path / machine / "out") == ["slope"]
    result = write_results.results(tmp_path / "results")["slope"]
    whole = started(tmp_path / "here", "--seeds", "[0, 1, 2]")
    assert result | {"seconds": 0} == whole | {"seconds": 0}
    assert list(result["seconds"]) == ["0", "1", "2"]
    assert (tmp_path / "results/slope.svg").read_text() == (tmp_path / "here/out/slope/slope.svg").read_text()
    (tmp_path / "other").mkdir()
    before = {file: file.read_bytes() for file in sorted((tmp_path / "results").rglob("*.*"))}
    started(tmp_path / "other", "--seeds", "[1]", "--slope", "2.0")
    with pytest.raises(InputError, match="would lose seed 0, 2"):
        write_results.take_over(tmp_path / "other/out")
    assert {file: file.read_bytes() for file in sorted((tmp_path / "results").rglob("*.*"))} == before
    started(tmp_path / "other", "--seeds", "[0, 2, 5]", "--slope", "2.0")
    write_results.take_over(tmp_path / "other/out")
    assert write_results.results(tmp_path / "results")["slope"]["seeds"] == [0, 1, 2, 5]
    assert len(list((tmp_path / "results/seeds").iterdir())) == 4


@pytest.mark.slow
def test_seeds_of_another_chain_do_not_join_the_committed_ones(tmp_path, monkeypatch):
    """Neither of another name, nor of the same name with other content; seeds that did not keep it do."""
    monkeypatch.setattr(write_results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(write_results.importlib, "import_module", lambda name: SimpleNamespace(STUDY=STUDY))
    for name in ("first", "named", "changed", "older"):
        (tmp_path / name).mkdir()
    chained(tmp_path / "first", "seed: 0\n", "--seeds", "[0]")
    write_results.take_over(tmp_path / "first/out")
    started(tmp_path / "named", "--seeds", "[1]", "--chain", "smoke.yaml")
    chained(tmp_path / "changed", "seed: 1\n", "--seeds", "[1]")
    for name in ("named", "changed"):
        with pytest.raises(InputError, match="would lose seed 0"):
            write_results.take_over(tmp_path / name / "out")
    chained(tmp_path / "older", "seed: 1\n", "--seeds", "[1]")
    forget_files(tmp_path / "older/out/slope/seed-1")
    write_results.take_over(tmp_path / "older/out")
    assert write_results.results(tmp_path / "results")["slope"]["seeds"] == [0, 1]


def test_a_result_names_every_machine_and_version_of_its_seeds(tmp_path):
    run_seed(STUDY, SlopeConfig(output_dir=str(tmp_path)), 0)
    one = Seed.of_run(tmp_path / "slope/seed-0")
    other = replace(one, seed=1, machine="another", versions={"torch": "9"})
    result = result_of(STUDY, [one, other])
    assert result["machine"] == f"{one.machine} and another"
    assert result["versions"]["torch"] == f"{one.versions['torch']} and 9"
    assert result["versions"]["trl"] == one.versions["trl"]


def test_a_result_without_its_seeds_rows_is_not_replaced_by_less(tmp_path, monkeypatch):
    """One that was committed before rows were."""
    monkeypatch.setattr(write_results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(write_results.importlib, "import_module", lambda name: SimpleNamespace(STUDY=STUDY))
    started(tmp_path, "--seeds", "[0, 1]")
    write_results.take_over(tmp_path / "out")
    shutil.rmtree(tmp_path / "results/seeds")
    shutil.rmtree(tmp_path / "out")
    started(tmp_path, "--seeds", "[1, 2]")
    with pytest.raises(InputError, match="would lose seed 0,"):
        write_results.take_over(tmp_path / "out")


def test_a_mark_of_nothing_is_refused():
    with pytest.raises(InputError, match="mark 'nothing'"):
        write_results.written("<!-- results: nothing -->\n<!-- end of nothing -->", "README.md")


def test_a_cell_cannot_break_a_table():
    assert study_page.markdown((["a | b"], [["c|d"]])) == "| a \\| b |\n| --- |\n| c\\|d |"


def test_one_table_of_all_panels():
    point = {"panel": "", "series": "PPO", "x": None, "value": 0.5, "seeds": [0.25, 0.75]}
    curve, other = point | {"x": 1.0, "value": 9.0}, point | {"panel": "cost", "value": 1234.0, "seeds": None}
    panels = [{"name": name, "y": y} for name, y in (("", "gold | score"), ("cost", "minutes"), ("curve", "nothing"))]
    result = {"panels": panels, "points": [point, curve, other, point | {"series": "DPO"}]}
    assert study_page.by_series(result).splitlines() == [
        "|  | gold \\| score | minutes |", "| --- | --- | --- |", "| PPO | 0.5 [0.25, 0.75] | 1,234 |",
        "| DPO | 0.5 [0.25, 0.75] |  |",
    ]  # fmt: skip
    assert study_page.by_series(result, bare=("",)).splitlines()[2:] == ["| PPO | 0.5 | 1,234 |", "| DPO | 0.5 |  |"]


def test_values_seed_by_seed_stand_panel_by_panel():
    panels = [{"name": "", "x": "", "y": "gold"}, {"name": "won", "x": "", "y": "won"}]
    given = [("won", "PPO", 0.75), ("", "PPO", 6.0), ("won", "DPO", 0.5), ("", "DPO", 5.0)]
    points = [
        {
            "panel": panel,
            "series": series,
            "x": None,
            "value": value,
            "by_seed": [value],
            "seeds": None,
            "prompts": None,
        }
        for panel, series, value in given
    ]
    result = {"seeds": [3], "panels": panels, "points": [*points, points[0] | {"x": 1.0}]}
    head = ["|  | seed 3 | mean | over seeds | over prompts |", "| --- | --- | --- | --- | --- |"]
    gold = ["| gold: PPO | 6 | 6 |  |  |", "| gold: DPO | 5 | 5 |  |  |"]
    won = ["| won: PPO | 0.75 | 0.75 |  |  |", "| won: DPO | 0.5 | 0.5 |  |  |"]
    assert study_page.by_seed(result).splitlines() == [*head, *gold, *won]
    assert study_page.by_seed(result, without="won").splitlines() == [*head, *gold]


def test_points_that_not_every_seed_has_are_told_apart(monkeypatch):
    """They are hollow, off the line and its band, and a table names how many seeds they are of."""
    shown = {}
    monkeypatch.setattr(study_page.html, "svg", lambda draw, *size: shown.update(axes=axes(draw)) or "<svg>")
    by_seed = {0: [Row("a", 1.0, 1), Row("a", 2.0, 2), Row("b", 5.0)], 1: [Row("a", 3.0, 1), Row("b", 5.0)]}
    result = {"name": "x", "seeds": [0, 1], "panels": [{"name": "", "x": "x", "y": "y", "scale": "linear"}]}
    curve = [point for point in study.points(by_seed) if point["series"] == "a"]
    study_page.pictures(result | {"points": curve})
    whole, few, entry = shown["axes"].lines
    assert (list(whole.get_xdata()), list(whole.get_ydata())) == ([1], [2.0])
    assert (list(few.get_xdata()), few.get_fillstyle()) == ([2], "none")
    assert entry.get_label() == "not of all seeds"
    assert [row[0] for row in study_page.tables(result | {"points": curve})[0][1]] == ["a", "a (1 of 2 seeds)"]
    alone = study.points({0: [Row("a", 1.0), Row("b", 2.0)], 1: [Row("a", 3.0)]})
    study_page.pictures(result | {"points": alone})
    labels = [label.get_text() for label in shown["axes"].get_yticklabels()]
    assert labels == ["b (1 of 2 seeds)", "a"]


def axes(draw):
    from matplotlib.figure import Figure

    made = Figure().subplots()
    draw(made)
    return made


def test_workers_share_the_seeds_of_a_chain():
    """Seeds of one study run side by side; a chain's seed is one worker's at a time; nothing runs twice."""
    names, seeds = ["accuracy", "ladder", "steps_toy"], [0, 1, 2]
    queue = all_studies.Queue(names, seeds)
    first, second = queue.take(), queue.take()
    assert (first, second) == (("accuracy", 0), ("accuracy", 1))
    assert [queue.take() for _ in range(2)] == [("accuracy", 2), ("steps_toy", 0)], "toy of 0, 1 and 2 is in use"
    queue.give_back(*second)
    assert queue.take() == ("ladder", 1)
    rest = []
    for done in (("accuracy", 0), ("accuracy", 2), ("steps_toy", 0), ("ladder", 1)):
        queue.give_back(*done)
    while taken := queue.take():
        rest.append(taken)
        queue.give_back(*taken)
    assert rest == [("ladder", 0), ("ladder", 2), ("steps_toy", 1), ("steps_toy", 2)]


def test_a_study_has_its_own_seeds_unless_others_are_named():
    names = ["ladder", "safety_toy"]
    assert [seed for _, seed in all_studies.Queue(names, None).left] == [0, 1, 2, 1, 2, 3]
    assert [seed for _, seed in all_studies.Queue(names, [5]).left] == [5, 5]


def test_all_but_the_longest_run_unless_named():
    assert set(STUDIES) - set(all_studies.AllConfig().studies) == set(all_studies.LONG)
    with pytest.raises(InputError, match="'acuracy' is none of accuracy"):
        all_studies.AllConfig(studies=["acuracy"])
