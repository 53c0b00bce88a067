"""Runs that die at any moment: atomic folders, checkpoints, stage states, manifests, random numbers."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf import InputError
from rlhf.callbacks import MarkComplete
from rlhf.checkpoint import (
    Manifest,
    atomic_folder,
    begin_stage,
    data_fingerprint,
    finish_stage,
    latest_checkpoint,
    random_state,
    require_disk,
    restore_random_state,
    save_checkpoint,
    stage_state,
    tokenizer_hash,
    write_json_atomic,
)
from rlhf.records import Prompt


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs but what a next process does."""


def fill(folder: Path, text: str) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- atomic folders


def test_an_atomic_folder_appears_whole_and_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for text in ("old", "new"):
        with atomic_folder(path) as temporary:
            assert temporary != path
            fill(temporary, text)
    assert (path / "model" / "weights").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_failing_body_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with atomic_folder(path) as temporary:
        fill(temporary, "old")
    with pytest.raises(FileNotFoundError), atomic_folder(path) as temporary:
        (temporary / "half" / "file").touch()
    assert (path / "model" / "weights").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_run_killed_while_renaming_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    import rlhf.checkpoint

    path = tmp_path / "out"
    with atomic_folder(path) as temporary:
        fill(temporary, "old")
    done = []
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise Killed
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying)
        patched.setattr(rlhf.checkpoint, "_remove", lambda path: None)  # a killed process cleans nothing up
        patched.setattr(rlhf.checkpoint, "_recover", lambda path: None)
        if renames < 2:
            with pytest.raises(Killed), atomic_folder(path) as temporary:
                fill(temporary, "new")
        else:
            with atomic_folder(path) as temporary:
                fill(temporary, "new")
    with pytest.raises(RuntimeError), atomic_folder(path):  # the next process begins to write, and fails
        raise RuntimeError
    assert (path / "model" / "weights").read_text() == ("new" if renames == 2 else "old")
    assert names(tmp_path) == ["out"]


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json_atomic(path, {"t": (1, 2), "n": np.float32(0.5), "p": Path("x"), "w": torch.ones(2)})
    assert json.loads(path.read_text()) == {"t": [1, 2], "n": 0.5, "p": "x", "w": [1.0, 1.0]}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"bad": object()})
    assert json.loads(path.read_text())["n"] == 0.5


def test_a_full_disk_is_refused_in_one_line(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(InputError, match=r"needs about 1000000\.00 GB, .* are free") as caught:
        require_disk(tmp_path / "not" / "yet", 10**15)
    assert "\n" not in str(caught.value)


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
    save_checkpoint(folder, 1, lambda path: (path / "x").touch())
    finish_stage(folder, manifest(inputs=inputs))
    assert stage_state(folder, inputs) == "complete"
    assert latest_checkpoint(folder) is None


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
    assert names(folder) == ["inputs.json"]


def test_a_folder_that_is_no_stage_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="no run of ours"):
            begin_stage(tmp_path, {}, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years"
    with pytest.raises(InputError, match="is a file"):
        stage_state(tmp_path / "thesis.txt", {})


# ---------------------------------------------------------------- checkpoints


def test_only_whole_checkpoints_count_and_the_newest_two_stay(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-3").mkdir()  # transformers was killed while writing it
    (tmp_path / "checkpoint-best").mkdir()
    for step in (2, 9, 10):
        save_checkpoint(tmp_path, step, lambda path, step=step: (path / "state").write_text(str(step)))
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9", "checkpoint-best"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert (latest.name, (latest / "state").read_text()) == ("checkpoint-10", "10")

    def dying(path: Path) -> None:
        (path / "state").touch()
        raise Killed

    with pytest.raises(Killed):
        save_checkpoint(tmp_path, 11, dying)
    assert latest_checkpoint(tmp_path) == latest


def test_transformers_checkpoints_are_marked_when_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    assert latest_checkpoint(tmp_path) is None
    state = SimpleNamespace(global_step=5, is_world_process_zero=True)
    MarkComplete().on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert latest_checkpoint(tmp_path) == folder


# ---------------------------------------------------------------- random numbers


def draw(generator: torch.Generator) -> tuple[Any, ...]:
    torch_numbers = torch.rand(3).tolist(), torch.rand(3, generator=generator).tolist()
    return (*torch_numbers, np.random.rand(3).tolist(), np.random.randn(), random.random(), random.gauss(0, 1))


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    draw(generator)
    torch.save(random_state(generator), tmp_path / "random.pt")
    expected = draw(generator)
    assert draw(generator) != expected
    fresh = torch.Generator()
    restore_random_state(torch.load(tmp_path / "random.pt", weights_only=True), fresh)
    assert draw(fresh) == expected
    with pytest.raises(ValueError, match="1 generators were saved, 0"):
        restore_random_state(random_state(generator))
