"""Units as users write them ('5GiB', '62.5%', '2s', 0.625) parsed once into bytes, shares and seconds.

`ByteSize` and `Seconds` are pydantic-ready annotated types; plain numbers are bytes and seconds.
"""

import math
import re
from typing import Annotated

from pydantic import BeforeValidator

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def _number_and_unit(text: str, units: dict[str, float] | dict[str, int], example: str) -> float:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or (match[2] and match[2].lower() not in units):
        raise ValueError(f"'{text}' is not a number with a unit of {', '.join(units)} (example: {example})")
    number = float(match[1]) * (units[match[2].lower()] if match[2] else 1)
    if not math.isfinite(number):
        raise ValueError(f"'{text}' is not a finite number")
    return number


def parse_bytes(value: object) -> int:
    """'5GiB' -> 5368709120; an int passes through. Raises ValueError on anything else or a negative size."""
    size = int(_number_and_unit(value, _BYTES, "4GiB")) if isinstance(value, str) else value
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"expected a size such as 4GiB, got {value!r}")
    return size


def parse_seconds(value: object) -> float:
    """'250ms' -> 0.25; a number passes through as seconds. Raises ValueError on anything else."""
    if isinstance(value, str):
        return _number_and_unit(value, _SECONDS, "2s")
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"expected a duration such as 2s, got {value!r}")
    return float(value)


def parse_share(value: object) -> float:
    """'62.5%' or 0.625 -> 0.625. Raises ValueError outside (0, 1]."""
    if isinstance(value, str):
        text = value.strip()
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        share = float(value)
    else:
        raise ValueError(f"expected a share such as 62.5%, got {value!r}")
    if not 0 < share <= 1:
        raise ValueError(f"a share lies in (0%, 100%], got {value!r}")
    return share


ByteSize = Annotated[int, BeforeValidator(parse_bytes)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
Share = Annotated[float, BeforeValidator(parse_share)]


def format_bytes(size: float) -> str:
    """1536 -> '1.5 KiB', for humans."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
