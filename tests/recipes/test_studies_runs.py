"""Studies run for real on the smoke chain: they share its stages, go on, and find what they need in them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from rlhf_recipes.studies import kl_or_stopping, proxy_runs, shared_runs, study

SMALL = {
    "demo": (),
    "ladder": (),
    "labelers": ("--prompts", "30"),
    "accuracy": ("--prompts", "[10]", "--hidden", "[16]"),
    "epochs": ("--prompts", "20", "--epochs", "[1,2]"),
    "overoptimisation": ("--proxy_prompts", "6", "--updates", "3", "--n", "4", "--max_prompts", "6"),
    "kl_or_stopping": ("--proxy_prompts", "6", "--updates", "3", "--kl_coefs", "[0.2]"),
    "root_kl": ("--proxy_prompts", "6", "--updates", "3"),
    "length_bias": (),
}


@pytest.mark.long
def test_toy_studies_run_on_the_smoke_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed each. The second time nothing is run again."""
    monkeypatch.setattr(proxy_runs, "GRID", (0.0, 1e-6, 1e-5, 1e-4))  # three updates do not go far
    monkeypatch.setattr(kl_or_stopping, "PARTED", 1e-6)
    flags = ["--chain", "smoke.yaml", "--seeds", "[0]", "--output_dir", str(tmp_path / "out")]
    for name, own in SMALL.items():
        module = importlib.import_module(f"rlhf_recipes.studies.{name}")
        config_class = next(
            (v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__
             and isinstance(v, type) and issubclass(v, study.StudyConfig)), study.StudyConfig,
        )  # fmt: skip
        for _ in range(2):
            study.main(module.STUDY, config_class, module.__file__, [*flags, *own])
        result = json.loads((tmp_path / f"out/{name}/{name}.json").read_text())
        assert result["verdict"] == "too few seeds"
        assert result["points"], name
        assert all(isinstance(check["value"], float) for check in result["checks"])
        page = (tmp_path / f"out/{name}/{name}.html").read_text()
        assert page.count("<svg") == len(result["panels"]), name
    shared = tmp_path / "out/runs/smoke-0"
    manifest = json.loads((shared / "ppo/manifest.json").read_text())
    assert manifest["inputs"]["config"]["reward_functions"] == [shared_runs.GOLD]
    assert manifest["inputs"]["config"]["reward_weights"] == [1.0, 0.0], "gold watches and does not train"
