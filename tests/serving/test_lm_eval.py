"""lm-eval's local-completions against our server: its loglikelihoods are those of lm-eval's own run of the model."""

from __future__ import annotations

import pytest
from reference.policy_server import serving
from reference.tiny_chain import save_base, shake

from rlhf.serving.app import Service
from rlhf.serving.config import ServingConfig
from rlhf.serving.engine import LocalEngine
from rlhf.serving.policies import load_policies

pytestmark = pytest.mark.long

PAIRS = [
    ("The capital of France is", " Paris."),
    ("Count to ten: one, two,", " three, four, five"),
    ("The quick brown fox", " jumps over the lazy dog."),
    ("", "You are a helpful assistant."),
]


@pytest.mark.parametrize("concurrent", [1, 4])
def test_loglikelihoods_are_lm_evals_own(tmp_path, tiny_model, tiny_tokenizer, monkeypatch, concurrent):
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")  # of its extra `api`
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    shake(tiny_model, 0, 0.1)
    base = str(save_base(tmp_path, tiny_model, tiny_tokenizer))
    pairs = list(PAIRS)
    greedy = tiny_model.generate(
        tiny_tokenizer("The fox", return_tensors="pt").input_ids, max_new_tokens=4, do_sample=False
    )
    pairs.append(("The fox", tiny_tokenizer.decode(greedy[0, -4:])))
    asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    own = HFLM(pretrained=base, tokenizer=base, device="cpu", dtype="float32", batch_size=2).loglikelihood(asked)
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    config = ServingConfig()
    engine = LocalEngine(load_policies({"base": base}, None, "cpu"), config)
    with serving(Service(engine, config), token="s3cret") as url:
        api = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions", model="base", tokenizer=base, tokenizer_backend="huggingface",
            num_concurrent=concurrent, batch_size=2 if concurrent == 1 else 1,
        )  # fmt: skip
        ours = api.loglikelihood(asked)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in own], abs=1e-5)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in own]
    assert len({round(value, 3) for value, _ in own}) == len(pairs)
