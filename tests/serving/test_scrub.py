"""Personal data in kept texts: what the rules take out, and what they leave."""

from __future__ import annotations

import time

import pytest

from rlhf.serving.scrub import is_card, is_iban, scrub, scrubbed


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("mail jo.doe+x@mail.example.co.uk!", "mail [mail]!"),
        ("jürgen@müller.de", "[mail]"),
        ("4111 1111 1111 1111 is Visa's test card", "[card] is Visa's test card"),
        ("3782-822463-10005", "[card]"),
        ("DE89 3704 0044 0532 0130 00", "[account]"),
        ("GB82WEST12345698765432.", "[account]."),
        ("call +49 30 1234567 now", "call [phone] now"),
        ("(030) 123-4567 or 030/1234567", "[phone] or [phone]"),
        ("555-123-4567, 1-800-555-1234, +1 (555) 123-4567", "[phone], [phone], [phone]"),
        ("06 12 34 56 78", "[phone]"),
        ("card 4111 1111 1111 1111 12/27 cvc 123", "card [card] 12/27 cvc 123"),
        ("4111-1111-1111-1111 737", "[card] 737"),
        ("order 7 4111 1111 1111 1111", "order 7 [card]"),
        ("Visa no.4111111111111111 2027", "Visa no.[card] 2027"),
        ("4111\u00a01111\u00a01111\u00a01111, 5555.5555.5555.4444", "[card], [card]"),
        ("4111 1111 1111 1111 5555 5555 5555 4444 1", "[card] [card] 1"),
        ("IBAN DE89 3704 0044 0532 0130 00 BIC COBADEFFXXX", "IBAN [account] BIC COBADEFFXXX"),
        ("DE89370400440532013000 EUR 50", "[account] EUR 50"),
        ("RE24 DE89 3704 0044 0532 0130 00", "RE24 [account]"),
        ("my iban is de89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000", "my iban is [account]"),
        ("(10.0.0.1:80) and 192.168.0.1: refused", "([address]:80) and [address]: refused"),
        ("ip:10.0.0.1 or ::ffff:10.0.0.1", "ip:[address] or [address]"),
        ("call 555-123-4567 24/7", "call [phone]"),
        ("from 192.168.0.1 and 2001:db8::8a2e:370:7334", "from [address] and [address]"),
    ],
)
def test_what_is_taken_out(text, kept):
    assert scrub(text) == kept


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112 fails the Luhn check",
        "7 4111 1111 1111 1112 12/27",
        "2016 2017 2018 2019 2020 2021 2022 2023 2024 2025",
        "in12 hours we meet and then go home by the next train",
        "DE88 3704 0044 0532 0130 00",
        "2024-01-02, 12.03.2024, 2026 11 28",
        "version 1.2.3, 12:30:45, pi 3.14159265358979",
        "order 12345678, 1,000,000,000 and 10 000 000 000",
        "5 6 7 8 9 10 11 12",
        "std::vector<int> x; a :: b",
        "00:1A:2B:3C:4D:5E",
        "a@b and @someone",
        "0000 0000 0000 0000",
    ],
)
def test_what_stays(text):
    assert scrub(text) == text


def test_check_digits():
    """Examples of ISO 7812 and ISO 13616; any changed digit fails."""
    assert is_card("79927398713") is False  # too short for a card
    assert is_card("5555555555554444")
    assert not is_card("5555555555554445")
    assert is_iban("GB29NWBK60161331926819")
    assert not is_iban("GB29NWBK60161331926818")


def test_values_are_scrubbed_everywhere_but_in_keys():
    rows = [{"role": "user", "content": "I am a@b.example", "n": [1, None, "c@d.example"]}]
    assert scrubbed(rows, scrub) == [{"role": "user", "content": "I am [mail]", "n": [1, None, "[mail]"]}]


def test_long_texts_take_no_long_time():
    before = time.process_time()
    for text in (
        "a" * 200_000,
        "1-" * 100_000,
        "1" * 100_000,
        "4111 1111 1111 1112 " * 5_000,
        "a@" * 100_000,
        "a.@b." * 50_000,
        ":" * 100_000,
        "AB12 " + "A1 " * 60_000,
    ):
        scrub(text)
    assert time.process_time() - before < 3
