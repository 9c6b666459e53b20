"""Prints the evaluations below a folder of runs as one Markdown table: `python table.py OUT --split=SPLIT`.

Reads OUT/<run>/eval/<split>.*.json, as `janus-jax evaluate` writes them.  One scorer for all rows.
"""

import argparse
import json
import pathlib
import sys

COLUMNS = (
    ("BLEU", "scores", "bleu", "{:.2f}", 1),
    ("chrF", "scores", "chrf", "{:.2f}", 1),
    ("BLEU tok. lc", "scores", "bleu_tok_lc", "{:.2f}", 1),
    ("length ratio", "scores", "length_ratio", "{:.3f}", 1),
    ("repeated, %", "scores", "repetition", "{:.2f}", 100),
    ("sentences/s", "speed", "sentences_per_s", "{:.1f}", 1),
)


def main() -> int:
    """Prints the table, and the signatures of its scores below it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--split", required=True)
    args = parser.parse_args()
    files = sorted(args.out.glob(f"*/eval/{args.split}.*.json"))
    if not files:
        print(
            f"no evaluation of {args.split} below {args.out}: run janus-jax evaluate first", file=sys.stderr
        )
        return 1
    print("| run | decode | checkpoint | " + " | ".join(name for name, *_ in COLUMNS) + " |")
    print("|---|---|---|" + "---|" * len(COLUMNS))
    signatures = {}
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        way = file.name.removeprefix(f"{args.split}.").removesuffix(".json")
        cells = [text.format(found[part][key] * factor) for _, part, key, text, factor in COLUMNS]
        print(f"| {file.parts[-3]} | {way} | {found['checkpoint']} | " + " | ".join(cells) + " |")
        signatures |= {k: v for k, v in found["scores"].items() if k.endswith("_signature")}
    print()
    for name, signature in signatures.items():
        print(f"{name.removesuffix('_signature')}: {signature}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
