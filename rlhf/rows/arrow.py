"""Rows of Arrow's tables (Parquet, Arrow files, `datasets` objects) as JSON would hold them.

A table holds times, decimals, bytes and datasets' Json in types of its own: they become text, or what the JSON says.
All objects of a column have the same keys there, with null for those that a row's own object lacks. In a call's
arguments, a tool's schema or the template's settings such a null would be trained or change the prompt: it is left out.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

_OF_ITS_OWN = ("tools", "tool_calls", "function_call", "chat_template_kwargs")
"""Fields whose objects have other keys in every row."""

_WRITTEN = (date, time, timedelta, Decimal, UUID)


def row_reader(schema: Any, decoded: bool = False) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return what reads a row of a table with this Arrow schema (None: unknown). decoded: its Json is read already."""
    import pyarrow

    where = _where_json(pyarrow.struct(list(schema or ())))
    return lambda row: _as_json(row, where, decoded, filled=False)


def _where_json(kind: Any) -> Any:
    """Return where an Arrow type holds datasets' Json: True (it is one), {key: where}, [where], or None (nowhere)."""
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return True
    if isinstance(kind, pyarrow.StructType):
        return {field.name: where for field in kind if (where := _where_json(field.type))} or None
    where = _where_json(getattr(kind, "value_type", None)) if kind is not None else None
    return [where] if where else None


def _as_json(value: Any, where: Any, decoded: bool, filled: bool) -> Any:
    """Return a value of a table. filled: nulls in its objects stand for keys that are not there."""
    if where is True:
        return value if decoded else _loaded(value)
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        inner = where if isinstance(where, dict) else {}
        return {
            key: _as_json(item, inner.get(key), decoded, filled or key in _OF_ITS_OWN)
            for key, item in value.items()
            if item is not None or not filled
        }
    if isinstance(value, list | tuple):
        return [_as_json(item, where[0] if where else None, decoded, filled) for item in value]
    if isinstance(value, bytes):
        return _text(value)
    return str(value) if isinstance(value, _WRITTEN) else value


def _loaded(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _text(value: bytes) -> str:
    """Return bytes as the UTF-8 text that they are, else in base64."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()
