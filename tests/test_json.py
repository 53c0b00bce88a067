"""What is written is JSON that any reader takes: no NaN, no Infinity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.rows.records import write_jsonl
from rlhf.run.checkpoint import plain, write_json_atomic
from rlhf.run.stages import Manifest


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_files_hold_no_nan(tmp_path: Path) -> None:
    numbers = {"loss": math.nan, "clip_value": math.inf, "more": [np.float64("nan"), -math.inf, 1.5]}
    expected = {"loss": None, "clip_value": "inf", "more": [None, "-inf", 1.5]}
    assert plain(numbers) == expected
    write_json_atomic(tmp_path / "one.json", numbers)
    assert strict((tmp_path / "one.json").read_text()) == expected
    write_jsonl(tmp_path / "rows.jsonl", [numbers, numbers])
    assert [strict(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [expected] * 2


def test_a_manifest_with_an_infinite_setting_is_the_same_when_read_again(tmp_path: Path) -> None:
    manifest = Manifest(stage="ppo", inputs={"config": {"clip_value": math.inf}}, seed=0, outputs={"score": math.nan})
    manifest.write(tmp_path)
    assert strict((tmp_path / "manifest.json").read_text())["inputs"]["config"]["clip_value"] == "inf"
    assert Manifest.read(tmp_path).fingerprint == manifest.fingerprint
