"""`janus-jax evaluate`: decode a split, score it, keep what was written beside the scores.

    <workdir>/eval/test_2016_flickr.nar-T4-c3.hyp    one line per example, in order
    <workdir>/eval/test_2016_flickr.nar-T4-c3.json   scores with signatures, speed, options, versions

The name tells the options that change what is written, so that no evaluation overwrites another one;
how many sentences are decoded together is no such option.

Room: shell.  Reads the data of a run, writes below its `eval` folder, prints to the terminal.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from janus_jax import mesh, paths, plots, processes, report, score, tables
from janus_jax.config import DecodeConfig
from janus_jax.data.sources import open_split
from janus_jax.generate import EMPTY
from janus_jax.paths import AnyPath
from janus_jax.run import Run
from janus_jax.translate import OutputError, cut_messages, output
from janus_jax.translator import Translator, decode_together

FOLDER = "eval"
TRUE_LENGTH = "true_length"  # in names: decoded at the lengths of the references
SHOWN_CUTS = 5  # over-long lines named on the terminal; the JSON has all

# Always part of the name, by mode: what a table of results is about.
_HEADLINE = {"ar": {"beam": "b"}, "nar": {"iterations": "T", "candidates": "c"}, "draft": {}}
# Part of the name where they differ from the defaults of the package.
_RARE = {
    "length_penalty": "lp",
    "max_length_a": "la",
    "max_length_b": "lb",
    "early_stop": "early",
    "rescore": "rescore",
    "draft_top_k": "k",
    "draft_margin": "m",
    "draft_block": "block",
    "draft_branches": "branches",
    "ban_unk": "ban_unk",
}
# What changes how many passes a strict draft takes, and not its text.
_SPEED = ("draft_block", "draft_branches")
_ONLY = {
    "ar": {"beam"},
    "nar": {"iterations", "candidates", "early_stop", "rescore"},
    "draft": {"draft_block", "draft_branches", "draft_top_k", "draft_margin"},
}


class EvaluationError(ValueError):
    """A split that cannot be evaluated; the message says why and what to do."""


@dataclass(frozen=True)
class Evaluation:
    """One split decoded in one way."""

    name: str  # what the JSON and the hypotheses file are called, less the suffix and the split
    result: dict[str, Any]  # what the JSON holds
    sources: list[str]
    references: list[tuple[str, ...]]
    hypotheses: list[str]


def relevant(decode: str, options: DecodeConfig) -> dict[str, Any]:
    """The options that can change what mode `decode` writes."""
    unused = {"tokens"}.union(*(names for mode, names in _ONLY.items() if mode != decode))
    if decode == "nar" and not options.rescore:
        unused |= {"length_penalty"}
    if decode == "draft" and options.draft_top_k == 1:
        unused |= {"draft_margin", *_SPEED}
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in unused}


def _told(decode: str, options: DecodeConfig) -> dict[str, Any]:
    """What changes how many passes a text takes, if not the text."""
    return {name: getattr(options, name) for name in _SPEED} if decode == "draft" else {}


def name_of(
    decode: str,
    options: DecodeConfig,
    checkpoint: str = "best",
    limit: int = 0,
    *,
    true_length: bool = False,
) -> str:
    """A file name part that tells one way of decoding from another: `nar-T4-c3`, `ar-b5-lp0.6-average5`."""
    values, defaults = relevant(decode, options), DecodeConfig()
    parts = [decode, *(f"{short}{values[key]}" for key, short in _HEADLINE[decode].items())]
    for key, short in _RARE.items():
        if key in values and (value := values[key]) != getattr(defaults, key):
            parts.append(
                (short if value else f"no_{short}") if isinstance(value, bool) else f"{short}{value:g}"
            )
    parts += [TRUE_LENGTH] if true_length else []
    if checkpoint != "best":
        parts.append(f"step{checkpoint}" if checkpoint.isdigit() else checkpoint.replace(":", ""))
    parts += [f"first{limit}"] if limit else []
    return "-".join(parts)


def evaluate(
    opened: Run,
    translator: Translator,
    split: str = "",
    decode: str = "ar",
    *,
    checkpoint: str = "best",
    limit: int = 0,
    batch_size: int | None = None,
    true_length: bool = False,
    folder: AnyPath | None = None,
    **options: Any,
) -> Evaluation:
    """Decodes `split`, scores it and writes both files.

    Of several processes each decodes its share, every example exactly once; the main one writes.

    Args:
      opened: the run, whose data hold the split.
      translator: its model.
      split: default `data.test_split`.
      decode: "ar", "nar" or "draft".
      checkpoint: what `translator` was loaded as; part of the name unless "best".
      limit: only so many examples, from the first; 0 means all.
      batch_size: most sentences decoded together.
      true_length: decode at the length of the reference (of several the first) in place of the predicted
        one: what a perfect prediction of the length would bring.  Not for "ar".
      folder: where to write; default `<workdir>/eval`.
      **options: any key of the config section `decode`.

    Raises:
      EvaluationError: the split is empty, or `folder` cannot be written to.
      data.DataError: there is no such split, or no prepared data.
      translator.DecodeError: as `Translator.decode`; `true_length` with "ar", for one.
    """
    split, folder = split or opened.config.data.test_split, folder or opened.folder / FOLDER
    effective = translator.options(decode, **options)
    pairs = open_split(opened.config.data, opened.data_folder, split)
    count = min(limit, len(pairs)) if limit else len(pairs)
    if not count:
        raise EvaluationError(f"split {split!r} in {opened.data_folder} has no examples: nothing to evaluate")
    sources = [source for source, _ in itertools.islice(pairs, count)]
    references = [pairs.references(i) for i in range(count)]
    first = limit if count < len(pairs) else 0
    name = name_of(decode, effective, checkpoint, first, true_length=true_length)
    lengths = None
    if true_length:
        lengths = [len(translator.vocabulary.encode(wordings[0])) - EMPTY for wordings in references]
    if processes.is_main():
        _check_folder(folder)
    console = Console(stderr=True, quiet=not processes.is_main())
    with report.progress(count, f"{split} {name}", unit="sentence", console=console) as progress:

        def advance(sentences: int) -> None:
            done = progress.done + sentences * processes.count()  # the others are about as far
            progress.update(min(done, count))

        found, took = decode_together(
            translator,
            sources,
            decode,
            batch_size=batch_size,
            lengths=lengths,
            on_batch=advance,
            **options,
        )
        for message in cut_messages(took.cut, limit=SHOWN_CUTS):
            progress.say(f"{split} {message}")
    hypotheses = [best.text for best, *_ in found]
    scores = score.score(hypotheses, references)
    result = {
        "split": split,
        "decode": decode,
        "checkpoint": translator.name,
        "scores": scores.to_dict(),
        "speed": {**took.speed(), "batches": took.batches, "shapes": len(took.shapes)},
        "passes_per_sentence": None if decode == "ar" else took.passes / count,
        "cut": [{"line": line + 1, "tokens": tokens, "kept": kept} for line, tokens, kept in took.cut],
        "options": relevant(decode, effective) | _told(decode, effective),
        "lengths": tables.TRUE if true_length else tables.PREDICTED,
        "batch_size": batch_size,
        "data": pairs.identity,
        "vocabulary_sha256": translator.vocabulary.sha256,
        "device": mesh.device_kind(),
        "processes": processes.count(),
        "versions": report.versions(),
    }
    if processes.is_main():
        try:
            with output(folder / f"{split}.{name}.hyp") as file:
                file.write("".join(f"{line}\n" for line in hypotheses).encode("utf-8"))
            report.write_json(folder / f"{split}.{name}.json", result)
        except (OutputError, report.ReportError) as error:
            told = f"{split} {name} has BLEU {scores.bleu:.2f}, chrF {scores.chrf:.2f}"
            raise EvaluationError(f"{told}, but is not kept: {error}") from error
    return Evaluation(name, result, sources, references, hypotheses)


def _check_folder(folder: AnyPath) -> None:
    """Raises EvaluationError unless `folder` takes files: decoding may take long, and is not done in vain."""
    try:
        paths.make_writable(folder)
    except OSError as error:
        why = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise EvaluationError(
            f"{folder} cannot be written to: {why}; name another folder with --output_dir=DIR"
        ) from error


def draw_refinements(
    translator: Translator, sources: Sequence[str], folder: AnyPath, **options: Any
) -> list[AnyPath]:
    """Pictures of how mask-predict writes each of `sources`: `folder`/refinement-1.png and so on.

    A blank source has none.

    Raises:
      translator.DecodeError: the model does not decode that way.
    """
    drawn = []
    for number, source in enumerate(sources, start=1):
        text, passes = translator.refine(source, **options)
        if not passes:
            continue
        history: list[report.RefinementPass] = [
            {"tokens": p.tokens, "confidence": p.confidence, "masked_before": p.filled} for p in passes
        ]
        path = folder / f"refinement-{number}.png"
        folder.mkdir(parents=True, exist_ok=True)
        plots.plot_refinement(history, path, f"{len(passes)} passes of mask-predict", source, text)
        drawn.append(path)
    return drawn


def print_scores(evaluations: Sequence[Evaluation], console: Console | None = None) -> None:
    """Tables of evaluations of the same split, one column each: scores, then BLEU by length."""
    first = evaluations[0].result
    rows = []
    for label, section, key, factor in (
        ("BLEU", "scores", "bleu", 1),
        ("chrF", "scores", "chrf", 1),
        ("BLEU, tokenised lower-case", "scores", "bleu_tok_lc", 1),
        ("exact match, %", "scores", "exact_match", 100),
        ("length ratio", "scores", "length_ratio", 1),
        ("repeated tokens, %", "scores", "repetition", 100),
        ("  in the references, %", "scores", "repetition_reference", 100),
        ("empty outputs", "scores", "empty", 1),
        ("sentences/s", "speed", "sentences_per_s", 1),
        ("target tokens/s", "speed", "tokens_per_s", 1),
        ("compile time, s (not in the rates)", "speed", "compile_seconds", 1),
    ):
        rows.append([label, *(factor * e.result[section][key] for e in evaluations)])
    title = f"{first['split']}, {first['scores']['sentences']:,} sentences, {first['checkpoint']}"
    report.table(title, ["", *(e.name for e in evaluations)], rows, console)

    buckets = [{b["tokens"]: b for b in e.result["scores"]["by_length"]} for e in evaluations]
    by_length = [
        [tokens, bucket["sentences"], *(b[tokens]["bleu"] for b in buckets)]
        for tokens, bucket in buckets[0].items()
    ]
    columns = ["reference tokens", "sentences", *(f"BLEU {e.name}" for e in evaluations)]
    report.table("by length of the reference", columns, by_length, console)
    console = console or Console()
    for key in ("bleu", "chrf", "bleu_tok_lc"):
        signature = first["scores"][f"{key}_signature"]
        console.print(f"{key:<12} {signature}", markup=False, highlight=False, soft_wrap=True)


def print_examples(evaluations: Sequence[Evaluation], count: int, console: Console | None = None) -> None:
    """The first `count` sentences: source, a reference, and what each evaluation wrote."""
    console = console or Console()
    first = evaluations[0]
    width = max(len("reference"), *(len(e.name) for e in evaluations))
    for i in range(min(count, len(first.sources))):
        texts = {"source": first.sources[i], "reference": first.references[i][0]}
        texts |= {e.name: e.hypotheses[i] for e in evaluations}
        console.print()
        for label, text in texts.items():
            console.print(f"{label:<{width}}  {text}", markup=False, highlight=False, soft_wrap=True)
