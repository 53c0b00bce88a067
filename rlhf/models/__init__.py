"""Language models as this library uses them: loaded from a folder or hub id, with an adapter or without.

`loading` reads policies and tokenizers, `scalar` reward models and their score normaliser, `encoders` what is
particular to encoder trunks, `adapters` everything about LoRA adapters (switching, sharing a base), `heads` the
language head, and `logprobs` log-probabilities from hidden states, a chunk of logits at a time.
"""

from rlhf.moved import names_in

__getattr__ = names_in(
    "rlhf.models.loading",
    "rlhf.models.scalar",
    "rlhf.models.adapters",
    only=("load_policy", "load_tokenizer", "load_scalar_model", "new_scalar_model", "ScoreNormalizer", "score_head"),
)
