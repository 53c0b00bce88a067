"""Small files that hold one JSON object, whole or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.errors import InputError, reason


def read_object(path: str | Path, missing: str = "check the path", kind: str = "JSON object") -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises InputError for a file that is missing (with the advice `missing`), unreadable, cut short or no such `kind`.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {missing}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read, broken JSON: {reason(error)}; it was cut short or changed") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: is no {kind}: it holds a {type(content).__name__} instead of a JSON object")
    return content
