"""Text out of tokens: all pieces together are what decoding at once gives, and nothing of a stop text gets out."""

from __future__ import annotations

import random

from rlhf.serving.text import Decoding, Stops, Writing, overlap


def as_bytes(ids):
    """A tokenizer whose tokens are bytes, so that characters come in up to four parts."""
    return bytes(ids).decode("utf-8", "replace")


def drawn(rng: random.Random) -> list[int]:
    ids = list("".join(rng.choice("ab é€😀\n") for _ in range(rng.randrange(12))).encode())
    if ids and rng.random() < 0.3:
        ids.pop()  # ends within a character
    if rng.random() < 0.2:
        ids.insert(rng.randrange(len(ids) + 1), 0xFF)  # no UTF-8 at all
    return ids


def test_pieces_are_the_whole_text():
    for seed in range(300):
        rng = random.Random(seed)
        ids = drawn(rng)
        decoding = Decoding(as_bytes, [ord("x")])
        given = [decoding.add(i) for i in ids]
        rest = decoding.end(stopped=False)
        assert "".join(given) + rest == as_bytes(ids)
        lazy = Decoding(as_bytes, [ord("x")])
        for i in ids:
            lazy.note(i)
        assert lazy.end(stopped=False) == as_bytes(ids)


def test_no_piece_holds_half_a_character():
    decoding = Decoding(as_bytes)
    assert [decoding.add(i) for i in "€a".encode()] == ["", "", "€", "a"]


def test_white_space_of_the_template_is_no_part_of_an_answer():
    for seed in range(300):
        rng = random.Random(seed)
        ids, before, after = drawn(rng), rng.choice(["", "\n", " ", "\n\n"]), rng.choice(["", "\n", " \n"])
        for stopped in (True, False):
            decoding = Decoding(as_bytes, [], before, after)
            text = "".join(decoding.add(i) for i in ids) + decoding.end(stopped)
            whole = as_bytes(ids)
            expected = (whole.removesuffix(after) if stopped else whole).removeprefix(before)
            assert text == expected, (whole, before, after, stopped)


def test_a_token_looks_like_it_does_after_its_left_neighbour():
    """A SentencePiece decoder drops the first space of what it is given."""
    words = {0: "x", 1: " one", 2: " two"}

    def decode(ids):
        return "".join(words[i] for i in ids).removeprefix(" ")

    decoding = Decoding(decode, [0])
    assert [decoding.add(1), decoding.add(2)] == [" one", " two"]


def test_text_ends_at_the_first_stop():
    for seed in range(500):
        rng = random.Random(seed)
        text = "".join(rng.choice("aab") for _ in range(12))
        stop = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 4)))
        stops, told, cut = Stops([stop]), "", False
        for letter in text:
            piece, cut = stops.add(letter)
            told += piece
            assert stop not in told
            if cut:
                break
        told += "" if cut else stops.end()
        assert (told, cut) == (text.partition(stop)[0], stop in text)


def test_two_stops_and_what_is_held_back():
    stops = Stops(["END", "\n\n"])
    assert stops.add("one E") == ("one ", False)  # may go on to END
    assert stops.add("N") == ("", False)
    assert stops.add("T\n") == ("ENT", False)
    assert stops.add("\nmore") == ("", True)
    assert overlap("abcab", "abd") == 2
    assert overlap("abc", "x") == 0


def test_writing_with_and_without_an_audience():
    ids = list(b"Hello, END of it")
    for at_once in (False, True):
        writing = Writing(Decoding(as_bytes), ["END"], at_once)
        told = ""
        for i in ids:
            text, cut = writing.add(i)
            told += text
            if cut:
                break
        assert told == "Hello, "
    quiet = Writing(Decoding(as_bytes), [], at_once=True)
    assert {quiet.add(i) for i in ids} == {("", False)}
    assert quiet.end(stopped=False) == ("Hello, END of it", False)
