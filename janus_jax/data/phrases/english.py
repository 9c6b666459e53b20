"""English wordings: each function returns every right wording of one meaning."""

from __future__ import annotations

import functools

from babel import dates, numbers
from num2words import num2words

_MONTHS = dates.get_month_names("wide", locale="en")
_DAYS = dates.get_day_names("wide", locale="en")  # 0 is Monday


def count(n: int) -> tuple[str, ...]:
    """`n` inhabitants."""
    return (f"{_cardinal(n)} inhabitants",)


def year(y: int) -> tuple[str, ...]:
    """In the year `y`."""
    return tuple(f"in {start}{_year(y)}" for start in ("", "the year "))


def date(day: int, month: int, y: int) -> tuple[str, ...]:
    """On a date."""
    return tuple(f"on {words} {_year(y)}" for words in _day(day, month))


def weekday(day: int, hour: int, minute: int) -> tuple[str, ...]:
    """At a time of the week."""
    return tuple(f"on {_DAYS[day]} at {words}" for words in _time(hour, minute))


def price(currency: str, units: int, cents: int) -> tuple[str, ...]:
    """An amount of money."""
    name = numbers.get_currency_name(currency, count=units, locale="en")
    start = f"{_cardinal(units)} {name}"
    if not cents:
        return (start,)
    small = _cardinal(cents)
    return f"{start} and {small} cents", f"{start} {small}"


def percent(whole: int, tenth: int) -> tuple[str, ...]:
    """A percentage with one decimal."""
    return (f"{_cardinal(whole)} point {_cardinal(tenth)} percent",)


def duration(hours: int, minutes: int) -> tuple[str, ...]:
    """A length of time."""
    return (f"{_cardinal(hours)} hours and {_cardinal(minutes)} minutes",)


@functools.cache
def _cardinal(n: int) -> str:
    return num2words(n, lang="en").replace(",", "")


@functools.cache
def _ordinal(n: int) -> str:
    return num2words(n, lang="en", to="ordinal")


@functools.cache
def _year(y: int) -> str:
    return num2words(y, lang="en", to="year")


def _day(day: int, month: int) -> tuple[str, ...]:
    return f"the {_ordinal(day)} of {_MONTHS[month]}", f"{_MONTHS[month]} the {_ordinal(day)}"


def _time(hour: int, minute: int) -> tuple[str, ...]:
    """Times from 6:00 to 21:55: spoken, and read off the clock."""
    part = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
    this, following = (_cardinal((h - 1) % 12 + 1) for h in (hour, hour + 1))
    half = "a.m." if hour < 12 else "p.m."
    if minute == 0:
        return f"{this} o'clock in the {part}", f"{this} {half}"
    clock = f"{this} {'oh ' if minute < 10 else ''}{_cardinal(minute)}"
    if minute <= 30:
        spoken = f"{_FRACTIONS.get(minute) or _cardinal(minute)} past {this}"
    else:
        spoken = f"{_FRACTIONS.get(60 - minute) or _cardinal(60 - minute)} to {following}"
    return f"{spoken} in the {part}", f"{clock} {half}"


_FRACTIONS = {15: "a quarter", 30: "half"}
