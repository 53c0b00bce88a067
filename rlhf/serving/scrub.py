"""Remove personal data from text before it is kept, by a small set of rules.

Found are mail addresses, account numbers (IBAN, by their check digits), payment cards (by the Luhn check), addresses of
machines, and phone numbers that are written as such. Names, streets and dates of birth are not: whoever needs that
gives the server a function of their own (`--scrub file.py:name`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any

Scrub = Callable[[str], str]

_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
_MACHINE = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7})(?![\w:])")
_PHONE = re.compile(r"(?<![\w.,/-])(?:\+|\(?\d)(?:[ ./()-]{0,2}\d){6,16}(?![\w-])")
_DATE = re.compile(r"\d{4}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./ ]\d{1,2}[-./ ]\d{2,4}")
_NATIONAL = re.compile(r"\(?0\d{1,5}\)?[ ./-]|\(\d{2,5}\)[ ./-]?|(?:1[ .-])?\d{3}[ .-]\d{3}[ .-]\d{4}$|0\d{8,11}$")


def scrub(text: str) -> str:
    """Replace what the rules find by its kind in brackets, such as [mail]."""
    text = _MAIL.sub("[mail]", text)
    text = _IBAN.sub(lambda found: "[account]" if is_iban(found[0]) else found[0], text)
    text = _CARD.sub(lambda found: "[card]" if is_card(found[0]) else found[0], text)
    text = _MACHINE.sub(lambda found: "[address]" if _is_address(found[0]) else found[0], text)
    return _PHONE.sub(lambda found: "[phone]" if is_phone(found[0]) else found[0], text)


def is_card(text: str) -> bool:
    """Return whether the digits of a text pass the Luhn check, as payment cards' do, and are not all alike."""
    digits = [int(letter) for letter in text if letter.isdecimal()]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Return whether a text passes the check of account numbers (ISO 13616: 1 modulo 97)."""
    letters = text.replace(" ", "")
    number = "".join(str(int(letter, 36)) for letter in letters[4:] + letters[:4])
    return 15 <= len(letters) <= 34 and int(number) % 97 == 1


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
