"""Views of one response of a rollout, token by token: for the terminal (rich) and as an HTML page without scripts.

`ResponseView` holds the numbers; all text from models and users is escaped when it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf.rows.messages import Messages
from rlhf.run import page as html

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from rlhf.ppo.rollout import ReadyRollout

End = Literal["", "stop", "cut"]
Sort = Literal["score", "kl", "tokens"]

NUMBERS = {
    "logprob": ("logprobs", "log-probability under the policy that sampled it, nats"),
    "reference": ("reference_logprobs", "log-probability under the reference, nats"),
    "KL": ("kl", "logprob - reference, nats"),
    "entropy": ("entropy", "entropy of the policy's next-token distribution, nats"),
    "value": ("values", "the value model's prediction before this token"),
    "reward": ("rewards", "-kl_coef * KL, plus the score at the last token and step scores at the ends of steps"),
    "advantage": ("advantages", "standardized over the rollout"),
    "return": ("returns", "the target that the value model learns"),
}
"""Column -> (field of the rollout, meaning)."""
SUMMED = ("logprob", "reference", "KL", "reward")
PRIORITY = ("KL", "advantage", "reward", "value", "logprob", "entropy", "return", "reference")
"""What a narrow terminal shows first."""
ONE_SIDED = ("logprob", "reference", "entropy")  # never on both sides of 0


@dataclass(frozen=True)
class Token:
    """One token of a response; `numbers` by column name, None where the rollout lacks a column."""

    position: int
    id: int
    text: str
    numbers: dict[str, float | None]
    end: End
    """On the last token: "stop" if the response stopped by itself, "cut" if it reached max_new_tokens; else ""."""

    @property
    def shown(self) -> str:
        """Return the text as a Python string literal, in which spaces and line breaks are visible."""
        return repr(self.text)


@dataclass(frozen=True)
class ResponseView:
    """One row of a rollout, with everything that is shown of it."""

    update: int
    row: int
    rows: int
    prompt: Messages
    response: str
    score: float
    raw_score: float
    stopped: bool
    tokens: list[Token]
    padding: int

    @property
    def kl_nats(self) -> float:
        """Return the response's KL to the reference: the sum of k1, in nats."""
        return math.fsum(token.numbers["KL"] or 0.0 for token in self.tokens)

    def facts(self) -> list[str]:
        """Return the facts about the whole response as short phrases."""
        return [
            f"score {number(self.score)}",
            f"raw score {number(self.raw_score)}",
            f"KL {number(self.kl_nats)} nats",
            f"{len(self.tokens)} token{'s' * (len(self.tokens) != 1)}",
            "stopped by itself" if self.stopped else "did not stop: cut at the last token",
        ]

    def sums(self) -> dict[str, float | None]:
        """Return the sum over the response's tokens of each column in SUMMED; None where a number is missing."""
        columns = {name: [token.numbers[name] for token in self.tokens] for name in SUMMED}
        return {
            name: None if any(x is None for x in column) else math.fsum(column)  # type: ignore[arg-type]
            for name, column in columns.items()
        }


def response_view(rollout: ReadyRollout, row: int, tokenizer: Any) -> ResponseView:
    """Return row `row` of a rollout for viewing; `tokenizer` turns its ids into text."""
    ids, stopped = rollout.response_ids[row], bool(rollout.stopped[row])
    columns = {name: getattr(rollout, source) for name, (source, _) in NUMBERS.items()}
    last: End = "stop" if stopped else "cut"
    return ResponseView(
        update=rollout.update + 1,
        row=row,
        rows=len(rollout),
        prompt=rollout.prompts[row].messages,
        response=rollout.texts[row],
        score=float(rollout.scores[row]),
        raw_score=float(rollout.raw_scores[row]),
        stopped=stopped,
        tokens=[
            Token(
                position=position,
                id=token,
                text=token_text(tokenizer, token),
                numbers={name: None if x is None else float(x[row, position]) for name, x in columns.items()},
                end=last if position == len(ids) - 1 else "",
            )
            for position, token in enumerate(ids)
        ],
        padding=rollout.mask.shape[1] - len(ids),
    )


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text that one token adds.

    SentencePiece's space mark, which `decode` drops, becomes a space; a token that is part of a character is shown
    under its name in the vocabulary."""
    piece = tokenizer.convert_ids_to_tokens(token)
    text: str = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if isinstance(piece, str) and ("\N{REPLACEMENT CHARACTER}" in text or "\u2581" in piece):
        return piece.replace("\u2581", " ")
    return text


def number(value: float | None) -> str:
    """Format with four decimals; an en dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value) or abs(value) >= 1000:
        return f"{value:.4g}"
    return f"{0.0 if abs(value) < 5e-5 else value:.4f}"  # no -0.0000


def visible(text: str) -> str:
    """Replace control characters by their escapes, so that none reaches a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return `visible` text on one line, with a sign for each line break."""
    return visible(text.replace("\n", "⏎"))


# ---------------------------------------------------------------- terminal


def response_lines(view: ResponseView, width: int = 100) -> Group:
    """Show prompt, response, its facts and the table of its tokens, with as many of its columns as `width` holds."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[Any] = [Text(f"update {view.update}, row {view.row} (rows 0 to {view.rows - 1})", style="bold")]
    for message in view.prompt:
        parts += [Text(message["role"], style="bold cyan"), Padding(Text(visible(message["content"])), (0, 0, 0, 2))]
    parts += [Text("response", style="bold cyan"), Padding(Text(visible(view.response)), (0, 0, 0, 2))]
    parts.append(Text("   ".join(view.facts()) + "\n", style="bold"))
    shown = columns_in(width)
    parts.append(token_table(view, shown))
    if left := [name for name in NUMBERS if name not in shown]:
        parts.append(Text(f"too narrow for {', '.join(left)}", style="dim"))
    if view.padding:
        parts.append(Text(f"{view.padding} padding tokens follow (mask 0, every number 0)", style="dim"))
    return Group(*parts)


def columns_in(width: int) -> list[str]:
    """Return the numbers of a token that fit into so many terminal columns, the most telling ones first chosen."""
    room = (width - 20) // 9  # beside a position, eight letters of the token and the mask
    chosen = PRIORITY if width >= 100 else PRIORITY[: max(1, room)]
    return [name for name in NUMBERS if name in chosen]


def token_table(view: ResponseView, names: Sequence[str] = tuple(NUMBERS)) -> Table:
    """Return the table of a response's tokens, one line each, with these of their numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=0, header_style="bold", show_footer=True)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("token", footer="sum", max_width=24)  # the only column that may shrink: numbers are never cut
    sums = view.sums()
    for name in names:
        footer = number(sums[name]) if name in sums else ""
        table.add_column(name, footer=footer, justify="right", no_wrap=True, min_width=8)
    table.add_column("mask", no_wrap=True, min_width=6)
    for token in view.tokens:
        style = {"stop": "green", "cut": "yellow", "": ""}[token.end]
        cells = [Text(number(token.numbers[name])) for name in names]
        shown = Text(token.shown, no_wrap=True, overflow="ellipsis")
        table.add_row(str(token.position), shown, *cells, f"1 {token.end}".rstrip(), style=style)
    return table


def sorted_rows(rollout: ReadyRollout, sort: Sort | None) -> list[int]:
    """Return row numbers, the highest `sort` number first; None keeps the order in which they were collected."""
    rows = list(range(len(rollout)))
    if sort is None:
        return rows
    keys = {"score": rollout.scores, "kl": rollout.kl.sum(-1), "tokens": rollout.response_tokens}[sort]
    return sorted(rows, key=lambda row: -float(keys[row]))


def rows_table(rollout: ReadyRollout, sort: Sort | None = None, width: int = 100) -> Table:
    """Return a table with a line per response; below 70 columns without the prompt and the less telling numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    order = f", highest {sort} first" if sort else ""
    table = Table(
        title=f"update {rollout.update + 1}: {len(rollout)} responses{order}", title_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold", expand=True, pad_edge=False,
    )  # fmt: skip
    table.add_column("row", justify="right", no_wrap=True)
    texts = ("prompt", "response") if width >= 70 else ("response",)
    numbers = ("score", "raw score", "KL nats", "tokens", "stopped") if width >= 70 else ("score", "KL nats")
    for name in texts:
        table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=1)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted_rows(rollout, sort):
        cells = row_cells(rollout, row)
        shown = [Text(one_line(cells[name][:300])) for name in texts]
        table.add_row(str(row), *shown, *(cells[name] for name in numbers))
    return table


def row_cells(rollout: ReadyRollout, row: int) -> dict[str, str]:
    """Return what a list of responses shows of one, by column."""
    return {
        "prompt": rollout.prompts[row].messages[-1]["content"],
        "response": rollout.texts[row],
        "score": number(float(rollout.scores[row])),
        "raw score": number(float(rollout.raw_scores[row])),
        "KL nats": number(float(rollout.kl[row].sum())),
        "tokens": str(int(rollout.response_tokens[row])),
        "stopped": "yes" if bool(rollout.stopped[row]) else "no",
    }


# ---------------------------------------------------------------- HTML


def response_page(view: ResponseView, title: str, links: Sequence[tuple[str, str]] = ()) -> str:
    """Return the HTML page: the response coloured by one column, chosen by radio buttons, above its token table; links:
    (label, path) of the pages beside it."""
    prompt = "".join(
        f"<dt>{html.text(message['role'])}</dt><dd>{html.text(message['content'])}</dd>" for message in view.prompt
    )
    largest = {name: _largest(view.tokens, name) for name in NUMBERS}
    choices, legends, rules = [], [], []
    for i, (name, (_, meaning)) in enumerate(NUMBERS.items()):
        checked = " checked" if name == "advantage" else ""
        choices.append(f'<input type="radio" name="by" id="by{i}"{checked}><label for="by{i}">{name}</label>')
        scale = "Darker is further from 0" if name in ONE_SIDED else "Blue above 0, orange below"
        scale += f"; the darkest is {number(largest[name])} from 0"
        legends.append(f'<span class="l{i}"><b>{name}</b>: {html.text(meaning)}. {scale}.</span>')
        rules.append(f"#by{i}:checked ~ .response a {{ background: var(--n{i}); }}")
        rules.append(f"#by{i}:checked ~ .legend .l{i} {{ display: inline; }}")
    tokens = "".join(_coloured(token, largest) for token in view.tokens)
    body = (
        f"{html.links(links)}<dl>{prompt}</dl>{html.items(view.facts(), 'facts')}<main>{''.join(choices)}"
        f'<div class="response">{tokens}</div><p class="legend">{"".join(legends)}</p></main>{_html_table(view)}'
    )
    return html.page(title, body, "\n".join([_STYLE, *rules]))


def _largest(tokens: Sequence[Token], name: str) -> float:
    values = [abs(x) for token in tokens if (x := token.numbers[name]) is not None and math.isfinite(x)]
    return max(values, default=0.0)


def _colour(name: str, value: float | None, largest: float) -> str:
    if value is None or not math.isfinite(value) or largest == 0:
        return "transparent"
    rgb = "139 92 246" if name in ONE_SIDED else "59 130 246" if value > 0 else "224 123 46"
    return f"rgb({rgb} / {0.75 * abs(value) / largest:.3f})"


def _coloured(token: Token, largest: dict[str, float]) -> str:
    """Return a token's HTML; hovering shows its numbers, a click leads to its line in the table."""
    colours = ";".join(
        f"--n{i}:{_colour(name, value, largest[name])}" for i, (name, value) in enumerate(token.numbers.items())
    )
    numbers = "  ".join(f"{name} {number(value)}" for name, value in token.numbers.items())
    tip = f"#{token.position} {token.shown}  {numbers}  {token.end}".rstrip()
    text = html.text(visible(token.text)).replace("\n", "⏎\n") or "&#8203;"
    return f'<a href="#t{token.position}" style="{colours}" data-numbers="{html.text(tip)}">{text}</a>'


def _html_table(view: ResponseView) -> str:
    head = "".join(f'<th title="{html.text(meaning)}">{name}</th>' for name, (_, meaning) in NUMBERS.items())
    rows = []
    for token in view.tokens:
        numbers = "".join(f"<td>{number(value)}</td>" for value in token.numbers.values())
        rows.append(
            f'<tr id="t{token.position}"><td>{token.position}</td><td><code>{html.text(token.shown)}</code></td>'
            f"{numbers}<td>1 {token.end}</td></tr>"
        )
    sums = view.sums()
    foot = "".join(f"<td>{number(sums[name]) if name in sums else ''}</td>" for name in NUMBERS)
    more = f'<tr><td></td><td colspan="{len(NUMBERS) + 2}">{view.padding} padding tokens follow (mask 0, every number 0)</td></tr>'  # noqa: E501
    return (
        f"<div class=scroll><table><thead><tr><th>#</th><th>token</th>{head}<th>mask</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody>"
        f"<tfoot><tr><td></td><td>sum</td>{foot}<td></td></tr>{more if view.padding else ''}</tfoot></table></div>"
    )


_STYLE = """
dl { margin: 0; } dt, .legend { color: var(--dim); font-size: .85rem; }
dd { margin: 0 0 .6rem 1rem; } dd, .response { white-space: pre-wrap; overflow-wrap: anywhere; }
.facts { list-style: none; padding: .6rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; }
input { margin: 0 .3rem 0 0; } label { margin-right: 1rem; }
.response { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; margin: .6rem 0; line-height: 2; }
.response a { color: inherit; text-decoration: none; padding: .15rem 0; border-bottom: 1px solid var(--line);
  border-left: 1px solid var(--line); }
.response a:is(:hover, :focus-visible) { outline: 2px solid CanvasText; }
.response a:is(:hover, :focus-visible)::after { content: attr(data-numbers); position: fixed; left: 0; right: 0;
  bottom: 0; padding: .6rem 1.2rem; background: Canvas; border-top: 1px solid var(--line); line-height: 1.5;
  font-variant-numeric: tabular-nums; white-space: pre-wrap; }
.legend { margin: 0 0 1.5rem; } .legend span { display: none; } th[title] { cursor: help; }
:is(th, td):first-child { text-align: right; } :is(th, td):is(:nth-child(2), :last-child) { text-align: left; }
code { white-space: pre; } tfoot td { border: 0; color: var(--dim); }
tr:target { background: var(--soft); outline: 1px solid var(--line); }
"""
