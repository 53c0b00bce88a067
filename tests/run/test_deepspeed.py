"""SFT and the reward model under DeepSpeed's ZeRO in two gloo processes, against one process without it.

`make test-deepspeed` runs them in an environment of its own.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import deepspeed_trainers as worker
from reference import forked
from reference.sharded_trainers import FILES, build
from safetensors.torch import load_file

pytestmark = [pytest.mark.deepspeed, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
ZERO = {"zero2.yaml": 1e-6, "zero3.yaml": 2e-5}  # how far weights may be from one process's
case = pytest.mark.parametrize(("zero", "kind"), [(zero, kind) for zero in ZERO for kind in ("full", "lora")])
MADE: dict[tuple[str, str], Path | str] = {}  # of this session


@pytest.fixture
def made(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Return the folder that a configuration ("alone": one process) filled; made when a test first asks for it."""
    pytest.importorskip("deepspeed", reason="no deepspeed here: make test-deepspeed installs it", exc_type=ImportError)

    def make(zero: str, kind: str) -> Path:
        if (zero, kind) not in MADE:
            folder = tmp_path_factory.mktemp(f"{zero}-{kind}")
            policy = build(folder / "models", kind, copy.deepcopy(tiny_model), tiny_tokenizer)
            if zero == "alone":
                worker.main(zero, str(folder), policy)
                MADE[zero, kind] = folder
            else:
                done = forked.shared().together([worker.__file__, zero, folder, policy], limit=240)
                MADE[zero, kind] = folder if done.returncode == 0 else done.stderr[-4000:]
        folder = MADE[zero, kind]
        if isinstance(folder, str):
            pytest.fail(f"the launch failed: {folder}")
        return folder

    return make


@case
@pytest.mark.parametrize("stage", worker.STAGES)
def test_its_weights_are_one_processs_and_a_killed_runs(made, zero, kind, stage):
    mine, alone = made(zero, kind), made("alone", kind)
    whole, resumed, expected = (
        load_file(place / stage / name / FILES[kind])
        for place, name in ((mine, "whole"), (mine, "resumed"), (alone, "whole"))
    )
    start = load_file(next((alone / "models").glob("sft" if kind == "lora" else "base")) / FILES[kind])
    assert whole.keys() == resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(whole[name], tensor, rtol=0, atol=ZERO[zero], err_msg=name)
        assert torch.equal(resumed[name], whole[name]), name
    moved = max(float((expected[name] - start[name]).abs().max()) for name in expected.keys() & start.keys())
    assert moved > 10 * ZERO[zero], "training must do something"
