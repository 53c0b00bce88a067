"""Remove personal data from text before it is kept, by a small set of rules.

Found are mail addresses, account numbers (IBAN, by their check digits), payment cards (by the Luhn check), addresses of
machines, and phone numbers that are written as such. Names, streets and dates of birth are not: whoever needs that
gives the server a function of their own (`--scrub file.py:name`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from string import ascii_letters
from typing import Any

Scrub = Callable[[str], str]

_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_IBAN = re.compile(r"(?<!\w)(?=([A-Za-z]{2}\d{2}(?:[ \u00a0]?[A-Za-z0-9]){11,30})(?!\w))")
_NUMBERS = {ord(letter): str(int(letter, 36)) for letter in ascii_letters}
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
_PRINTED = re.compile(r"(?<!\w)(?<![^\W\d]-)(?<!\d\.)(?=(\d{4}(?:[ \u00a0\u202f.-]{0,3}\d){9,15})(?!\w))")
_AS_ON_CARDS = re.compile(  # groups of four digits or more but for the last one, and no list of years
    r"\d{13,19}|\d{4}(?:\.\d{4}){3}|(?!0|1|20|21)\d{4,}(?:[ \u00a0\u202f-]{1,3}\d{4,})*(?:[ \u00a0\u202f-]{1,3}\d+)?"
)
_MACHINE = re.compile(
    r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w)"
    r"|(?<![\w.:])[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7}(?:(?:\.\d{1,3}){3})?(?![\w:])"
)
_PHONE = re.compile(r"(?<![\w.,/-])(?:\+|\(?\d)(?:[ ./()-]{0,2}\d){6,16}(?![\w-])")
_DATE = re.compile(r"\d{4}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./ ]\d{1,2}[-./ ]\d{2,4}")
_NATIONAL = re.compile(
    r"\(?0\d{1,5}\)?[ ./-]|\(\d{2,5}\)[ ./-]?|(?:1[ .-])?\d{3}[ .-]\d{3}[ .-]\d{4}(?!\d)|0\d{8,11}(?!\d)"
)


def scrub(text: str) -> str:
    """Replace what the rules find by its kind in brackets, such as [mail]."""
    text = _MAIL.sub("[mail]", text)
    text = _without(text, _IBAN, _is_account, "[account]")
    text = _CARD.sub(lambda found: "[card]" if is_card(found[0]) else found[0], text)
    text = _without(text, _PRINTED, _is_printed, "[card]")
    text = _MACHINE.sub(lambda found: "[address]" if _is_address(found[0]) else found[0], text)
    return _PHONE.sub(lambda found: "[phone]" if is_phone(found[0]) else found[0], text)


def _without(text: str, pattern: re.Pattern[str], is_one: Callable[[str], bool], kind: str) -> str:
    """Replace what a rule finds among its neighbours: of every place where the pattern's group may begin, the longest
    run of whole words that is one. Groups are short, so that the time grows with the text's length alone."""
    parts, end = list[str](), 0
    for place in pattern.finditer(text):
        ends = [word.end() for word in re.finditer(r"\w+", place[1])] if place.start() >= end else []
        size = next((size for size in reversed(ends) if is_one(place[1][:size])), 0)
        if size:
            parts += [text[end : place.start()], kind]
            end = place.start() + size
    return "".join(parts) + text[end:]


def is_card(text: str) -> bool:
    """Return whether the digits of a text pass the Luhn check, as payment cards' do, and are not all alike."""
    digits = [int(letter) for letter in text if letter.isdecimal()]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Return whether a text passes the check of account numbers (ISO 13616: 1 modulo 97)."""
    letters = "".join(text.split())
    if not 15 <= len(letters) <= 34:
        return False
    return int((letters[4:] + letters[:4]).translate(_NUMBERS)) % 97 == 1


def _is_account(text: str) -> bool:
    return sum(map(str.isdecimal, text)) > 9 and is_iban(text)  # words have fewer digits


def _is_printed(text: str) -> bool:
    return bool(_AS_ON_CARDS.fullmatch(text)) and is_card(text)


def is_phone(text: str) -> bool:
    """Return whether a text is written as a phone number: +49 30 123456, (030) 123456, 030-123456, 555-123-4567."""
    digits = sum(letter.isdecimal() for letter in text)
    if not 7 <= digits <= 15 or _DATE.fullmatch(text):
        return False
    return text.startswith("+") or bool(_NATIONAL.match(text))


def _is_address(text: str) -> bool:
    try:
        return len(text) > 3 and bool(ipaddress.ip_address(text))  # "::" is code
    except ValueError:
        return False


def scrubbed(value: Any, rule: Scrub) -> Any:
    """Apply a rule to every text of a JSON value, but not to the keys of its objects."""
    if isinstance(value, str):
        return rule(value)
    if isinstance(value, list | tuple):
        return [scrubbed(inner, rule) for inner in value]
    if isinstance(value, Mapping):
        return {name: scrubbed(inner, rule) for name, inner in value.items()}
    return value
