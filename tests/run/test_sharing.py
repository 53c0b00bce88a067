"""Work shared out: in order whatever the shares, copies made once where they are needed and forgotten in time."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from reference.several import playing

from rlhf.run import owner
from rlhf.run.sharing import can_share, remember, share

MADE: list[str] = []
SEEN: list[str | None] = []


class Thing:
    def __init__(self, name: str, inner: Thing | None = None) -> None:
        self.name = name if inner is None else f"{name} of {inner.name}"
        MADE.append(name)
        SEEN.append(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING"))


def thing(name: str, inner: Thing | None = None) -> Thing:
    """A thing that other processes can have."""
    made = Thing(name, inner)
    remember(made, Thing, name, inner)
    return made


def squares(parts: Sequence[int], *needed: Thing) -> list[tuple[int, tuple[str, ...]]]:
    assert parts, "called without a part"
    return [(part * part, tuple(one.name for one in needed)) for part in parts]


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("parts", [0, 1, 2, 4, 7])
def test_the_results_are_in_order(processes: int, parts: int) -> None:
    own = thing("a")
    with playing(processes) as exchanges:
        assert share(squares, range(parts), own) == [(n * n, ("a",)) for n in range(parts)]
        assert exchanges == ([processes] if parts > 1 else [])


def test_copies_are_made_once_and_forgotten_with_the_thing() -> None:
    base = thing("base")
    one, two = thing("one", base), thing("two", base)
    MADE.clear()
    with playing(2):
        share(squares, range(4), one)
        del base  # the others still need theirs for the second
        share(squares, range(4), one, two)
        share(squares, range(4), two)
        assert MADE == ["base", "one", "two"]
        del one  # nor is the first one's copy needed any more
        share(squares, range(4), two)
        assert sorted(kept.name for kept in owner.held.values()) == ["base", "two of base"]


def test_copies_are_never_left_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers leaves a model on every process but the first where this variable, of accelerate's, is true."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    own = thing("a")
    with playing(2):
        share(squares, range(4), own)
    assert SEEN[-2:] == ["true", "false"]
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_what_nobody_remembered_is_worked_on_here() -> None:
    with playing(2) as exchanges:
        assert not can_share(lone := Thing("lone"))
        assert share(squares, range(3), lone) == [(n * n, ("lone",)) for n in range(3)]
        assert exchanges == []


def test_a_process_without_a_part_makes_no_copy() -> None:
    own = thing("a")
    MADE.clear()
    with playing(5):
        assert len(share(squares, range(2), own)) == 2
        assert MADE == ["a"]  # the second process's; they are one here
        owner.held.clear()
    with playing(3):
        MADE.clear()
        share(squares, range(1), own)
        assert MADE == []
