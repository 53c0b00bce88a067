"""How many tokens a model has positions for, and one refusal of a row that is longer.

Beyond learned positions a forward fails (GPT-2) at whatever step a row gets that long; beyond those that a rotary model
was made for it goes on, and writes and scores garbage. Sliding windows, ALiBi and recurrent states set no limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf.errors import InputError
from rlhf.models import encoders
from rlhf.models.adapters import base_model

NAMES = ("max_position_embeddings", "max_seq_len")  # transformers maps other names (n_positions) to the first
EXTENDED = ("linear", "yarn")  # the config of a model that they extend may still hold the length before


class Positions(NamedTuple):
    """A model's limit, in tokens of prompt and response together."""

    limit: int
    of: str
    """What has this limit, for an error."""

    def check(self, tokens: int, what: str, remedy: str) -> None:
        """Raise InputError where `what` has more tokens."""
        if tokens > self.limit:
            raise InputError(f"{what} {tokens} tokens, and {self.of} {self.limit}; {remedy}")


def positions_of(model: Any) -> Positions | None:
    """Return a model's limit; None if it has none, or is an encoder without rotary positions, whose text is shortened.

    A rotary type that computes a row by the longest one beside it (longrope) ends at its original length; up to there
    rows are computed alike. (The type "dynamic" does so beyond the limit of its config.)
    """
    plain = base_model(model)
    config = plain.config.get_text_config()
    limit = next((getattr(config, name) for name in NAMES if (getattr(config, name, None) or 0) > 0), None)
    if limit is None or getattr(config, "alibi", False):
        return None
    family = type(plain).__name__
    ropes = getattr(config, "rope_parameters", None) or {}
    if encoders.is_encoder(config) and not ropes:
        return None
    for rope in [rope for rope in (ropes, *ropes.values()) if isinstance(rope, dict)]:
        kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings")
        if kind == "longrope" and original:
            return Positions(min(limit, original), f"{family}'s longrope computes a row alike beside any other up to")
        if kind in EXTENDED:
            limit = max(limit, int((original or limit) * (rope.get("factor") or 1)))
    return Positions(limit, f"{family} has positions for")


def check_responses(
    model: Any, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, name: str = "", ends: int = 0
) -> None:
    """Raise InputError where a prompt and its longest response have more tokens than a model has positions for.

    name: of the model, for the error. ends: tokens that it reads behind such a response, which has no end of turn."""
    positions = positions_of(model)
    if positions is None or not prompt_ids:
        return
    longest = max(map(len, prompt_ids))
    parts = f"the longest prompt ({longest} tokens) and {max_new_tokens=}{', with an end of turn,' * ends}"
    what = f"{name}{': ' * bool(name)}{parts} make"
    positions.check(longest + max_new_tokens + ends, what, "lower max_new_tokens, or leave out such prompts")
