"""The embedded data set: wordings of numbers, dates, times and amounts.

A meaning, say (weekday, Monday, 18:30), has one or more right wordings in every language:

  en  on Monday at half past six in the evening
      on Monday at six thirty p.m.
  de  am Montag um halb sieben abends
      am Montag um achtzehn Uhr dreißig
  ro  luni la ora șase și jumătate seara
      luni la ora optsprezece și treizeci

A pair is one wording in each of two languages.  That a source has several right targets, all of them
known, is what makes the set a small model of what is hard for non-autoregressive generation.

`generate` is deterministic; train, valid and test share no meaning, hence no source.  Words
that nothing else could teach (twelve inhabitants) stay in train.

Room: pure.  One module per language, each with one function per kind of meaning.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

from janus_jax.data.lines import DataError
from janus_jax.data.phrases import english, german, romanian

LANGUAGES = {"de": german, "en": english, "ro": romanian}
SPLITS = ("train", "valid", "test")
TRAIN_PAIRS = 12_000
HELD_OUT_PAIRS = 500  # of valid, and of test
GRAMMAR = 2  # rises whenever `generate` gives other text

_SEED = 20_220_712
_DRAWS_PER_PAIR = 30  # draws before `generate` gives up on finding pairs that are new
_CURRENCIES = ("EUR", "USD", "CHF")
_HOURS = (*range(6, 12), *range(13, 22))  # no noon and no night, whose names differ too much
_DAYS_OF_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

Value = tuple[int | str, ...]
Record = tuple[str, str, tuple[str, ...]]  # source, target, all right targets


@dataclass(frozen=True)
class _Kind:
    """A kind of meaning: the function of that name in each language words it."""

    name: str
    weight: int  # share of the pairs, in percent
    draw: Callable[[random.Random], Value]
    holdable: Callable[[Value], bool] = lambda value: True  # may a test ask for it unseen?


def _count(rng: random.Random) -> Value:
    digits = rng.randint(1, 4)
    return (rng.choice([n for n in _thousand(rng, digits) if n % 100 != 1]),)  # "one inhabitant" is singular


def _thousand(rng: random.Random, digits: int) -> range:
    """A window of numbers with that many digits: choosing in it is choosing among all of them."""
    low, high = max(2, 10 ** (digits - 1)), 10**digits
    start = rng.randrange(low, high)
    return range(start, min(start + 3, high))


def _date(rng: random.Random) -> Value:
    month = rng.randint(1, 12)
    return rng.randint(1, _DAYS_OF_MONTH[month - 1]), month, rng.randint(1900, 2049)


def _time(rng: random.Random) -> Value:
    return rng.choice(_HOURS), rng.randrange(0, 60, 5)


def _price(rng: random.Random) -> Value:
    """Whole amounts below 1000, and amounts with cents below 100; the franc has none here."""
    currency = rng.choice(_CURRENCIES)
    if currency != "CHF" and rng.random() < 0.7:
        return currency, rng.randint(2, 99), rng.randrange(5, 100, 5)
    return currency, rng.choice([n for n in range(2, 1000) if n % 100 != 1]), 0


_KINDS = (
    _Kind("count", 20, _count, lambda v: int(v[0]) > 99),
    _Kind("year", 12, lambda rng: (rng.randint(1100, 2049),), lambda v: int(v[0]) % 100 > 0),
    _Kind("date", 15, _date),
    _Kind("weekday", 25, lambda rng: (rng.randrange(7), *_time(rng))),
    _Kind("price", 10, _price),
    _Kind("percent", 5, lambda rng: (rng.randint(2, 99), rng.randint(1, 9)), lambda v: int(v[0]) > 20),
    _Kind("duration", 8, lambda rng: (rng.randint(2, 30), rng.randrange(5, 60, 5)), lambda v: int(v[0]) > 20),
)


@functools.lru_cache(maxsize=2)
def generate(source: str, target: str, size: int) -> dict[str, tuple[Record, ...]]:
    """The records of all splits.

    Args:
      source: language of the sources, one of `LANGUAGES`.
      target: language of the targets, another one.
      size: pairs in train; valid and test have `HELD_OUT_PAIRS`, each with a source of its own.

    Returns:
      {split: records}.  In train a source may occur with several of its targets, no pair occurs twice.

    Raises:
      DataError: the grammar has fewer pairs than `size`.
    """
    rng = random.Random(_SEED)
    held_out: dict[tuple[str, Value], Record] = {}
    while len(held_out) < 2 * HELD_OUT_PAIRS:
        kind, value = _draw(rng)
        if kind.holdable(value) and (kind.name, value) not in held_out:
            held_out[kind.name, value] = _record(rng, source, target, kind, value)
    train: dict[Record, None] = {}
    for _ in range(size * _DRAWS_PER_PAIR):
        if len(train) == size:
            break
        kind, value = _draw(rng)
        if (kind.name, value) not in held_out:
            train[_record(rng, source, target, kind, value)] = None
    if len(train) < size:
        raise DataError(f"data.size = {size} is too large for phrases: set it to {len(train)} or less")
    records = tuple(held_out.values())
    return {"train": tuple(train), "valid": records[:HELD_OUT_PAIRS], "test": records[HELD_OUT_PAIRS:]}


def _draw(rng: random.Random) -> tuple[_Kind, Value]:
    kind = rng.choices(_KINDS, [k.weight for k in _KINDS])[0]
    return kind, kind.draw(rng)


def _record(rng: random.Random, source: str, target: str, kind: _Kind, value: Value) -> Record:
    targets = _wordings(target, kind.name, value)
    return rng.choice(_wordings(source, kind.name, value)), rng.choice(targets), targets


def _wordings(language: str, kind: str, value: Value) -> tuple[str, ...]:
    """All right wordings of a meaning, without repetition."""
    return tuple(dict.fromkeys(getattr(LANGUAGES[language], kind)(*value)))
