"""Reports of `janus-jax compile --json=FILE` as one Markdown table, a line for each file.

    python launch/tables/scaling.py FILE.json ...

Memory and collectives are per chip and those of the compiled train step; columns marked (p) are predicted.
Efficiency is the predicted target tokens/s per chip against that of the first file, on the same chip.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = (
    "slice", "chips", "data x fsdp", "batch", "state", "activations", "total", "of", "ICI sent", "DCN sent",
    "compute (p)", "memory (p)", "ICI (p)", "DCN (p)", "bound (p)", "step (p)", "tokens/s (p)",
    "utilisation (p)", "efficiency (p)",
)  # fmt: skip


def main(paths: list[str]) -> int:
    """Prints the table."""
    if not paths:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    found = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + " --- |" * len(COLUMNS))
    for one in found:
        print("| " + " | ".join(_line(one, found[0])) + " |")
    return 0


def _line(one: dict[str, Any], first: dict[str, Any]) -> list[str]:
    train, mesh = one["programs"]["train"], one["mesh"]
    memory, shape = train["memory"], train["shape"]
    name = f"{one['slices']} x {one['topology']}" if one["slices"] > 1 else one["topology"]
    cells = [
        name,
        str(one["devices"]),
        f"{mesh['data']} x {mesh['fsdp']}",
        f"{shape['rows']} x {shape['length']} in {shape['microbatches']}",
        _size(memory["parameters"] + memory["optimizer"]),
        _size(memory["temporaries"]),
        _size(memory["total"]),
        f"{memory['limit'] / 2**30:.0f} GiB",
    ]
    if "predicted" not in train:
        return [*cells, "does not fit", *[""] * (len(COLUMNS) - len(cells) - 1)]
    sent = {n: sum(c["bytes"] for c in train["collectives"] if c["network"] == n) for n in ("ici", "dcn")}
    comparable = one["chip"] == first["chip"] and _per_chip(first) > 0
    seconds, predicted = train["roofline_seconds"], train["predicted"]
    return [
        *cells,
        _size(sent["ici"]),
        _size(sent["dcn"]),
        *(f"{1000 * seconds[k]:,.1f} ms" for k in ("compute", "memory", "ici", "dcn")),
        predicted["bound"],
        f"{1000 * predicted['seconds']:,.1f} ms",
        f"{predicted['tokens_per_s']:,.0f}",
        f"{predicted['utilisation']:.1%}",
        f"{_per_chip(one) / _per_chip(first):.0%}" if comparable else "",
    ]


def _per_chip(one: dict[str, Any]) -> float:
    return one["programs"]["train"].get("predicted", {}).get("tokens_per_s", 0.0) / one["devices"]


def _size(n: float) -> str:
    if not n:
        return "-"
    return f"{n / 2**30:,.2f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
