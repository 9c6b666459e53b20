"""From a batch of sources to token ids, both ways: the model's functions bound to the decode loops.

Pure functions of (parameters, arrays), to be jit-compiled by whoever calls them; the options are
static.  Parameters come as training has them or, better, as `models.apart` lays them out, once for all calls.
Results do not depend on the batch a sentence is in, nor on padding.

Letters: B sentences, G beams or length candidates, S source length, T target slots, V vocabulary.
Room: pure core.  Imports models, decode and config.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.config import DecodeConfig, ModelConfig
from janus_jax.decode import beam, draft_verify, mask_predict, reading
from janus_jax.models import ArCache, Janus, Memory, Params, apart, empty_cache

EMPTY = mask_predict.EMPTY  # length of a target without tokens: BOS and EOS
SPARE = draft_verify.SPARE  # slots of a draft's canvas beyond the predicted length


# The options that each method of a Generator goes by; the others are nothing to its program.
_LIMITS = ("max_length_a", "max_length_b")
OPTIONS = {
    "remember": ("candidates", *_LIMITS),
    "autoregressive": ("beam", "length_penalty", "ban_unk", *_LIMITS),
    "non_autoregressive": ("iterations", "early_stop", "rescore", "length_penalty", "ban_unk"),
    "draft_and_verify": (
        "draft_block", "draft_branches", "draft_top_k", "draft_margin", "length_penalty", "ban_unk", *_LIMITS,
    ),
}  # fmt: skip


_State = tuple[ArCache, Memory]

BY_ROW = 0  # where B lies in all that decoding remembers


@dataclass(frozen=True)
class Generator:
    """A model configuration and how to decode with it; hashable, hence static under jit."""

    model: ModelConfig
    decode: DecodeConfig

    def doing(self, method: str) -> Generator:
        """The same model with the options that `method` goes by, the others as by default.

        Two that are equal in that compile to the same program.
        """
        used = {name: getattr(self.decode, name) for name in OPTIONS[method]}
        return Generator(self.model, with_options(DecodeConfig(), **used))

    def remember(
        self, params: Params, source: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[Memory, jax.Array]:
        """Encodes [B, S] once -> (memory, candidate target lengths [B, G] with BOS and EOS).

        The candidates lie around the likeliest length, or around `lengths` [B] where these are given.
        """
        memory: Memory = self._apply(apart(params, self.model), "remember", source)
        bounds: dict[str, Any] = {
            # BOS, one token, EOS: an empty answer to a source that is not empty is no answer
            "min_length": 3,
            "max_length": self.limits(source) + 1,  # a limit counts EOS but not BOS
        }
        if lengths is None:
            found = mask_predict.candidate_lengths(memory.length_logits, self.decode.candidates, **bounds)
        else:
            found = mask_predict.lengths_around(lengths, self.decode.candidates, **bounds)
        return memory, found

    def limits(self, source: jax.Array) -> jax.Array:
        """[B, S] -> [B] int32: most tokens of each target, EOS counted; of the sentence alone."""
        n_source = jnp.sum(source != self.model.ids.pad, axis=1)
        most = self.slots(source.shape[1])
        # Clipped before it is made an integer: what is meant as no limit would not fit one.
        a, b = self._limit(most)
        return jnp.clip(jnp.floor(a * n_source).astype(jnp.int32) + b, 1, most)

    def slots(self, source_length: int) -> int:
        """The most tokens, EOS counted, of any target whose source is padded to `source_length`."""
        most = self.model.max_length - 1
        if self.model.positions == "learned":
            most = min(most, self.model.max_positions - 1)
        a, b = self._limit(most)
        return max(1, min(int(a * source_length) + b, most))

    def _limit(self, most: int) -> tuple[float, int]:
        """max_length_a and max_length_b, no larger than matters where there can be `most` tokens."""
        return min(self.decode.max_length_a, float(most)), min(self.decode.max_length_b, most)

    def autoregressive(self, params: Params, source: jax.Array) -> beam.BeamResult:
        """Left to right, greedily (`beam` = 1) or by beam search: [B, S] -> hypotheses, best first."""
        params = apart(params, self.model)
        width, slots = self.decode.beam, self.slots(source.shape[1])
        memory, _ = self.remember(params, source)
        options = self._search(width, slots)

        def step(tokens: jax.Array, index: jax.Array, state: _State) -> tuple[jax.Array, _State]:
            cache, memory = state
            logits, cache = self._apply(params, "ar_step", tokens, index, cache, memory)
            return logits, (cache, memory)

        state = empty_cache(self.model, source.shape[0], width, slots), memory
        limits = self.limits(source)
        if width == 1:
            return beam.greedy_search(step, state, limits, options, axes=BY_ROW)
        return beam.beam_search(step, state, limits, options, reorder=_reorder, axes=BY_ROW)

    def draft(self, params: Params, source: jax.Array) -> draft_verify.DraftResult:
        """`draft_and_verify` of sources [B, S] in one program, on a canvas for the longest target."""
        params = apart(params, self.model)
        memory, lengths = self.remember(params, source)
        return self.draft_and_verify(params, source, memory, lengths, self.slots(source.shape[1]) + 1)

    def draft_and_verify(
        self, params: Params, source: jax.Array, memory: Memory, lengths: jax.Array, slots: int
    ) -> draft_verify.DraftResult:
        """NAR drafts, AR verifies: greedy AR's text (`draft_top_k` = 1) in fewer passes.

        Args:
          params: parameters.
          source: [B, S], for the limits.
          memory: encoded sources.
          lengths: [B, G] candidate lengths; the middle one, the likeliest, is drafted.
          slots: T, static; `lengths` and `draft_verify.SPARE`, or the most that a target can take.
        """
        params = apart(params, self.model)
        options = draft_verify.DraftOptions(
            search=self._search(1, self.slots(source.shape[1])),
            banned=self._banned(eos=True),
            canvas=max(slots, draft_verify.LEAST),  # a limit may leave room for EOS alone
            block=self.decode.draft_block,
            branches=self.decode.draft_branches,
            top_k=self.decode.draft_top_k,
            margin=self.decode.draft_margin,
        )

        def look(block: draft_verify.Block, canvas: jax.Array, state: _State) -> Any:
            cache, memory = state
            logits, states, cache = self._apply(params, "draft_pass", *block, canvas, cache, memory)
            return logits, states, (cache, memory)

        state = empty_cache(self.model, source.shape[0], 1, options.cells), memory
        likeliest = lengths[:, lengths.shape[1] // 2]
        limits = self.limits(source)
        return draft_verify.draft_and_verify(
            look, self._project(params), state, likeliest, limits, options, axes=BY_ROW
        )

    def non_autoregressive(
        self, params: Params, memory: Memory, lengths: jax.Array, slots: int, *, history: bool = False
    ) -> tuple[mask_predict.Choice, mask_predict.MaskPredictResult]:
        """Mask-predict over all candidates of `remember`, and the best of each sentence.

        Args:
          params: parameters.
          memory: encoded sources.
          lengths: [B, G] candidate lengths, none above `slots`.
          slots: T, static.
          history: keep every pass, for a picture of the refinement.
        """
        params, ids = apart(params, self.model), self.model.ids
        options = mask_predict.MaskPredictOptions(
            ids=ids,
            max_length=slots,
            iterations=self.decode.iterations,
            banned=self._banned(eos=True),
            early_stop=self.decode.early_stop,
            history=history,
        )

        def look(canvas: jax.Array, memory: Memory) -> jax.Array:
            return self._apply(params, "nar_pass", canvas, memory)

        # Without early stop all rows make the same passes, but for those with less to fill than passes: the
        # programs of smaller batches would not earn their compilation.
        axes = BY_ROW if self.decode.early_stop else None
        result = mask_predict.mask_predict(look, self._project(params), memory, lengths, options, axes=axes)
        if self.decode.rescore:
            result = result._replace(scores=self.rescore(params, memory, result.tokens))
        return mask_predict.choose(result), result

    def rescore(self, params: Params, memory: Memory, tokens: jax.Array) -> jax.Array:
        """AR scores of whole candidates in one parallel pass: [B, G, T] -> [B, G] float32.

        Sum of log p, EOS counted, over length ** length_penalty: what the same model's beam search
        would have given them.
        """
        params = apart(params, self.model)
        states = self._apply(params, "ar_pass", tokens, memory)
        real = (tokens != self.model.ids.pad).at[:, :, 0].set(False)  # BOS is given, not predicted
        log_p = reading.score(self._project(params), states, real, tokens)
        return jnp.sum(log_p, axis=-1) / jnp.sum(real, axis=-1) ** self.decode.length_penalty

    def _search(self, width: int, slots: int) -> beam.BeamOptions:
        """What AR may say, in `slots` tokens at most."""
        return beam.BeamOptions(
            ids=self.model.ids,
            beam=width,
            max_length=slots,
            banned=self._banned(eos=False),
            length_penalty=self.decode.length_penalty,
        )

    def _apply(self, params: Params, method: str, *args: object) -> Any:
        """A method of the model with these parameters."""
        return Janus(self.model).apply({"params": params}, *args, method=method)

    def _project(self, params: Params) -> Callable[[jax.Array], jax.Array]:
        """States [.., D] -> logits [.., V]."""
        return functools.partial(self._apply, params, "logits")

    def _banned(self, *, eos: bool) -> tuple[int, ...]:
        """Symbols that are no output: pad, bos, start, mask; unk by option; EOS where the length is given."""
        ids = self.model.ids
        never = {ids.pad, ids.bos, ids.start, ids.mask} | ({ids.unk} if self.decode.ban_unk else set())
        return tuple(sorted(never | {ids.eos} if eos else never - {ids.eos}))


def _reorder(state: _State, parents: jax.Array) -> _State:
    cache, memory = state
    return cache.reorder(parents), memory


def with_options(config: DecodeConfig, **options: object) -> DecodeConfig:
    """`config` with some options replaced.

    Raises:
      ValueError: an option that does not exist.
    """
    known = {f.name for f in dataclasses.fields(config)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown decoding option {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return dataclasses.replace(config, **options)  # type: ignore[arg-type]
