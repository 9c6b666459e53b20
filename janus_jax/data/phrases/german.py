"""German wordings: each function returns every right wording of one meaning."""

from __future__ import annotations

import functools

from babel import dates, numbers
from num2words import num2words

_MONTHS = dates.get_month_names("wide", locale="de")
_DAYS = dates.get_day_names("wide", locale="de")  # 0 is Monday


def count(n: int) -> tuple[str, ...]:
    """`n` inhabitants."""
    return tuple(f"{words} Einwohner" for words in _cardinal(n))


def year(y: int) -> tuple[str, ...]:
    """In the year `y`."""
    return tuple(f"{start}{_year(y)}" for start in ("", "im Jahr "))


def date(day: int, month: int, y: int) -> tuple[str, ...]:
    """On a date."""
    return (f"am {_day(day, month)} {_year(y)}",)


def weekday(day: int, hour: int, minute: int) -> tuple[str, ...]:
    """At a time of the week."""
    return tuple(f"am {_DAYS[day]} um {words}" for words in _time(hour, minute))


def price(currency: str, units: int, cents: int) -> tuple[str, ...]:
    """An amount of money."""
    name = numbers.get_currency_name(currency, count=units, locale="de")
    start = [f"{words} {name}" for words in _cardinal(units)]
    if not cents:
        return tuple(start)
    small = _cardinal(cents)[0]
    return tuple(f"{s}{end}" for s in start for end in (f" und {small} Cent", f" {small}"))


def percent(whole: int, tenth: int) -> tuple[str, ...]:
    """A percentage with one decimal."""
    return (f"{_cardinal(whole)[0]} Komma {_cardinal(tenth)[0]} Prozent",)


def duration(hours: int, minutes: int) -> tuple[str, ...]:
    """A length of time."""
    return (f"{_cardinal(hours)[0]} Stunden und {_cardinal(minutes)[0]} Minuten",)


@functools.cache
def _cardinal(n: int) -> tuple[str, ...]:
    """As a count; a leading "ein" of hundred and thousand may be left out."""
    full = num2words(n, lang="de")
    leading = next((s for s in ("einhundert", "eintausend") if full.startswith(s)), None)
    return (full, full.removeprefix("ein")) if leading else (full,)


@functools.cache
def _ordinal(n: int) -> str:
    return num2words(n, lang="de", to="ordinal")


@functools.cache
def _year(y: int) -> str:
    return num2words(y, lang="de", to="year")


def _day(day: int, month: int) -> str:
    """In the dative, after "am"."""
    return f"{_ordinal(day)}n {_MONTHS[month]}"


def _time(hour: int, minute: int) -> tuple[str, ...]:
    """Times from 6:00 to 21:55: spoken with the part of the day, and on the 24-hour clock."""
    part = "morgens" if hour < 12 else "nachmittags" if hour < 18 else "abends"
    # "ein Uhr", but "Viertel nach eins"
    this, following = (_cardinal((h - 1) % 12 + 1)[0] for h in (hour, hour + 1))
    clock = f"{_cardinal(hour)[0]} Uhr" + (f" {_cardinal(minute)[0]}" if minute else "")
    if minute == 0:
        spoken = f"{this.removesuffix('s') if this == 'eins' else this} Uhr"
    else:
        spoken = f"{_SPOKEN[minute]} {this if minute < 25 else following}"
    return f"{spoken} {part}", clock


_SPOKEN = {
    5: "fünf nach",
    10: "zehn nach",
    15: "Viertel nach",
    20: "zwanzig nach",
    25: "fünf vor halb",
    30: "halb",
    35: "fünf nach halb",
    40: "zwanzig vor",
    45: "Viertel vor",
    50: "zehn vor",
    55: "fünf vor",
}
