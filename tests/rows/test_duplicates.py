"""Near duplicates: the similarity by hand, against a loop over all texts, and what does not count."""

from __future__ import annotations

import random

import pytest

from rlhf.rows.duplicates import NearDuplicates, grams_of, normalised


def test_similarity_by_hand():
    near = NearDuplicates()
    near.add("abcdefg")  # abcde bcdef cdefg
    assert near.nearest("abcdefx") == (2 / 4, "abcdefg")  # abcde bcdef cdefx: two of four
    assert near.nearest("ABC-defg") == (0.0, "")  # "abc defg": other grams
    assert near.nearest("Abcdefg!") == (1.0, "abcdefg")
    assert near.nearest("xyz") == (0.0, "")


def test_case_punctuation_and_white_space_do_not_count():
    assert normalised("  Ｗhat's\tUP,\n Doc?! ") == "what s up doc"
    assert grams_of("Hi!") == {"hi"}
    assert grams_of("...") == {""}


def test_the_index_finds_what_a_loop_over_all_finds():
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["fox", "dog", "cat", "count", "write", "a", "the"], k=6)) for _ in range(60)]
    near = NearDuplicates()
    for text in texts:
        near.add(text)
    for asked in [" ".join(draw.choices(["fox", "dog", "count", "song"], k=5)) for _ in range(20)]:
        own = grams_of(asked)
        best = max(len(own & grams_of(text)) / len(own | grams_of(text)) for text in texts)
        found = near.nearest(asked)
        assert found.similarity == pytest.approx(best)
        own_of_found = grams_of(found.text)
        assert len(own & own_of_found) / len(own | own_of_found) == pytest.approx(best)
