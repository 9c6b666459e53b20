"""Decoding as compiled loops over a function that scores symbols: they know no model.

  beam.py          left to right: greedy and beam search
  mask_predict.py  all places at once, refined in T passes, over several target lengths

Room: pure core.  Imports batch and config only.
"""
