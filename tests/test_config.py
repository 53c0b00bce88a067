"""Configs from dataclasses, YAML and flags; users' functions; trl's arguments."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import transformers
import trl

from rlhf.config import (
    fingerprint,
    from_dict,
    import_function,
    load,
    require_divides,
    run,
    to_dict,
    to_yaml,
    training_arguments,
)
from rlhf.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """The stage."""

    kl_coef: float = 0.05
    """Weight of the KL penalty, 100% of it."""
    updates: int = 10
    """Rollouts collected."""
    kind: Literal["replace", "subtract"] = "replace"
    """What a missing stop costs."""
    weights: tuple[float, ...] = ()
    """One per function."""
    options: dict[str, float] = field(default_factory=dict)
    """By name."""
    target: float | None = None
    """Nats, or null."""
    lora: bool = False
    """Adapters only."""
    reward_model: str | None = None
    """A folder; also the name of a section."""
    half: bool | None = None
    """Or null."""
    names: list[str] | None = None
    """Of layers."""
    output_dir: str = "runs/inner"
    """Where it goes."""
    seed: int = 0
    """Decides everything random."""

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise InputError(f"updates={self.updates} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Base:
    """Optional section."""

    steps: int
    """Optimizer steps."""
    lr: float = 1e-3
    """Learning rate."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """All stages."""

    ppo: Inner = field(default_factory=lambda: Inner(kl_coef=0.2))
    """The last stage."""
    base: Base | None = None
    """Pretraining."""
    output_dir: str = "runs/chain"
    """The run's folder."""
    seed: int = 1
    """For all."""


SECTIONS = ("ppo", "base", "reward_model", "sft")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def write(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text)
    return str(path)


def wrong(function: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- precedence and types


@dataclass(frozen=True, kw_only=True)
class AnyValues:
    values: dict[str, Any] | None = None


@pytest.mark.parametrize("by_flag", [False, True])
def test_values_of_any_type_stay_as_they_were_written(tmp_path: Path, by_flag: bool) -> None:
    """Text in quotation marks is text, whatever else it could be read as."""
    written = (
        "{id: '00123', version: '1.10', answer: 'no', note: 'Note: be brief', at: '12:30', none: 'null', rate: 1e-3,"
    )
    written += " deep: {id: '7', rates: [1e-4]}, n: 3, day: 2026-11-26, flag: true, other: null}"
    argv = ["--values", written] if by_flag else ["--config", write(tmp_path, f"values: {written}\n")]
    assert load(AnyValues, argv).values == {
        "id": "00123", "version": "1.10", "answer": "no", "note": "Note: be brief", "at": "12:30", "none": "null",
        "rate": 0.001, "deep": {"id": "7", "rates": [0.0001]}, "n": 3,
        "day": "2026-11-26", "flag": True, "other": None,
    }  # fmt: skip
    assert load(AnyValues, ["--values", "null"]).values is None
    keys = "{no: 1, 1: 2, null: {on: 3}, ~: 4}"
    argv = ["--values", keys] if by_flag else ["--config", write(tmp_path, f"values: {keys}\n")]
    assert load(AnyValues, argv).values == {"no": 1, "1": 2, "null": {"on": 3}, "~": 4}
    assert "password" in wrong(load, AnyValues, ["--values", "{url: 'http://user:secret@host/'}"])
    for value in ("word", "[1]", "{a: "):
        assert "--values: expected" in wrong(load, AnyValues, ["--values", value])


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, "kl_coef: 1e-3\nupdates: 7\n")
    config = load(Inner, ["--config", file, "--updates", "3"])
    assert (config.kl_coef, config.updates, config.seed) == (0.001, 3, 0)  # PyYAML reads 1e-3 as text


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--weights", "[1, 0.5]"], "weights", (1.0, 0.5)),
        (["--options", "{a.b: 2}"], "options", {"a.b": 2.0}),
        (["--target", "3"], "target", 3.0),
        (["--target=null"], "target", None),
        (["--kl_coef", "-1"], "kl_coef", -1.0),
        (["--kind", "subtract"], "kind", "subtract"),
        (["--lora"], "lora", True),
        (["--lora", "false"], "lora", False),
        (["--lora", "--seed", "4"], "lora", True),
        (["--weights", "1,0.5"], "weights", (1.0, 0.5)),
        (["--weights", "1", "0.5"], "weights", (1.0, 0.5)),
        (["--weights", "[1,", "0.5]"], "weights", (1.0, 0.5)),
        (["--weights", "1e-1"], "weights", (0.1,)),
        (["--weights=1,2", "--seed", "4"], "weights", (1.0, 2.0)),
        (["--kl-coef", "0.5"], "kl_coef", 0.5),
        (["--half"], "half", True),
        (["--half", "no"], "half", False),
        (["--half", "null"], "half", None),
        (["--names", "q_proj,v_proj"], "names", ["q_proj", "v_proj"]),
        (["--names", "q_proj", "v_proj"], "names", ["q_proj", "v_proj"]),
        (["--names", "all-linear"], "names", ["all-linear"]),
        (["--names", "null"], "names", None),
        (["--reward_model", "#5"], "reward_model", "#5"),
        (["--reward_model", "null"], "reward_model", None),
        (["--options", "{no: 1, 1: 2, 2026-11-26: 3}"], "options", {"no": 1.0, "1": 2.0, "2026-11-26": 3.0}),
        (["--reward_model", "123"], "reward_model", "123"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
    ],
)
def test_flags_become_the_fields_types(argv: list[str], name: str, value: Any) -> None:
    found = getattr(load(Inner, argv), name)
    assert found == value
    assert type(found) is type(value)


def test_names_in_a_file_may_be_a_text(tmp_path: Path) -> None:
    assert load(Inner, ["--config", write(tmp_path, "names: q_proj, v_proj\n")]).names == ["q_proj", "v_proj"]
    assert load(Inner, ["--config", write(tmp_path, "names: [q_proj]\n")]).names == ["q_proj"]


def test_an_optional_section_turns_on_and_off(tmp_path: Path) -> None:
    assert load(Chain, []).base is None
    assert load(Chain, ["--base.steps", "5"]).base == Base(steps=5)
    file = write(tmp_path, "base:\n  steps: 5\n  lr: 0.1\n")
    assert load(Chain, ["--config", file]).base == Base(steps=5, lr=0.1)
    assert load(Chain, ["--config", file, "--base.lr", "0.2"]).base == Base(steps=5, lr=0.2)
    assert load(Chain, ["--config", file, "--base", "null"]).base is None
    file = write(tmp_path, "base: null\n")
    assert load(Chain, ["--config", file]).base is None


def test_a_section_keeps_its_own_defaults_and_inherits_seed_and_folder(tmp_path: Path) -> None:
    config = load(Chain, ["--ppo.updates", "2", "--seed", "9"])
    assert config.ppo == Inner(kl_coef=0.2, updates=2, seed=9, output_dir="runs/chain/ppo")
    file = write(tmp_path, "output_dir: here\nppo:\n  seed: 4\n")
    config = load(Chain, ["--config", file])
    assert (config.ppo.output_dir, config.ppo.seed, config.seed) == ("here/ppo", 4, 1)


def test_a_stage_reads_its_section_of_a_chain_file(tmp_path: Path) -> None:
    text = "seed: 5\noutput_dir: runs/toy\nsft:\n  anything: 1\nppo:\n  updates: 3\n  reward_model: folder\n"
    config = load(Inner, ["--config", write(tmp_path, text)], section="ppo", known_sections=SECTIONS)
    assert config == Inner(updates=3, reward_model="folder", seed=5, output_dir="runs/toy/ppo")
    flat = write(tmp_path, "updates: 3\nreward_model: folder\noutput_dir: runs/mine\n")
    config = load(Inner, ["--config", flat], section="ppo", known_sections=SECTIONS)
    assert config == Inner(updates=3, reward_model="folder", output_dir="runs/mine")
    of_all = write(tmp_path, "output_dir:\nseed:\noverwrite: true\noverwrite_from: sft\nppo:\n  updates: 3\n")
    assert load(Inner, ["--config", of_all], section="ppo", known_sections=SECTIONS) == Inner(updates=3)
    only_others = write(tmp_path, "reward_model:\n  lr: 1\n")
    assert load(Inner, ["--config", only_others], section="ppo", known_sections=SECTIONS) == Inner()


def test_stage_and_chain_resolve_one_file_alike(tmp_path: Path) -> None:
    file = write(tmp_path, "output_dir: r\nseed: 3\nppo:\n  kl_coef: 0.3\n  updates: 2\n")
    stage = load(Inner, ["--config", file], section="ppo", known_sections=SECTIONS)
    assert stage == load(Chain, ["--config", file]).ppo


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("updates: 3\nkl_coeff: 1\n", ["my.yaml:2", "unknown key kl_coeff", "did you mean kl_coef?"]),
        ("kl_coef: high\n", ["my.yaml:1", "kl_coef", "expected a number", "'high'"]),
        ("updates: 2.5\n", ["my.yaml:1", "updates", "expected a whole number", "2.5"]),
        ("updates: true\n", ["updates", "expected a whole number", "True"]),
        ("updates: null\n", ["updates", "expected a whole number", "null"]),
        ("kl_coef: .nan\n", ["kl_coef", "expected a number", "nan"]),
        ("kind: drop\n", ["kind", "one of replace, subtract", "'drop'"]),
        ("\nreward_model: 3\n", ["my.yaml:2", "reward_model", "expected text or null", "3"]),
        ("weights: [a]\n", ["weights", "a list of a number", "['a']"]),
        ("updates: 1\nupdates: 2\n", ["my.yaml:2", "given twice", "my.yaml:1"]),
        ("updates: [1\nseed: 2\n", ["my.yaml:2", "broken YAML"]),
        ("- updates\n", ["my.yaml", "field: value"]),
        ("", ["my.yaml", "is empty"]),
        ("# nothing\n", ["my.yaml", "is empty"]),
        ("updates: 0\n", ["updates=0 must be at least 1"]),
        ("seed: 1\nreward_model: 2026-02-30\n", ["my.yaml:2", "broken YAML: day is out of range"]),
        ("updates: !!int abc\n", ["my.yaml:1", "broken YAML: invalid literal for int"]),
        ("updates: !!timestamp abc\n", ["my.yaml:1", "broken YAML"]),
        (f"updates: {'9' * 5000}\n", ["my.yaml:1", "broken YAML: Exceeds the limit"]),
        (f"kl_coef: {'9' * 400}\n", ["my.yaml:1: kl_coef: expected a number", "999"]),
        ("weights: &all [1, *all]\n", ["my.yaml:1", "recursive"]),
        ("seed: 1\nbase: &all\n  again: *all\n", ["my.yaml:2", "recursive"]),
        ("weights: " + "[" * 3000, ["my.yaml: broken YAML: it is nested too deeply"]),
    ],
)
def test_a_mistake_in_the_file_names_line_and_field(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = wrong(load, Inner, ["--config", write(tmp_path, text)])
    assert [part for part in parts if part not in message] == []


def test_a_chain_leaves_alone_the_sections_that_only_others_read(tmp_path: Path) -> None:
    file = write(tmp_path, "ppo:\n  updates: 3\nreward_model:\n  lr: 1\nsft: null\n")
    assert load(Chain, ["--config", file], known_sections=SECTIONS) == load(Chain, ["--ppo.updates", "3"])
    file = write(tmp_path, "ppo:\n  updates: 3\nreward_modl:\n  lr: 1\n")
    message = wrong(load, Chain, ["--config", file], known_sections=SECTIONS)
    assert message.endswith("my.yaml:3: unknown key reward_modl; did you mean reward_model?")
    assert "unknown flag --reward_model.lr" in wrong(load, Chain, ["--reward_model.lr", "1"], known_sections=SECTIONS)


def test_mistakes_in_a_chain_file(tmp_path: Path) -> None:
    file = write(tmp_path, "pppo:\n  updates: 3\nsft:\n  x: 1\n")
    message = wrong(load, Inner, ["--config", file], section="ppo", known_sections=SECTIONS)
    assert "my.yaml:1" in message
    assert "did you mean ppo?" in message
    file = write(tmp_path, "zzz:\n  updates: 3\n")
    message = wrong(load, Inner, ["--config", file], section="ppo", known_sections=SECTIONS)
    assert message.endswith("unknown section zzz; known: ppo, base, reward_model, sft, seed, output_dir")
    file = write(tmp_path, "ppo: 3\nsft:\n  x: 1\n")
    assert "my.yaml:1" in wrong(load, Inner, ["--config", file], section="ppo", known_sections=SECTIONS)
    file = write(tmp_path, "seed: 1\nppo:\n  kl_coef: 1\n  updats: 3\n")
    message = wrong(load, Chain, ["--config", file])
    assert "my.yaml:4" in message
    assert "did you mean ppo.updates?" in message
    message = wrong(load, Chain, ["--config", write(tmp_path, "base:\n  lr: 1\n")])
    assert "my.yaml:1" in message
    assert "--base.steps" in message
    assert "ppo: updates=0" in wrong(load, Chain, ["--ppo.updates", "0"])
    assert "did you mean --ppo.kl_coef?" in wrong(load, Chain, ["--kl_coef", "1"])
    assert "did you mean --ppo.kl_coef?" in wrong(load, Chain, ["--ppo.beta", "1"])
    assert "did you mean --base.lr?" in wrong(load, Chain, ["--lr", "1"])
    assert "my.yaml:1" in wrong(load, Chain, ["--config", write(tmp_path, "base: true\n")])


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--kl_coeff", "1"], ["unknown flag --kl_coeff", "did you mean --kl_coef?"]),
        (["--init_kl_coef", "1"], ["unknown flag --init_kl_coef", "did you mean --kl_coef?"]),
        (["--beta", "1"], ["unknown flag --beta", "did you mean --kl_coef?"]),
        (["--max_steps", "1"], ["unknown flag --max_steps", "did you mean --updates?"]),
        (["--updates"], ["--updates needs a value"]),
        (["--updates", "--seed", "1"], ["--updates needs a value"]),
        (["--updates", "x"], ["--updates", "expected a whole number", "'x'"]),
        (["3"], ["unexpected '3'"]),
        (["--config", "missing.yaml"], ["missing.yaml", "no such file", str(Path.cwd()), str(RECIPES)]),
        (["--config", "smokes.yaml"], ["smokes.yaml", "did you mean smoke.yaml?"]),
        (["--config", "a.yaml", "--config", "b.yaml"], ["given twice"]),
        (["--config", "/"], ["/", "cannot be read"]),
        (["--config", ""], ["--config is empty; name a YAML file"]),
        (["--config="], ["--config is empty"]),
        (["--weights", "[" * 3000], ["--weights: expected a list of a number"]),
        (["--kl_coef", "9" * 400], ["--kl_coef: expected a number"]),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], parts: list[str]) -> None:
    message = wrong(load, Inner, argv)
    assert [part for part in parts if part not in message] == []


def test_recipes_end_with_one_line_and_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def main(argv: list[str]) -> None:
        raise InputError("data.jsonl:3: broken\nJSON")

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: data.jsonl:3: broken JSON\n"

    def stop(argv: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run(stop)
    assert caught.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_help_shows_every_field_with_its_docstring(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        load(Chain, ["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "--config FILE.yaml",
        "--ppo.kl_coef",
        "penalty, 100% of it.",
        "--base.steps",
        "base (off unless named)",
    ):
        assert part in shown


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """Settings in groups."""

    "Run"

    seed: int = 0
    """Decides everything random."""

    "Size"

    width: int = 8
    """Columns, so many that this line of help is longer than what is left of a terminal beside the flag."""

    "Run"

    name: str = ""
    """null would do."""


@dataclass(frozen=True, kw_only=True)
class Most(Grouped):
    """Settings of a recipe on top."""

    MOST_USED = ("width",)

    "Data"

    data: str | None = None
    """What to read."""
    kind: Literal["a", "b"] = "a"
    """One of two."""


HELP = """Do something.

    rlhf something --width 3 \\
        --data rows.jsonl

It takes
a while.
"""


def test_help_shows_the_most_used_first_and_then_groups(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rlhf", "something", "--help"])
    with pytest.raises(SystemExit):
        load(Most, ["--help"], description=HELP)
    assert capsys.readouterr().out == (
        "usage: rlhf something [--config FILE.yaml] [--name value ...]\n\n"
        "Do something.\n\n"
        "    rlhf something --width 3 \\\n        --data rows.jsonl\n\n"
        "It takes a while.\n\n"
        "Most used:\n"
        "  --config FILE.yaml      a YAML file, here or among those of `rlhf list`; flags\n"
        "                          win over it\n"
        "  --width N               Columns, so many that this line of help is longer than\n"
        "                          what is left of a terminal beside the flag. (default:\n"
        "                          8)\n\n"
        "Data:\n"
        "  --data TEXT             What to read. (default: null)\n"
        "  --kind a|b              One of two. (default: a)\n\n"
        "Run:\n"
        "  --seed N                Decides everything random. (default: 0)\n"
        "  --name TEXT             null would do.\n\n"
    )


# ---------------------------------------------------------------- where files are found


def test_a_config_is_looked_up_here_and_then_among_the_recipes(tmp_path: Path, monkeypatch) -> None:
    from rlhf_recipes.chain import ChainConfig

    monkeypatch.chdir(RECIPES.parent)
    by_path = load(ChainConfig, ["--config", "recipes/configs/smoke.yaml"])
    monkeypatch.chdir(tmp_path)
    by_name = load(ChainConfig, ["--config", "smoke.yaml"])
    assert by_name == by_path == load(ChainConfig, ["--config", "recipes/configs/smoke.yaml"])
    assert fingerprint(by_name) == fingerprint(by_path)
    (tmp_path / "smoke.yaml").write_text("seed: 7\n")
    assert load(ChainConfig, ["--config", "smoke.yaml"]).seed == 7


def test_a_function_is_looked_up_here_and_then_among_the_recipes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = "data/toy/toy_labelers.py:rank"
    assert import_function(spec).__code__.co_filename == str(RECIPES.parent / "data/toy/toy_labelers.py")
    (tmp_path / "data/toy").mkdir(parents=True)
    (tmp_path / "data/toy/toy_labelers.py").write_text("def rank():\n    return 'mine'\n")
    assert import_function(spec)() == "mine"
    message = wrong(import_function, "data/toy/toy_labeler.py:rank")
    assert str(tmp_path) in message
    assert str(RECIPES) in message
    assert "did you mean toy_labelers.py?" in message
    assert "recipes" not in wrong(import_function, f"{tmp_path}/nothing.py:rank")


# ---------------------------------------------------------------- writing


def test_dict_and_yaml_come_back_as_the_same_config(tmp_path: Path) -> None:
    config = Chain(ppo=Inner(weights=(1.0, 2.0), options={"a": 1.0}, target=2.0), base=Base(steps=3))
    assert from_dict(Chain, to_dict(config), "test") == config
    assert load(Chain, ["--config", write(tmp_path, to_yaml(config))]) == config
    assert "test: unknown key nope" in wrong(from_dict, Chain, {"nope": 1}, "test")


def test_the_fingerprint_follows_what_is_computed() -> None:
    assert fingerprint(Inner()) == fingerprint(Inner(output_dir="elsewhere"))
    assert fingerprint(Inner()) != fingerprint(Inner(kl_coef=0.051))
    assert fingerprint(Chain()) != fingerprint(Chain(ppo=Inner(kl_coef=0.3)))
    # sha256 of the canonical JSON, written out by hand
    import hashlib

    literal = '{"lr":0.001,"steps":3}'
    assert fingerprint(Base(steps=3)) == hashlib.sha256(literal.encode()).hexdigest()


# ---------------------------------------------------------------- users' functions


def test_functions_come_from_files_with_their_siblings(tmp_path: Path) -> None:
    (tmp_path / "sibling_words.py").write_text("WORD = 'hen'\n")
    (tmp_path / "json.py").write_text("raise SystemError('shadowed')\n")
    file = tmp_path / "score.py"
    file.write_text("from sibling_words import WORD\ndef score(x):\n    return (WORD, x)\nlimit = 3\n")
    function = import_function(f"{file}:score")
    assert function(1) == ("hen", 1)
    assert import_function(f"{tmp_path}/../{tmp_path.name}/score.py:score") is function
    assert sys.path[0] != str(tmp_path)
    assert import_function("os.path:join")("a", "b") == "a/b"
    assert "did you mean score?" in wrong(import_function, f"{file}:scores")
    assert "limit is a int" in wrong(import_function, f"{file}:limit")


def test_mistakes_in_a_users_function(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\nimport nowhere_at_all\n")
    assert "broken.py:2: ModuleNotFoundError" in wrong(import_function, f"{broken}:f")
    broken.write_text("x = 1\n\ndef f(:\n")
    assert "broken.py:3: SyntaxError" in wrong(import_function, f"{broken}:f")
    assert "no such file" in wrong(import_function, f"{tmp_path}/none.py:f")
    assert "no module nowhere_at_all" in wrong(import_function, "nowhere_at_all:f")
    assert "file.py:name" in wrong(import_function, "score")


# ---------------------------------------------------------------- arithmetic and arguments


@pytest.mark.parametrize(
    ("small", "big", "advice"),
    [(48, 128, "try 32 or 64"), (0, 6, "try 1"), (7, 6, "try 6"), (4, 6, "try 3 or 6"), (-1, 6, "try 1")],
)
def test_batch_arithmetic_names_what_would_fit(small: int, big: int, advice: str) -> None:
    message = wrong(require_divides, "minibatch_size", small, "rollout_size", big)
    assert message == f"minibatch_size={small} must divide rollout_size={big}; {advice}"


def test_batch_arithmetic_passes_divisors() -> None:
    for small in (1, 2, 64, 128):
        require_divides("a", small, "b", 128)
    assert wrong(require_divides, "a", 1, "b", 0) == "b=0 must be at least 1"


@dataclass(frozen=True, kw_only=True)
class Training:
    output_dir: str = "out"
    seed: int = 3
    epochs: float = 1.5
    learning_rate: float = 1e-4
    batch_size: int = 32
    microbatch_size: int | None = 8
    lr_schedule: str = "cosine"
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 0.5
    gradient_checkpointing: bool = False
    logging_steps: int = 4
    save_steps: int = 0
    report_to: list[str] | None = None


@pytest.mark.parametrize("cls", [transformers.TrainingArguments, trl.SFTConfig, trl.RewardConfig])
def test_our_fields_reach_the_library(cls: Any, tmp_path: Path) -> None:
    arguments = training_arguments(Training(output_dir=str(tmp_path)), cls, max_steps=5)
    assert arguments.output_dir == str(tmp_path)
    assert (arguments.seed, arguments.num_train_epochs, arguments.learning_rate) == (3, 1.5, 1e-4)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (8, 4)
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.get_warmup_steps(50) == 5
    assert (arguments.weight_decay, arguments.max_grad_norm, arguments.logging_steps) == (0.01, 0.5, 4)
    assert arguments.save_strategy == "no"
    assert arguments.report_to == []
    assert arguments.gradient_checkpointing is False
    assert arguments.disable_tqdm is True
    assert arguments.max_steps == 5


def test_arguments_on_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = training_arguments(Training(output_dir=str(tmp_path), save_steps=7), trl.SFTConfig)
    assert (arguments.bf16, arguments.use_cpu) == (False, True)
    assert (arguments.save_strategy, arguments.save_steps, arguments.save_total_limit) == ("steps", 7, None)


def test_one_process_uses_one_gpu_of_several(tmp_path: Path) -> None:
    """transformers would copy the model to each, and trl refuses that."""

    class TwoVisible(trl.SFTConfig):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 2

    arguments = training_arguments(Training(output_dir=str(tmp_path)), TwoVisible)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 8)


def test_batches_are_shared_out_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes: a micro-batch that doesn't divide their share is made smaller, as it changes no gradient."""
    from rlhf.run.trl_arguments import batch_arithmetic

    def found(*args: int | None) -> tuple[int, int]:
        settings = batch_arithmetic(*args)  # type: ignore[arg-type]
        return settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]

    monkeypatch.setenv("WORLD_SIZE", "4")
    assert found(32, 4) == (4, 2)
    assert found(32, None) == (8, 1)
    assert found(32, 16) == (8, 1)
    assert found(24, 4) == (3, 2)
    assert "number of processes=4 must divide batch_size=30; try 3 or 5" in wrong(batch_arithmetic, 30, 2)
    assert "must divide prompts_per_batch=30" in wrong(batch_arithmetic, 30, 2, "prompts_per_batch")
    monkeypatch.delenv("WORLD_SIZE")
    assert "microbatch_size=64 must divide batch_size=32; try 32" in wrong(batch_arithmetic, 32, 64)


def test_importing_config_brings_no_heavy_library() -> None:
    code = (
        "import sys, rlhf.config, rlhf.run.checkpoint, rlhf.metrics, rlhf.run.console, rlhf.run.report;"
        "print({'torch', 'transformers', 'jsonargparse', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
