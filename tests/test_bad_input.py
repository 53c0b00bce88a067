"""Bad input gets exit code 2 and one line that says where, what and what to do, and leaves no files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reference import recipe, tiny_chain

PAIRS = [{"prompt": f"Name animal {i}.", "chosen": f"fox {i}", "rejected": "no way"} for i in range(8)]
DEMONSTRATIONS = [{"prompt": f"Say {i}.", "completion": f"yes {i}"} for i in range(8)]
PROMPTS = [{"prompt": f"Say {i}."} for i in range(8)]
QUICK = {
    "sft": ("--batch_size", 4, "--microbatch_size", 4, "--epochs", 1),
    "reward_model": ("--prompts_per_batch", 4),
    "ppo": ("--updates", 1, "--rollout_size", 4, "--minibatch_size", 4, "--inner_epochs", 1, "--max_new_tokens", 4),
    "evaluate_policy": ("--max_new_tokens", 4, "--best_of", 0),
    "rankings": (),
}


@pytest.fixture
def base(tmp_path: Path, tiny_model, tiny_tokenizer) -> Path:
    tiny_chain.shake(tiny_model, 0, 0.05)
    return tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)


@pytest.fixture
def scorer(tmp_path: Path, base: Path, tiny_tokenizer) -> Path:
    return tiny_chain.save_reward_model(tmp_path / "scorer", base, tiny_tokenizer)


def write(path: Path, content: list[Any] | str) -> Path:
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(text)
    return path


def refused(out: Path, name: str, *flags: object) -> str:
    """Run a recipe that must be refused; return its one line. Nothing may be written under `out`."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    result = recipe.run(name, *flags)
    assert result.code == 2, result.out + result.err
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in result.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    return line


def stage(name: str, tmp_path: Path, base: Path, data: Path, scorer: Path | None = None) -> tuple[object, ...]:
    """Return flags of a stage in which only the data is wrong."""
    out = ("--output_dir", tmp_path / "run" / name)
    if name == "rankings":
        return ("--rankings", data, "--output_dir", tmp_path / "run" / "rankings")
    if name == "evaluate_policy":
        models = ("--policy", base, "--baseline", base, "--judge", scorer)
        return (*models, "--eval_data", data, *out, *QUICK[name])
    more = ("--reward_model", scorer) if name == "ppo" else ()
    return ("--model", base, "--train_data", data, *more, *out, *QUICK[name])


# ---------------------------------------------------------------- data

GOOD = json.dumps(PAIRS[0]) + "\n"
BAD_PAIRS = {
    "empty file": ("", r"data\.jsonl: the file is empty; write one JSON object per line"),
    "only blank lines": ("\n\n", r"data\.jsonl: the file is empty"),
    "broken JSON": (
        GOOD + '{"prompt": "x", \n',
        r"data\.jsonl:2: broken JSON at column \d+, .*; write one object per line",
    ),
    "no object": (GOOD + "[1, 2]\n", r"data\.jsonl:2: got \[1, 2\]; write an object with prompt, chosen and rejected"),
    "missing field": (
        GOOD + '{"prompt": "x", "chosen": "a"}\n',
        r"data\.jsonl:2: rejected: missing; the fields are .*; add",
    ),
    "misspelt field": (
        GOOD + '{"prompt": "x", "chosen": "a", "rejectd": "b"}\n',
        r"data\.jsonl:2: rejected: missing, but there is 'rejectd'; rename 'rejectd' to 'rejected'",
    ),
    "wrong type": (
        GOOD + '{"prompt": "x", "chosen": 3, "rejected": "b"}\n',
        r"data\.jsonl:2: (chosen|rejected): got .*; write",
    ),
    "null": (GOOD + '{"prompt": "x", "chosen": null, "rejected": "b"}\n', r"data\.jsonl:2: chosen: got null; add"),
    "empty prompt": (
        GOOD + '{"prompt": " ", "chosen": "a", "rejected": "b"}\n',
        r"data\.jsonl:2: prompt: got empty text ' '; ",
    ),
    "empty response": (
        GOOD + '{"prompt": "x", "chosen": "", "rejected": "b"}\n',
        r"data\.jsonl:2: chosen: got empty text ''; ",
    ),
    "bad role": (
        '{"prompt": [{"role": "usr", "content": "x"}], "chosen": "a", "rejected": "b"}\n',
        r"data\.jsonl:1: prompt\[0\]\.role: got 'usr'; did you mean 'user'\?",
    ),
    "ranks of another number": (
        '{"prompt": "x", "responses": ["a", "b"], "ranks": [1]}\n',
        r"data\.jsonl:1: ranks: got 1 ranks for 2 responses; write one number per response",
    ),
    "all the same": (
        '{"prompt": "x", "chosen": "a", "rejected": "a"}\n' * 3,
        r"data\.jsonl: chosen/rejected: all 3 rows are ties or identical texts; check that the two columns differ",
    ),
}


@pytest.mark.parametrize("what", BAD_PAIRS)
def test_bad_pairs(tmp_path: Path, base: Path, what: str) -> None:
    content, expected = BAD_PAIRS[what]
    data = write(tmp_path / "data.jsonl", content)
    for name in ("reward_model", "rankings"):
        line = refused(tmp_path / "run", name, *stage(name, tmp_path, base, data))
        assert re.search(expected, line), line
        assert str(data) in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "reward_model", "ppo", "evaluate_policy", "rankings"])
def test_the_corrected_file_runs_in_the_same_folder(tmp_path: Path, base: Path, scorer: Path, name: str) -> None:
    flags = stage(name, tmp_path, base, tmp_path / "data.jsonl", scorer)
    line = refused(tmp_path / "run", name, *flags)
    assert line == f"error: {tmp_path}/data.jsonl: no such file or folder; check the path"
    rows = {"sft": DEMONSTRATIONS, "reward_model": PAIRS, "rankings": PAIRS}.get(name, PROMPTS)
    key = "completion" if name == "sft" else "chosen" if rows is PAIRS else "prompt"
    write(tmp_path / "data.jsonl", [*rows, rows[0] | {key: 3}])
    assert re.search(rf"data\.jsonl:9: (rejected|{key}): got ", refused(tmp_path / "run", name, *flags))
    write(tmp_path / "data.jsonl", rows)
    result = recipe.run(name, *flags)
    assert (result.code, result.err) == (0, ""), result.out


def test_a_misspelt_file_name(tmp_path: Path, base: Path) -> None:
    write(tmp_path / "pairs.jsonl", PAIRS)
    line = refused(tmp_path / "run", "reward_model", *stage("reward_model", tmp_path, base, tmp_path / "pair.jsonl"))
    assert line.endswith(f"pair.jsonl: no such file or folder; did you mean {tmp_path}/pairs.jsonl?")


@pytest.mark.parametrize(("name", "rows"), [("sft", DEMONSTRATIONS), ("reward_model", PAIRS)])
def test_a_prompt_in_both_splits(tmp_path: Path, base: Path, name: str, rows: list[Any]) -> None:
    data, held_out = write(tmp_path / "data.jsonl", rows), write(tmp_path / "eval.jsonl", rows[2:3])
    line = refused(tmp_path / "run", name, *stage(name, tmp_path, base, data), "--eval_data", held_out)
    assert re.search(r"(data|set): prompt: 1 in both, the first is '.* \d\.'; split by prompt", line), line


def test_evaluation_on_prompts_of_the_training(tmp_path: Path, base: Path, scorer: Path) -> None:
    data = write(tmp_path / "data.jsonl", PROMPTS)
    flags = stage("evaluate_policy", tmp_path, base, data, scorer)
    line = refused(tmp_path / "run", "evaluate_policy", *flags, "--seen_data", data)
    assert "seen_data, eval_data: prompt: 8 in both, the first is 'Say 0.'" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "reward_model", "ppo", "evaluate_policy"])
def test_rows_that_are_too_long(tmp_path: Path, base: Path, scorer: Path, name: str) -> None:
    rows = {"sft": DEMONSTRATIONS, "reward_model": PAIRS}.get(name, PROMPTS)
    data = write(tmp_path / "data.jsonl", [*rows, rows[0] | {"prompt": "on and on " * 80}])
    flag = "--max_length" if name in ("sft", "reward_model") else "--max_prompt_tokens"
    flags = stage(name, tmp_path, base, data, scorer)
    line = refused(tmp_path / "run", name, *flags, flag, 3)
    assert re.search(r"max_(length|prompt_tokens)=3\b.*(raise|shorten)", line), line
    assert re.search(r"\b[89]\b", line), "how many"
    result = recipe.run(name, *flags, flag, 100)
    assert result.code == 0, result.err
    told = " ".join(result.out.split())
    assert re.search(r"1 of 9 (demonstrations|rankings|prompts)", told) or re.search(r"left out 1 of \d", told), told
    assert "left out" in told
    assert "on and on" in told or "demonstrations 9 " in told, "which"


# ---------------------------------------------------------------- config and flags


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("sft", ["--learning_rat", "1e-3"], "command line: unknown flag --learning_rat; did you mean --learning_rate?"),
        ("chain", ["--ppo.kl_coeff", "1"], "command line: unknown flag --ppo.kl_coeff; did you mean --ppo.kl_coef?"),
        ("sft", ["--epochs", "many"], "--epochs: expected "),
        ("sft", ["--epochs"], "command line: --epochs needs a value"),
        ("sft", ["data.jsonl"], "command line: unexpected 'data.jsonl'; options are written `--name value`"),
        ("sft", ["--config", "nope.yaml"], "nope.yaml: no such file in "),
        (
            "sft",
            ["--batch_size", "10", "--microbatch_size", "4"],
            "microbatch_size=4 must divide batch_size=10; try 2 or 5",
        ),
        ("reward_model", ["--prompts_per_batch", "6"], "microbatch_size=4 must divide prompts_per_batch=6; try 3 or 6"),
        (
            "ppo",
            ["--rollout_size", "128", "--minibatch_size", "48"],
            "minibatch_size=48 must divide rollout_size=128; try 32 or 64",
        ),
        ("chain", ["--ppo.minibatch_size", "0"], "ppo: minibatch_size=0 must be at least 1"),
        ("ppo", ["--temperature", "0"], "temperature=0.0 must be positive"),
        ("rankings", ["--held_out_fraction", "1.5"], "held_out_fraction=1.5 must be a share between 0 and 1, say 0.1"),
        ("rankings", ["--responses_per_prompt", "1"], "responses_per_prompt=1 must be at least 2"),
        ("evaluate_policy", ["--max_new_tokens", "0"], "max_new_tokens=0 must be at least 1"),
        ("sft", [], "--model is missing, and no earlier stage left "),
        ("reward_model", [], "--model is missing, and no earlier stage left "),
        ("ppo", [], "--model is missing, and no earlier stage left "),
        ("chain", [], "evaluation.judge is null, so a second reward model judges: give data.judge_fraction (say 0.5)"),
    ],
)
def test_flags(tmp_path: Path, name: str, flags: list[str], expected: str) -> None:
    out = tmp_path / "run" / name
    line = refused(tmp_path, name, "--output_dir", out, *flags)
    assert line.startswith(f"error: {expected}"), line
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sft:\n  learning_rat: 1\n", r"my\.yaml:2: unknown key learning_rat; did you mean learning_rate\?"),
        ("sft:\n  epochs: lots\n", r"my\.yaml:2: epochs: expected a number.*, got 'lots'"),
        ("sfr:\n  epochs: 1\n", r"my\.yaml:1: unknown \w+ sfr; did you mean sft\?"),
        ("sft:\n  epochs: 1\n  epochs: 2\n", r"my\.yaml:3: `sft\.epochs` is given twice; first at .*my\.yaml:2"),
        ("sft: [1\n", r"my\.yaml:\d: broken YAML: "),
        ("sft: 3\n", r"my\.yaml:1: sft: expected a section of fields, got 3"),
        ("", r"my\.yaml: is empty; write one `field: value` per line"),
    ],
)
def test_config_files(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path / "my.yaml", text)
    assert re.search(expected, line := refused(tmp_path / "run", "sft", "--config", file)), line


def test_the_chain_refuses_before_its_first_stage(tmp_path: Path) -> None:
    smoke = ("--config", recipe.ROOT / "recipes/configs/smoke.yaml", "--output_dir", tmp_path / "run")
    gold = "data/toy/toy_gold.py"
    for flags, expected in (
        (("--sft.train_data", "no/such.jsonl"), "no/such.jsonl: no such file or folder; check the path"),
        (("--sft.model", "./no_model"), "./no_model: no such model folder; name a saved model's folder or a hub id"),
        (("--data.labeler", "nope.py:rank"), "function 'nope.py:rank': no such file nope.py"),
        (("--evaluation.judge", f"{gold}:golden"), f"{gold}: unknown function golden; did you mean gold"),
        (("--ppo.reward_functions", f"[{gold}:no_like]"), f"{gold}: unknown function no_like"),
    ):
        line = refused(tmp_path / "run", "chain", *smoke, *flags)
        assert line.startswith(f"error: {expected}"), line
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- models


def test_model_folders_that_do_not_fit(tmp_path: Path, base: Path, scorer: Path) -> None:
    data = write(tmp_path / "data.jsonl", DEMONSTRATIONS)
    bare = Path(shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    (tmp_path / "hollow").mkdir()
    for folder, expected in (
        (bare, f"{bare}: model folder without a tokenizer; save one there with tokenizer.save_pretrained"),
        (tmp_path / "hollow", f"{tmp_path}/hollow: no config.json and no adapter_config.json; name a folder with"),
        (tmp_path / "absent", f"{tmp_path}/absent: no such model folder; name a saved model's folder or a hub id"),
        (scorer, f"{scorer}: holds a reward model (LlamaForSequenceClassification), not a language model; name "),
    ):  # fmt: skip
        line = refused(tmp_path / "run", "sft", *stage("sft", tmp_path, folder, data))
        assert line.startswith(f"error: {expected}"), line


def test_a_judge_that_needs_another_column(tmp_path: Path, base: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS)
    write(tmp_path / "mine.py", "def judge(texts):\n    return [0.0 for text in texts]\n")
    flags = stage("evaluate_policy", tmp_path, base, prompts, f"{tmp_path / 'mine.py'}:judge")  # type: ignore[arg-type]
    assert "judge: it needs 'texts', and " in refused(tmp_path / "run", "evaluate_policy", *flags)


def test_reward_models_that_do_not_fit(tmp_path: Path, base: Path, tiny_tokenizer) -> None:
    data, prompts = write(tmp_path / "data.jsonl", DEMONSTRATIONS), write(tmp_path / "prompts.jsonl", PROMPTS)
    assert recipe.run("sft", *stage("sft", tmp_path, base, data)).code == 0
    sft = tmp_path / "run" / "sft"
    line = refused(tmp_path / "run", "ppo", *stage("ppo", tmp_path, base, prompts, sft))
    assert line.startswith(f"error: {sft}/manifest.json: made by stage 'sft'; expected one of reward_model, judge")
    line = refused(tmp_path / "run", "evaluate_policy", *stage("evaluate_policy", tmp_path, base, prompts, sft))
    assert "made by stage 'sft'; expected one of reward_model, judge" in line
    line = refused(tmp_path / "run", "ppo", *stage("ppo", tmp_path, base, prompts, base))  # no manifest says it
    assert line.startswith(
        f"error: {base}: holds ['LlamaForCausalLM'], no reward model; train one with recipes/reward_model.py"
    )
    interrupted = tmp_path / "run" / "reward_model"
    interrupted.mkdir()
    write(interrupted / "inputs.json", "{}")
    line = refused(tmp_path / "run", "ppo", *stage("ppo", tmp_path, base, prompts, interrupted))
    assert line.startswith(f"error: {interrupted}: its stage was interrupted; run that stage again")


def test_a_reward_model_of_other_tokens_scores_but_starts_no_value_model(
    tmp_path: Path, base: Path, scorer: Path, tiny_tokenizer
) -> None:
    """Its own tokenizer reads the responses (trl#1979); the value model must read the policy's tokens."""
    tiny_tokenizer.add_tokens(["brown fox"])
    tiny_tokenizer.save_pretrained(scorer)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(scorer)
    model.resize_token_embeddings(len(tiny_tokenizer))
    model.save_pretrained(scorer)
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS)
    result = recipe.run("ppo", *stage("ppo", tmp_path, base, prompts, scorer))
    assert result.code == 0, result.err
    told = " ".join(result.out.split())
    assert "the reward model reads other tokens than the policy: the value model starts from the policy" in told
    assert told.count("reads other tokens") == 1


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{file}:lenght", "unknown function lenght; did you mean length?"),
        ("{file}:NUMBER", "NUMBER is a int, not a function"),
        ("{folder}/nope.py:length", "no such file {folder}/nope.py"),
        ("{file}", "write path/to/file.py:name or package.module:name"),
        ("{folder}/broken.py:length", "broken.py:2: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_reward_functions(tmp_path: Path, base: Path, spec: str, expected: str) -> None:
    file = write(
        tmp_path / "scores.py",
        "NUMBER = 3\ndef length(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n",
    )
    write(tmp_path / "broken.py", "# mine\nimport no_such_module\n")
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS)
    spec = spec.format(file=file, folder=tmp_path)
    line = refused(tmp_path / "run", "ppo", "--model", base, "--train_data", prompts, "--reward_functions", f"[{spec}]",
                   "--output_dir", tmp_path / "run" / "ppo", *QUICK["ppo"])  # fmt: skip
    assert expected.format(folder=tmp_path) in line, line


# ---------------------------------------------------------------- disk and folders


def test_not_enough_disk(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "data.jsonl", DEMONSTRATIONS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 10**7))
    line = refused(tmp_path / "run", "sft", *stage("sft", tmp_path, base, data))
    assert re.search(rf"output_dir {tmp_path}/run/sft: needs about 0\.1\d GB, 0\.02 GB are free on its disk; ", line), (
        line
    )
    monkeypatch.undo()
    assert recipe.run("sft", *stage("sft", tmp_path, base, data)).code == 0


def test_the_space_asked_for_grows_with_the_model(tmp_path: Path) -> None:
    needed = recipe.load("stage").needed_bytes
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10**9)
    ask = lambda **config: needed(SimpleNamespace(**config), str(tmp_path))  # noqa: E731
    assert needed(SimpleNamespace(), None) == 10**8
    assert ask(save_steps=0) == 10**8 + 10**9  # the model
    saved = {"save_steps": 5, "save_total_limit": 2}
    assert ask(**saved) == 10**8 + 10 * 10**9  # and three times, while one is replaced: weights and two moments
    assert ask(**saved, rollout_size=8) == 10**8 + 20 * 10**9  # of policy and value model
    assert ask(**saved, lora_rank=8) == 10**8 + 10 * 10**8
    assert ask(save_steps=0, save_rollouts=5, updates=12) == 10**8 + 7 * 10**9  # updates 5 and 10


def test_an_output_dir_of_another_run(tmp_path: Path, base: Path) -> None:
    data = write(tmp_path / "data.jsonl", DEMONSTRATIONS)
    flags = stage("sft", tmp_path, base, data)
    assert recipe.run("sft", *flags).code == 0
    out = tmp_path / "run" / "sft"
    line = refused(out, "sft", *flags, "--seed", 1)
    assert line.startswith(
        f"error: output_dir {out} belongs to another run: config.seed was 0, now 1; pass --overwrite to "
    )
    # a mistake together with --overwrite costs nothing either: the old run stays until the new one begins
    bad = write(tmp_path / "bad.jsonl", "{")
    assert "bad.jsonl:1: broken JSON" in refused(out, "sft", *stage("sft", tmp_path, base, bad), "--overwrite")
    write(data, [*DEMONSTRATIONS, {"prompt": "Say 8.", "completion": "yes"}])
    line = refused(out, "sft", *flags)
    assert re.search(
        r"belongs to another run: train_data was [0-9a-f]{12}, now [0-9a-f]{12}; pass --overwrite", line
    ), line
    assert recipe.run("sft", *flags, "--overwrite").code == 0


def test_an_output_dir_of_something_else(tmp_path: Path, base: Path) -> None:
    data, out = write(tmp_path / "data.jsonl", DEMONSTRATIONS), tmp_path / "run" / "sft"
    out.mkdir(parents=True)
    write(out / "thesis.txt", "years")
    for more in ((), ("--overwrite",)):
        line = refused(out, "sft", *stage("sft", tmp_path, base, data), *more)
        assert line == f"error: output_dir {out}: holds files but no run of ours; choose another --output_dir"
    line = refused(out, "sft", *stage("sft", tmp_path, base, data), "--output_dir", out / "thesis.txt")
    assert line == f"error: output_dir {out}/thesis.txt: is a file; choose another --output_dir"


# ---------------------------------------------------------------- as the shell sees it


def test_in_a_shell(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", GOOD + '{"prompt": "x", "chosen": "a"}\n')
    done = subprocess.run(
        [sys.executable, "recipes/rankings.py", "--rankings", data, "--output_dir", tmp_path / "run" / "data"],
        cwd=recipe.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {data}:2: rejected: missing; the fields are prompt, chosen; add 'rejected' to the row\n"
    )
    assert not (tmp_path / "run").exists()
