"""A registry in OpenAI's layout: what can be run is read, what can't says why in one line; our own two-line form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from reference.documents import ROOT

from rlhf.errors import InputError
from rlhf.evals.grading import Eval
from rlhf.evals.modelgraded import ModelBasedClassify, filled, read_spec
from rlhf.evals.own import read_own
from rlhf.evals.registry import Registry, Unread

USER = {"role": "user", "content": "2 + 2 ="}
SYSTEM = {"role": "system", "content": "Answer with the number."}
SHOWN = [
    {"role": "system", "name": "example_user", "content": "1 + 1 ="},
    {"role": "system", "name": "example_assistant", "content": "2"},
]
SPEC = {
    "prompt": "Is this right? {{no place}}\n{input}\n{completion}\n{criteria}",
    "choice_strings": "YN",
    "choice_scores": {"Y": 1.0, "N": 0.0},
    "input_outputs": {"input": "completion"},
}


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))


def entry(name: str, cls: str, **args: object) -> dict:
    return {
        name: {"id": f"{name}.dev.v0", "description": "...", "metrics": ["accuracy"]},
        f"{name}.dev.v0": {"class": f"evals.elsuite.{cls}", "args": args},
    }


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    folder = tmp_path / "registry"
    graded = "modelgraded.classify:ModelBasedClassify"
    files = {
        "sums.yaml": entry("sums", "basic.match:Match", samples_jsonl="sums/samples.jsonl", num_few_shot=1,
                           few_shot_jsonl="sums/few_shot.jsonl"),
        "words.yaml": entry("words", "basic.includes:Includes", samples_jsonl="words/samples.jsonl", ignore_case=True),
        "fuzzy.yaml": entry("fuzzy", "basic.fuzzy_match:FuzzyMatch", samples_jsonl="words/samples.jsonl"),
        "json.yaml": entry("json", "basic.json_match:JsonMatch", samples_jsonl="json.jsonl", max_tokens=64),
        "graded.yaml": entry("graded", graded, samples_jsonl="words/samples.jsonl", eval_type="cot_classify",
                             modelgraded_spec="yes", modelgraded_spec_args={"criteria": "Is it short?"}),
        "best.yaml": entry("best", graded, samples_jsonl="words/samples.jsonl", eval_type="classify",
                           modelgraded_spec="best", multicomp_n=3),
        "meta.yaml": entry("meta", graded, samples_jsonl="meta.jsonl", eval_type="classify", modelgraded_spec="yes",
                           modelgraded_spec_args={"criteria": "x"}, metaeval=True),
        "custom.yaml": entry("custom", "make_me_say.eval:MakeMeSay", samples_jsonl="words/samples.jsonl"),
        "lfs.yaml": entry("lfs", "basic.match:Match", samples_jsonl="lfs/samples.jsonl"),
        "missing.yaml": entry("missing", "basic.match:Match", samples_jsonl="nowhere/samples.jsonl"),
        "models.yaml": entry("models", graded, samples_jsonl="words/samples.jsonl", modelgraded_spec="yes",
                             multicomp_n="from_models"),
        "nospec.yaml": entry("nospec", graded, samples_jsonl="words/samples.jsonl", modelgraded_spec="yess"),
        "argument.yaml": entry("argument", "basic.match:Match", samples_jsonl="words/samples.jsonl", eval_type="x"),
        "outside.yaml": entry("outside", "basic.match:Match", samples_jsonl="../../secret.jsonl"),
        "row.yaml": entry("row", "basic.match:Match", samples_jsonl="row.jsonl"),
        "assistant.yaml": entry("assistant", "basic.match:Match", samples_jsonl="assistant.jsonl"),
        "alias.yaml": {"alias": {"id": "gone.dev.v0"}, "loop": {"id": "loop2"}, "loop2": {"id": "loop"}},
        "broken.yaml": "a: [1,\nb: 2\n",
        "zwice.yaml": entry("words", "basic.match:Match", samples_jsonl="words/samples.jsonl"),
        "empty.yaml": "",
    }  # fmt: skip
    for name, content in files.items():
        write(folder / "evals" / name, content)
    write(folder / "modelgraded/yes.yaml", {"yes": SPEC})
    best = {
        "prompt": "Best of {n}?\n{completion}",
        "choice_strings": "from_n",
        "input_outputs": {"input": "completion"},
    }
    write(folder / "modelgraded/more.yaml", {"best": {**best, "output_template": "{i}. {output}\n"}})
    data = folder / "data"
    write(
        data / "sums/samples.jsonl",
        [{"input": [SYSTEM, USER], "ideal": "4"}, {"input": [USER], "ideal": ["4", "four"]}],
    )
    write(data / "sums/few_shot.jsonl", [{"sample": SHOWN}, {"sample": SHOWN}])
    write(
        data / "words/samples.jsonl",
        [{"input": "Say {yes}.", "ideal": ["yes", "Yes"]}, {"input": [SYSTEM], "ideal": "no"}],
    )
    write(data / "json.jsonl", [{"input": "JSON?", "ideal": '{"a": [1]}'}])
    write(data / "meta.jsonl", [{"input": "q", "completion": "an answer", "choice": "Y"}])
    write(data / "lfs/samples.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    write(data / "row.jsonl", [{"input": "fine", "ideal": "a"}, {"input": "no answer"}])
    write(data / "assistant.jsonl", [{"input": [USER, {"role": "assistant", "content": "4"}], "ideal": "4"}])
    write(tmp_path / "secret.jsonl", [{"input": "x", "ideal": "y"}])
    return folder


REASONS = {
    "custom.dev.v0": "class of its own, evals.elsuite.make_me_say.eval:MakeMeSay",
    "lfs.dev.v0": "lfs/samples.jsonl: a Git LFS pointer and not the data",
    "missing.dev.v0": "nowhere/samples.jsonl: no such file",
    "models.dev.v0": "multicomp_n: got 'from_models'",
    "nospec.dev.v0": "unknown modelgraded spec yess; did you mean yes?",
    "argument.dev.v0": "unknown argument of Match eval_type",
    "outside.dev.v0": "../../secret.jsonl: leads out of the registry",
    "row.dev.v0": "row.jsonl:2: ideal: got None",
    "assistant.dev.v0": "assistant.jsonl:1: input: the last turn is 'assistant'",
    "alias": "alias stands for gone.dev.v0, which is not there",
    "loop": "loop stands for loop2, which is not there",
    "loop2": "loop2 stands for loop, which is not there",
}


def test_what_can_run_is_read_and_the_rest_says_why(registry):
    found = Registry(registry)
    loaded = {name: found.load(name) for name in found.find(["*"])}
    ran = {name for name, one in loaded.items() if isinstance(one, Eval)}
    assert ran == {f"{name}.dev.v0" for name in ("sums", "words", "fuzzy", "json", "graded", "best", "meta")}
    reasons = {name: one.reason for name, one in loaded.items() if isinstance(one, Unread)}
    assert reasons.keys() == REASONS.keys()
    for name, part in REASONS.items():
        assert part in reasons[name], reasons[name]
        assert "\n" not in reasons[name]
    files = {unread.name: unread.reason for unread in found.unread}
    assert "broken.yaml:3: broken YAML" in files["broken.yaml"]
    assert "words.yaml:1" in files["words"]
    assert "zwice.yaml:1" in files["words"]


def test_few_shot_named_turns_and_lone_system_turns(registry):
    one = Registry(registry).load("sums.dev.v0")
    assert isinstance(one, Eval)
    shown = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
    assert one.samples[0].messages == [SYSTEM, *shown, USER]
    assert one.samples[1].messages == [*shown, USER]
    assert one.samples[1].ideal == ("4", "four")
    words = Registry(registry).load("words.dev.v0")
    assert words.samples[1].messages == [{"role": "user", "content": SYSTEM["content"]}]
    assert words.grader.ignore_case
    assert Registry(registry).load("json.dev.v0").max_new_tokens == 64


def test_a_graded_question_is_written_by_the_spec(registry):
    one = Registry(registry).load("graded.dev.v0")
    assert isinstance(one.grader, ModelBasedClassify)
    sample = one.samples[0]
    assert one.grader.asks(sample) == {"completion": sample.messages}
    (turn,) = one.grader.question(sample, {"completion": ["{yes} yes."]})
    head, _, tail = turn["content"].partition("\n\n")
    assert head == "Is this right? {no place}\nSay {yes}.\n{yes} yes.\nIs it short?"
    assert '"Y" or "N"' in tail
    best = Registry(registry).load("best.dev.v0")
    assert (best.grader.choices, best.temperature) == (("1", "2", "3"), 0.4)
    (turn,) = best.grader.question(sample, {"completion": ["a", "b", "c"]})
    assert turn["content"].startswith("Best of 3?\n1. a\n2. b\n3. c\n\nAnswer with one of")
    meta = Registry(registry).load("meta.dev.v0")
    assert meta.grader.asks(meta.samples[0]) == {}
    assert meta.grader.by_letter


def test_patterns_name_evals_and_aliases(registry):
    found = Registry(registry)
    assert found.find(["sums", "sums.dev*", "w*"]) == ["sums.dev.v0", "words.dev.v0"]
    with pytest.raises(InputError, match=r"unknown eval sum; did you mean sums\?"):
        found.find(["sum"])
    with pytest.raises(InputError, match=r"no evals/\*\.yaml in it; name .*registry$"):
        Registry(registry.parent)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"choice_strings": ["Y."]}, "choice_strings"),
        ({"choice_strings": [True, False]}, "choice_strings"),
        ({"input_outputs": {}}, "input_outputs"),
        ({"eval_type": "guess"}, "eval_type"),
        ({"choice_scores": {"Y": "1"}}, "choice_scores"),
        ({"args": {}}, "args"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_a_wrong_spec_names_its_field(change, field):
    with pytest.raises(InputError, match=rf"spec\.yaml.*{field}"):
        read_spec({**SPEC, **change}, "spec.yaml:1")


def test_places_are_filled_once():
    assert filled("{a}{{b}}{b}", {"a": "{b}", "b": "2"}, "") == "{b}{b}2"
    with pytest.raises(InputError, match=r"nothing for \{c\}"):
        filled("{c}", {}, "here")


# ---------------------------------------------------------------- our own form


def test_two_lines_are_an_eval(tmp_path):
    write(tmp_path / "capitals.jsonl", [{"prompt": "Capital of France?", "ideal": ["Paris"]}])
    assert read_own(str(tmp_path / "capitals.jsonl")).grader.name == "Match"
    assert read_own(str(tmp_path / "capitals.jsonl"), kind="FuzzyMatch").grader.name == "FuzzyMatch"
    write(tmp_path / "capitals.yaml", {"class": "Includes", "max_tokens": 8, "dataset": "me/capitals"})
    for name in ("capitals.jsonl", "capitals.yaml"):
        one = read_own(str(tmp_path / name))
        assert (one.name, one.grader.name, one.max_new_tokens) == ("capitals", "Includes", 8)
        assert one.dataset == "me/capitals"
    with pytest.raises(InputError, match=r"capitals\.yaml:1: class: is 'Includes', and --eval_class Match"):
        read_own(str(tmp_path / "capitals.jsonl"), kind="Match")


def test_few_shot_of_our_own_form(tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "3?", "ideal": "4"}])
    write(tmp_path / "shots.jsonl", [{"prompt": "1?", "ideal": ["2", "two"]}])
    (sample,) = read_own(str(tmp_path / "a.jsonl"), few_shot=str(tmp_path / "shots.jsonl"), num_few_shot=1).samples
    assert [turn["content"] for turn in sample.messages] == ["1?", "2", "3?"]
    with pytest.raises(InputError, match=r"shots\.jsonl: 1 rows, and num_few_shot=2"):
        read_own(str(tmp_path / "a.jsonl"), few_shot=str(tmp_path / "shots.jsonl"), num_few_shot=2)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ('{"prompt": "a"}', r"a\.jsonl:2: ideal: got None"),
        ('{"prompt": "a", "ideal": 4}', r"a\.jsonl:2: ideal: got 4; write the right answer as text"),
        ('{"prompt": "a", "ideal": []}', r"a\.jsonl:2: ideal: got \[\]"),
        ('{"prompt": "a", "ideal": ""}', r"a\.jsonl:2: ideal: an empty text"),
        ('{"prompt": "", "ideal": "b"}', r"a\.jsonl:2: prompt: got empty text"),
        ('{"question": "a", "ideal": "b"}', r"a\.jsonl:2: no prompt among the columns question, ideal"),
        ('{"prompt": [{"role": "usr", "content": "a"}], "ideal": "b"}', r"a\.jsonl:2: prompt\[0\]\.role: got 'usr'"),
        ('{"prompt": "a", "ideal": "b"', r"a\.jsonl:2: broken JSON"),
        ("[1]", r"a\.jsonl:2: got \[1\]"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, row, line):
    write(tmp_path / "a.jsonl", f'{{"prompt": "a", "ideal": "b"}}\n{row}\n')
    with pytest.raises(InputError, match=line):
        read_own(str(tmp_path / "a.jsonl"))


def test_a_bad_description_is_named_by_line_and_field(tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "a", "ideal": "b"}])
    for text, line in (
        ("class: Guess\n", r"a\.yaml: unknown class Guess"),
        ("class: Match\nclas: 1\n", r"a\.yaml:2: unknown field of an eval clas"),
        ("class: Match\nmax_tokens: few\n", r"a\.yaml: max_tokens: got 'few'"),
        ("class: Match\nsamples: b.jsonl\n", r"b\.jsonl: no such file"),
    ):
        write(tmp_path / "a.yaml", text)
        with pytest.raises(InputError, match=line):
            read_own(str(tmp_path / "a.yaml"))
    with pytest.raises(InputError, match="eval_data=arithmetik: no such file"):
        read_own("arithmetik")


def test_choices_for_likelihood(tmp_path):
    rows = [{"prompt": "a", "ideal": "b", "choices": ["b", "c"]}, {"prompt": "a", "ideal": "b", "choices": ["c", "d"]}]
    write(tmp_path / "a.jsonl", [*rows, {"prompt": "a", "ideal": "b"}])
    good, none_right, none = read_own(str(tmp_path / "a.jsonl")).samples
    assert good.choices == ("b", "c")
    with pytest.raises(InputError, match=r"a\.jsonl:2: choices: .*is none of them"):
        none_right.choices  # noqa: B018
    with pytest.raises(InputError, match=r"a\.jsonl:3: choices: got None"):
        none.choices  # noqa: B018


# ---------------------------------------------------------------- the sets that come with the package

SETS = {"arithmetic": 120, "toy": 100, "pii": 80, "overreliance": 60, "overreliance_control": 60}


def test_our_sets_are_what_their_script_makes(tmp_path):
    spec = importlib.util.spec_from_file_location("eval_sets", ROOT / "data/evals/eval_sets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make(tmp_path)
    assert set(module.SETS) == set(SETS)
    for name, items in SETS.items():
        file = ROOT / "data/evals" / f"{name}.jsonl"
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
        samples = read_own(name).samples
        assert len(samples) == items
        assert len({json.dumps(sample.messages) for sample in samples}) == items
        if name not in ("toy", "pii"):
            assert all(len(sample.choices) >= 2 for sample in samples)


def test_right_answers_to_our_sets():
    """Arithmetic recomputed; the toy world's own right answers pass, another request's fail."""
    for sample in read_own("arithmetic").samples:
        question = sample.messages[0]["content"].removeprefix("What is ").partition("?")[0]
        assert sample.ideal == (str(eval(question)),)
    toy = read_own("toy")
    for sample in toy.samples:
        full = f"Sure! {sample.ideal[0]}" + (" tools: saw." if sample.columns["family"] == "count" else "")
        assert toy.grader.verdict(full, sample.ideal).numbers["accuracy"] == 1.0
        assert toy.grader.verdict("I do not know.", sample.ideal).numbers["accuracy"] == 0.0
