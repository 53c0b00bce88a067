"""Cards: every number stands in an artefact, a change on disk breaks the card; what may be pushed to the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rlhf import artefacts, cards, cli
from rlhf.errors import InputError, RunStopped
from rlhf.publish import left_behind, outgoing

SFT = {"score": 0.1, "gold_score": 4.5, "prompts": 40, "kl_nats": 0.0}
PPO = {"score": 0.7, "gold_score": 6.25, "prompts": 40, "kl_nats": 2.125, "win_rate_vs_sft": 0.7375,
       "win_rate_ci": [0.5811, 0.8512]}  # fmt: skip
EVALUATION = {"sft": SFT, "ppo": PPO, "judge": {"kind": "gold", "name": "gold.py:gold"}}
EVALS = {
    "metrics": {
        "sums/accuracy": {"value": 0.375, "low": 0.2013, "high": 0.5893, "n": 24},
        "sums/calibration_error": {"value": 0.0815, "low": 0.0413, "high": 0.1217, "n": 24},
        "sums/choice_A": {"value": 0.5, "low": 0.3, "high": 0.7, "n": 24},
    },
    "model": "runs/my/ppo",
    "evals": {"sums": {"metric": "accuracy", "bounds": [0.0, 1.0]}},
}


def manifest(stage: str, **outputs: object) -> dict:
    return {
        "stage": stage, "seed": 3, "seconds": 12.5, "created": "2026-01-02T03:04:05+00:00",
        "machine": "a machine, 8 cores", "command": "python /home/me/venv/bin/rlhf chain --config my.yaml",
        "versions": {"torch": "2.13.0"}, "base_model": "owner/base" if stage == "sft" else f"/home/me/runs/{stage}",
        "inputs": {"config": {"learning_rate": 0.0003, "epochs": 2.0}, "model": "ab12", "train_data": "cd34"},
        "outputs": outputs,
    }  # fmt: skip


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in content) if isinstance(content, list) else json.dumps(content)
    path.write_text(text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my"
    write(folder / "data/prompts.jsonl", [{"prompt": str(n)} for n in range(17)])
    write(folder / "data/manifest.json", manifest("data"))
    for stage in ("sft", "ppo"):
        write(folder / stage / "manifest.json", manifest(stage, loss=1.625, accuracy=0.5, accuracy_ci=[0.25, 0.75]))
        write(folder / stage / "config.json", {"architectures": ["LlamaForCausalLM"], "_name_or_path": "/home/me/base"})
        (folder / stage / "model.safetensors").write_bytes(b"weights")
        write(folder / stage / "samples.jsonl", [{"prompt": "secret"}])
        (folder / stage / "checkpoint-2").mkdir()
    write(folder / "evaluation/manifest.json", manifest("evaluation"))
    write(folder / "evaluation/evaluation.json", EVALUATION)
    better = {"prompt": "p", "sft": "good", "ppo": "better", "gold_score_sft": 1.0, "gold_score_ppo": 2.0}
    worse = {
        "prompt": "why `````?",
        "sft": "good",
        "ppo": "<b>bad</b> | ```",
        "gold_score_sft": 3.5,
        "gold_score_ppo": 1,
    }
    write(folder / "evaluation/samples.jsonl", [better, worse])
    write(folder / "run_evals/run_evals.json", EVALS)
    item = {"eval": "sums", "key": "k", "prompt": [{"role": "user", "content": "1 + 1?"}], "ideal": ["2"]}
    trial = {"answers": {"completion": "3"}, "numbers": {"accuracy": 0.0}}
    write(folder / "run_evals/items.jsonl", [{**item, "trials": [trial]}])
    return folder


def card(run: Path) -> tuple[str, dict]:
    cli.command(["system_card", str(run)])
    folder = run / "system_card"
    return (folder / "system_card.md").read_text(), json.loads((folder / "system_card.json").read_text())


def numerals(text: str) -> list[str]:
    return re.findall(r"\d[\d,]*\.?\d*(?:e-?\d+)?", text)


def at(content: object, place: str) -> object:
    """A JSON pointer, read anew."""
    for key in place.split("/")[1:]:
        content = content[int(key)] if isinstance(content, list) else content[key.replace("~1", "/")]
    return content


def test_what_must_not_be_said_is_not_shown_as_right(run):
    assert "right" in card(run)[0].split("## Failures")[1]
    evals = {**EVALS, "evals": {"sums": {**EVALS["evals"]["sums"], "class": "Excludes"}}}
    write(run / "run_evals/run_evals.json", evals)
    shown = card(run)[0].split("## Failures")[1]
    assert "forbidden" in shown
    assert "right" not in shown


def test_every_number_of_the_card_stands_in_an_artefact(run):
    """Walk the card's tables: each row's value is found in the file that it names, by its own reading."""
    text, content = card(run)
    facts = {(fact["what"], fact["text"]): fact for fact in content["facts"]}
    rows = [line for line in text.split("\n## Files")[0].splitlines() if line.startswith("| ")]
    rows = [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in line.strip("|").split(" | ")] for line in rows]
    rows = [row for row in rows if row not in (["what", "value", "from"], ["---"] * 3)]
    assert len(rows) == len(facts) > 40
    for what, shown, source in rows:
        fact = facts[what, shown]
        assert source.startswith(f"{fact['file']}: ")
        if fact["places"] == ["number of rows"]:
            values = [len((run / fact["file"]).read_text().splitlines())]
        else:
            file = json.loads((run / fact["file"]).read_text())
            values = [at(file, place) for place in fact["places"]]
        if all(isinstance(value, int | float) for value in values):
            written = [float(number.replace(",", "")) for number in numerals(shown)]
            assert len(written) == len(values)
            assert all(abs(a - b) <= max(0.005, 0.05 * abs(b)) for a, b in zip(written, values, strict=True))
        else:
            assert set(numerals(shown)) <= set(numerals(json.dumps(values)))
    prose = [line for line in text.split("\n## Files")[0].splitlines() if not line.startswith(("| ", "```"))]
    quoted = "\n".join(prose).replace("gold_score", "")
    assert set(numerals(quoted)) <= {"1", "3", "2"}, "only the samples' own texts and rows hold digits outside tables"


def test_what_was_measured_and_what_was_not(run):
    text, content = card(run)
    for expected in (
        "ppo: win_rate_vs_sft | 0.74 [0.58, 0.85] |",
        "run_evals: sums/accuracy | 0.38 [0.20, 0.59], n 24 |",
        "run_evals: sums/calibration_error | 0.08 [0.04, 0.12], n 24 |",
        "rows of data/prompts.jsonl | 17 |",
        "Not measured: `rlhf red_team` attacks the policy.",
        "Not measured: `rlhf contamination`",
    ):
        assert expected in text, expected
    assert content["not_measured"] == ["Judges", "Safety", "Contamination", "Prediction"]
    assert content["metrics"]["run_evals/sums/accuracy"] == EVALS["metrics"]["sums/accuracy"]
    assert "choice_A" not in text
    assert "/home/me" not in text
    assert "python rlhf chain --config my.yaml" in text


def test_texts_stay_texts(run):
    text, _ = card(run)
    fence = re.search(r"(`{6,})text\nprompt:\nwhy `````\?\n\nbefore:\ngood\n\nafter:\n<b>bad</b> \| ```\n\1\n", text)
    assert fence, text
    page = (run / "system_card/system_card.html").read_text()
    assert "&lt;b&gt;bad" in page
    assert "<b>bad" not in page


@pytest.mark.parametrize(
    ("file", "place", "value", "told"),
    [
        ("evaluation/evaluation.json", "/ppo/win_rate_vs_sft", 0.99, r"win_rate_vs_sft: the card says '0.74"),
        ("run_evals/run_evals.json", "/metrics/sums~1accuracy/low", 0.0, r"sums/accuracy: the card says"),
        ("ppo/manifest.json", "/outputs/loss", 1.5, r"ppo: result loss"),
        ("ppo/manifest.json", "/outputs/loss", 1.6251, r"ppo/manifest.json: has changed since"),
    ],
)
def test_a_changed_number_breaks_the_card(run, file, place, value, told):
    card(run)
    cli.command(["system_card", str(run), "--check", "true"])
    content = json.loads((run / file).read_text())
    *above, last = place.split("/")[1:]
    inner = content
    for key in above:
        inner = inner[key.replace("~1", "/")]
    inner[last] = value
    write(run / file, content)
    with pytest.raises(RunStopped, match=told):
        cli.command(["system_card", str(run), "--check", "true"])


def test_a_file_that_is_gone_and_a_row_more_break_it(run):
    _, content = card(run)
    (run / "run_evals/run_evals.json").unlink()
    with (run / "data/prompts.jsonl").open("a") as file:
        file.write('{"prompt": "18"}\n')
    found = artefacts.check(content, run)
    assert "run_evals/run_evals.json: is gone" in found
    assert any("rows of data/prompts.jsonl: the card says '17', the file '18'" in line for line in found)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="holds no complete stage"):
        cli.command(["system_card", str(tmp_path)])
    with pytest.raises(InputError, match="name the run's folder first"):
        cli.command(["system_card"])


def test_a_models_card(run):
    text = cards.model_card(run / "sft")
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "owner/base"
    assert header["pipeline_tag"] == "text-generation"
    assert header["library_name"] == "transformers"
    assert "| result accuracy | 0.50 [0.25, 0.75] |" in text
    assert "base_model" not in yaml.safe_load(cards.model_card(run / "ppo").split("---")[1])
    card(run)
    assert (run / "ppo/README.md").read_text() == cards.model_card(run / "ppo")
    assert not (run / "data/README.md").exists()
    manifest = json.loads((run / "ppo/manifest.json").read_text())
    settings = manifest["inputs"].get("config", {}) | {"epochs": 3.0, "trains": "head"}
    write(run / "ppo/manifest.json", manifest | {"inputs": manifest["inputs"] | {"config": settings}})
    assert "| trains | head |" in cards.model_card(run / "ppo")
    assert "epochs" not in cards.model_card(run / "ppo")  # no step was taken
    tags = dict.fromkeys(("reward_model", "moderation", "process_reward"), "text-classification")
    tags |= dict.fromkeys(("dpo", "kto", "grpo", "rloo"), "text-generation")
    for stage, tag in tags.items():
        write(run / "ppo/manifest.json", json.loads((run / "ppo/manifest.json").read_text()) | {"stage": stage})
        assert yaml.safe_load(cards.model_card(run / "ppo").split("---")[1])["pipeline_tag"] == tag


def test_a_baseline_stands_on_the_systems_card(run):
    write(run / "dpo/manifest.json", manifest("dpo", accuracy=0.75))
    write(run / "evaluation/evaluation.json", EVALUATION | {"dpo": PPO | {"score": 1.25}})
    sections = cards.system_sections(artefacts.Artefacts(run))
    facts = {fact.what: fact.text for section in sections for fact in section.facts}
    assert (facts["dpo: result accuracy"], facts["dpo: starts from"]) == ("0.75", "dpo")
    assert "1.25" in facts["dpo: score"]


def test_absolute_paths_are_shortened():
    for text, short in (
        ("python /home/me/bin/rlhf ppo", "python rlhf ppo"),
        ("see https://host/a/b", "see https://host/a/b"),
        ("runs/my/ppo", "runs/my/ppo"),
        ("--model=/data/models/x", "--model=x"),
        (r"C:\Users\me\x", "x"),
    ):
        assert artefacts.without_folders(text) == short


# ---------------------------------------------------------------- pushing


def pushed(run: Path, *flags: str) -> dict:
    folder = run.parent / "pushed"
    cli.command(["push_to_hub", "--model", str(run / "ppo"), "--repo", "me/x", "--output_dir", str(folder), *flags])
    return json.loads((folder / "push_to_hub.json").read_text())


def test_a_dry_run_shows_an_allow_list(run, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", None)  # nothing may reach it
    content = pushed(run)
    assert [row["path"] for row in content["files"]] == ["README.md", "config.json", "model.safetensors"]
    assert content["left_behind"] == ["checkpoint-2/", "manifest.json", "samples.jsonl"]
    assert not content["pushed"]
    assert "nothing has left this machine" in capsys.readouterr().out
    (config,) = [one for one in outgoing(run / "ppo") if one.path == "config.json"]
    assert json.loads(config.content) == {"architectures": ["LlamaForCausalLM"]}


def test_what_our_own_models_are_loaded_from_goes_along(run, capsys):
    from reward_models.moderation_trainer import WORDS_FILE
    from reward_models.scoring import CATEGORIES_FILE, PROCESS_FILE

    for name in (CATEGORIES_FILE, PROCESS_FILE, WORDS_FILE):
        (run / "ppo" / name).write_bytes(b"\x00 /home/me")
    with pytest.raises(InputError, match=r"categories\.json:1: names a path of this machine"):
        pushed(run)
    for name in (CATEGORIES_FILE, PROCESS_FILE):
        (run / "ppo" / name).write_text("{}")
    paths = [row["path"] for row in pushed(run)["files"]]
    assert {CATEGORIES_FILE, PROCESS_FILE, WORDS_FILE} <= {*paths}
    assert "words.npz lists words" in capsys.readouterr().out


def test_a_push_sends_what_was_shown(run, monkeypatch):
    sent = []
    hub = SimpleNamespace(
        create_repo=lambda repo, **options: sent.append((repo, options)),
        create_commit=lambda repo, operations, commit_message: sent.extend(operations),
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    content = pushed(run, "--push", "true")
    assert sent[0] == ("me/x", {"private": True, "exist_ok": True})
    assert [operation.path_in_repo for operation in sent[1:]] == [row["path"] for row in content["files"]]
    assert content["pushed"]


def test_an_adapters_local_base_needs_the_hubs_name(run):
    folder = run / "ppo"
    write(folder / "adapter_config.json", {"base_model_name_or_path": str(run / "sft"), "r": 4})
    with pytest.raises(InputError, match="only this machine has; name the hub's: --base_model"):
        outgoing(folder)
    (config,) = [one for one in outgoing(folder, base_model="owner/base") if one.path == "adapter_config.json"]
    assert json.loads(config.content) == {"base_model_name_or_path": "owner/base", "r": 4}
    (config,) = [one for one in outgoing(folder, base_model="gpt2") if one.path == "adapter_config.json"]
    assert json.loads(config.content) == {"base_model_name_or_path": "gpt2", "r": 4}
    with pytest.raises(InputError, match="base_model_name_or_path is 'a b', which only this machine has"):
        outgoing(folder, base_model="a b")


@pytest.mark.parametrize("line", ["see /home/me/runs", "from /usr/lib/x", "https://me:secret@host/x"])
def test_a_text_with_a_path_or_a_secret_is_refused(run, line):
    (run / "ppo/README.md").write_text(f"# A model\n{line}\n")
    with pytest.raises(InputError, match=r"README\.md:2: (names a path of this machine|holds a password)"):
        outgoing(run / "ppo")
    (run / "ppo/README.md").write_text("from manifest.json: /inputs/model\n")
    assert outgoing(run / "ppo")


def test_only_results_for_the_hubs_data_sets_go_along(run):
    folder = run / "run_evals/.eval_results"
    folder.mkdir()
    (folder / "known.yaml").write_text("- dataset: {id: me/known, task_id: a}\n  value: 1\n")
    (folder / "own.yaml").write_text("- dataset: {id: own}\n  value: 1\n  notes: 'not a data set of the hub: a'\n")
    paths = [one.path for one in outgoing(run / "ppo", evals=run / "run_evals")]
    assert ".eval_results/known.yaml" in paths
    assert ".eval_results/own.yaml" not in paths


def test_a_folder_without_weights_is_refused(run):
    (run / "ppo/model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        outgoing(run / "ppo")
    with pytest.raises(InputError, match="name a saved model's folder"):
        outgoing(run / "data")


def test_what_stays_is_named(run):
    assert "samples.jsonl" in left_behind(run / "ppo", outgoing(run / "ppo"))
