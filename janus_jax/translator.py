"""Lines of text in, lines of text out: tokenise, bucket, decode in few shapes, put back in order.

    from janus_jax import Translator
    translate = Translator.from_run("runs/m30k")
    translate(["Ein Hund rennt über die Wiese."], decode="nar", iterations=4)

One line comes back for each line given, always and in order; the result of a line does not depend on
the others.  A blank line yields an empty one without troubling the model; a line longer than the
model was trained for is cut, and said so in `Report.cut`.

Room: composes run [disk] and engine [devices]; used by the shells.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from janus_jax import losses, processes, run
from janus_jax.config import Config, ConfigError, DecodeConfig, LossConfig, ModelConfig, from_dict
from janus_jax.engine import Engine, Report, Written, span
from janus_jax.generate import EMPTY, Generator, with_options
from janus_jax.models import init_params
from janus_jax.text import Vocabulary, clean_line
from janus_jax.ways import SIDES

MODES = tuple(SIDES)
WIDTH = {"ar": "beam", "nar": "candidates", "draft": ""}  # the option that says how many it writes
PARTIAL = 8  # a batch that is not full is padded to 1/8, 1/64, .. of the rows, so that shapes stay few

AHEAD = 1  # batches that the devices have while the host reads one


class DecodeError(ValueError):
    """A request that this model cannot serve; the message says why and what it can do."""


@dataclass(frozen=True)
class Hypothesis:
    """One output for one line."""

    text: str
    score: float  # AR: sum of log p / length ** penalty; NAR: mean log p (or the AR score, if re-scored)
    tokens: int  # generated, EOS not counted


@dataclass(frozen=True)
class Pass:
    """One pass of a refinement: what each slot holds after it."""

    tokens: list[str]
    confidence: list[float]  # probability when it was filled
    filled: list[bool]  # whether this pass filled the slot


class Translator:
    """A trained model ready to decode; compiled once per shape and kept."""

    def __init__(self, params: Any, config: Config, vocabulary: Vocabulary, *, name: str = "") -> None:
        """Lays `params` on all devices.  `name` says what they are, for reports."""
        self.config, self.vocabulary, self.name = config, vocabulary, name
        self._engine = Engine(params, config)

    @classmethod
    def from_run(cls, workdir: str | os.PathLike[str], checkpoint: str = "best") -> Translator:
        """The model of a run directory.

        Args:
          workdir: the folder that `janus-jax train` wrote.
          checkpoint: best | latest | a step | average:N.

        Raises:
          run.RunError: no run directory, another vocabulary, or a checkpoint of another model.
          text.VocabularyError: the vocabulary cannot be read.
          checkpoint.NoCheckpointError, checkpoint.CheckpointError: no such checkpoint, or a damaged one.
        """
        opened = run.open_run(workdir)
        vocabulary = opened.vocabulary()
        params, name = opened.params(checkpoint)
        check_params(params, opened.config.model, opened)
        return cls(params, opened.config, vocabulary, name=name)

    @property
    def params(self) -> Any:
        """The parameters as decoding reads them (`models.apart`), on the devices."""
        return self._engine.params

    @property
    def devices(self) -> int:
        """How many devices share the work."""
        return self._engine.devices

    def set_params(self, params: Any) -> None:
        """Other parameters of the same model; what is compiled stays."""
        self._engine.set_params(params)

    @property
    def modes(self) -> tuple[str, ...]:
        """What this model was trained for: "ar", "nar", or both and with them "draft"."""
        return modes_of(self.config.loss)

    def options(self, decode: str, *, nbest: int = 1, **options: Any) -> DecodeConfig:
        """What decoding would go by: the run's `decode` section with `options` in place of its own.

        Where the model has no AR side, the run's `decode.rescore` counts for nothing.

        Raises:
          DecodeError: a mode that this model was not trained for, an option that does not exist or has
            an unusable value, rescore asked of a model without an AR side, or nbest beyond what there is.
        """
        if decode not in MODES:
            raise DecodeError(f"decode must be one of {', '.join(MODES)}, got {decode!r}")
        if decode not in self.modes:
            raise DecodeError(
                f"this model was trained with objective {self.config.loss.objective!r} and decodes "
                f"{self.modes[0]} only; train with loss.objective = janus for both"
            )
        try:
            effective = _checked(with_options(self.config.decode, **options))
        except ConfigError as error:
            raise DecodeError("; ".join(line.strip() for line in str(error).splitlines()[1:])) from error
        except ValueError as error:
            raise DecodeError(str(error)) from error
        if effective.rescore and "ar" not in self.modes:
            if "rescore" in options:
                raise DecodeError(
                    f"rescore needs a model that decodes ar, and this one was trained with objective "
                    f"{self.config.loss.objective!r}; leave it out, or train with loss.objective = janus"
                )
            effective = dataclasses.replace(effective, rescore=False)  # its AR side was never trained
        if not 1 <= nbest <= _width(decode, effective):
            name = WIDTH[decode]
            needs = f"{name} of at least that; it is {getattr(effective, name)}" if name else "another mode"
            raise DecodeError(f"nbest = {nbest} needs {needs}")
        return effective

    def __call__(self, lines: Sequence[str], decode: str = "ar", **options: Any) -> list[str]:
        """The translation of each line; see `decode` for the options."""
        return [found[0].text for found in self.decode(lines, decode, **options)[0]]

    def decode(
        self,
        lines: Sequence[str],
        decode: str = "ar",
        *,
        nbest: int = 1,
        batch_size: int | None = None,
        lengths: Sequence[int] | None = None,
        on_batch: Callable[[int], None] = lambda sentences: None,
        **options: Any,
    ) -> tuple[list[list[Hypothesis]], Report]:
        """Hypotheses of each line, best first, and what it took.

        Args:
          lines: text; blanks at the ends and in a row do not matter.
          decode: "ar" (beam search), "nar" (mask-predict) or "draft" (NAR drafts, AR verifies).
          nbest: hypotheses a line, at most the beam or the length candidates.
          batch_size: most sentences decoded together; default what `decode.tokens` slots hold.
          lengths: tokens that each target has (BOS and EOS not counted), in place of the predicted number;
            AR decides for itself when to end, and takes none.
          on_batch: called with the number of lines done after each batch.
          **options: any key of the config section `decode`, such as beam, iterations or candidates.

        Raises:
          DecodeError: as `options`; a string for lines; batch_size below 1; or lengths that do not go with
            mode or lines.
        """
        if isinstance(lines, (str, bytes)):
            raise DecodeError(
                f"lines must be a list of lines, got {type(lines).__name__}; pass [line] for one"
            )
        generator = Generator(self.config.model, self.options(decode, nbest=nbest, **options))
        if batch_size is not None and batch_size < 1:
            raise DecodeError(f"batch_size must be at least 1, got {batch_size}")
        if lengths is not None and decode == "ar":
            raise DecodeError("decode='ar' ends where the model ends it: lengths are for nar and draft")
        if lengths is not None and len(lengths) != len(lines):
            raise DecodeError(f"{len(lengths)} lengths for {len(lines)} lines")
        width = _width(decode, generator.decode)
        report, start = Report(sentences=len(lines)), time.perf_counter()
        found: list[list[Hypothesis]] = [[Hypothesis("", 0.0, 0)] for _ in lines]
        with span("tokenise"):
            sources = self._encode(lines, report)
        on_batch(len(lines) - len(sources))
        sent: deque[tuple[list[int], Callable[[], Written]]] = deque()

        def write_down(chunk: list[int], wait: Callable[[], Written]) -> None:
            with span("wait for the text"):
                written = wait()
            with span("read back"):
                for row, line in enumerate(chunk):
                    found[line] = self._read(written.tokens[row], written.scores[row], nbest)
                    report.tokens += found[line][0].tokens
                    report.passes += int(written.passes[row])
            report.batches += 1
            on_batch(len(chunk))

        for length, chunk in self._chunks(sources, width, generator, batch_size):
            rows = self._rows(len(chunk), self._most_rows(length, width, generator, batch_size))
            source = np.full((rows, length), generator.model.ids.pad, np.int32)
            filled = [*chunk, *chunk[-1:] * (rows - len(chunk))]  # a filler row repeats the last sentence
            for row, line in enumerate(filled):
                source[row, : len(sources[line])] = sources[line]
            told = None if lengths is None else np.array([lengths[i] + EMPTY for i in filled], np.int32)
            sent.append((chunk, self._engine.start(decode, generator, source, report, told)))
            if len(sent) > AHEAD:
                write_down(*sent.popleft())
        while sent:
            write_down(*sent.popleft())
        report.seconds = time.perf_counter() - start - report.compile_seconds
        return found, report

    def refine(self, line: str, **options: Any) -> tuple[str, list[Pass]]:
        """How mask-predict writes one line: the result, and the winning candidate after each pass."""
        generator = Generator(self.config.model, self.options("nar", **{"early_stop": False, **options}))
        report = Report()
        encoded = self._encode([line], report)
        if not encoded:
            return "", []
        length = next(b for b in self.config.batch.buckets if b >= len(encoded[0]))
        source = np.full((1, length), generator.model.ids.pad, np.int32)
        source[0, : len(encoded[0])] = encoded[0]
        choice, history = self._engine.refine(generator, source, report)
        winner, n = int(choice.candidate[0]), int(choice.lengths[0])
        passes = []
        filled = np.ones(choice.tokens.shape[1], np.bool_)
        for tokens, log_probs, remasked in zip(*history, strict=True):
            inner = slice(1, n - 1)
            passes.append(
                Pass(
                    tokens=self.vocabulary.pieces(tokens[0, winner, inner]),
                    confidence=np.exp(log_probs[0, winner, inner]).tolist(),
                    filled=filled[inner].tolist(),
                )
            )
            filled = remasked[0, winner]
        return clean_line(self.vocabulary.decode(choice.tokens[0])), passes

    def _encode(self, lines: Sequence[str], report: Report) -> dict[int, list[int]]:
        """Token ids of the lines that are not blank, cut to the largest bucket."""
        longest = self.config.batch.buckets[-1]
        sources = {}
        for number, line in enumerate(lines):
            ids = self.vocabulary.encode(line)
            if len(ids) <= 2:
                continue
            if len(ids) > longest:
                report.cut.append((number, len(ids), longest))
                ids = [*ids[: longest - 1], ids[-1]]
            sources[number] = ids
        return sources

    def _chunks(
        self, sources: dict[int, list[int]], width: int, generator: Generator, batch_size: int | None
    ) -> Iterator[tuple[int, list[int]]]:
        """(bucket, numbers of the lines decoded together), short lines first."""
        by_length = sorted(sources, key=lambda n: (len(sources[n]), n))
        start = 0
        for length in self.config.batch.buckets:
            end = start
            while end < len(by_length) and len(sources[by_length[end]]) <= length:
                end += 1
            most = self._most_rows(length, width, generator, batch_size)
            for first in range(start, end, most):
                yield length, by_length[first : min(first + most, end)]
            start = end

    def _most_rows(self, length: int, width: int, generator: Generator, batch_size: int | None) -> int:
        rows = max(1, generator.decode.tokens // (length * width))
        return min(rows, batch_size) if batch_size else rows

    def _rows(self, sentences: int, most: int) -> int:
        """Rows of the batch for so many sentences: one of few sizes, and a multiple of the devices."""
        rows = most
        while rows // PARTIAL >= sentences:
            rows //= PARTIAL
        share = self._engine.devices
        return -(-rows // share) * share

    def _read(self, tokens: np.ndarray, scores: np.ndarray, nbest: int) -> list[Hypothesis]:
        """Hypotheses of one sentence, best first; those that do not exist are left out."""
        ids = self.config.model.ids
        found: list[Hypothesis] = []
        # Lists, as numpy takes longer over so few numbers, and a fast device waits for the host.
        for row, score in zip(tokens[:nbest].tolist(), scores[:nbest].tolist(), strict=True):
            if math.isfinite(score) or not found:
                count = len(row) - sum(row.count(i) for i in {ids.pad, ids.eos, ids.bos})
                # A byte piece may spell a line break; an answer is one line.
                found.append(Hypothesis(clean_line(self.vocabulary.decode(row)), score, count))
        return found


def _checked(options: DecodeConfig) -> DecodeConfig:
    """`options`, with every value usable; remembered, as the check takes a quarter of a millisecond.

    Raises:
      ConfigError: they cannot be used.
    """
    # Types are part of what is asked: True equals 1, and is no number of passes.
    asked = tuple((key, type(value), value) for key, value in vars(options).items())
    try:
        return _check(asked)
    except TypeError:  # no hash: a list, say, which no option is
        return _check.__wrapped__(asked)


@functools.lru_cache(maxsize=256)
def _check(asked: tuple[tuple[str, type, Any], ...]) -> DecodeConfig:
    return from_dict({"decode": {key: value for key, _, value in asked}}).decode


def modes_of(loss: LossConfig) -> tuple[str, ...]:
    """What a model trained with this loss has learnt to decode: "ar", "nar", or both and "draft"."""
    taught = losses.taught(loss)
    return tuple(mode for mode, sides in SIDES.items() if taught.issuperset(sides))


def decode_together(
    translator: Translator, lines: Sequence[str], decode: str = "ar", **arguments: Any
) -> tuple[list[list[Hypothesis]], Report]:
    """`Translator.decode` by all processes: each decodes its share of `lines`, and all get the whole.

    Every process must call it, with the same lines.  In the report, seconds are those of the slowest.
    """
    if not processes.several():
        return translator.decode(lines, decode, **arguments)
    mine = range(processes.index(), len(lines), processes.count())
    if (lengths := arguments.get("lengths")) is not None:
        arguments["lengths"] = [lengths[i] for i in mine]
    found, own = translator.decode([lines[i] for i in mine], decode, **arguments)
    cut = [(mine[line], tokens, kept) for line, tokens, kept in own.cut]
    told = [[dataclasses.astuple(h) for h in hypotheses] for hypotheses in found]
    whole: list[list[Hypothesis]] = [[] for _ in lines]
    total = Report(sentences=len(lines))
    report = dataclasses.asdict(own) | {"cut": cut, "shapes": sorted(own.shapes)}
    parts = processes.gather({"found": told, "report": report})
    for index, part in enumerate(parts):
        for line, hypotheses in zip(range(index, len(lines), len(parts)), part["found"], strict=True):
            whole[line] = [Hypothesis(*h) for h in hypotheses]
        report = part["report"]
        for name in ("tokens", "batches", "passes"):
            setattr(total, name, getattr(total, name) + report[name])
        for name in ("seconds", "compile_seconds"):
            setattr(total, name, max(getattr(total, name), report[name]))
        total.shapes |= {tuple(shape) for shape in report["shapes"]}
        total.cut += [(line, tokens, kept) for line, tokens, kept in report["cut"]]
    total.cut.sort()
    return whole, total


def _width(decode: str, options: DecodeConfig) -> int:
    """Hypotheses that a mode writes for each sentence."""
    return int(getattr(options, WIDTH[decode])) if WIDTH[decode] else 1


def check_params(params: Any, model: ModelConfig, opened: run.Run) -> None:
    """Raises RunError, naming the first array that differs, unless `params` are those of `model`."""
    asked = model == opened.config.model
    what = f"{opened.folder / 'config.json'}" if asked else "what is asked for"
    remedy = "put back the config.json of this run" if asked else "leave out --config and the keys of `model`"

    def arrays(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}

    saved, wanted = arrays(params), arrays(jax.eval_shape(lambda: init_params(jax.random.key(0), model)))
    for name in dict.fromkeys([*wanted, *saved]):
        if saved.get(name) != wanted.get(name):
            raise run.RunError(
                f"{what} is not the configuration of the checkpoint in {opened.checkpoints}: {name} has "
                f"shape {saved.get(name)} there, the configuration wants {wanted.get(name)}; {remedy}"
            )
