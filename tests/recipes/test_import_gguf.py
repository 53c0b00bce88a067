"""What `rlhf import_gguf` refuses before it reads weights, and what a kill leaves."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import transformers
from reference import recipe


@pytest.mark.parametrize("is_folder", [True, False])
def test_nothing_that_is_there_is_written_over(tmp_path, is_folder):
    file, out = tmp_path / "model.gguf", tmp_path / "run" / "sft"
    file.touch()
    kept = out / "manifest.json" if is_folder else out
    kept.parent.mkdir(parents=True)
    kept.write_text("a trained stage's")
    refused = recipe.run("import_gguf", "--file", file, "--output_dir", out)
    assert refused.code == 2
    assert refused.err == f"error: output_dir {out}: is there already and not empty; choose another --output_dir\n"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert kept.read_text() == "a trained stage's"


def test_a_kill_while_it_saves_leaves_nothing_in_the_way(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    module, out = recipe.load("import_gguf"), tmp_path / "run" / "base"
    config = module.ImportConfig(file=str(tmp_path / "model.gguf"), output_dir=str(out))
    (tmp_path / "model.gguf").touch()
    for name, read in (
        ("AutoModelForCausalLM", tiny_model), ("AutoConfig", tiny_model.config), ("AutoTokenizer", tiny_tokenizer),
    ):  # fmt: skip
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, read=read, **__: read)
    with monkeypatch.context() as killed:
        killed.setattr(type(tiny_tokenizer), "save_pretrained", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            module.import_gguf(config)
    assert not out.exists()
    module.import_gguf(config)
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {file.name for file in out.iterdir()}
    assert [file.name for file in out.parent.iterdir()] == ["base"]
