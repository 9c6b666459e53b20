"""Weights of others, brought in: fairseq JANUS state dicts and Hugging Face BART.

Room: [disk].  Imports config alone of ours; torch only for a .pt file, as the extra `torch`.
"""

from janus_jax.convert.bart import load_bart
from janus_jax.convert.fairseq import load_fairseq
from janus_jax.convert.names import ConvertError

__all__ = ["ConvertError", "load_bart", "load_fairseq"]
