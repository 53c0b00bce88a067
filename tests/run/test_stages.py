"""Stages: fingerprints of their inputs, manifests, and reading a stage's state from its folder."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.errors import InputError
from rlhf.rows.records import Prompt
from rlhf.run.checkpoint import latest_checkpoint, save_checkpoint
from rlhf.run.stages import (
    Manifest,
    begin_stage,
    data_fingerprint,
    drop_checkpoints,
    finish_stage,
    reopen_stage,
    stage_state,
    tokenizer_hash,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- fingerprints


def test_data_fingerprints_follow_the_content(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "hi"}\n')
    assert data_fingerprint(file) == hashlib.sha256(hashlib.sha256(file.read_bytes()).digest()).hexdigest()
    other = tmp_path / "b.jsonl"
    other.write_text('{"prompt": "hi"}\n')
    assert data_fingerprint(other) == data_fingerprint(str(file))
    folder = data_fingerprint(tmp_path)
    other.rename(tmp_path / "c.jsonl")
    assert data_fingerprint(tmp_path) != folder
    records = [Prompt(messages=[{"role": "user", "content": "hi"}]), {"prompt": "ä"}]
    assert data_fingerprint(records) == data_fingerprint(list(records))
    assert data_fingerprint(records) != data_fingerprint(records[::-1])
    assert data_fingerprint("some/hub-id") != data_fingerprint("some/other-id")


def test_the_tokenizer_hash_survives_use_and_saving(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    before = tokenizer_hash(tiny_tokenizer)
    tiny_tokenizer(["a", "the fox"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tiny_tokenizer) == before
    tiny_tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == before
    tiny_tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_hash(tiny_tokenizer) == before
    tiny_tokenizer.add_tokens(["<new>"])
    changed = tokenizer_hash(tiny_tokenizer)
    assert changed != before
    tiny_tokenizer.eos_token = "<|im_end|>"
    assert tokenizer_hash(tiny_tokenizer) not in (before, changed)


# ---------------------------------------------------------------- manifests and stages


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {"stage": "sft", "inputs": {"config": {"epochs": 2}}, "seed": 0, "stop_ids": (1, 2)}
    return Manifest(**(values | changes))


def test_a_manifest_reads_back_and_names_its_versions(tmp_path: Path) -> None:
    written = manifest(outputs={"loss": 1.5}, base_model="a/b", pad_id=3)
    written.write(tmp_path)
    assert Manifest.read(tmp_path) == written
    assert written.versions["torch"] == torch.__version__
    assert written.command.startswith("python")
    assert json.loads((tmp_path / "manifest.json").read_text())["inputs"] == {"config": {"epochs": 2}}


def test_a_manifest_fingerprint_ignores_time_and_sees_content() -> None:
    same = manifest(seconds=9.0, command="other", created="then", versions={})
    assert manifest().fingerprint == same.fingerprint
    assert manifest(outputs={"training_seconds": 1.0}).fingerprint == manifest().fingerprint
    for change in ({"seed": 1}, {"inputs": {}}, {"outputs": {"loss": 1}}, {"stop_ids": (1,)}, {"template_hash": "x"}):
        assert manifest(**change).fingerprint != manifest().fingerprint


def test_broken_manifests_are_one_line(tmp_path: Path) -> None:
    for text, part in ((None, "no such file"), ("{", "broken JSON"), ("{}", "no manifest"), ("[]", "no manifest")):
        if text is not None:
            (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=part) as caught:
            Manifest.read(tmp_path)
        assert "manifest.json" in str(caught.value)


def test_a_stage_goes_from_absent_to_interrupted_to_complete(tmp_path: Path) -> None:
    folder = tmp_path / "sft"
    inputs = {"config": {"epochs": 2, "rate": 0.1, "names": ("a",)}, "data": "f" * 64}
    assert stage_state(folder, inputs) == "absent"
    assert begin_stage(folder, inputs) == "absent"
    assert begin_stage(folder, inputs) == "interrupted"
    save_checkpoint(folder, 1, lambda path: (path / "x").touch(), {})
    finish_stage(folder, manifest(inputs=inputs))
    assert stage_state(folder, inputs) == "complete"
    assert latest_checkpoint(folder, {}) is None


@pytest.mark.parametrize(
    ("settings", "goes_on"),
    [
        ([{"rollout_size": 8}], True),  # PPO kept it when a function failed: it names none
        ([{"rollout_size": 8, "reward_funcs": ["f 1"]}], False),
        ([{"rollout_size": 8}, {"rollout_size": 8, "reward_funcs": ["f 1"]}], False),  # the newest counts
        ([{"epochs": 2}], False),  # of another stage, whose checkpoints never name any
        ([], False),
    ],
)
def test_another_functions_file_is_another_run_but_where_ppo_waits_for_it(
    tmp_path: Path, settings: list[dict[str, Any]], goes_on: bool
) -> None:
    before = {"config": {"rate": 0.1}, "code": {"f.py:f": "0" * 64}}
    begin_stage(tmp_path / "ppo", before)
    for step, held in enumerate(settings, 1):
        save_checkpoint(tmp_path / "ppo", step, lambda path: (path / "x").touch(), held)
    mended = {**before, "code": {"f.py:f": "1" * 64}}
    for inputs, fine in ((mended, goes_on), (mended | {"config": {"rate": 0.2}}, False)):
        with nullcontext() if fine else pytest.raises(InputError, match="belongs to another run"):
            assert stage_state(tmp_path / "ppo", inputs) == "interrupted"
        assert stage_state(tmp_path / "ppo", inputs, overwrite=True) == "absent", "who asks for a new run gets one"


@pytest.mark.parametrize("finished", [True, False])
def test_another_run_in_the_folder_is_refused_naming_what_differs(tmp_path: Path, finished: bool) -> None:
    folder = tmp_path / "sft"
    inputs = {"config_fingerprint": "0" * 64, "config": {"epochs": 2, "rate": 0.1}, "data": "f" * 64}
    begin_stage(folder, inputs)
    if finished:
        finish_stage(folder, manifest(inputs=inputs))
    changed = {"config_fingerprint": "1" * 64, "config": {"epochs": 2, "rate": 0.2}, "data": "f" * 64}
    with pytest.raises(InputError, match=r"config\.rate was 0\.1, now 0\.2; pass --overwrite"):
        stage_state(folder, changed)
    with pytest.raises(InputError, match=r"data was ffffffffffff, now null"):
        begin_stage(folder, {key: value for key, value in inputs.items() if key != "data"})
    (folder / "weights").touch()
    assert begin_stage(folder, inputs, overwrite=True) == ("complete" if finished else "interrupted")
    assert begin_stage(folder, changed, overwrite=True) == "absent"
    assert names(folder) == ["begun.json", "inputs.json"]


def worked(folder: Path, began: float, until: float) -> None:
    """Let the process that is in a stage have begun, and written its last file, at these times."""
    record = json.loads((folder / "begun.json").read_text())
    (folder / "begun.json").write_text(json.dumps(record | {"since": began}))
    (folder / "metrics.jsonl").touch()
    for file in folder.iterdir():
        os.utime(file, (until, until))
    for later in (".lock", "report.html"):  # of who looks at it, or takes it, in between
        (folder / later).touch()


def test_the_best_weights_stay_as_long_as_a_checkpoint_does(tmp_path: Path) -> None:
    """Else a complete stage that is trained longer would have forgotten what it chose from."""
    best = tmp_path / "best.safetensors"
    begin_stage(tmp_path, {})
    for kept in (True, False):
        best.touch()
        save_checkpoint(tmp_path, 1, lambda path: (path / "x").touch(), {})
        finish_stage(tmp_path, manifest(), keep_checkpoints=kept)
        assert (best.exists(), (tmp_path / "checkpoint-1").exists()) == (kept, kept)
    best.touch()  # killed after the manifest
    drop_checkpoints(tmp_path)
    assert not best.exists()


def test_seconds_are_those_of_all_processes_and_the_first_one_began_it(tmp_path: Path) -> None:
    folder, inputs, grown = tmp_path / "ppo", {"config": {"updates": 4}}, {"config": {"updates": 8}}
    before = datetime.now(UTC).replace(microsecond=0)
    begin_stage(folder, inputs)
    first = json.loads((folder / "begun.json").read_text())["began"]
    assert before <= datetime.fromisoformat(first) <= datetime.now(UTC)
    worked(folder, began=1000.0, until=1040.0)
    begin_stage(folder, inputs)  # ten hours later, after a kill
    worked(folder, began=37_000.0, until=37_002.5)
    begin_stage(folder, inputs)
    made = finish_stage(folder, manifest(inputs=inputs, seconds=7.0))
    assert made.seconds == 49.5
    assert made.began == first
    assert Manifest.read(folder) == made
    assert made.fingerprint == manifest(inputs=inputs).fingerprint
    assert not (folder / "begun.json").exists()
    save_checkpoint(folder, 1, lambda path: (path / "x").touch(), {})
    finish_stage(folder, made, keep_checkpoints=True)
    begin_stage(folder, grown)  # trained longer
    assert finish_stage(folder, manifest(inputs=grown, seconds=0.5), keep_checkpoints=True).seconds == 50.0
    reopen_stage(folder, inputs)  # with other settings of what is done with it
    begin_stage(folder, inputs)
    found = finish_stage(folder, manifest(inputs=inputs))
    assert found.seconds == pytest.approx(50.0, abs=1.0)
    assert found.began == first


def test_a_folder_that_is_no_stage_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="no run of ours"):
            begin_stage(tmp_path, {}, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years"
    with pytest.raises(InputError, match="is a file"):
        stage_state(tmp_path / "thesis.txt", {})
