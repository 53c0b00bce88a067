"""The whole chain as a user runs it: what it leaves and what it skips. What a kill costs (nothing): test_kill.py."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reference import recipe, whole_chain
from reference.whole_chain import SMOKE, STAGES, TRAINED, copied, lines, manifests, read, run

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf_recipes.chain import ChainConfig, check
from rlhf_recipes.stage import SECTIONS


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one undisturbed run; tests copy it before they change anything."""
    return whole_chain.undisturbed(tmp_path_factory)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, times included."""
    return copied(finished, tmp_path / "run")


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


# ---------------------------------------------------------------- what it leaves


def test_the_summary_has_the_documented_shape_and_finite_numbers(finished: Path) -> None:
    summary = read(finished / "summary.json")
    assert set(summary) == {"stages", "evaluation", "seconds"}
    assert set(summary["stages"]) == set(STAGES) - {"evaluation"}
    card = summary["stages"]["reward_model"]
    low, high = card["accuracy_ci"]
    assert 0 <= low <= card["accuracy"] <= high <= 1
    assert card["n"] > 0
    assert {"sft", "ppo", "best_of_n"} <= set(summary["evaluation"])
    ppo = summary["evaluation"]["ppo"]
    wanted = {"score", "gold_score", "win_rate_vs_sft", "win_rate_ci", "kl_nats", "response_tokens", "eos_rate"}
    assert wanted <= set(ppo)
    assert ppo["win_rate_ci"][0] <= ppo["win_rate_vs_sft"] <= ppo["win_rate_ci"][1]
    assert 0 <= ppo["eos_rate"] <= 1
    assert set(summary["seconds"]) == set(STAGES)
    assert all(math.isfinite(number) for number in numbers(summary))


def test_every_stage_leaves_its_files(finished: Path) -> None:
    for stage in STAGES:
        manifest = read(finished / stage / "manifest.json")
        assert manifest["stage"] == stage
        assert manifest["versions"]["torch"]
        assert "recipes/chain.py" in manifest["command"]
        assert not list((finished / stage).glob("checkpoint-*")), "a complete stage needs no checkpoints"
        assert not list((finished / stage).glob(".*")), "nothing half-written"
    for stage in TRAINED:
        logged = lines(finished / stage / "metrics.jsonl")
        steps = [line["step"] for line in logged]
        assert steps == sorted(steps)
        assert all(math.isfinite(number) for number in numbers(logged))
    for stage in ("sft", "reward_model", "ppo"):
        manifest = read(finished / stage / "manifest.json")
        assert re.fullmatch("[0-9a-f]{64}", manifest["tokenizer_hash"])
        assert re.fullmatch("[0-9a-f]{16,}", manifest["template_hash"])
        assert manifest["stop_ids"]
        assert isinstance(manifest["pad_id"], int)
    assert len({line["step"] for line in lines(finished / "ppo/metrics.jsonl")}) == 4
    assert {"prompt", "response", "score", "kl_nats"} <= set(lines(finished / "ppo/samples.jsonl")[0])
    assert lines(finished / "evaluation/samples.jsonl")


def test_the_report_is_one_file_that_fetches_nothing(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert len(page) > 5000
    assert page.count("<svg") + page.count("data:image") > 0
    fetched = re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?\s*((?:https?:)?//[^"')\s>]+)""", page)
    assert fetched == []
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_the_models_load_with_plain_transformers(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    for stage in ("base", "sft", "ppo"):
        model, told = AutoModelForCausalLM.from_pretrained(finished / stage, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(finished / stage)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]
    scorer, told = AutoModelForSequenceClassification.from_pretrained(
        finished / "reward_model", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert scorer.config.num_labels == 1


def test_what_the_terminal_shows(finished: Path) -> None:
    out = (finished.parent / "stdout").read_text()
    for stage in STAGES:
        assert re.search(rf"^{stage} +done in \d+ s", out, re.MULTILINE), stage
    shown = [line for line in out.splitlines() if re.match(r"(INFO|WARNING|ERROR)", line)]
    alarms = [found[1] for line in shown if (found := re.match(r"WARNING +step \d+: (\w+)=", line))]
    assert len(shown) == len(alarms), "nothing else is wrong"
    assert len(alarms) == len(set(alarms)), "each alarm is told once"
    assert "Traceback" not in out
    assert "evaluation    3/3" in out
    assert out.splitlines()[-1].endswith("report.html")
    assert "KL nats" in out


# ---------------------------------------------------------------- running again


@pytest.mark.slow
def test_running_again_skips_every_stage(copy: Path) -> None:
    """Also with other settings of memory, speed and logging, which change no result."""
    before = manifests(copy)
    summary = read(copy / "summary.json")
    code, out, err = run(
        copy, "--ppo.tokens_per_microbatch", "256", "--sft.microbatch_size", "2", "--ppo.save_steps", "1"
    )
    assert (code, err) == (0, "")
    for stage in STAGES:
        assert re.search(rf"^{stage} +complete, skipped$", out, re.MULTILINE), stage
    assert manifests(copy) == before
    assert read(copy / "summary.json") == summary


def test_another_config_in_the_same_folder_is_refused_in_one_line(copy: Path) -> None:
    before = manifests(copy)
    refused = recipe.run("chain", *SMOKE[1:], "--output_dir", copy, "--ppo.kl_coef", 0.2)
    assert refused.code == 2
    (line,) = refused.err.splitlines()
    assert line.startswith(f"error: output_dir {copy}/ppo belongs to another run: config.kl_coef was 0.05, now 0.2; ")
    assert "--overwrite" in line
    assert manifests(copy) == before


@pytest.mark.slow
def test_overwrite_redoes_what_changed(copy: Path) -> None:
    before = manifests(copy)
    again = recipe.run("chain", *SMOKE[1:], "--output_dir", copy, "--ppo.kl_coef", 0.2, "--overwrite")
    assert (again.code, again.err) == (0, "")
    after = manifests(copy)
    assert {stage for stage in after if after[stage] != before[stage]} == {"ppo", "evaluation"}
    assert read(copy / "ppo/manifest.json")["inputs"]["config"]["kl_coef"] == 0.2


def test_all_changes_of_all_stages_are_named_before_anything_is_trained(copy: Path) -> None:
    before = manifests(copy)
    changed = ["--sft.learning_rate", 1e-3, "--ppo.kl_coef", 0.2, "--ppo.lam", 0.9]
    refused = recipe.run("chain", *SMOKE[1:], "--output_dir", copy, *changed)
    assert refused.code == 2
    (line,) = refused.err.splitlines()
    assert line.startswith(f"error: output_dir {copy} belongs to another run: sft: config.learning_rate was ")
    assert "; ppo: config.kl_coef was 0.05, now 0.2, config.lam was 0.95, now 0.9; " in line
    assert "--overwrite_from sft" in line
    assert manifests(copy) == before


@pytest.mark.slow
def test_overwrite_from_a_stage_keeps_the_earlier_ones(copy: Path) -> None:
    before = manifests(copy)
    flags = [*SMOKE[1:], "--output_dir", copy, "--ppo.kl_coef", 0.2]
    refused = recipe.run("chain", *flags, "--sft.learning_rate", 1e-3, "--overwrite_from", "ppo")
    assert refused.code == 2
    assert "sft belongs to another run: config.learning_rate" in refused.err
    assert "kl_coef" not in refused.err
    unknown = recipe.run("chain", *flags, "--overwrite_from", "pp0")
    assert (unknown.code, "did you mean ppo?" in unknown.err) == (2, True)
    assert manifests(copy) == before
    done = recipe.run("chain", *flags, "--overwrite_from", "ppo")
    assert (done.code, done.err) == (0, "")
    after = manifests(copy)
    assert {stage for stage in after if after[stage] != before[stage]} == {"ppo", "evaluation"}


def test_a_changed_file_or_folder_is_noticed(copy: Path) -> None:
    """Though its size and its time are the same."""
    import os

    prompts = copy / "rankings/prompts.jsonl"
    text, stat = prompts.read_bytes(), prompts.stat()
    weights = copy / "sft/model.safetensors"
    for file in (prompts, weights):
        content = file.read_bytes()
        file.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        refused = recipe.run("chain", *SMOKE[1:], "--output_dir", copy)
        assert refused.code == 2
        assert "belongs to another run: " in refused.err
        assert ("train_data was" if file == prompts else "model.content was") in refused.err
        file.write_bytes(content)
    assert text == prompts.read_bytes()


@pytest.mark.slow
def test_a_finished_stage_is_trained_longer(copy: Path) -> None:
    flags = [*SMOKE[1:], "--output_dir", copy, "--ppo.save_steps", 1]
    updates = read(copy / "ppo/manifest.json")["inputs"]["config"]["updates"]
    longer = [*flags, "--ppo.keep_checkpoint", "true", "--ppo.updates", updates + 1]
    refused = recipe.run("chain", *longer)
    assert "ppo is complete, and kept no checkpoint to go on from" in refused.err
    again = recipe.run("chain", *flags, "--ppo.keep_checkpoint", "true", "--ppo.lam", 0.9, "--overwrite")
    assert again.code == 0, again.err
    assert [path.name for path in (copy / "ppo").glob("checkpoint-*")] == [f"checkpoint-{updates}"]
    stale = recipe.run("chain", *longer, "--ppo.lam", 0.9)
    assert stale.code == 2
    assert "evaluation belongs to another run" in stale.err
    assert len(lines(copy / "ppo/metrics.jsonl")) == updates
    done = recipe.run("chain", *longer, "--ppo.lam", 0.9, "--overwrite_from", "evaluation")
    assert done.code == 0, done.err
    assert [line["step"] for line in lines(copy / "ppo/metrics.jsonl")] == list(range(1, updates + 2))
    assert read(copy / "ppo/manifest.json")["inputs"]["config"]["updates"] == updates + 1


# ---------------------------------------------------------------- the end: evals, judges, contamination, cards

END = [
    "--run_evals.eval_data", "toy", "--run_evals.max_items", 4, "--run_evals.max_new_tokens", 8,
    "--judge_card.judge", "data/toy/toy_grader.py:answer", "--judge_card.template", "data/toy/toy_rubric.yaml",
    "--judge_card.labeler", "data/toy/toy_labelers.py:rank", "--contamination.min_chars", 20,
    "--system_card.model_cards", "false",
]  # fmt: skip
LAST = ("run_evals_sft", "run_evals", "judge_card_reward_model", "judge_card", "contamination")


@pytest.mark.slow
def test_a_chain_ends_with_evals_judges_contamination_and_a_card(copy: Path) -> None:
    before, flags = manifests(copy), [*SMOKE[1:], "--output_dir", copy, *END]
    done = recipe.run("chain", *flags)
    assert (done.code, done.err) == (0, "")
    summary, after = read(copy / "summary.json"), manifests(copy)
    assert set(summary["seconds"]) == {*STAGES, *LAST}
    assert set(after) == {*before, *LAST}
    assert all(after[name] == before[name] for name in before), "what was complete is left alone"

    evals = read(copy / "run_evals/run_evals.json")
    assert summary["stages"]["run_evals"]["toy/accuracy"] == evals["metrics"]["toy/accuracy"]["value"]
    assert evals["comparison"], "the policy is compared with the SFT model"
    for name in ("judge_card_reward_model", "judge_card"):
        verdicts = lines(copy / name / "verdicts.jsonl")
        votes = [(row["forward"], label) for row in verdicts for label in row["labels"]]
        alike = sum(win == label for win, label in votes) / len(votes)
        assert summary["stages"][name]["agreement"] == pytest.approx(alike, abs=1e-9)
        assert {len(row["labels"]) % 2 for row in verdicts} == {0}, "every pair was labelled twice"
        assert summary["stages"][name]["human_kappa"] > 0
    files = ("data/pretraining", "data/demonstrations", "rankings/train", "rankings/prompts")
    rows = sum(len(lines(copy / f"{file}.jsonl")) for file in files)
    assert summary["stages"]["contamination"]["rows"] == rows
    assert set(read(copy / "contamination/contamination.json")["evals"]) == {"toy", "eval_prompts"}
    card = read(copy / "system_card/system_card.json")
    assert {file.split("/")[0] for file in card["artefacts"]} >= {*LAST, "evaluation"}
    page = (copy / "report.html").read_text()
    for link in (
        *(f"{name}/{name.partition('_sft')[0].partition('_reward')[0]}" for name in LAST),
        "system_card/system_card",
    ):
        assert f'href="{link}.html"' in page, link

    again = recipe.run("chain", *flags)
    assert (again.code, again.err) == (0, "")
    assert all(f"{name:<13} complete, skipped" in again.out for name in LAST)
    assert manifests(copy) == after
    assert read(copy / "summary.json") == summary


@pytest.mark.slow
def test_what_is_done_by_hand_in_a_stage_of_the_end_is_done_again(copy: Path) -> None:
    flags = [*SMOKE[1:], "--output_dir", copy, "--contamination.min_chars", 20]
    assert recipe.run("chain", *flags).code == 0
    found = read(copy / "contamination/contamination.json")
    by_hand = recipe.run("contamination", "--min_chars", 30, "--output_dir", copy / "contamination")
    assert by_hand.code == 0, by_hand.err
    assert read(copy / "contamination/contamination.json")["rules"]["min_chars"] == 30
    refused = recipe.run("chain", *flags[:-1], 30)
    assert "contamination belongs to another run: config.min_chars was 20, now 30" in refused.err
    assert recipe.run("chain", *flags).code == 0
    assert read(copy / "contamination/contamination.json") == found


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (("--judge_card.template", "none.yaml"), "template none.yaml: no such file"),
        (("--judge_card.labeler", "data/toy/toy_labelers.py:rnk"), "unknown function rnk; did you mean rank?"),
        (("--judge_card.human", "no/such/labels.jsonl"), "no/such/labels.jsonl: no such file"),
        (("--run_evals.eval_data", "artihmetic"), "artihmetic: no such file"),
        (("--run_evals.max_items", "3"), "run_evals: nothing to run"),
        (("--contamination.train_data", "no/such/data.jsonl"), "no/such/data.jsonl: no such file"),
        (
            ("--red_team.policy", "toy", "--red_team.success", "data/toy/toy_safety.py:complid"),
            "unknown function complid; did you mean complied?",
        ),
        (
            (
                "--red_team.policy",
                "toy",
                "--red_team.attack.attacker",
                "x",
                "--red_team.attack.valid",
                "data/toy/toy_safety.py:ask",
            ),
            "unknown function ask; did you mean asks?",
        ),
        (("--red_team.data", "[no/such/suite.csv]"), "no/such/suite.csv: no such file"),
        (("--red_team.policy", "toy", "--red_team.human", "no/such/labels.jsonl"), "no/such/labels.jsonl: no such"),
        (
            ("--data.make", "null", "--red_team.max_cases", "3"),
            "nothing to attack with; name --policy, --data, or both",
        ),
        (("--ppo.output_dir", "elsewhere"), "ppo.output_dir=elsewhere: the other stages look in"),
        (("--evaluation.output_dir", "elsewhere"), "evaluation.output_dir=elsewhere: the other stages look in"),
    ],
)
def test_a_mistake_at_the_end_is_refused_before_anything_is_trained(tmp_path: Path, flags: Any, wrong: str) -> None:
    refused = recipe.run("chain", *SMOKE[1:], "--output_dir", tmp_path / "run", *flags)
    assert refused.code == 2
    (line,) = refused.err.splitlines()
    assert wrong in line
    assert not (tmp_path / "run").exists()


def test_a_reward_server_is_no_function_to_import() -> None:
    address = "http://127.0.0.1:8001"
    check(configs.load(ChainConfig, [*map(str, SMOKE[1:]), "--ppo.reward_functions", address]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ppo.reward_model": "none"}, "ppo.reward_model=none: nothing else scores"),
        ({"ppo.reward_model": "none", "ppo.process_model": "none"}, "ppo.reward_model=none: nothing else scores"),
        ({"sft.model": "none"}, "none: "),
        ({"ppo.reward_model": "none", "ppo.reward_functions": "[http://127.0.0.1:1]"}, None),
    ],
)
def test_none_is_refused_before_anything_is_trained_unless_something_else_scores(changes, told) -> None:
    flags = [word for name, value in changes.items() for word in (f"--{name}", value)]
    config = configs.load(ChainConfig, ["--config", "toy.yaml", *flags], known_sections=SECTIONS)
    with pytest.raises(InputError, match=told) if told else contextlib.nullcontext():
        check(config)
