"""Fixtures shared by all tests: a tiny tokenizer, a tiny model, the folder of real data."""

from __future__ import annotations

import os

# Before any import of transformers, datasets or tokenizers, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several side by side: a thread each, or they wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# The shapes in ppo_math's signatures are checked at every call, by the trainers' tests too.
install_import_hook("rlhf.ppo.math", "reference.checked")

# Files whose tests share something expensive: of workers side by side, one runs all of such a file. Longest first, and
# before all other tests, which then fill the gaps.
TOGETHER = {
    "test_kill.py": "chain",
    "recipes/test_chain.py": "chain",
    "recipes/test_processes.py": "processes",
    "test_docs.py": "docs",
    "run/test_distributed.py": "distributed",
    "run/test_sharded_trainers.py": "sharded",
    "test_invariance.py": "invariance",
    "recipes/test_notebook.py": "notebook",
    "recipes/test_inspect_rollout.py": "inspect_rollout",
    "sampling/test_vllm.py": "vllm",
    "sampling/test_vllm_faults.py": "vllm",
    "reward_models/test_server.py": "server",
    "data/test_toy.py": "toy",
    "test_wheel.py": "wheel",
}

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "system user assistant Human Assistant prompt response chosen rejected",
    "Count to ten: one, two, three, four, five, six, seven, eight, nine, ten.",
    "You are a helpful assistant. Please answer the question of the user.",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    places = {name: place for place, name in enumerate(TOGETHER)}
    files = {item: item.path.relative_to(Path(__file__).parent).as_posix() for item in items}
    items.sort(key=lambda item: places.get(files[item], len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give each test to whichever worker is free, and the files of `TOGETHER` to one each. (xdist's own groups add to
    a test's id, which pytest 9 no longer lets them do: every expensive fixture was made by every worker.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER.get(nodeid.partition("::")[0].removeprefix("tests/"), nodeid)

    return Together(config, log)


@pytest.fixture(autouse=True)
def precision_of_any_machine(monkeypatch):
    """PPO chooses bfloat16 where a CPU is fast at it; tests that compare to the last bit mean float32 everywhere."""
    monkeypatch.setattr("rlhf.run.precision.bf16_hardware", lambda: None)


@pytest.fixture
def tiny_tokenizer():
    """Byte-level BPE of about 400 entries with ChatML's tokens, no chat template; a fresh one for each test."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def tiny_model(tiny_tokenizer):
    """A Llama of hidden size 32, float32, seeded, for `tiny_tokenizer`'s vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(torch.float32)


def _shared(name: str) -> Path:
    """Return a folder beside the checkout, which is not part of the repository; skip where it is missing."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"nothing at {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """The small inputs that failed once."""
    return _shared("cases")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data."""
    return _shared("data")
