"""Batches of sources in, token ids out: `generate`, compiled once per shape and laid on the devices.

The sentences of a batch are divided over the devices of this process, each of which holds all parameters
and decodes its own sentences without a word to the others; so a device whose sentences are done is done.

Letters: B sentences of a decoding batch, G beams or length candidates, S source length, T target slots.
Room: [devices].  Imports generate, models, mesh, sharding and config; knows no text.
"""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from janus_jax import mesh, sharding
from janus_jax.config import Config
from janus_jax.generate import SPARE, Generator
from janus_jax.models import apart

# Most programs kept.  On CPU each takes some 270 of the 65,530 memory maps that Linux grants a process;
# beyond them LLVM cannot compile, and ends the process.
KEPT = 160

ROWS, WHOLE = PartitionSpec(sharding.ROWS), PartitionSpec()

# What a profile calls the host's part of decoding, in order; `benchmarks.sentence` adds them up.
Span = Literal[
    "tokenise", "start the encoder", "wait for lengths", "start writing", "wait for the text", "read back"
]


def span(name: Span) -> jax.profiler.TraceAnnotation:
    """Gives what is done inside its name in a profile, where one is being taken."""
    return jax.profiler.TraceAnnotation(name)


@dataclass
class Report:
    """What decoding took."""

    sentences: int = 0
    tokens: int = 0  # generated target tokens, EOS not counted, of the best hypotheses
    seconds: float = 0.0  # everything but compiling: tokenising, transfer, decoding, detokenising
    compile_seconds: float = 0.0
    batches: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    passes: int = 0  # NAR and draft: decoder passes, summed over sentences
    cut: list[tuple[int, int, int]] = field(default_factory=list)  # line (from 0), its tokens, tokens kept

    def speed(self) -> dict[str, float]:
        """Rates without compile time, as shown in tables and kept in JSON."""
        seconds = max(self.seconds, 1e-9)
        return {
            "sentences_per_s": self.sentences / seconds,
            "tokens_per_s": self.tokens / seconds,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
        }


class Written(NamedTuple):
    """What a batch came to, on the host."""

    tokens: np.ndarray  # [B, G, T] int32, best first
    scores: np.ndarray  # [B, G] float32
    passes: np.ndarray  # [B] int32, of the best; 0 for AR


class Engine:
    """Parameters on all devices, and the compiled programs that decode with them."""

    def __init__(self, params: Any, config: Config) -> None:
        """Lays `params` on the devices of this process that `config.mesh` makes use of."""
        self._config = config
        self._mesh = mesh.local_mesh(config.mesh)
        self._compiled: OrderedDict[tuple[Any, ...], Any] = OrderedDict()  # the last used at the end
        self._sent: Any = ()  # what the devices were last told to make
        self.set_params(params)

    @property
    def devices(self) -> int:
        """Rows of a batch must be a multiple of this."""
        return mesh.row_shares(self._mesh)

    @property
    def params(self) -> Any:
        """The parameters as decoding reads them (`models.apart`), on the devices."""
        return self._params

    def set_params(self, params: Any) -> None:
        """Other parameters of the same model; what is compiled stays."""
        laid_out = apart(jax.tree.map(np.asarray, params), self._config.model)
        self._params = jax.device_put(laid_out, mesh.replicated(self._mesh))

    def start(
        self,
        decode: str,
        generator: Generator,
        source: np.ndarray,
        report: Report,
        lengths: np.ndarray | None = None,
    ) -> Callable[[], Written]:
        """Sends a batch to the devices; compile time is added to `report`.

        The devices work while the host goes on: to write down the batch before, and to send the next one.

        Args:
          decode: "ar", "nar" or "draft".
          generator: the model and its options.
          source: [B, S] int32, B a multiple of `devices`.
          report: gets compile time and shapes.
          lengths: [B] int32, target lengths (BOS and EOS counted) to go by in place of the predicted ones.

        Returns:
          A function that waits for the devices and gives what they wrote.
        """
        if decode == "draft":
            placed = (self._place(source), ROWS)
            (memory, tried), slots = self._remember(generator, source, report, ROWS, lengths, spare=SPARE)
            verify = functools.partial(generator.doing("draft_and_verify").draft_and_verify, slots=slots)
            encoded = ((memory, ROWS), (tried, ROWS))
            with span("start writing"):
                drafted = self._call(verify, (slots,), report, placed, *encoded, out=ROWS)
            return lambda: Written(*jax.device_get((drafted.tokens, drafted.scores, drafted.passes)))
        if decode == "ar":
            write = generator.doing("autoregressive").autoregressive
            with span("start writing"):
                result = self._call(write, (), report, (self._place(source), ROWS), out=ROWS)
            no_passes = np.zeros(len(source), np.int32)
            return lambda: Written(*jax.device_get((result.tokens, result.scores, no_passes)))
        (memory, tried), slots = self._remember(generator, source, report, ROWS, lengths)
        refine = functools.partial(generator.doing("non_autoregressive").non_autoregressive, slots=slots)
        args = ((memory, ROWS), (tried, ROWS))
        with span("start writing"):
            _, result = self._call(refine, (slots,), report, *args, out=ROWS)

        def best_first() -> Written:
            kept = result.tokens, result.scores, result.lengths, result.passes
            tokens, scores, lengths, passes = jax.device_get(kept)
            order, scores = ranked(scores, lengths)
            passes = np.take_along_axis(passes, order, 1)
            return Written(np.take_along_axis(tokens, order[..., None], 1), scores, passes[:, 0])

        return best_first

    def refine(self, generator: Generator, source: np.ndarray, report: Report) -> tuple[Any, Any]:
        """(choice, history) of mask-predict over one source [1, S], on the host."""
        (memory, lengths), slots = self._remember(generator, source, report, WHOLE)
        write = functools.partial(
            generator.doing("non_autoregressive").non_autoregressive, slots=slots, history=True
        )
        choice, result = self._call(
            write, (slots, True), report, (memory, WHOLE), (lengths, WHOLE), out=WHOLE
        )
        return jax.device_get((choice, result.history))

    def _remember(
        self,
        generator: Generator,
        source: np.ndarray,
        report: Report,
        rows: PartitionSpec,
        lengths: np.ndarray | None = None,
        *,
        spare: int = 0,
    ) -> tuple[tuple[Any, jax.Array], int]:
        """Encoded sources with candidate lengths, and a canvas no larger than the longest and `spare` need.

        Reading the lengths back costs one wait; the canvas is a bucket, so that shapes stay few.
        """
        given = [source] if lengths is None else [source, lengths]
        place = self._place if rows == ROWS else lambda x: jax.device_put(x, mesh.replicated(self._mesh))
        encode = generator.doing("remember").remember
        with span("start the encoder"):
            args = [(place(x), rows) for x in given]
            found = self._call(encode, (), report, *args, out=rows)
        with span("wait for lengths"):
            longest = int(jax.device_get(found[1]).max()) + spare
        most = generator.slots(source.shape[1]) + 1
        return found, min([b for b in self._config.batch.buckets if longest <= b < most], default=most)

    def _place(self, by_row: np.ndarray) -> jax.Array:
        return mesh.global_batch(self._mesh, {"by row": by_row})["by row"]

    def _call(
        self,
        function: Callable[..., Any],
        key: tuple[Any, ...],
        report: Report,
        *args: tuple[Any, Any],
        out: Any,
    ) -> Any:
        """Calls the compiled form of `function(params, *args)`, which is made once per shape.

        Each argument comes with the axes that its dimensions are cut over, `out` are those of the results.
        """
        values, axes = (tuple(x[i] for x in args) for i in (0, 1))
        base: Any = getattr(function, "func", function)
        shapes = tuple(x.shape for x in jax.tree.leaves(values))
        full_key = (base.__self__, base.__name__, key, shapes)
        program = self._compiled.get(full_key)
        if program is None:
            jax.block_until_ready(self._sent)  # what runs beside a compilation would seem to cost no time
            start = time.perf_counter()
            each = mesh.on_each_device(function, self._mesh, (WHOLE, *axes), out)
            program = self._compiled[full_key] = jax.jit(each).lower(self._params, *values).compile()
            report.compile_seconds += time.perf_counter() - start
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(full_key)
        report.shapes.add((*shapes[0], *key))
        self._sent = program(self._params, *values)
        return self._sent


def ranked(scores: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of NAR's candidates [B, G], best first, and their scores [B, G] in that order.

    Near a limit several candidates have the same length, hence the same text: of these one counts, the others
    come last and score -inf.
    """
    order = np.argsort(-scores, axis=1, kind="stable")  # of equals the first, as `choose` has it
    scores, lengths = (np.take_along_axis(x, order, 1) for x in (scores, lengths))
    again = np.tril(lengths[:, :, None] == lengths[:, None, :], -1).any(axis=2)
    last = np.argsort(again, axis=1, kind="stable")
    order, scores = (np.take_along_axis(x, last, 1) for x in (order, np.where(again, -np.inf, scores)))
    return order, scores
