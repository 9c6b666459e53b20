"""Who may see whom: boolean attention masks, each drawn in its docstring (the drawings are tests).

Masks are pure functions of (which slots are real, which target positions are in M); nothing is
reordered.  True where attention is allowed.  Rows are the attending slots, columns the
attended content slots.  In the drawings `x` is True and `.` False.

Letters: R rows (sentences, or sentences x candidates), S source length, T target length, C capacity.
Room: pure core.  Imports nothing of ours.
"""

import jax
import jax.numpy as jnp


def padding_mask(real: jax.Array) -> jax.Array:
    """Every slot sees every real slot: [R, S] bool -> [R, 1, S] bool.

    Used by the encoder, by cross-attention and by the NAR content stream.  real = 1 1 1 0:

        x x x .
    """
    return real[:, None, :]


def causal_mask(length: int) -> jax.Array:
    """Slot i sees AR content k <= i: [1, T, T] bool.  T = 4:

        x . . .
        x x . .
        x x x .
        x x x x

    Padding needs no mask of its own: it lies to the right of everything real.  The AR query of slot
    i, which predicts token i + 1, uses the same rows as the AR content of slot i.
    """
    return jnp.tril(jnp.ones((1, length, length), bool))


Held = tuple[jax.Array, jax.Array]  # places that C slots hold, [R, C] int, and which hold one, [R, C] bool


def true_content_mask(masked: jax.Array, real: jax.Array, held: Held | None = None) -> jax.Array:
    """Rows of the true-token content stream: [R, T] x 2 bool -> [R, T, 2T] bool.

    Columns: T slots of NAR content, then T slots of true-token content.  Slot j in M sees the
    visible tokens, the mask symbols at k > j, and the true tokens at k <= j.  Target `B a b c E`
    with a and c masked (M = {1, 3}); rows outside M are computed and never read:

          NAR content  true tokens
          B M b M E    . a . c .
        a x . x x x    . x . . .
        c x . x . x    . x . x .

    With `held`, there are C slots of true-token content, rows and columns alike: [R, C, T + C] bool.  The
    rows of slots that hold nothing are never read.
    """
    return _two_stream(masked, real, held, own=False)


def aux_query_mask(masked: jax.Array, real: jax.Array, held: Held | None = None) -> jax.Array:
    """Rows of the AUX query stream: [R, T] x 2 bool -> [R, T, 2T] bool.

    Columns as in `true_content_mask`, with `held` as well.  Slot j in M, which predicts y_j, sees the
    visible tokens, the mask symbols at k >= j (its own among them), and the true tokens at k < j:

          NAR content  true tokens
          B M b M E    . a . c .
        a x x x x x    . . . . .
        c x . x x x    . x . . .
    """
    return _two_stream(masked, real, held, own=True)


def _two_stream(masked: jax.Array, real: jax.Array, held: Held | None, *, own: bool) -> jax.Array:
    """`own`: slot j still sees the mask symbol in its own place rather than its true token."""
    place = jnp.arange(masked.shape[-1])[None, :]
    slot, there = (place, masked) if held is None else held  # of the rows, and of the true tokens
    compare = jnp.greater_equal if own else jnp.greater

    def ahead(column: jax.Array) -> jax.Array:
        """Does what stands there come after the slot of the row?  If so, its symbol is seen."""
        return compare(column[:, None, :], slot[:, :, None])

    symbols = real[:, None, :] & (~masked[:, None, :] | ahead(place))
    truths = there[:, None, :] & ~ahead(slot)
    return jnp.concatenate([symbols, truths], axis=-1)
