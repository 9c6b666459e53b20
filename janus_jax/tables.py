"""Tables of experiments: which runs may stand side by side, and what they say when they do.

A *row* of a table is an experiment (`ar`, `janus`, `no_aux`), in one run or in several seeds (`janus`,
`janus-s1`).  A *way* is a manner of decoding (`ar-b5`, `nar-T4-c3-rescore`), named as `evaluate` names its
files.  Nothing is averaged or compared unless it is alike in all that the table is not about:

  runs          finished, of one commit, one vocabulary, and equal in every key of the configuration but
                those in ABOUT (what the rows differ in) and IDLE (what changes no result); the seeds of a
                row equal in ABOUT, too
  evaluations   of one split, test data, vocabulary, scorer, commit and set of options, and of the
                checkpoint that is best on dev now

What differs is set apart, with every difference named.  What others have is the value that most have; where
as many have another, the baseline row's.  What is missing is a blank, never a 0.

Room: pure core.  Imports config, score and ways; touches no file, no device, no clock.
"""

from __future__ import annotations

import csv
import html
import io
import itertools
import re
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from janus_jax import config as configuration
from janus_jax import score, ways
from janus_jax.config import Config

# Keys that rows may differ in: prefixes end in a dot.
ABOUT = (
    "init.",
    "loss.",
    "model.ar_stream",
    "model.ar_positions",
    "model.length_gradient",
    "batch.sampler",
    "batch.mask_rate",
    "batch.span_mean",
    "batch.order",
    "seed",
)
FIXED = ("loss.label_smoothing",)  # inside a prefix of ABOUT, yet the same for all
# Keys that change no result, or that each evaluation tells by itself.
IDLE = (
    "decode.",
    "mesh.",
    "data.dir",
    "data.raw_dir",
    "data.test_split",
    "batch.workers",
    "batch.prefetch",
    "batch.device_tokens",
    "loss.chunk",
    "loss.gather",
    "model.scan_layers",
    "model.remat",
    "model.remat_keep",
    "train.microbatches",
    "train.log_every",
    "train.keep_last",
    "train.checkpoint_every",  # what is evaluated on dev is saved in any case
    "train.nonfinite",
    "train.max_skipped",
    "train.max_grad_norm",
    "train.tensorboard",
)
# Of these `decode.` keys, what dev is decoded with chooses the checkpoint that is best by BLEU.
DEV_DECODING = (
    "decode.candidates",
    "decode.rescore",
    "decode.early_stop",
    "decode.length_penalty",
    "decode.max_length_a",
    "decode.max_length_b",
    "decode.ban_unk",
)
FIRST_ROWS = ("ar_content", "ar", "rdrop", "cmlm", "janus")  # the others follow by name
ABLATED = "janus"  # the row that ablations change one thing of
UNKNOWN, DIRTY = "unknown", "-dirty"
PREDICTED, TRUE = "predicted", "of the references"  # lengths that NAR decoded at, in an evaluation's JSON
SAMPLES = 1000  # resamples of the bootstrap


@dataclass(frozen=True)
class Way:
    """A manner of decoding that the table has a column for."""

    name: str  # as `evaluate.name_of` gives it, with the checkpoint that is best on dev
    how: ways.Way  # what the name stands for
    true_length: bool = False  # at the lengths of the references

    @property
    def label(self) -> str:
        """What stands above the column, and what `bench` calls it."""
        return f"{self.how.label}, at the true length" if self.true_length else self.how.label


def _nar(passes: int, *, rescore: bool) -> Way:
    return Way(f"nar-T{passes}-c3" + ("-rescore" if rescore else ""), ways.nar(passes, rescore=rescore))


WAYS = (
    Way("ar-b1", ways.GREEDY),
    Way("ar-b5", ways.BEAM),
    *(_nar(passes, rescore=False) for passes in (1, 4, 10)),
    *(_nar(passes, rescore=True) for passes in (1, 4, 10)),
    Way("nar-T10-c1-true_length", ways.nar(10, 1), true_length=True),
    Way("draft", ways.STRICT),
)
HEADLINES = ("ar-b5", "nar-T10-c3")  # one for each side, where there is room for no more
SPEED_BATCHES = (1, 128)


def ways_of(objective: str) -> tuple[str, ...]:
    """The ways that a model of this objective is to be evaluated in."""
    trained = {"janus": {"ar", "nar"}, "cmlm": {"nar"}}.get(objective, {"ar"})
    return tuple(way.name for way in WAYS if way.how.sides <= trained)


@dataclass(frozen=True)
class Evaluated:
    """One `SPLIT.NAME.json` and the `.hyp` beside it."""

    split: str
    name: str
    result: Mapping[str, Any]
    hypotheses: tuple[str, ...] | None = None
    fault: str = ""  # why it could not be read

    @property
    def commit(self) -> str:
        """The commit that decoded."""
        return self.result["versions"].get("commit") or UNKNOWN


@dataclass(frozen=True)
class Trained:
    """A run directory as it was read; what could not be read is in `faults`."""

    name: str
    config: Config | None = None
    rows: Sequence[Mapping[str, Any]] = ()  # of metrics.jsonl
    versions: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: str = ""  # sha256
    evaluations: tuple[Evaluated, ...] = ()
    bench: Mapping[str, Any] | None = None
    bench_fault: str = ""  # why there is none, though there is a file
    faults: tuple[str, ...] = ()

    @property
    def row(self) -> str:
        """The experiment: the name without `-sSEED`."""
        return re.sub(r"(?<=.)-s\d+$", "", self.name)

    @property
    def updates(self) -> int:
        """Updates that were made and written down."""
        return max((r["step"] for r in self.rows if r["kind"] in ("train", "dev")), default=0)

    @property
    def skipped(self) -> int:
        """Updates that were passed over, as they were not finite or exploded."""
        return len({r["step"] for r in self.rows if r["metrics"].get("event") == "skipped"})

    @property
    def commits(self) -> tuple[str, ...]:
        """Every commit that trained it, in order; what was never recorded is "unknown"."""
        starts = [
            r["metrics"].get("commit") or UNKNOWN
            for r in self.rows
            if r["kind"] == "event" and r["metrics"].get("event") in ("started", "resumed")
        ]
        return tuple(dict.fromkeys(starts)) or (self.versions.get("commit") or UNKNOWN,)

    @property
    def devices(self) -> tuple[str, ...]:
        """Every kind of device that it was trained on."""
        found = [r["metrics"].get("device") for r in self.rows if r["kind"] == "event"]
        return tuple(dict.fromkeys(d for d in found if d))


@dataclass(frozen=True)
class Apart:
    """What stands outside the tables, and every reason why."""

    run: str
    what: str  # "" for the run itself, else the name of an evaluation
    reasons: tuple[str, ...]
    bleu: float | None = None


@dataclass(frozen=True)
class Judged:
    """The runs of one table, and what is to be compared in them."""

    runs: tuple[Trained, ...]  # alike, in order of rows and seeds
    evaluations: Mapping[tuple[str, str], Evaluated]  # (run, way) -> what is alike
    apart_runs: tuple[Apart, ...]
    apart_evaluations: tuple[Apart, ...]
    missing: Mapping[str, tuple[str, ...]]  # run -> ways that it is to have and has not
    split: str
    baseline: str

    @property
    def rows(self) -> dict[str, list[Trained]]:
        """The runs of each row."""
        found: dict[str, list[Trained]] = {}
        for run in self.runs:
            found.setdefault(run.row, []).append(run)
        return found

    def of(self, row: str, way: str) -> list[tuple[Trained, Evaluated]]:
        """The seeds of a row that have this way."""
        pairs = ((run, self.evaluations.get((run.name, way))) for run in self.rows.get(row, ()))
        return [(run, one) for run, one in pairs if one]

    def ways(self) -> list[Way]:
        """The ways that any run has, in the order of WAYS."""
        return [w for w in WAYS if any(way == w.name for _, way in self.evaluations)]


# -- telling apart ------------------------------------------------------------------------------------


def judge(runs: Sequence[Trained], baseline: str = "ar", split: str = "", any_commit: bool = False) -> Judged:
    """Sorts runs and evaluations into what is alike and what is set apart.

    Args:
      runs: of one table, in any order.
      baseline: the row that decides where opinions are even.
      split: which to compare; default what most configurations name as `data.test_split`.
      any_commit: commits may differ, or be "-dirty" or mixed.
    """
    runs = sorted(runs, key=_order)
    usable = [run for run in runs if not run.faults and run.config]
    finished = [run for run in usable if not _unfinished(run)] or usable
    finished = sorted(finished, key=lambda run: run.row != baseline)  # of equal votes the first decides
    if not split:
        split = _common([run.config.data.test_split for run in finished if run.config]) or ""
    reasons = {run.name: list(run.faults) for run in runs}
    for run in usable:
        reasons[run.name] += _unfinished(run)
        reasons[run.name] += _other_settings(run, finished)
        if run.vocabulary != (most := _common([r.vocabulary for r in finished])):
            reasons[run.name].append(
                f"vocabulary {_short(run.vocabulary)}, that of the others {_short(most)}"
            )
        if not any_commit:
            reasons[run.name] += _other_commit(run.commits, [r.commits for r in finished], "trained")
    for row in _grouped(usable, lambda run: run.row):
        for run, why in _unlike_seeds([r for r in row if not reasons[r.name]]):
            reasons[run.name].append(why)
    alike = [run for run in runs if not reasons[run.name]]
    evaluations, aside = _judge_evaluations(alike, split, any_commit, baseline)
    seen = {(one.run, one.what) for one in aside}
    missing = {
        run.name: absent
        for run in alike
        if run.config
        and (
            absent := tuple(
                way
                for way in ways_of(run.config.loss.objective)
                if (run.name, way) not in evaluations and (run.name, f"{split}.{way}") not in seen
            )
        )
    }
    return Judged(
        runs=tuple(alike),
        evaluations=evaluations,
        apart_runs=tuple(Apart(r.name, "", tuple(reasons[r.name])) for r in runs if reasons[r.name]),
        apart_evaluations=tuple(aside),
        missing=missing,
        split=split,
        baseline=baseline,
    )


def _order(run: Trained) -> tuple[Any, ...]:
    known = FIRST_ROWS.index(run.row) if run.row in FIRST_ROWS else len(FIRST_ROWS)
    number = run.name.removeprefix(run.row).removeprefix("-s")
    return (known, run.row, int(number) if number else -1)


def _unfinished(run: Trained) -> list[str]:
    assert run.config
    wanted = run.config.train.steps
    if run.updates > wanted:
        return [f"trained for {run.updates:,} updates, more than its train.steps, {wanted:,}"]
    ended = any(r["kind"] == "dev" and r["step"] == wanted for r in run.rows)
    if run.updates < wanted or not ended:
        return [f"unfinished, {run.updates:,} of {wanted:,} updates" + (", last evaluation on dev missing" if
                run.updates == wanted else "")]  # fmt: skip
    if run.skipped:
        return [f"{run.skipped:,} of its updates were skipped (train.nonfinite)"]
    return []


def _matches(key: str, keys: Iterable[str]) -> bool:
    return any(key.startswith(k) if k.endswith(".") else key == k for k in keys)


def equal_terms() -> tuple[str, ...]:
    """The keys that all rows of a table share."""
    return tuple(
        key
        for key in configuration.key_names()
        if key in FIXED or not (_matches(key, ABOUT) or _matches(key, IDLE))
    )


def _other_settings(run: Trained, finished: Sequence[Trained]) -> list[str]:
    found = []
    by_bleu = run.config is not None and run.config.train.best == "bleu"
    for key in (*equal_terms(), *(DEV_DECODING if by_bleu else ())):
        own = configuration.get(run.config, key)  # type: ignore[arg-type]
        most = _common([configuration.get(r.config, key) for r in finished if r.config])
        if own != most:
            found.append(f"{key} = {own!r}, that of the others {most!r}")
    return found


def _other_commit(own: Sequence[str], others: Sequence[Sequence[str]], done: str) -> list[str]:
    """What sets apart by commit: several of them, changes that no commit holds, or another one."""
    if len(own) > 1:
        return [f"{done} by several commits: {', '.join(own)}"]
    (commit,) = own
    if commit.endswith(DIRTY):
        return [f"{done} by commit {commit}: changes that nobody can check out"]
    clean = [c[0] for c in others if len(c) == 1 and not c[0].endswith(DIRTY)]
    if clean and commit != (most := _common(clean)):
        return [f"{done} by commit {commit}, the others by {most}"]
    return []


def _unlike_seeds(runs: Sequence[Trained]) -> Iterator[tuple[Trained, str]]:
    """Runs of one row that are not the same experiment with another seed."""
    keys = [k for k in configuration.key_names() if _matches(k, ABOUT) and not _matches(k, (*IDLE, "seed"))]
    common = {k: _common([configuration.get(r.config, k) for r in runs if r.config]) for k in keys}
    seeds: dict[int, str] = {}
    for run in runs:
        assert run.config
        differing = [
            f"{k} = {own!r}, that of its row's other seeds {most!r}"
            for k, most in common.items()
            if (own := configuration.get(run.config, k)) != most
        ]
        if differing:
            yield run, "; ".join(differing)
        elif run.config.seed in seeds:
            yield run, f"the same seed as {seeds[run.config.seed]}: {run.config.seed}"
        else:
            seeds[run.config.seed] = run.name


def best_steps(run: Trained) -> frozenset[int]:
    """The updates whose checkpoint is best on dev, by what `train.best` looks at; several if equal."""
    assert run.config
    name, sign = ("bleu", 1) if run.config.train.best == "bleu" else ("loss", -1)
    found = {
        r["step"]: sign * value
        for r in run.rows
        if r["kind"] == "dev" and (value := r["metrics"].get(name)) is not None
    }
    best = max(found.values(), default=None)
    return frozenset(step for step, value in found.items() if value == best)


def result_fault(result: Any) -> str:
    """What is wrong with the JSON of an evaluation; "" if a table can be made of it."""
    wanted: tuple[tuple[str, type | tuple[type, ...]], ...] = (
        ("decode", str), ("checkpoint", str), ("data", str), ("vocabulary_sha256", str), ("options", dict),
        ("versions", dict), ("scores.sentences", int), ("scores.bleu", (int, float)),
        ("scores.bleu_signature", str), ("scores.chrf", (int, float)), ("scores.chrf_signature", str),
        ("scores.bleu_tok_lc", (int, float)), ("scores.bleu_tok_lc_signature", str),
        ("scores.length_ratio", (int, float)), ("scores.repetition", (int, float)),
        ("scores.by_length", list),
    )  # fmt: skip
    for key, kind in wanted:
        value = result
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not isinstance(value, kind):
            return f"not the result of an evaluation: {key} is {value!r}"
    for bucket in result["scores"]["by_length"]:
        if not (
            isinstance(bucket, Mapping)
            and isinstance(bucket.get("tokens"), str)
            and isinstance(bucket.get("sentences"), int)
            and isinstance(bucket.get("bleu"), (int, float))
        ):
            return f"not the result of an evaluation: scores.by_length has {bucket!r}"
    return ""


def stale(run: Trained, one: Evaluated) -> str:
    """Why an evaluation is not one of the best checkpoint on dev; "" if it is."""
    checkpoint, best = one.result["checkpoint"], best_steps(run)
    if best and checkpoint not in {f"step {step}" for step in best}:
        return f"of {checkpoint}, and best on dev is step {min(best)}: evaluate again"
    return ""


def _judge_evaluations(
    runs: Sequence[Trained], split: str, any_commit: bool, baseline: str
) -> tuple[dict[tuple[str, str], Evaluated], list[Apart]]:
    known = {way.name: way for way in WAYS}
    aside, kept = [], []
    for run in runs:
        for one in run.evaluations:
            reasons = [one.fault] if one.fault else _own_faults(run, one, split, known.get(one.name))
            if reasons:
                aside.append(Apart(run.name, f"{one.split}.{one.name}", tuple(reasons), _bleu(one)))
            else:
                kept.append((run, one))
    alike = {}
    others = [o for _, o in sorted(kept, key=lambda pair: pair[0].row != baseline)]
    for run, one in kept:
        peers = [o for o in others if o.name == one.name]
        reasons = [
            f"{what} {_short(own)}, that of the others {_short(most)}"
            for what, read in _TRAITS.items()
            if (own := read(one)) != (most := _common([read(o) for o in others]))
        ]
        for key in sorted({k for o in peers for k in o.result["options"]}):
            values = [o.result["options"].get(key, "not recorded") for o in peers]
            own, most = one.result["options"].get(key, "not recorded"), _common(values)
            if own != most:
                reasons.append(f"decoded with {key} = {own!r}, the others with {most!r}")
        if not any_commit:
            reasons += _other_commit((one.commit,), [(o.commit,) for o in others], "decoded")
        if reasons:
            aside.append(Apart(run.name, f"{one.split}.{one.name}", tuple(reasons), _bleu(one)))
        else:
            alike[run.name, one.name] = one
    return alike, aside


_TRAITS: dict[str, Callable[[Evaluated], Hashable]] = {
    "test data": lambda one: one.result["data"],
    "sentences:": lambda one: one.result["scores"]["sentences"],
    "BLEU signature": lambda one: one.result["scores"]["bleu_signature"],
    "chrF signature": lambda one: one.result["scores"]["chrf_signature"],
    "signature of the lower-case BLEU": lambda one: one.result["scores"]["bleu_tok_lc_signature"],
}


def _own_faults(run: Trained, one: Evaluated, split: str, way: Way | None) -> list[str]:
    """What sets an evaluation apart whatever the others are like."""
    if one.split != split:
        return [f"of another split; the table is about {split}"]
    if way is None:
        return ["another way of decoding, or another checkpoint, than the table has a column for"]
    asked = {"decode": one.result["decode"], **one.result["options"]}
    named = {"decode": way.how.decode, **way.how.options}
    wrong = {k: v for k, v in named.items() if asked.get(k) != v}
    found = [f"{key} = {asked.get(key)!r}, its name says {value!r}" for key, value in wrong.items()]
    if (lengths := one.result.get("lengths", PREDICTED)) != (TRUE if way.true_length else PREDICTED):
        found.append(f"decoded at lengths {lengths}, its name says otherwise")
    if why := stale(run, one):
        found.append(why)
    if run.vocabulary and one.result["vocabulary_sha256"] != run.vocabulary:
        found.append(f"of another vocabulary than its run has: {_short(one.result['vocabulary_sha256'])}")
    return found


def _bleu(one: Evaluated) -> float | None:
    return None if one.fault else float(one.result["scores"]["bleu"])


def _common(values: Sequence[Any]) -> Any:
    """The most frequent value; of equals the first; None of none."""
    counts = Counter(values)
    return max(counts, key=lambda v: counts[v], default=None)


def _short(value: Any) -> str:
    return (
        f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)
    )


def _grouped(runs: Iterable[Trained], key: Callable[[Trained], str]) -> list[list[Trained]]:
    found: dict[str, list[Trained]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return list(found.values())


# -- numbers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Mean over n seeds and their standard deviation (n - 1; None for one seed)."""

    mean: float
    sd: float | None
    n: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """Of the values that are there; None of none."""
    found = [v for v in values if v is not None]
    if not found:
        return None
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def update_seconds(run: Trained) -> float | None:
    """Seconds of one update, compiling and evaluating apart: the median over what was written down.

    A window of `train.log_every` updates is shorter after an evaluation, a checkpoint or a start, which
    set the clock back.
    """
    if not run.config:
        return None
    cadences = (run.config.train.eval_every, run.config.train.checkpoint_every)
    since, compiled, found = 0, 0.0, []
    for row in run.rows:
        step, timing = row["step"], row["timing"]
        if row["kind"] == "event" and row["metrics"].get("event") in ("started", "resumed"):
            since, compiled = step, 0.0
        if row["kind"] != "train" or not {"data_s", "step_s", "wait_s"} <= set(timing):
            continue
        start = max(since, *((step - 1) // every * every for every in cadences))
        total = timing.get("compile_s") or 0.0
        seconds = timing["data_s"] + timing["step_s"] + timing["wait_s"] - max(total - compiled, 0.0)
        if step > start and seconds > 0:
            found.append(seconds / (step - start))
        since, compiled = step, total
    return statistics.median(found) if found else None


def dev_curves(run: Trained, what: str = "bleu") -> dict[str, list[tuple[int, float]]]:
    """BLEU ("bleu") or nats a token ("nll") on dev by updates, by side that the run has: "ar", "nar"."""
    curves = {
        side: [
            (r["step"], float(value))
            for r in run.rows
            if r["kind"] == "dev" and (value := r["metrics"].get(f"{what}_{side}")) is not None
        ]
        for side in ("ar", "nar")
    }
    return {side: curve for side, curve in curves.items() if curve}


@dataclass(frozen=True)
class Versus:
    """A paired bootstrap of one run's way against the baseline's, or why there is none."""

    run: str
    way: str
    against: str  # "ar, AR beam 5"
    found: score.Comparison | None
    why_not: str = ""


References = Callable[[Trained, Evaluated], Sequence[Sequence[str]]]


def versus_baseline(judged: Judged, references: References, samples: int = SAMPLES) -> list[Versus]:
    """Every way of every other run against the same way of the baseline, else against its AR, beam 5 first.

    The baseline's run of the same seed is taken where there is one, else its first.

    Args:
      judged: what is alike.
      references: the wordings of an evaluation's sentences; raises ValueError where it cannot tell.
      samples: resamples.
    """
    found = []
    base = judged.rows.get(judged.baseline, [])
    seeds = {b.name: f"{b.row}, seed {b.config.seed}" for b in base if b.config and len(base) > 1}
    for run in judged.runs if base else ():
        if run.row == judged.baseline:
            continue
        for way in judged.ways():
            one = judged.evaluations.get((run.name, way.name))
            rival = _rival(judged, base, run, way) if one else None
            if one and rival:
                name = f"{seeds.get(rival[0].name, rival[0].name)}, {rival[2].label}"
                found.append(_versus(run, one, way, *rival[:2], name, references, samples))
    return found


def _rival(
    judged: Judged, base: Sequence[Trained], run: Trained, way: Way
) -> tuple[Trained, Evaluated, Way] | None:
    same_seed = sorted(base, key=lambda b: b.config is None or run.config is None
                       or b.config.seed != run.config.seed)  # fmt: skip
    known = {w.name: w for w in WAYS}
    rivals = (
        ("ar-b1", "ar-b5") if way.how.decode == "draft" else ("ar-b5", "ar-b1")
    )  # a draft writes greedy text
    for name, candidate in itertools.product(dict.fromkeys((way.name, *rivals)), same_seed):
        if one := judged.evaluations.get((candidate.name, name)):
            return candidate, one, known[name]
    return None


def _versus(
    run: Trained, one: Evaluated, way: Way, base: Trained, other: Evaluated, name: str,
    references: References, samples: int,
) -> Versus:  # fmt: skip
    try:
        for who, what in ((run, one), (base, other)):
            if what.hypotheses is None:
                raise ValueError(f"{who.name} has no {what.split}.{what.name}.hyp")
        wordings = references(run, one)
        assert one.hypotheses is not None
        assert other.hypotheses is not None
        found = score.compare(other.hypotheses, one.hypotheses, wordings, samples=samples)
        for who, what, bleu in ((run, one, found.bleu_b), (base, other, found.bleu_a)):
            if abs(bleu - what.result["scores"]["bleu"]) > 0.005:
                raise ValueError(
                    f"{who.name}: {what.name}.hyp scores {bleu:.2f}, its .json says "
                    f"{what.result['scores']['bleu']:.2f}: evaluate again"
                )
    except ValueError as error:
        return Versus(run.name, way.name, name, None, str(error))
    return Versus(run.name, way.name, name, found)


@dataclass(frozen=True)
class Speeds:
    """Sentences a second by (row, system of bench, batch), as far as they may be compared."""

    found: Mapping[tuple[str, str, int], float]
    device: str
    apart: tuple[Apart, ...]

    def ratio(self, row: str, system: str, batch: int, base: str, rival: str) -> float | None:
        """How many times faster than `rival` of the row `base`; None where either was not measured."""
        own, other = self.found.get((row, system, batch)), self.found.get((base, rival, batch))
        return own / other if own and other else None


def speeds(judged: Judged, any_commit: bool = False) -> Speeds:
    """What `bench` measured: the first seed of each row that has it, on one device, by one commit."""
    aside = [Apart(r.name, "bench.json", (r.bench_fault,)) for r in judged.runs if r.bench_fault]
    found, seen = {}, set()
    measured = sorted(
        [run for run in judged.runs if run.bench and run.config], key=lambda r: r.row != judged.baseline
    )
    device = _common([run.bench["device"] for run in measured if run.bench]) or ""
    commits = [((run.bench or {}).get("versions", {}).get("commit") or UNKNOWN,) for run in measured]
    for run, commit in zip(measured, commits, strict=True):
        assert run.bench
        assert run.config
        reasons = []
        if run.bench["device"] != device:
            reasons.append(f"measured on {run.bench['device']}, the others on {device}")
        if not any_commit:
            reasons += _other_commit(commit, commits, "measured")
        if run.config.decode.candidates != 3:
            reasons.append(f"measured with {run.config.decode.candidates} length candidates, not 3")
        if reasons:
            aside.append(Apart(run.name, "bench.json", tuple(reasons)))
        elif run.row not in seen:
            seen.add(run.row)
            for one in run.bench["decoding"]:
                found[run.row, one["system"], one["batch"]] = float(one["sentences/s"])
    return Speeds(found, device, tuple(aside))


def bench_fault(found: Any) -> str:
    """What is wrong with a bench.json; "" if a table can be made of it."""
    try:
        found["device"], found["versions"].get("commit")
        for one in found["decoding"]:
            one["system"], int(one["batch"]), float(one["sentences/s"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"not what bench writes: {type(error).__name__}: {error}"
    return ""


# -- tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Cells as they are printed; a blank is something that is not there."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    left: int = 1  # columns of words, from the left

    def markdown(self) -> str:
        """For GitHub and its like."""
        marks = ["---" if i < self.left else "---:" for i in range(len(self.columns))]
        lines = [self.columns, marks, *self.rows]
        text = "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)
        return f"### {self.title}\n\n{text}\n" + (f"\n{self.note}\n" if self.note else "")

    def html(self) -> str:
        """A section of a page."""

        def line(cells: Sequence[str], tag: str) -> str:
            ends = (
                f"<{tag}{'' if i < self.left else ' class=n'}>{html.escape(c)}</{tag}>"
                for i, c in enumerate(cells)
            )
            return f"<tr>{''.join(ends)}</tr>"

        body = "\n".join(line(row, "td") for row in self.rows)
        note = f"<p class=note>{html.escape(self.note)}</p>" if self.note else ""
        return (
            f"<h3>{html.escape(self.title)}</h3>\n<div class=wide><table>\n<thead>{line(self.columns, 'th')}"
            f"</thead>\n<tbody>\n{body}\n</tbody></table></div>\n{note}\n"
        )


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _number(value: Spread | None, form: str, factor: float = 1) -> str:
    if value is None:
        return ""
    mean = form.format(factor * value.mean)
    return mean if value.sd is None else f"{mean} ± {form.format(factor * value.sd)} ({value.n})"


def score_of(judged: Judged, row: str, way: str, key: str = "bleu") -> Spread | None:
    """A score of a row, over its seeds."""
    return spread([one.result["scores"].get(key) for _, one in judged.of(row, way)])


def quality(judged: Judged) -> Table:
    """BLEU of every row in every way."""
    shown = judged.ways()
    rows = []
    for row, runs in judged.rows.items():
        cells = [_number(score_of(judged, row, way.name), "{:.2f}") for way in shown]
        rows.append((row, str(len(runs)), f"{runs[0].updates:,}", *cells))
    columns = ("row", "seeds", "updates", *(way.label for way in shown))
    note = "BLEU of the checkpoint that is best on dev.  With several seeds: mean ± s.d. (number of seeds)."
    return Table(f"BLEU, {judged.split}", columns, tuple(rows), note)


def details(judged: Judged, versus: Sequence[Versus]) -> Table:
    """A line for each row and way: all scores, and the bootstrap against the baseline."""
    names = {run.name: run.row for run in judged.runs}
    rows = []
    for row, way in itertools.product(judged.rows, judged.ways()):
        pairs = judged.of(row, way.name)
        if not pairs:
            continue
        cells = [
            _number(score_of(judged, row, way.name, key), form, factor)
            for key, form, factor in (
                ("bleu", "{:.2f}", 1), ("chrf", "{:.2f}", 1), ("bleu_tok_lc", "{:.2f}", 1),
                ("length_ratio", "{:.3f}", 1), ("repetition", "{:.2f}", 100),
            )
        ]  # fmt: skip
        passes = _number(spread([one.result.get("passes_per_sentence") for _, one in pairs]), "{:.1f}")
        mine = [v for v in versus if names[v.run] == row and v.way == way.name and v.found]
        told = [
            "; ".join(dict.fromkeys(v.against for v in mine)),
            "; ".join(f"{v.found.difference:+.2f}" for v in mine if v.found),
            "; ".join("{:+.2f} to {:+.2f}".format(*v.found.interval) for v in mine if v.found),
            "; ".join(f"{v.found.p_value:.4f}" for v in mine if v.found),
        ]
        rows.append((row, way.label, *cells, passes, *told))
    columns = (
        "row", "decoding", "BLEU", "chrF", "BLEU tokenised lower-case", "length ratio", "repeated tokens, %",
        "passes", "compared with", "difference", "95 % interval", "p",
    )  # fmt: skip
    notes = []
    if judged.evaluations:
        one = next(iter(judged.evaluations.values())).result["scores"]
        notes += [
            f"BLEU {one['bleu_signature']}, chrF {one['chrf_signature']}.",
            f"BLEU tokenised lower-case {one['bleu_tok_lc_signature']}: close to the figures of papers that "
            "report that, and not to be put beside a cased figure.",
        ]
    notes += [
        f"Difference, 95 % interval and p: paired bootstrap as sacreBLEU computes it, {n:,} resamples, "
        "with one tail, so about half of a two-sided p; with several seeds one for each.  Passes are those "
        "of the decoder, re-scoring one more."
        for n in sorted({v.found.samples for v in versus if v.found})
    ]
    note = "  ".join(notes)
    return Table("Scores", columns, tuple(rows), note, left=2)


def by_length(judged: Judged) -> Table | None:
    """BLEU by the length of the reference, for the headline ways."""
    curves = length_curves(judged)
    sized = buckets(judged)
    if not curves:
        return None
    labels = {way.name: way.label for way in WAYS}
    rows = tuple(
        (row, labels[way], *(_number(curve.get(name), "{:.2f}") for name, _ in sized))
        for (row, way), curve in curves.items()
    )
    columns = ("row", "decoding", *(f"{name} ({count})" for name, count in sized))
    note = "Tokens of the reference (sentences): BLEU over the orders of n-grams that occur."
    return Table("BLEU by length of the reference", columns, rows, note, left=2)


def length_curves(judged: Judged) -> dict[tuple[str, str], dict[str, Spread]]:
    """For each (row, headline way): BLEU by bucket."""
    found = {}
    for row, way in itertools.product(judged.rows, HEADLINES):
        pairs = judged.of(row, way)
        curve = {}
        for name, _ in buckets(judged):
            values = [b["bleu"] for _, one in pairs for b in one.result["scores"]["by_length"]
                      if b["tokens"] == name]  # fmt: skip
            if one := spread(values):
                curve[name] = one
        if curve:
            found[row, way] = curve
    return found


def buckets(judged: Judged) -> list[tuple[str, int]]:
    """Names and sizes of the length buckets, the short ones first."""
    scores = [one.result["scores"] for one in judged.evaluations.values()]
    sizes = {b["tokens"]: b["sentences"] for s in scores for b in s["by_length"]}

    def lowest(name: str) -> tuple[int, int]:
        return (0 if name.startswith("<") else 2 if name.startswith(">") else 1,
                int(re.findall(r"\d+", name)[0]))  # fmt: skip

    return sorted(sizes.items(), key=lambda item: lowest(item[0]))


def speed(judged: Judged, measured: Speeds) -> Table | None:
    """Sentences a second, against greedy and beam of the baseline row and of the row itself."""
    systems = [way for way in WAYS if any(way.label == s for _, s, _ in measured.found)]
    rows = []
    for row, way in itertools.product(judged.rows, systems):
        cells: list[str] = []
        for batch in SPEED_BATCHES:
            rate = measured.found.get((row, way.label, batch))
            cells.append(f"{rate:,.1f}" if rate else "")
            for base, rival in itertools.product(
                (judged.baseline, row), (ways.GREEDY.label, ways.BEAM.label)
            ):
                ratio = measured.ratio(row, way.label, batch, base, rival)
                cells.append(f"{ratio:.2f}" if ratio else "")
        if any(cells):
            rows.append((row, way.label, *cells))
    if not rows:
        return None
    columns = tuple(
        f"{what}, batch {batch}"
        for batch in SPEED_BATCHES
        for what in (
            "sentences/s", f"x {judged.baseline} greedy", f"x {judged.baseline} beam 5",
            "x own greedy", "x own beam 5",
        )
    )  # fmt: skip
    note = f"Measured by janus-jax bench on {measured.device}, compiling apart; x: times as fast."
    return Table("Speed", ("row", "decoding", *columns), tuple(rows), note, left=2)


def timed(judged: Judged) -> tuple[str, dict[str, Spread | None]]:
    """The kind of device that most runs were trained on, and seconds an update there by row."""
    device = _common([run.devices for run in judged.runs if len(run.devices) == 1])
    seconds = {
        row: spread([update_seconds(run) for run in runs if run.devices == device])
        for row, runs in judged.rows.items()
    }
    return (device[0] if device else ""), seconds


def cost(judged: Judged) -> Table:
    """What training took, against the baseline row."""
    device, seconds = timed(judged)
    base = seconds.get(judged.baseline)
    rows = []
    for row, runs in judged.rows.items():
        own, updates = seconds[row], runs[0].updates
        rows.append(
            (
                row,
                f"{updates:,}",
                f"{own.mean:.4g}" if own else "",
                f"{own.mean * updates / 3600:.3g}" if own else "",
                f"{own.mean / base.mean:.2f}" if own and base else "",
            )
        )
    where = f" on {device}" if device else ""
    columns = ("row", "updates", "s an update", "hours of updates", f"an update, {judged.baseline} = 1")
    note = (
        f"Medians of what training wrote down{where}, compiling, evaluating on dev and saving apart.  What "
        "else the machine did is in them."
    )
    return Table("Training cost", columns, tuple(rows), note)


def settings(judged: Judged) -> Table:
    """What each row is, as its configuration has it: where it differs from the baseline, else from ours."""
    base = next(iter(judged.rows.get(judged.baseline, ())), None)
    reference = base.config if base and base.config else Config()
    rows = []
    for row, runs in judged.rows.items():
        config = runs[0].config or Config()
        differing = configuration.differences(reference, config)
        told = [f"{key} = {own}" for key, (_, own) in differing.items()
                if _matches(key, ABOUT) and not _matches(key, (*IDLE, "seed"))]  # fmt: skip
        seeds = ", ".join(str(run.config.seed) for run in runs if run.config)
        rows.append((row, seeds, "; ".join(told)))
    name = judged.baseline if base else "the defaults"
    return Table("Rows", ("row", "seeds", f"differs from {name} in"), tuple(rows), left=3)


def ablations(judged: Judged) -> dict[str, dict[str, Spread]]:
    """For each ablation, and the row it changes: BLEU in the headline ways that it has."""
    found = {
        row: {way: one for way in HEADLINES if (one := score_of(judged, row, way))}
        for row, runs in judged.rows.items()
        if runs[0].config and runs[0].config.loss.objective == ABLATED
    }
    found = {row: moved for row, moved in found.items() if moved}
    return found if ABLATED in found and len(found) > 1 else {}


def apart(judged: Judged, measured: Speeds, versus: Sequence[Versus] = ()) -> list[Table]:
    """What is not in the tables, and why; what was not evaluated."""
    tables = []
    if judged.apart_runs:
        rows = tuple((one.run, "; ".join(one.reasons)) for one in judged.apart_runs)
        note = "None of these is in a table or a mean."
        tables.append(Table("Set apart: runs", ("run", "why"), rows, note, left=2))
    others = [*judged.apart_evaluations, *measured.apart]
    if others:
        told = [
            (o.run, o.what, "" if o.bleu is None else f"{o.bleu:.2f}", "; ".join(o.reasons)) for o in others
        ]
        columns = ("run", "evaluation", "BLEU", "why")
        tables.append(Table("Set apart: evaluations and measurements", columns, tuple(told), left=4))
    failed = tuple((v.run, v.way, v.against, v.why_not) for v in versus if not v.found)
    if failed:
        tables.append(Table("Not compared", ("run", "evaluation", "with", "why"), failed, left=4))
    if judged.missing:
        rows = tuple((run, ", ".join(absent)) for run, absent in judged.missing.items())
        tables.append(Table("Not evaluated", ("run", "missing"), rows, left=2))
    return tables


TIMED = ("seconds_per_update", "sentences_per_s_batch_1", "sentences_per_s_batch_128")  # columns of the clock
CSV_COLUMNS = (
    "set", "row", "run", "seeds", "status", "updates", "split", "way", "bleu", "bleu_sd", "chrf", "chrf_sd",
    "bleu_tok_lc", "bleu_tok_lc_sd", "length_ratio", "length_ratio_sd", "repetition", "repetition_sd",
    "passes", "against", "difference", "interval_low", "interval_high", "p", "resamples", "bleu_signature",
    "chrf_signature", "bleu_tok_lc_signature", "commit", "device", *TIMED,
)  # fmt: skip


def csv_rows(
    name: str, judged: Judged, versus: Sequence[Versus], measured: Speeds
) -> Iterator[dict[str, Any]]:
    """One line for each row and way, with every digit; then one for each run that is set apart.

    What is compared seed by seed holds a value for each seed, parted by "; ".
    """
    names = {run.name: run.row for run in judged.runs}
    device, seconds = timed(judged)
    for row, runs in judged.rows.items():
        base = {"set": name, "row": row, "seeds": len(runs), "status": "ok", "updates": runs[0].updates}
        base |= {"commit": " ".join(runs[0].commits)}
        if own := seconds[row]:
            base |= {"device": device, "seconds_per_update": own.mean}
        there = [way for way in judged.ways() if judged.of(row, way.name)]
        for way in there:
            pairs = judged.of(row, way.name)
            run, one = pairs[0]
            scores = one.result["scores"]
            line = base | {"run": run.name, "split": judged.split, "way": way.name}
            line |= {k: scores[k] for k in ("bleu_signature", "chrf_signature", "bleu_tok_lc_signature")}
            for key in ("bleu", "chrf", "bleu_tok_lc", "length_ratio", "repetition"):
                if found := score_of(judged, row, way.name, key):
                    line |= {key: found.mean, f"{key}_sd": found.sd}
            passes = spread([e.result.get("passes_per_sentence") for _, e in pairs])
            line["passes"] = passes.mean if passes else None
            mine = [(v.against, v.found) for v in versus
                    if names[v.run] == row and v.way == way.name and v.found]  # fmt: skip
            compared: dict[str, list[Any]] = {
                "against": list(dict.fromkeys(against for against, _ in mine)),
                "difference": [c.difference for _, c in mine],
                "interval_low": [c.interval[0] for _, c in mine],
                "interval_high": [c.interval[1] for _, c in mine],
                "p": [c.p_value for _, c in mine],
            }
            for key, values in compared.items():
                line[key] = values[0] if len(values) == 1 else "; ".join(map(str, values))
            line["resamples"] = mine[0][1].samples if mine else None
            for batch in SPEED_BATCHES:
                rate = measured.found.get((row, way.label, batch))
                line[f"sentences_per_s_batch_{batch}"] = rate
            yield line
        if not there:
            yield base | {"run": runs[0].name}
    for gone in judged.apart_runs:
        why = "; ".join(gone.reasons)
        yield {"set": name, "row": Trained(gone.run).row, "run": gone.run, "status": why}


def to_csv(rows: Iterable[Mapping[str, Any]], timed: bool = True) -> str:
    """CSV with a header; without `timed`, only what does not depend on the clock."""
    columns = [c for c in CSV_COLUMNS if timed or c not in TIMED]
    memory = io.StringIO()
    writer = csv.DictWriter(memory, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: "" if v is None else repr(v) if isinstance(v, float) else v for k, v in row.items()}
        )
    return memory.getvalue()
