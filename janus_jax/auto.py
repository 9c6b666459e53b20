"""`--decode=auto`: the fastest way to decode, on the machine at hand, that keeps the quality asked for.

Every way is tried once on dev sentences of the run: BLEU, and the time without compiling, of a whole batch
and of a sentence at a time.  What was found is kept in <workdir>/auto.json by checkpoint, machine and
decoding options, so that the next start only reads it; delete the file to measure anew.

Room: shell [disk, clock].
"""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from janus_jax import mesh, report, score, ways
from janus_jax.data.lines import DataError
from janus_jax.data.sources import open_split
from janus_jax.generate import with_options
from janus_jax.prepare import bring_data
from janus_jax.run import Run
from janus_jax.translator import Translator

FILE = "auto.json"
KEEP = 0.98
SENTENCES, ALONE = 200, 32  # dev sentences decoded in batches, and of them one at a time


@dataclass(frozen=True)
class Measured:
    """One way to decode, and what it gave here."""

    decode: str
    options: dict[str, Any] = field(default_factory=dict)
    bleu: float = 0.0  # on dev sentences
    sentences_per_s: float = 0.0  # in batches
    alone_per_s: float = 0.0  # one sentence at a time

    @property
    def name(self) -> str:
        """`nar iterations=4 candidates=3`."""
        return " ".join((self.decode, *(f"{k}={v}" for k, v in self.options.items())))

    def speed(self, batch_size: int | None) -> float:
        """Sentences a second at (about) this batch size."""
        return self.alone_per_s if batch_size == 1 else self.sentences_per_s


WAYS = (
    ways.nar(1, 1),
    ways.nar(2, rescore=True),
    ways.nar(4, 1),
    ways.nar(4, rescore=True),
    ways.nar(10, rescore=True),
    ways.nar(10, 7, rescore=True),
    ways.TOLERANT,
    ways.STRICT,
    ways.GREEDY,
    ways.BEAM,
)
# Instead of the re-scored ones, where there is no AR side to score by.
WITHOUT_AR = (ways.nar(4), ways.nar(10), ways.nar(10, 7))


def choose(
    opened: Run,
    translator: Translator,
    keep: float = KEEP,
    batch_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Measured:
    """The fastest way with at least `keep` of the best BLEU; measures first where that was not done yet.

    Args:
      opened: the run, whose dev split is decoded.
      translator: its model.
      keep: the share of the best way's dev BLEU that is asked for, in (0, 1].
      batch_size: of the decoding to come; 1 means that latency counts.
      options: of the section `decode`, in place of the run's, for every way that does not set them itself.

    Raises:
      data.DataError: the run has no prepared dev split here.
      translator.DecodeError: an option with an unusable value.
    """
    console = Console(stderr=True)
    given = dict(options or {})
    here = _here(translator, given)
    kept = _read(opened)
    if here not in kept:
        kept[here] = [asdict(way) for way in measure(opened, translator, console, given)]
        try:
            report.write_json(opened.folder / FILE, kept)
        except OSError as error:  # a run that others own can be decoded all the same
            told = f"auto: the measurement is not kept: {opened.folder / FILE}: {error.strerror or error}"
            console.print(told, markup=False, highlight=False, soft_wrap=True)
    found = [Measured(**one) for one in kept[here]]
    chosen = pick(found, keep, batch_size)
    best = max(found, key=lambda one: one.bleu)
    times = chosen.speed(batch_size) / max(best.speed(batch_size), 1e-9)
    console.print(
        f"auto: {chosen.name}: dev BLEU {chosen.bleu:.2f} ({best.bleu:.2f} with {best.name}), "
        f"{times:.2f} times as fast",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return chosen


def pick(found: list[Measured], keep: float, batch_size: int | None = None) -> Measured:
    """The fastest of `found` with at least `keep` of the best BLEU among them."""
    enough = keep * max(one.bleu for one in found)
    return max((one for one in found if one.bleu >= enough), key=lambda one: one.speed(batch_size))


def measure(
    opened: Run, translator: Translator, console: Console, given: Mapping[str, Any]
) -> list[Measured]:
    """What each way that the model has gives on dev sentences, here and now, with the options `given`."""
    try:
        bring_data(opened.config, opened.folder)
        pairs = open_split(opened.config.data, opened.data_folder, opened.config.data.dev_split)
    except DataError as error:
        told = (
            "--decode=auto measures on dev sentences of the run, which are not there; name a mode instead, or"
        )
        raise DataError(f"{told} bring them: {error}") from error
    count = min(SENTENCES, len(pairs))
    sources = [source for source, _ in itertools.islice(pairs, count)]
    references = [pairs.references(i) for i in range(count)]
    known, measured = tried(translator.modes), []
    with report.progress(len(known), "auto: measuring", unit="way", console=console) as progress:
        for way in known:
            options = {**given, **way.options}
            translator.decode(sources, way.decode, **options)  # compiles
            found, took = translator.decode(sources, way.decode, **options)
            translator.decode(sources[:ALONE], way.decode, batch_size=1, **options)
            _, alone = translator.decode(sources[:ALONE], way.decode, batch_size=1, **options)
            bleu = score.score([best.text for best, *_ in found], references).bleu
            rates = took.speed()["sentences_per_s"], alone.speed()["sentences_per_s"]
            measured.append(Measured(way.decode, dict(way.options), bleu, *rates))
            progress.advance(way=way.label)
    return measured


def tried(modes: Sequence[str]) -> list[ways.Way]:
    """The ways that a model with these modes has."""
    every = WAYS if "ar" in modes else (*WAYS, *WITHOUT_AR)
    return [way for way in every if way.sides <= set(modes)]


def _here(translator: Translator, given: Mapping[str, Any]) -> str:
    """What a measurement holds for: parameters, dev split, machine, options that no way sets."""
    machine = f"{os.cpu_count()} x {platform.machine()}"
    devices = f"{translator.devices} x {mesh.device_kind()}"
    set_by_ways = {name for way in (*WAYS, *WITHOUT_AR) for name in way.options}
    options = asdict(with_options(translator.config.decode, **given))
    left = " ".join(f"{name}={options[name]}" for name in sorted(options.keys() - set_by_ways))
    dev = translator.config.data.dev_split
    return f"{translator.name}, {dev}, {devices}, {machine}, jax {report.versions()['jax']}, {left}"


def _read(opened: Run) -> dict[str, Any]:
    """What is kept; nothing where the file is missing or damaged, as it can be made anew."""
    try:
        found = json.loads((opened.folder / FILE).read_text(encoding="utf-8"))
        return {name: kept for name, kept in found.items() if [Measured(**one) for one in kept]}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
