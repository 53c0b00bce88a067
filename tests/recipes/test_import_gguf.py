"""What `rlhf import_gguf` refuses before it reads weights."""

from __future__ import annotations

import pytest
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
