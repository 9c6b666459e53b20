"""`janus-jax demo`: everything once, in minutes: train a small JANUS, decode it both ways, draw two pictures.

    <workdir>/training.png     every term of the loss
    <workdir>/refinement.png   how mask-predict writes one sentence, pass by pass
    <workdir>/demo.json        what is printed, for programs

A second call finds the model trained and only decodes; a call after an interruption goes on.

Room: shell.  Writes into the run directory, prints to the terminal.
"""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from janus_jax import paths, plots, report, run
from janus_jax.config import Config, ConfigError
from janus_jax.evaluate import Evaluation, evaluate
from janus_jax.score import is_exact
from janus_jax.train import DONE, train
from janus_jax.translator import MODES, Translator, modes_of

PASSES = (1, 4, 10)  # NAR: decoder passes compared
SENTENCES = 5  # shown in full
TRIED = 40  # sentences among which the one to be drawn is sought


@dataclass(frozen=True)
class Refinement:
    """How mask-predict wrote one source."""

    source: str
    output: str
    history: list[report.RefinementPass]

    @property
    def changes(self) -> int:
        """Slots whose token differs from the pass before, over all passes."""
        tokens = [one["tokens"] for one in self.history]
        return sum(a != b for x, y in itertools.pairwise(tokens) for a, b in zip(x, y, strict=True))


def demo(config: Config, workdir: paths.Name, console: Console | None = None) -> int:
    """Trains `config` in `workdir`, decodes its test split both ways and shows what came out.

    Args:
      config: objective `janus`, so that both modes are there.
      workdir: the run's folder, made if needed; a run that is already there goes on.
      console: where it is shown; standard output by default.

    Returns:
      0, or the exit code of `train.train` when it was asked to stop.

    Raises:
      Whatever `train.train`, `Translator.from_run` and `evaluate.evaluate` raise.
    """
    workdir, console, start = paths.as_path(workdir), console or Console(), time.perf_counter()
    data = config.data
    console.print(
        f"Train a small JANUS on {data.name} ({data.source} -> {data.target}), one model for both ways\n"
        f"of writing, in {workdir}: {config.train.steps:,} updates, then decode the test split left to\n"
        "right (AR) and all slots at once (NAR).  Three to six minutes on two CPU cores.",
        highlight=False,
    )
    if set(modes_of(config.loss)) != set(MODES):
        raise ConfigError(
            f"the demo decodes both ways, so loss.objective must be janus with AR and NAR taught, got "
            f"{config.loss.objective}; train and evaluate take any other"
        )
    if (code := train(config, workdir)) != DONE:
        return code
    opened, translator = run.open_run(workdir), Translator.from_run(workdir)
    autoregressive = evaluate(opened, translator, decode="ar")
    parallel = {T: evaluate(opened, translator, decode="nar", iterations=T) for T in PASSES}
    refinement = most_refined(translator, unsettled(parallel[PASSES[0]], parallel[PASSES[-1]]))

    modes = {f"AR, beam {config.decode.beam}": autoregressive}
    modes |= {f"NAR, {T} pass{'es' if T > 1 else ''}": one for T, one in parallel.items()}
    print_scores(modes, console)
    sentences = [example(modes, i) for i in range(min(SENTENCES, len(autoregressive.sources)))]
    print_sentences(sentences, console)
    picture = workdir / "refinement.png"
    title = f"One sentence in {len(refinement.history)} passes of mask-predict"
    plots.plot_refinement(refinement.history, picture, title, refinement.source, refinement.output)
    legend = f"\n{title}: · is a masked slot, [brackets] what the pass wrote\n"
    console.print(legend, markup=False, highlight=False)
    text = report.refinement_text(refinement.history, refinement.source, refinement.output)
    console.print(text, markup=False, highlight=False, soft_wrap=True)

    seconds = time.perf_counter() - start
    found = {
        "modes": {label: one.result for label, one in modes.items()},
        "sentences": sentences,
        "refinement": {
            "source": refinement.source,
            "output": refinement.output,
            "passes": refinement.history,
        },
        "seconds": seconds,
    }
    report.write_json(workdir / "demo.json", found)
    console.print(epilogue(workdir, seconds), markup=False, highlight=False, soft_wrap=True)
    return 0


def unsettled(first: Evaluation, last: Evaluation) -> list[str]:
    """The sources, in order, whose output differs between two evaluations; all of them if none does."""
    pairs = zip(first.sources, first.hypotheses, last.hypotheses, strict=True)
    return [source for source, a, b in pairs if a != b] or first.sources


def most_refined(translator: Translator, sources: Sequence[str]) -> Refinement:
    """The refinement that changes most, of the first `TRIED` sources; of equals the first."""
    found = []
    for source in sources[:TRIED]:
        output, passes = translator.refine(source, iterations=PASSES[-1])
        history: list[report.RefinementPass] = [
            {"tokens": p.tokens, "confidence": p.confidence, "masked_before": p.filled} for p in passes
        ]
        found.append(Refinement(source, output, history))
    return max(found, key=lambda one: one.changes)


def example(modes: dict[str, Evaluation], i: int) -> dict[str, Any]:
    """Test sentence `i`: its source, all right wordings, and what each mode wrote, right or wrong."""
    first = next(iter(modes.values()))
    wordings = first.references[i]
    outputs = {label: one.hypotheses[i] for label, one in modes.items()}
    return {
        "source": first.sources[i],
        "references": wordings,
        "outputs": {
            label: {"text": text, "right": is_exact(text, wordings)} for label, text in outputs.items()
        },
    }


def print_scores(modes: dict[str, Evaluation], console: Console) -> None:
    """One row for each way of decoding."""
    first = next(iter(modes.values())).result
    rows = []
    for label, one in modes.items():
        scores, speed = one.result["scores"], one.result["speed"]
        rows.append(
            [
                label,
                100 * scores["exact_match"],
                scores["bleu"],
                scores["chrf"],
                speed["sentences_per_s"],
                speed["compile_seconds"],
            ]
        )
    title = (
        f"{first['scores']['sentences']:,} sentences of {first['split']!r}, none seen in training; "
        "exact match: any right wording counts"
    )
    columns = ["", "exact match, %", "BLEU", "chrF", "sentences/s", "compile, s"]
    report.table(title, columns, rows, console)


def print_sentences(sentences: Sequence[dict[str, Any]], console: Console) -> None:
    """Each sentence with one reference and, per mode, what was written and whether it is right."""
    for one in sentences:
        more = len(one["references"]) - 1
        lines = [("source", one["source"], ""), ("reference", one["references"][0], "")]
        if more:
            lines[1] = (*lines[1][:2], f"   (and {more} other right wording{'s' if more > 1 else ''})")
        lines += [
            (label, output["text"], "  ✓" if output["right"] else "  ✗")
            for label, output in one["outputs"].items()
        ]
        console.print()
        for label, text, remark in lines:
            console.print(f"{label:<15} {text}{remark}", markup=False, highlight=False, soft_wrap=True)


def epilogue(workdir: paths.AnyPath, seconds: float) -> str:
    """Where everything lies, and what to try next."""
    run = shlex.quote(str(workdir))
    return f"""\
Done in {report.clock_time(seconds)}.

  {workdir / "training.png"}     the terms of the loss, from update to update
  {workdir / "refinement.png"}   the refinement above, with the confidence of each slot
  {workdir / "demo.json"}        all of this, for programs

Next:

  echo "am Montag um halb sieben abends" | janus-jax translate --workdir={run} --decode=nar --iterations=4
  janus-jax evaluate --workdir={run} --decode=nar --iterations=2 --rescore=true --refine=3
  janus-jax train --help"""
