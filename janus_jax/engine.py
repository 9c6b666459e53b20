"""Batches of sources in, token ids out: `generate`, compiled once per shape and laid on the devices.

Letters: B sentences of a decoding batch, G beams or length candidates, S source length, T target slots.
Room: [devices].  Imports generate, mesh and config; knows no text.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from janus_jax import mesh
from janus_jax.config import Config
from janus_jax.generate import Generator


@dataclass
class Report:
    """What decoding took."""

    sentences: int = 0
    tokens: int = 0  # generated target tokens, EOS not counted, of the best hypotheses
    seconds: float = 0.0  # everything but compiling: tokenising, transfer, decoding, detokenising
    compile_seconds: float = 0.0
    batches: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    passes: int = 0  # NAR: decoder passes, summed over sentences
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


class Engine:
    """Parameters on all devices, and the compiled programs that decode with them."""

    def __init__(self, params: Any, config: Config) -> None:
        """Lays `params` on the mesh of `config`."""
        self._config = config
        self._mesh = mesh.make_mesh(config.mesh.data)
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self.set_params(params)

    @property
    def devices(self) -> int:
        """Rows of a batch must be a multiple of this."""
        return mesh.data_parallelism(self._mesh)

    def set_params(self, params: Any) -> None:
        """Other parameters of the same model; what is compiled stays."""
        self._params = jax.device_put(params, mesh.replicated(self._mesh))

    def run(
        self, decode: str, generator: Generator, source: np.ndarray, report: Report
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decodes a batch; compile time is added to `report`.

        Args:
          decode: "ar" or "nar".
          generator: the model and its options.
          source: [B, S] int32, B a multiple of `devices`.
          report: gets compile time and shapes.

        Returns:
          Tokens [B, G, T] int32 and scores [B, G] float32, best first, and the NAR passes of the best
          [B] (0 for AR).
        """
        if decode == "ar":
            result = self._call(generator.autoregressive, (), report, self._place(source))
            tokens, scores = jax.device_get((result.tokens, result.scores))
            return tokens, scores, np.zeros(len(source), np.int32)
        memory, lengths, slots = self._remember(generator, source, report)
        write = functools.partial(generator.non_autoregressive, slots=slots)
        _, result = self._call(write, (slots,), report, memory, lengths)
        tokens, scores, passes = jax.device_get((result.tokens, result.scores, result.passes))
        order = np.argsort(-scores, axis=1, kind="stable")  # of equals the first, as `choose` has it
        scores, passes = (np.take_along_axis(x, order, 1) for x in (scores, passes))
        return np.take_along_axis(tokens, order[..., None], 1), scores, passes[:, 0]

    def refine(self, generator: Generator, source: np.ndarray, report: Report) -> tuple[Any, Any]:
        """(choice, history) of mask-predict over one source [1, S], on the host."""
        memory, lengths, slots = self._remember(generator, source, report, alone=True)
        write = functools.partial(generator.non_autoregressive, slots=slots, history=True)
        choice, result = self._call(write, (slots, True), report, memory, lengths)
        return jax.device_get((choice, result.history))

    def _remember(
        self, generator: Generator, source: np.ndarray, report: Report, alone: bool = False
    ) -> tuple[Any, jax.Array, int]:
        """Encoded sources, candidate lengths, and a canvas no larger than the longest of them needs.

        Reading the lengths back costs one wait; the canvas is a bucket, so that shapes stay few.
        """
        memory, lengths = self._call(generator.remember, (), report, self._place(source, alone))
        longest = int(jax.device_get(lengths).max())
        most = generator.slots(source.shape[1]) + 1
        return (
            memory,
            lengths,
            min([b for b in self._config.batch.buckets if longest <= b < most], default=most),
        )

    def _place(self, source: np.ndarray, alone: bool = False) -> jax.Array:
        if alone:  # one row does not divide over the devices
            return jax.device_put(source, mesh.replicated(self._mesh))
        return mesh.global_batch(self._mesh, {"source": source})["source"]

    def _call(self, function: Callable[..., Any], key: tuple[Any, ...], report: Report, *args: Any) -> Any:
        """Calls the compiled form of `function(params, *args)`, which is made once per shape."""
        base: Any = getattr(function, "func", function)
        shapes = tuple(x.shape for x in jax.tree.leaves(args))
        full_key = (base.__self__, base.__name__, key, shapes)
        if full_key not in self._compiled:
            start = time.perf_counter()
            self._compiled[full_key] = jax.jit(function).lower(self._params, *args).compile()
            report.compile_seconds += time.perf_counter() - start
        report.shapes.add((*shapes[0], *key))
        return self._compiled[full_key](self._params, *args)
