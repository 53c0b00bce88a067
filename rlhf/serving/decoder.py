"""The rows of one policy that are decoded together: they join and leave between two steps.

Each row has random numbers of its own, drawn from its seed as `rlhf.sampling` draws them, so that the rows beside it
change an answer by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.models.forward import LOGITS_PER_CHUNK, response_hidden
from rlhf.models.heads import head_weight, logits_function
from rlhf.padding import make_batch, pad
from rlhf.sampling.decode import next_logits
from rlhf.sampling.draw import draw, row_numbers
from rlhf.serving import cache as caches

PREFILL_TOKENS = 4096  # padded prompt tokens in one forward, unless a single prompt has more


@dataclass(frozen=True)
class Drawn:
    """One token of a row: its id, and its log-probability where it was asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place, the likeliest first."""


@dataclass(eq=False)
class Row:
    """One answer that is being written."""

    prompt: list[int]
    """Rows of one request share the list, and its forward."""
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    top: int | None = None
    """How many of the likeliest tokens to tell beside each log-probability; None: no log-probabilities."""
    written: int = 0
    done: bool = False
    numbers: list[float] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """Return the most columns of the cache that it can come to use."""
        return len(self.prompt) + self.max_tokens


class Decoder:
    """A policy's batch of rows. Only one thread may use it.

    most_columns: of the cache, all rows together, padding included.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int, most_rows: int, most_columns: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.most_rows, self.most_columns = most_rows, most_columns
        self.clear()

    def clear(self) -> None:
        """Drop all rows."""
        self.rows: list[Row] = []
        self.cache: Any = None
        self.attention = torch.zeros(0, 0, dtype=torch.long, device=self.model.device)
        self.last = torch.zeros(0, dtype=torch.long, device=self.model.device)  # each row's last token

    def fits(self, row: Row, others: Sequence[Row] = ()) -> bool:
        """Return whether a row may join now, together with others that are about to."""
        rows = [*self.rows, *others, row]
        return len(rows) <= self.most_rows and len(rows) * max(one.columns for one in rows) <= self.most_columns

    @torch.no_grad()
    def admit(self, rows: Sequence[Row]) -> list[tuple[Row, Drawn]]:
        """Read the rows' prompts, draw each one's first token, and let them join."""
        prompts: dict[int, list[int]] = {}  # rows of one request have the same list
        for row in rows:
            prompts[id(row.prompt)] = row.prompt
            numbers = row_numbers([row.seed], row.max_tokens, torch.device("cpu")) if row.temperature else None
            row.numbers = [] if numbers is None else numbers[0].tolist()
        place = {key: n for n, key in enumerate(prompts)}
        cache: Any = DynamicCache(config=self.model.config)
        ids, mask = pad(list(prompts.values()), self.pad_id, self.model.device, side="left")
        attention = mask.long()
        logits = next_logits(self.model, ids, attention, (attention.cumsum(-1) - 1).clamp(min=0), cache)
        chosen = torch.tensor([place[id(row.prompt)] for row in rows], device=ids.device)
        caches.keep(cache, chosen, 0)
        drawn, tokens = self._draw(logits[chosen], rows)
        self._join(list(rows), cache, attention[chosen], tokens)
        return list(zip(rows, drawn, strict=True))

    @torch.no_grad()
    def step(self) -> list[tuple[Row, Drawn]]:
        """Draw the next token of every row."""
        self.attention = torch.cat([self.attention, self.attention.new_ones(len(self.rows), 1)], dim=1)
        positions = self.attention.sum(-1, keepdim=True) - 1
        logits = next_logits(self.model, self.last[:, None], self.attention, positions, self.cache)
        drawn, self.last = self._draw(logits, self.rows)
        return list(zip(self.rows, drawn, strict=True))

    def leave(self) -> None:
        """Let the rows leave that are done."""
        stay = [place for place, row in enumerate(self.rows) if not row.done]
        if len(stay) == len(self.rows):
            return
        if not stay:
            self.clear()
            return
        kept = torch.tensor(stay, device=self.last.device)
        attention = self.attention[kept]
        cut = attention.shape[1] - int(attention.sum(-1).max())  # columns in which no row has a token any more
        caches.keep(self.cache, kept, cut)
        self.rows, self.attention, self.last = [self.rows[n] for n in stay], attention[:, cut:], self.last[kept]

    def _join(self, rows: list[Row], cache: Any, attention: Int[Tensor, "B S"], tokens: Int[Tensor, "B"]) -> None:
        if not self.rows:
            self.rows, self.cache, self.attention, self.last = rows, cache, attention, tokens
            return
        columns = max(self.attention.shape[1], attention.shape[1])
        caches.join(self.cache, cache, columns)
        masks = [torch.nn.functional.pad(mask, (columns - mask.shape[1], 0)) for mask in (self.attention, attention)]
        self.attention, self.last = torch.cat(masks), torch.cat([self.last, tokens])
        self.rows = [*self.rows, *rows]

    def _draw(self, logits: Float[Tensor, "B V"], rows: Sequence[Row]) -> tuple[list[Drawn], Int[Tensor, "B"]]:
        tokens = next_tokens(logits, rows)
        ids: list[int] = tokens.tolist()
        drawn = [Drawn(token) for token in ids]
        asking = [place for place, row in enumerate(rows) if row.top is not None]
        if asking:
            at = torch.tensor(asking, device=logits.device)
            scored = scored_tokens(logits[at], tokens[at], max(rows[n].top or 0 for n in asking))
            for place, token in zip(asking, scored, strict=True):
                drawn[place] = Drawn(token.id, token.logprob, token.top[: rows[place].top])
        for row in rows:
            row.written += 1
        return drawn, tokens


def next_tokens(logits: Float[Tensor, "B V"], rows: Sequence[Row]) -> Int[Tensor, "B"]:
    """Choose each row's next token: drawn by its next number, at its temperature and top_p; the likeliest at 0."""
    greedy = logits.argmax(-1)
    if not any(row.temperature for row in rows):
        return greedy
    device, exact = logits.device, torch.float32 if logits.device.type == "mps" else torch.float64
    temperature = torch.tensor([row.temperature for row in rows], device=device)
    numbers = torch.tensor([row.numbers[row.written] if row.numbers else 0.0 for row in rows], dtype=exact)
    scaled = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    probabilities = scaled.softmax(-1, dtype=torch.float32)
    if any(row.top_p < 1 for row in rows):
        share = torch.tensor([row.top_p if row.top_p < 1 else 2.0 for row in rows], device=device)
        probabilities = nucleus(probabilities, share)
    return torch.where(temperature > 0, draw(probabilities, numbers.to(device)), greedy)


def nucleus(probabilities: Float[Tensor, "B V"], share: Float[Tensor, "B"]) -> Float[Tensor, "B V"]:
    """Set to 0 all but the fewest tokens that have at least this share of the probability together (Holtzman 2020)."""
    ordered, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < share[:, None], ordered, 0.0)
    kept[:, 0] = ordered[:, 0]
    return torch.zeros_like(probabilities).scatter_(-1, order, kept)


def scored_tokens(logits: Float[Tensor, "B V"], tokens: Int[Tensor, "B"], top: int) -> list[Drawn]:
    """Return the tokens with their log-probabilities (temperature 1, whole softmax), and the `top` likeliest."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    likely, ids = (part.tolist() for part in logprobs.topk(min(top, logprobs.shape[-1]), -1))
    return [
        Drawn(token, logprob, tuple(zip(names, values, strict=True)))
        for token, logprob, names, values in zip(tokens.tolist(), own, ids, likely, strict=True)
    ]


@torch.no_grad()
def scored_prompts(model: PreTrainedModel, prompts: Sequence[list[int]], pad_id: int, top: int) -> list[list[Drawn]]:
    """Return the tokens of each prompt but its first, with their log-probabilities, in one forward."""
    several = [prompt for prompt in prompts if len(prompt) > 1]
    if not several:
        return [[] for _ in prompts]
    batch = make_batch([prompt[:1] for prompt in several], [prompt[1:] for prompt in several], pad_id, model.device)
    hidden = response_hidden(model, batch)[batch.mask]
    weight, after = head_weight(model), logits_function(model)
    chunk = max(1, LOGITS_PER_CHUNK.get(weight.device.type, 2**26) // weight.shape[0])
    targets, scored = batch.targets[batch.mask], []
    for start in range(0, len(targets), chunk):
        logits = hidden[start : start + chunk].to(weight.dtype) @ weight.T
        scored += scored_tokens(logits if after is None else after(logits), targets[start : start + chunk], top)
    found, rows = iter(scored), []
    for prompt in prompts:
        rows.append([next(found) for _ in prompt[1:]])
    return rows
