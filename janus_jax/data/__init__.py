"""Text to batches: catalogue of data sets, prepared sets, encoded splits, and the batch pipeline.

Read in the order in which data flow: `lines` and `phrases` (raw text), `catalogue` (which text),
`builders` and `sources` (TFDS sets on disk), `encoded` (token ids), `pipeline` (batches).
Room: [disk] (and, in `download`, the network).  Imports batch, config and text.
"""

from janus_jax.data.lines import DataError

__all__ = ["DataError"]
