"""Romanian wordings: each function returns every right wording of one meaning."""

from __future__ import annotations

import functools

from babel import dates, numbers
from num2words import num2words

_MONTHS = dates.get_month_names("wide", locale="ro")
_DAYS = dates.get_day_names("wide", locale="ro")  # 0 is Monday


def count(n: int) -> tuple[str, ...]:
    """`n` inhabitants."""
    return (f"{_counted(n, 'locuitori')}",)


def year(y: int) -> tuple[str, ...]:
    """In the year `y`."""
    return tuple(f"în {start}{_cardinal(y)}" for start in ("", "anul "))


def date(day: int, month: int, y: int) -> tuple[str, ...]:
    """On a date."""
    return tuple(f"pe {words} {_cardinal(y)}" for words in _day(day, month))


def weekday(day: int, hour: int, minute: int) -> tuple[str, ...]:
    """At a time of the week."""
    return tuple(f"{_DAYS[day]} la ora {words}" for words in _time(hour, minute))


def price(currency: str, units: int, cents: int) -> tuple[str, ...]:
    """An amount of money."""
    amount = _counted(units, numbers.get_currency_name(currency, count=units, locale="ro"))
    return (f"{amount} și {_counted(cents, 'cenți')}" if cents else amount,)


def percent(whole: int, tenth: int) -> tuple[str, ...]:
    """A percentage with one decimal."""
    return (f"{_cardinal(whole)} virgulă {_cardinal(tenth)} la sută",)


def duration(hours: int, minutes: int) -> tuple[str, ...]:
    """A length of time."""
    return (f"{_counted(hours, 'ore', True)} și {_counted(minutes, 'minute', True)}",)


@functools.cache
def _cardinal(n: int, feminine: bool = False) -> str:
    words = num2words(n, lang="ro")
    if not feminine:
        return words
    head, _, last = words.rpartition(" ")
    last = {"unu": "una", "doi": "două", "doisprezece": "douăsprezece"}.get(last, last)
    return f"{head} {last}".strip()


def _counted(n: int, noun: str, feminine: bool = False) -> str:
    """`n` things in the plural: "de" follows a number whose last two digits are not 1 to 19."""
    return f"{_cardinal(n, feminine)} {'' if 1 <= n % 100 <= 19 else 'de '}{noun}"


def _day(day: int, month: int) -> tuple[str, ...]:
    words = (_cardinal(day),) if day > 1 else ("întâi", "unu")
    return tuple(f"{w} {_MONTHS[month]}" for w in words)


def _time(hour: int, minute: int) -> tuple[str, ...]:
    """Times from 6:00 to 21:55: spoken with the part of the day, and on the 24-hour clock."""
    part = "dimineața" if hour < 12 else "după-amiaza" if hour < 18 else "seara"
    # An hour "one" is masculine, the other hours are feminine.
    this, following = (_cardinal(h, feminine=h > 1) for h in ((hour - 1) % 12 + 1, hour % 12 + 1))
    clock = _cardinal(hour, feminine=True) + (f" și {_cardinal(minute)}" if minute else "")
    if minute == 0:
        spoken = this
    elif minute <= 30:
        spoken = f"{this} și {_FRACTIONS.get(minute) or _cardinal(minute)}"
    else:
        spoken = f"{following} fără {_FRACTIONS.get(60 - minute) or _cardinal(60 - minute)}"
    return f"{spoken} {part}", clock


_FRACTIONS = {15: "un sfert", 30: "jumătate"}
