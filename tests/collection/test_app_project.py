"""What annotators are asked, from YAML."""

from __future__ import annotations

import json

import pytest
from reference.documents import BLOCKS

from rlhf.collection.project import FLAGS, Criterion, Project, check_ratings, read_project
from rlhf.errors import InputError


@pytest.fixture
def write(tmp_path):
    def written(text: str):
        (tmp_path / "project.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "project.yaml"

    return written


def test_a_whole_project(write, tmp_path):
    (tmp_path / "guide.md").write_text("# Be fair\n<b>é</b>", encoding="utf-8")
    file = write(
        "title: Helpful answers\nguidelines: guide.md\nflags: [unsafe]\ncriteria:\n"
        '  - {name: help, scale: 3, text: "Does it do it?"}\n  - {name: tone, scale: [rude, kind]}\n'
    )
    criteria = (Criterion("help", ("1", "2", "3"), "Does it do it?"), Criterion("tone", ("rude", "kind")))
    project = read_project(file)
    assert project == Project("Helpful answers", "# Be fair\n<b>é</b>", criteria, ("unsafe",))
    assert Project.from_json(json.loads(json.dumps(project.to_json()))) == project  # as the store keeps it


def test_the_guides_example(write, tmp_path):
    (tmp_path / "guidelines.md").write_text("Be fair")
    example = next(block for block in BLOCKS if block.file.stem == "labelling" and "criteria:" in block.text)
    project = read_project(write(example.text))
    assert [(one.name, len(one.scale)) for one in project.criteria] == [("helpfulness", 5), ("tone", 3)]
    assert project.flags == FLAGS


def test_what_is_left_out_has_defaults(write):
    assert read_project(write("title: Short")) == Project("Short", "", (), FLAGS)
    assert read_project(write("flags: []")).flags == ()


def test_the_guideline_changes_with_the_criteria_and_the_text_alone():
    one = Project("A", "Be fair", (Criterion("tone", ("1", "2")),))
    assert one.guideline == Project("B", "Be fair", one.criteria, ()).guideline
    assert one.guideline != Project("A", "Be fair", (Criterion("tone", ("1", "2", "3")),)).guideline
    assert one.guideline != Project("A", "Be fairer", one.criteria).guideline
    assert Project("A", "Be fair").guideline == "Be fair"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("titel: x", "project.yaml:1: unknown key titel; did you mean title?"),
        ("title: 5", "project.yaml:1: title: got 5; write text"),
        ("title: ' '", "title: got ' '"),
        ("title: x\nguidelines: gone.md", "project.yaml:2: guidelines: "),
        ("title: x\nguidelines: gone.md", "no such file; paths are relative to the project file"),
        ("flags: unsafe", "flags: got 'unsafe'; write a list of at most 9"),
        ("flags: [a, b, c, d, e, f, g, h, i, j]", "a list of at most 9"),
        ("flags: [yes]", "flags[0]: got True; write text of 1 to 60 characters, in quotes"),
        ("flags: [a, a]", "flags: 'a' is given twice"),
        ("criteria: [tone]", "criteria[0]: got 'tone'; write {name: helpfulness"),
        ("criteria: [{nam: tone}]", "criteria[0]: unknown key nam; did you mean name?"),
        ("criteria: [{scale: 5}]", "criteria[0].name: got None"),
        ("criteria: [{name: t, scale: 1}]", "criteria[0].scale: got 1; use 2 to 10 points"),
        ("criteria: [{name: t, scale: [a]}]", "criteria[0].scale: got 1 names"),
        ("criteria: [{name: t, scale: [a, a]}]", "criteria[0].scale: 'a' is given twice"),
        ("criteria: [{name: t, scale: good}]", "criteria[0].scale: got 'good'; write a list"),
        ("criteria: [{name: t}, {name: t}]", "criteria: 't' is given twice"),
    ],
)
def test_mistakes_name_the_line(write, text, says):
    with pytest.raises(InputError) as problem:
        read_project(write(text))
    assert says in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("ratings", "says"),
    [({1: {"tone": 0}}, "got 0"), ({1: {"tone": 3}}, "1 to 2"), ({1: {"tone": 1.5}}, "got 1.5"), ({1: {"x": 1}}, "x")],
)
def test_ratings_off_the_scale(ratings, says):
    project = Project(criteria=(Criterion("tone", ("bad", "good")),))
    check_ratings({1: {"tone": 1}, 2: {"tone": 2.0}}, project)
    with pytest.raises(InputError, match=says):
        check_ratings(ratings, project)
