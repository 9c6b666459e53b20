"""Ways to decode that tables, benchmarks and `--decode=auto` choose from, each named once.

Room: pure core.  Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CANDIDATES = 3  # lengths that NAR tries, unless a label says otherwise
SIDES = {"ar": frozenset({"ar"}), "nar": frozenset({"nar"}), "draft": frozenset({"ar", "nar"})}  # by mode


@dataclass(frozen=True)
class Way:
    """A mode and its options."""

    label: str  # unique: "NAR T = 4, re-scored"
    decode: str  # ar | nar | draft
    options: Mapping[str, Any]  # of the section `decode`; the others are left as they are

    @property
    def sides(self) -> frozenset[str]:
        """What it reads of a model: "ar", "nar" or both."""
        return SIDES[self.decode] | (SIDES["ar"] if self.options.get("rescore") else frozenset())


def nar(passes: int, candidates: int = CANDIDATES, *, rescore: bool = False) -> Way:
    """Mask-predict that makes all its passes."""
    label = f"NAR T = {passes}"
    label += "" if candidates == CANDIDATES else f", {candidates} candidate{'s' if candidates > 1 else ''}"
    options = {"iterations": passes, "candidates": candidates, "rescore": rescore, "early_stop": False}
    return Way(f"{label}, re-scored" if rescore else label, "nar", options)


GREEDY = Way("AR greedy", "ar", {"beam": 1})
BEAM = Way("AR beam 5", "ar", {"beam": 5})
STRICT = Way("draft, strict", "draft", {"draft_top_k": 1})
UNBRANCHED = Way("draft, strict, no branches", "draft", {"draft_top_k": 1, "draft_branches": 0})
TOLERANT = Way("draft, 3 within 1.0", "draft", {"draft_top_k": 3, "draft_margin": 1.0})
