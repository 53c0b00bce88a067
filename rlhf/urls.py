"""Addresses among the settings: http ones are whole, and none holds a password or key, since settings are written into
manifests, logs and reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from rlhf.errors import InputError, hidden, short

_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]{0,30}://", re.IGNORECASE)


class Address(NamedTuple):
    """An http address in parts; `path` has no slash at its end."""

    secure: bool
    host: str
    port: int | None
    path: str


def is_url(text: str) -> bool:
    """Return whether a setting that may also name a folder or a function is a server's address."""
    return text.startswith(("http://", "https://"))


def require_no_secret(value: object, where: str) -> None:
    """Raise InputError for an address with a user, a password or a key in it, also inside lists and mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            require_no_secret(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            require_no_secret(inner, where)
    elif isinstance(value, str) and _ADDRESS.match(value) and (found := _secret_in(value)):
        raise InputError(
            f"{where}: the address holds a {found}, which would be written into manifests and logs; leave it out and "
            "set an environment variable (RLHF_SERVER_TOKEN for a server of ours, HF_TOKEN for the hub)"
        )


def _secret_in(url: str) -> str | None:
    try:
        parts = urlsplit(url.strip())
        parts.port  # noqa: B018  a password with a slash in it ends up where the port is expected
    except ValueError:
        return "user or password" if "@" in url else None
    if "@" in parts.netloc:
        return "user or password"
    return "key" if hidden(url) != url else None


def http_address(url: str, where: str) -> Address:
    """Return the parts of an http or https address. Raises InputError for anything else."""
    require_no_secret(url, where)
    advice = "write http://host:port"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InputError(f"{where}={short(url)!r}: {error}; {advice}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s\x00-\x20\x7f]", url):
        raise InputError(f"{where}={short(url)!r}: {advice}, as the server prints it")
    if parts.query or parts.fragment:
        raise InputError(f"{where}={short(url)!r}: it goes on after the path; {advice}")
    return Address(parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/"))
