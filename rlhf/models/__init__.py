"""Language models as this library uses them: loaded from a folder or hub id, with or without an adapter.

`loading` reads policies and tokenizers; `scalar` holds reward models and their score normaliser, `encoders` the
special rules for encoder trunks; both read files through `pretrained`, which refuses what is not whole, and
`adapter_check`, which refuses adapters that no stage could compute exactly. `adapters` holds the switching and sharing
of LoRA adapters, `heads` the language head, `head_outputs` a scalar head at every position, `packing` rows without
padding, `torch_flash` torch's own flash attention for them, `forward` the forward pass over prompts with responses, and
`logprobs` log-probabilities from hidden states, computed one chunk of logits at a time.
"""

from rlhf.moved import names_in

__getattr__ = names_in(
    "rlhf.models.loading",
    "rlhf.models.scalar",
    "rlhf.models.adapters",
    only=("load_policy", "load_tokenizer", "load_scalar_model", "new_scalar_model", "ScoreNormalizer", "score_head"),
)
