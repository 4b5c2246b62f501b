"""How pages write numbers, sizes, times and names: never as Python prints them."""

import math
import re
from collections.abc import Mapping
from datetime import date
from pathlib import PurePosixPath, PureWindowsPath

from sparlow.files import human_bytes

UNKNOWN = "–"
_SNAPSHOT = re.compile(r"models--(.+?)--(.+?)/snapshots/")  # where the hub's cache keeps a model
_LONG = 12  # characters of a checksum that are shown


def model_name(given: str) -> str:
    """A model's name, from what it was opened by: a hub id as it is, of a path its last part.

    >>> model_name("/home/me/models/tiny-llama/")
    'tiny-llama'
    >>> model_name("org/model")
    'org/model'
    """
    cached = _SNAPSHOT.search(given.replace("\\", "/"))
    if cached:
        return f"{cached[1]}/{cached[2]}"
    path = PureWindowsPath(given) if "\\" in given else PurePosixPath(given)
    own = path.name.removesuffix(".gguf") or given
    hub_id = len(path.parts) == 2 and path.parts[0] not in (".", "..", "~", "/") and own == path.name  # noqa: PLR2004 - org/model
    return given if hub_id and "\\" not in given else own


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many digits behind the point: 13.74, 1,234.50, ∞; a dash for what is not known."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """A number in three significant digits."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:  # noqa: PLR2004 - what reads well without a power of ten
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa}·10{raised(int(power))}".replace("-", "−")
    return f"{value:,.{max(2 - math.floor(math.log10(abs(value))), 0)}f}"


def raised(power: int) -> str:
    """An exponent.

    >>> raised(-5)
    '⁻⁵'
    """
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def percent(share: float | None, sign: str = "") -> str:
    """A share in per cent."""
    if share is None or not math.isfinite(share):
        return number(share)
    return f"{100 * share:{sign}.{1 if abs(share) < 1 else 0}f} %".replace("-", "−")


def duration(seconds: float | None) -> str:
    """A time in the units that a reader would take: 0.4 s, 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None or not math.isfinite(seconds):
        return number(seconds)
    if seconds < 10:  # noqa: PLR2004 - a digit
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004 - a minute
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:  # noqa: PLR2004 - an hour
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def day(given: str) -> str:
    """A date as one says it.

    >>> day("2026-11-08")
    '8 November 2026'
    """
    try:
        found = date.fromisoformat(given)
    except ValueError:
        return given
    return f"{found.day} {found:%B %Y}"


def size(count: float | None) -> str:
    """Bytes in the unit that fits; a dash for none, which stands for unknown."""
    return human_bytes(round(count)) if count else UNKNOWN


def plain(value: object) -> str:
    """A value of a record: yes and no, lists by commas, short numbers, the beginning of a checksum."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {plain(one)}" for name, one in value.items()) or UNKNOWN
    if isinstance(value, list | tuple | set):
        return ", ".join(map(plain, value)) or UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else short(value)
    text = "" if value is None else str(value)
    return (f"{text[:_LONG]}…" if re.fullmatch(r"[0-9a-f]{40,}", text) else text) or UNKNOWN


def words(name: str) -> str:
    """The name of a field as words."""
    return name.replace("_", " ")
