"""The command line: `janus-jax VERB`, also as `python -m janus_jax VERB`.

A verb's own flags are parsed by argparse.  `--config.any.key=value` goes through ml_collections'
config flags, on a private set of absl flags, so that nothing here depends on global state.
Whatever a user can get wrong ends as `janus-jax: error: ...` on standard error:

  exit 2    a command line that cannot be understood, in one line
  exit 1    everything else that is expected to happen: files, data, configurations, full disks
  exit 130, 141, 143    stopped by Ctrl-C; the reader of a pipe went away; ended by SIGTERM

Anything else is a defect and keeps its traceback; JANUS_JAX_DEBUG=1 keeps it always.

Room: shell.  Imports of jax and of what needs it lie inside the verbs: `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import os
import re
import shlex
import signal
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags

import janus_jax
from janus_jax import config as configuration
from janus_jax import paths
from janus_jax.config import Config, ConfigError, DecodeConfig
from janus_jax.paths import CACHE, AnyPath, as_path

PROGRAM = "janus-jax"
DEBUG = "JANUS_JAX_DEBUG"
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE, EXIT_TERMINATED = 1, 2, 130, 141, 143


class UsageError(ValueError):
    """A command line that cannot be understood; one line that names the argument and the remedy."""


class ConfigFileError(ValueError):
    """A configuration file that cannot be used; the message names the file and, where known, the line."""


class Terminated(BaseException):
    """SIGTERM has come: as with Ctrl-C, what is half written goes on the way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; `argv` without the program's name, by default the command line.

    Returns:
      The exit code: 0, or one of those at the head of the module (`train` has 75 of its own: stopped
      on request and saved).
    """
    code = _run(argv)
    processes = sys.modules.get("janus_jax.processes")  # unless nobody has needed it yet
    return processes.leave(code) if processes else code


def _run(argv: Sequence[str] | None) -> int:
    try:
        args, overrides = parse(sys.argv[1:] if argv is None else argv)
        code = args.run(args, overrides)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()  # a pipe without a reader shows here, not when Python has left us
        return code
    except SystemExit as done:  # argparse, after --help and --version
        return int(done.code or 0)
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # else Python complains when it flushes at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)
    except Terminated:
        return _complain("terminated", EXIT_TERMINATED)
    except UsageError as error:
        return _complain(str(error), EXIT_USAGE)
    except Exception as error:
        processes = sys.modules.get("janus_jax.processes")
        if processes and processes.is_loss(error):
            processes.mourn(error)
        message = explain(error)
        if message is None and not (processes and processes.several()):
            raise
        if message is None:  # raised on, it would wait for the others, which wait for this process
            traceback.print_exc()
        return _complain(message or "a defect; see above", EXIT_FAILED)


def explain(error: Exception) -> str | None:
    """What to tell the user about an expected error; None for one that is a defect of the program."""
    if type(error).__module__.partition(".")[0] == janus_jax.__name__:
        return str(error)
    if (message := paths.explain(error)) is not None:
        return message
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        first_line = str(error).partition("\n")[0]
        return (
            f"out of memory: {first_line[:200]}; to train, lower batch.tokens or raise train.microbatches; "
            "to decode, lower --batch_size or --tokens"
        )
    return None


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Where SIGTERM raises Terminated; Python allows that in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: types.FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _complain(message: str, code: int) -> int:
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exc()
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return code


# -- verbs ----------------------------------------------------------------------------------------

Overrides = list[tuple[str, str]]  # (dotted key, value as it was written)


def _prepare(args: argparse.Namespace, overrides: Overrides) -> int:
    config = resolve_config(args.config, args.workdir, overrides)
    from janus_jax import prepare, run

    with run.locked(args.workdir):
        run.claim(args.workdir, config)
        prepare.prepare(config, args.workdir)
    return 0


def _train(args: argparse.Namespace, overrides: Overrides) -> int:
    config = resolve_config(args.config, args.workdir, overrides)
    from janus_jax import train

    use_compilation_cache()
    start_devices(config, args)
    return train.train(config, args.workdir)


def _evaluate(args: argparse.Namespace, _: Overrides) -> int:
    from janus_jax import evaluate, prepare, processes, run
    from janus_jax.translator import Translator

    use_compilation_cache()
    opened = run.open_run(args.workdir)
    start_devices(opened.config, args)
    processes.main_first(lambda: prepare.bring_data(opened.config, opened.folder))
    translator = Translator.from_run(args.workdir, args.checkpoint)
    modes = args.decode or [mode for mode in translator.modes if mode != "draft"]
    options = {mode: _options_for(mode, modes, args) for mode in modes}
    for mode in modes:
        translator.options(mode, **options[mode])  # complains before the first mode is decoded
    if args.true_length and "nar" not in modes:
        raise UsageError(f"--true_length is about --decode=nar, this is --decode={','.join(modes)}")
    if args.refine and args.true_length:
        raise UsageError("--refine draws NAR at the lengths that it predicts: leave out --true_length")
    if args.refine:
        translator.options("nar")
    split, folder = args.split or opened.config.data.test_split, args.output_dir or opened.folder / "eval"
    evaluations = [
        evaluate.evaluate(
            opened,
            translator,
            split,
            mode,
            checkpoint=args.checkpoint,
            limit=args.limit,
            batch_size=args.batch_size,
            true_length=args.true_length and mode == "nar",
            folder=folder,
            **options[mode],
        )
        for mode in modes
    ]
    if not processes.is_main():
        return 0
    evaluate.print_scores(evaluations)
    evaluate.print_examples(evaluations, args.show)
    print()
    for one in evaluations:
        print(f"written: {folder / f'{split}.{one.name}'}.hyp, .json")
    if args.refine:
        sources = evaluations[0].sources[: args.refine]
        for path in evaluate.draw_refinements(translator, sources, folder, **options.get("nar", {})):
            print(f"written: {path}")
    return 0


@_sigterm_raises()
def _translate(args: argparse.Namespace, _: Overrides) -> int:
    from janus_jax import run, translate
    from janus_jax.translator import Translator

    if args.decode == "auto" and args.nbest > 1:
        raise UsageError(
            f"--nbest={args.nbest} needs a mode, such as --decode=ar: --decode=auto chooses by the best one"
        )
    translate.check_output(args.output)
    lines = translate.read_lines(args.input)
    use_compilation_cache()
    opened = run.open_run(args.workdir)
    start_devices(opened.config)
    translator = Translator.from_run(args.workdir, args.checkpoint)
    mode = args.decode or translator.modes[0]
    options = _options_for(mode, [mode], args)
    if args.keep is not None and mode != "auto":
        raise UsageError(f"--keep is an option of --decode=auto, this is --decode={mode}")
    if mode == "auto":
        from janus_jax import auto

        way = auto.choose(opened, translator, args.keep or auto.KEEP, args.batch_size, options)
        mode, options = way.decode, {**options, **way.options}
    translator.options(mode, nbest=args.nbest, **options)
    with translate.output(args.output, keep=True) as file:
        translate.translate(
            translator, lines, file, mode, nbest=args.nbest, batch_size=args.batch_size, **options
        )
    return 0


@_sigterm_raises()
def _export(args: argparse.Namespace, _: Overrides) -> int:
    from janus_jax import export, run
    from janus_jax.translator import modes_of

    opened = run.open_run(args.workdir)
    mode = args.decode or modes_of(opened.config.loss)[0]
    start_devices(opened.config)
    manifest = export.export(
        opened,
        args.output,
        mode,
        checkpoint=args.checkpoint,
        batch_size=args.batch_size,
        platforms=tuple(dict.fromkeys(args.platforms.split(","))),
        **_options_for(mode, [mode], args),
    )
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(
        f"written: {args.output}: {mode} of {manifest['checkpoint']} for {', '.join(manifest['platforms'])}, "
        f"{len(manifest['files'])} files, {size / 1e6:.1f} MB"
    )
    print(f"try: python {shlex.quote(str(args.output / 'load.py'))} < source.txt > target.txt")
    return 0


def _plot(args: argparse.Namespace, _: Overrides) -> int:
    from janus_jax import plots, report

    runs = {str(folder): report.read_metrics(folder) for folder in args.workdir}
    path = args.output or args.workdir[0] / "training.png"
    plots.plot_training(runs if len(runs) > 1 else next(iter(runs.values())), path)
    print(f"written: {path}")
    return 0


def _bench(args: argparse.Namespace, overrides: Overrides) -> int:
    config = resolve_config(args.config, args.workdir, overrides)
    from janus_jax import bench

    use_compilation_cache()
    start_devices(config)
    return bench.bench(config, args.workdir)


def _compile(args: argparse.Namespace, overrides: Overrides) -> int:
    config = resolve_config(args.config, args.workdir, overrides)
    from janus_jax import compile as verb

    if args.topology == verb.LOCAL:
        use_compilation_cache()
        start_devices(config)
    memory = args.memory * 2**30 if args.memory else None
    return verb.run(
        config, args.topology, args.slices, programs=args.programs.split(","), memory=memory, to=args.json
    )


def _report(args: argparse.Namespace, _: Overrides) -> int:
    from janus_jax import results

    return results.report_on(
        args.folder,
        args.output,
        baseline=args.baseline,
        split=args.split,
        samples=args.samples,
        any_commit=args.any_commit,
    )


def _demo(args: argparse.Namespace, overrides: Overrides) -> int:
    config = resolve_config(args.config, args.workdir, overrides)
    from janus_jax import demo

    use_compilation_cache()
    start_devices(config)
    return demo.demo(config, args.workdir)


def _options_for(mode: str, modes: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """The decoding options given on the command line that matter to `mode`.

    Raises:
      UsageError: one that matters to none of `modes`.
    """
    given = {name: value for name in DECODE_HELP if (value := getattr(args, name)) is not None}
    for name in given:
        if (only := ONLY_FOR.get(name)) and only not in modes:
            raise UsageError(f"--{name} is an option of --decode={only}, this is --decode={','.join(modes)}")
    return {name: value for name, value in given.items() if ONLY_FOR.get(name, mode) == mode}


def join_others(args: argparse.Namespace, config: Config) -> None:
    """Makes this process one of several, where the command line says so."""
    given = (args.coordinator, args.processes, args.process_id)
    if not args.distributed and given == (None, None, None):
        return
    from janus_jax import processes

    processes.join(
        *given,
        startup_timeout=config.mesh.startup_timeout,
        heartbeat_timeout=config.mesh.heartbeat_timeout,
    )


def use_compilation_cache() -> None:
    """Keeps compiled programs in `paths.cache_root`; $JANUS_JAX_CACHE set to "" switches it off."""
    if os.environ.get(CACHE) == "":
        return
    folder = str(paths.cache_root())
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        print(f"{PROGRAM}: compiled programs are not kept: {folder}: {error.strerror}", file=sys.stderr)
        return
    from janus_jax import mesh

    mesh.set_compilation_cache(folder)


def start_devices(config: Config, args: argparse.Namespace | None = None) -> None:
    """Starts jax on what there is, as `config.mesh` wants it; with `args`, beside the others they name."""
    from janus_jax import mesh

    if config.mesh.portable:
        mesh.ask_for_portable_numbers()
    if args is not None:
        join_others(args, config)
    mesh.check_devices()


# -- the command line -----------------------------------------------------------------------------

DESCRIPTION = """\
JANUS: one Transformer that writes autoregressively (ar) and non-autoregressively (nar).

  janus-jax prepare   --config=configs/multi30k_deen.py --workdir=runs/m30k
  janus-jax train     --config=configs/multi30k_deen.py --workdir=runs/m30k
  janus-jax evaluate  --workdir=runs/m30k --decode=ar,nar
  janus-jax translate --workdir=runs/m30k --decode=nar < source.txt > target.txt

A run directory (--workdir) holds everything there is to a run: configuration, vocabulary, data,
metrics, checkpoints, scores.  It may be gs://bucket/folder, but for the
data, which then stay on each machine.  `janus-jax VERB --help` tells what a verb reads and writes.
"""

EPILOG = """\
environment:
  JANUS_JAX_CACHE   the folder of this machine where compiled programs are kept (default
                    ~/.cache/janus_jax; "" for nowhere), and the data of runs on gs://
  JANUS_JAX_DEBUG   1 shows the traceback of every error

exit codes: 0 done, 1 failed, 2 not understood, 75 training stopped on request and saved (start it
again), 76 or 134 another process was lost
"""

CONFIG_EPILOG = """\
configuration:
  --config.KEY=VALUE overrides a key: --config.model.dim=512 --config.batch.buckets=16,32
  --config.train.tensorboard=false.  janus_jax/config.py lists every key and its meaning.
"""

PREPARE = """\
Make what training needs: the data set, the vocabulary, and the encoded splits.

reads    the raw files of data.raw_dir, or downloads them, or generates them (data.name = phrases)
writes   WORKDIR/config.json, vocab.model, vocab.json, and data/ (or data.dir)

What is there already is checked and kept.  `train` does this by itself where it has not been done.

  janus-jax prepare --config=configs/multi30k_deen.py --workdir=runs/m30k --config.data.raw_dir=raw
"""

TRAIN = """\
Train, or go on with training: the newest checkpoint in WORKDIR is resumed by itself.

reads    WORKDIR, and what `prepare` reads if it has not been run
writes   WORKDIR/metrics.jsonl, tensorboard/, checkpoints/, training.png

SIGTERM or Ctrl-C saves and stops (exit code 75); the same command goes on from there, with the same
batches and random numbers as if nothing had happened.

  janus-jax train --config=configs/multi30k_deen.py --workdir=runs/m30k
  janus-jax train --workdir=runs/m30k --config.train.steps=40000    go on with a run, for longer
"""

EVALUATE = """\
Decode a split, score it, print a table.

reads    WORKDIR
writes   WORKDIR/eval/SPLIT.NAME.hyp (a line per example, in order) and SPLIT.NAME.json beside it
         (scores with signatures, speed, options, versions); NAME tells the way of decoding

  janus-jax evaluate --workdir=runs/m30k --split=test_2016_flickr --decode=ar
  janus-jax evaluate --workdir=runs/m30k --decode=ar,nar --iterations=4 --candidates=3 --refine=2
"""

TRANSLATE = """\
Translate lines: one line out for each line in, always and in order.

reads    WORKDIR, and text from standard input (UTF-8, one sentence per line)
writes   translations to standard output, progress and reports of cut lines to standard error

All input is read and checked first: an input that is not UTF-8 is an error that names the line,
before anything is written.  Blank lines stay blank.  A line longer than the model was trained for
is cut and reported.

  janus-jax translate --workdir=runs/m30k --decode=nar --iterations=4 < source.txt > target.txt
"""

EXPORT = """\
Export a run for serving: a folder that decodes with jax alone, one way, with these options.

reads    WORKDIR
writes   DIR: manifest.json, params.npz, programs/ (StableHLO, for several platforms), vocab.model,
         vocab.json, and load.py, which runs it

DIR appears whole or not at all; an export that is there is replaced.

Where it runs it needs the packages jax, flatbuffers and sentencepiece, and nothing of this one.  What it
writes equals what `translate` writes with the same options.

  janus-jax export --workdir=runs/m30k --output=m30k-nar --decode=nar --iterations=4
  python m30k-nar/load.py < source.txt > target.txt
"""

BENCH = """\
Measure training and decoding speed and memory, on the model of a run or on random weights.

  janus-jax bench --workdir=runs/m30k
  janus-jax bench --config=configs/multi30k_deen.py
"""

COMPILE = """\
Compile for TPUs or GPUs that are not here, and report what each chip would need: memory and whether it fits,
FLOPs, collectives, the roofline and the time it predicts; of GPUs how many kernels a program is cut into.

  janus-jax compile --config=configs/wmt14_ende.py --topology=v5e:16x16 --slices=2
  janus-jax compile --config=configs/wmt14_ende.py --topology=h200:8 --slices=2   two hosts of eight GPUs
  janus-jax compile --config=configs/demo.py --topology=h100:1 --config.decode.tokens=1   a sentence alone
  janus-jax compile --config=configs/demo.py --topology=local     run here, measured beside predicted

Needs the extra [compilers] (or, for TPUs alone, [tpu]): libtpu and jax's plugin for CUDA; no TPU and no
GPU.  v4 and v5p have slices in three dimensions (v4:4x4x8), v5e and v6e in two; a100, a100-40gb, h100
and h200 come with how many a host has.  Lines marked (p) are predictions of a model.

exit codes: 1 when it does not fit; the nearest setting that does (micro-batches, remat, fsdp) is
compiled too and named.
"""

PLOT = """\
Draw the training curves: every term of the loss, dev BLEU, gradient norm, learning rate.

reads    WORKDIR/metrics.jsonl; several runs, separated by commas, are laid over each other
writes   WORKDIR/training.png (of the first), or the file named by --output (.png, .svg or .pdf)

  janus-jax plot --workdir=runs/janus,runs/ar --output=curves.svg
"""

REPORT = """\
Make tables and pictures from one run, or from the runs below a folder: scores, speed, cost of training, a
paired bootstrap.

reads    FOLDER, where it is a run directory; else those below it, up to five folders down: one table for
         each folder that holds some.  A directory's name is that of its row; ROW-s1, ROW-s2 are seeds of ROW
writes   FOLDER/table.md, table.csv, report.html (all in one file) and pictures, or the same in --output

Runs that are unfinished, broken, of other settings or of another commit, and evaluations of another
checkpoint, split, vocabulary, scorer or set of options, are set apart with the reason, never averaged in.
What is missing is a blank.

  janus-jax report runs/demo
  janus-jax report runs/tables/multi30k
  janus-jax report runs/tables/multi30k --baseline=cmlm --output=cmlm_report
"""

DEMO = """\
Everything once, in minutes: train a small model on generated text, decode it both ways, draw pictures.

reads    nothing: the data set is generated
writes   WORKDIR, a run directory like any other, and in it training.png and refinement.png

  janus-jax demo --config=configs/demo.py --workdir=runs/demo
"""

# Help of the flags made from config.DecodeConfig, by mode.
DECODE_HELP = {
    "beam": "ar: hypotheses kept; 1 is greedy",
    "length_penalty": "ar: a hypothesis scores sum log p / length ** this",
    "max_length_a": "at most A * source length + B tokens: A",
    "max_length_b": "at most A * source length + B tokens: B",
    "iterations": "nar: decoder passes, T",
    "candidates": "nar: target lengths tried",
    "early_stop": "nar: a sentence stops when a pass changes nothing; faster, and worse",
    "rescore": "nar: choose among candidates by the AR score of the same model",
    "draft_block": "draft: tokens that AR verifies in a pass; changes the speed alone while draft_top_k is 1",
    "draft_branches": "draft: other symbols for its places, verified beside it: fewer passes, each wider",
    "draft_top_k": "draft: accepted among AR's best so many; 1 (the default) writes what greedy AR writes",
    "draft_margin": "draft: with draft_top_k above 1, and at most this below AR's best, in log p",
    "ban_unk": "never write the unknown symbol",
    "tokens": "slots of one decoding batch (rows x beam or candidates x length); results do not depend on it",
}
ONLY_FOR = {
    name: help_text.partition(":")[0]
    for name, help_text in DECODE_HELP.items()
    if name != "length_penalty" and help_text.startswith(("ar:", "nar:", "draft:"))
}


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    """The flags of the verb, and the overrides of configuration keys.

    A flag may be written with underscores or hyphens.

    Raises:
      UsageError: anything that is not understood.
    """
    rest, overrides = split_overrides(argv)
    parser, verbs = _parser()
    args, unknown = parser.parse_known_args([_underscored(a) for a in rest])
    takes_config = "config" in args
    if unknown:
        raise UsageError(_unknown(unknown[0], verbs[args.verb], takes_config))
    if overrides and not takes_config:
        key, value = overrides[0]
        flag = key.removeprefix("decode.")
        hint = f"; use --{flag}={value}" if flag in DECODE_HELP and flag in args else ""
        raise UsageError(f"--config.{key}: {args.verb} takes its configuration from the run directory{hint}")
    return args, overrides


def split_overrides(argv: Sequence[str]) -> tuple[list[str], Overrides]:
    """Takes `--config.KEY=VALUE`, `--config.KEY VALUE`, `--config.FLAG` and `--noconfig.FLAG` out of `argv`.

    Raises:
      UsageError: an unknown key (the message has the nearest real one), or a key without a value.
    """
    rest: list[str] = []
    overrides: Overrides = []
    waiting = iter(argv)
    for argument in waiting:
        found = re.fullmatch(r"--(no)?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL)
        if not found:
            rest.append(argument)
            continue
        negated, key, value = found.groups()
        default = _default(key)
        if isinstance(default, bool) and value is None:
            value = "false" if negated else "true"
        elif negated:
            raise UsageError(f"{argument}: only a key that is true or false can be negated this way")
        elif value is None:
            value = next(waiting, None)
            if value is None:
                raise UsageError(f"{argument} needs a value: {argument}=...")
        overrides.append((key, value))
    return rest, overrides


def _default(key: str) -> Any:
    """The default of a configuration key.

    Raises:
      UsageError: there is no such key.
    """
    names = configuration.key_names()
    if key in names:
        return configuration.get(Config(), key)
    inside = [name for name in names if name.startswith(f"{key}.")]
    if inside:
        raise UsageError(
            f"--config.{key} is a section; set one of its keys, such as --config.{inside[0]}=..."
        )
    near = configuration.nearest_key(key)
    raise UsageError(
        f"--config.{key}: unknown configuration key" + (f"; did you mean --config.{near}?" if near else "")
    )


def _underscored(argument: str) -> str:
    """`--length-penalty=0.6` -> `--length_penalty=0.6`; what is no flag stays."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _unknown(argument: str, verb: argparse.ArgumentParser, takes_config: bool) -> str:
    """What to say about an argument that the verb does not know."""
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r} (see {verb.prog} --help)"
    name = argument.partition("=")[0]
    known = [option for action in verb._actions for option in action.option_strings]
    if takes_config:
        known += [f"--config.{key}" for key in configuration.key_names()]
        if (key := configuration.nearest_key(name.lstrip("-"))) and "." in name:
            return f"unknown flag {name}; did you mean --config.{key}?"
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else f" (see {verb.prog} --help)")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and that of each verb."""
    top = _Parser(PROGRAM, description=DESCRIPTION, epilog=EPILOG, **_STYLE)
    top.add_argument("--version", action="version", version=f"{PROGRAM} {janus_jax.__version__}")
    subparsers = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs: dict[str, argparse.ArgumentParser] = {}

    def verb(name: str, run: Callable[..., int], text: str, epilog: str = "") -> argparse.ArgumentParser:
        short = text.partition("\n")[0].rstrip(".")
        verbs[name] = subparsers.add_parser(name, help=short, description=text, epilog=epilog, **_STYLE)
        verbs[name].set_defaults(run=run)
        return verbs[name]

    def with_config(name: str, run: Callable[..., int], text: str, *, needs_workdir: bool = True) -> None:
        flags_ = verb(name, run, text, CONFIG_EPILOG)
        _add_config(flags_)
        _add_workdir(flags_, required=needs_workdir)

    with_config("prepare", _prepare, PREPARE)
    with_config("train", _train, TRAIN)
    _add_processes(verbs["train"])
    flags_ = verb("evaluate", _evaluate, EVALUATE)
    _add_workdir(flags_, required=True)
    _add_processes(flags_)
    flags_.add_argument("--split", default="", help="which split (default: data.test_split of the run)")
    flags_.add_argument(
        "--decode",
        type=_modes,
        metavar="MODE",
        help="any of ar, nar, draft, with commas between (default: ar and nar, as far as the run has them)",
    )
    flags_.add_argument("--limit", type=_positive, default=0, metavar="N", help="only the first N examples")
    flags_.add_argument("--show", type=_count, default=3, metavar="N", help="examples to print (default: 3)")
    flags_.add_argument(
        "--true_length",
        action="store_true",
        help="nar: decode at the length of the reference, not the predicted one, to see what a perfect "
        "prediction of the length would bring (with --candidates=1 at that length alone)",
    )
    flags_.add_argument(
        "--refine",
        type=_count,
        default=0,
        metavar="N",
        help="draw the first N examples pass by pass, as refinement-1.png and so on",
    )
    flags_.add_argument(
        "--output_dir", type=as_path, metavar="DIR", help="where to write (default: WORKDIR/eval)"
    )
    _add_decoding(flags_)
    flags_ = verb("translate", _translate, TRANSLATE)
    _add_workdir(flags_, required=True)
    flags_.add_argument(
        "--input", type=as_path, metavar="FILE", help="text to translate (default: standard input)"
    )
    flags_.add_argument(
        "--output", type=as_path, metavar="FILE", help="translations (default: standard output)"
    )
    flags_.add_argument(
        "--decode",
        type=functools.partial(_mode, auto=True),
        metavar="MODE",
        help="ar, nar, draft (NAR drafts, AR verifies: greedy AR's text in fewer passes) or auto (the "
        "fastest on this machine that keeps --keep of the best dev BLEU; measured once for each run and "
        "machine, and kept in WORKDIR/auto.json); default: ar if the run has it",
    )
    flags_.add_argument(
        "--keep",
        type=_share,
        metavar="SHARE",
        help="auto: the share of the best dev BLEU that is asked for, above 0, at most 1 (default: 0.98)",
    )
    flags_.add_argument(
        "--nbest",
        type=_positive,
        default=1,
        metavar="N",
        help="write up to N hypotheses a line, best first, as `LINE ||| TEXT ||| SCORE`, lines from 0",
    )
    _add_decoding(flags_)
    flags_ = verb("export", _export, EXPORT)
    _add_workdir(flags_, required=True)
    flags_.add_argument("--output", type=as_path, required=True, metavar="DIR", help="the folder to write")
    flags_.add_argument(
        "--decode", type=_mode, metavar="MODE", help="ar, nar or draft (default: ar if the run has it)"
    )
    flags_.add_argument(
        "--platforms",
        default="cpu,cuda,tpu",
        metavar="NAME,...",
        help="what the programs are for: cpu, cuda, rocm, tpu; not needed here (default: cpu,cuda,tpu)",
    )
    _add_decoding(flags_)
    with_config("bench", _bench, BENCH, needs_workdir=False)
    with_config("compile", _compile, COMPILE, needs_workdir=False)
    flags_ = verbs["compile"]
    flags_.add_argument(
        "--topology",
        default="local",
        metavar="NAME",
        help="generation and shape of a slice, such as v5e:16x16, or GPUs of a host, such as h200:8; local: "
        "the devices here (default: local)",
    )
    flags_.add_argument(
        "--slices", type=_positive, default=1, metavar="N", help="slices, or hosts of GPUs (default: 1)"
    )
    flags_.add_argument(
        "--programs",
        default="train,ar,nar,draft",
        metavar="NAME,...",
        help="what to compile: train, ar, nar, draft (default: all)",
    )
    flags_.add_argument(
        "--memory",
        type=_gibibytes,
        metavar="GIB",
        help="what a program may take on a chip (default: all that the chip has)",
    )
    flags_.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the report as JSON; without FILE, to standard output in place of the tables",
    )
    flags_ = verb("plot", _plot, PLOT)
    flags_.add_argument(
        "--workdir",
        type=_folders,
        required=True,
        metavar="DIR,...",
        help="run directories",
    )
    flags_.add_argument("--output", type=as_path, metavar="FILE", help="the picture")
    flags_ = verb("report", _report, REPORT)
    flags_.add_argument("folder", type=as_path, metavar="FOLDER", help="a run directory, or where some lie")
    flags_.add_argument("--output", type=as_path, metavar="DIR", help="where to write (default: FOLDER)")
    flags_.add_argument(
        "--baseline", default="", metavar="ROW", help="the row that others are compared with (default: ar)"
    )
    flags_.add_argument("--split", default="", help="which evaluations (default: the runs' data.test_split)")
    flags_.add_argument(
        "--samples",
        type=_positive,
        default=1000,
        metavar="N",
        help="resamples of the paired bootstrap (default: 1000)",
    )
    flags_.add_argument(
        "--any_commit",
        action="store_true",
        help="let runs and evaluations of different commits, or of changed checkouts, stand side by side",
    )
    with_config("demo", _demo, DEMO)
    return top, verbs


_STYLE: dict[str, Any] = {
    "formatter_class": lambda prog: argparse.RawDescriptionHelpFormatter(
        prog, max_help_position=30, width=100
    ),
    "allow_abbrev": False,
}


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="configuration, a Python file with get_config() (default: WORKDIR/config.json)",
    )


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes, each started with the same command")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the others by what the environment tells (TPU pod, SLURM, Open MPI, Kubernetes)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="or say it: where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process_id", type=int, metavar="I", help="which one this is, from 0")


def _add_workdir(parser: argparse.ArgumentParser, *, required: bool) -> None:
    text = "the run directory: a folder, or gs://bucket/folder"
    parser.add_argument("--workdir", type=as_path, required=required, metavar="DIR", help=text)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    """The flags shared by evaluate and translate: which parameters, batches, and config.DecodeConfig."""
    parser.add_argument(
        "--checkpoint",
        default="best",
        help="best (on dev), latest, a step, or average:N, the mean of the newest N (default: best)",
    )
    parser.add_argument(
        "--batch_size",
        type=_positive,
        metavar="N",
        help="most sentences decoded together (default: what --tokens holds); results do not depend on it",
    )
    group = parser.add_argument_group(
        "decoding options",
        "Each default is the key of that name in the section `decode` of the run's config.json; that of the\n"
        "package is in brackets.",
    )
    hints = typing.get_type_hints(DecodeConfig)
    for field in dataclasses.fields(DecodeConfig):
        name, kind = field.name, hints[field.name]
        text = f"{DECODE_HELP[name]} [{str(field.default).lower()}]"
        if kind is bool:
            text += f"; --no{name} switches it off"
            group.add_argument(f"--{name}", type=_boolean, nargs="?", const=True, metavar="BOOL", help=text)
            off = (f"--no{name}", f"--no_{name}")
            group.add_argument(*off, dest=name, action="store_false", default=None, help=argparse.SUPPRESS)
        else:
            group.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=text)


def _folders(text: str) -> list[AnyPath]:
    return [as_path(part) for part in text.split(",") if part] or [Path()]


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return values[text.lower()]


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a number from 0 up, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a number from 1 up, got {text!r}")
    return int(text)


def _gibibytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _mode(text: str, *, auto: bool = False) -> str:
    modes = ("ar", "nar", "draft", "auto") if auto else ("ar", "nar", "draft")
    if text not in modes:
        raise argparse.ArgumentTypeError(f"must be {', '.join(modes[:-1])} or {modes[-1]}, got {text!r}")
    return text


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, got {text!r}")
    return value


def _modes(text: str) -> list[str]:
    return list(dict.fromkeys(_mode(part) for part in text.split(",")))


# -- configuration --------------------------------------------------------------------------------


def resolve_config(file: Path | None, workdir: AnyPath | None, overrides: Overrides) -> Config:
    """The configuration: from `file`, else from `workdir`'s config.json; then the overrides.

    Raises:
      UsageError: neither is there, or an override has the wrong type.
      ConfigFileError: `file` cannot be used.
      ConfigError: values that cannot be used together.
      run.RunError: the config.json cannot be used.
    """
    if file is not None:
        base = load_config_file(file)
    elif workdir is None:
        raise UsageError("give --config=FILE, or --workdir=DIR of a run")
    elif (workdir / "config.json").is_file():
        from janus_jax import run

        base = run.open_run(workdir).config
    else:
        raise UsageError(f"--config=FILE is needed: {workdir} has no config.json to go on with")
    return override(base, overrides)


def load_config_file(path: Path) -> Config:
    """The checked configuration that `get_config()` of the Python file at `path` returns.

    The file can import what lies in the folder above it, in its own and in the current one:
    `from configs import base`.

    Raises:
      ConfigFileError: no such file, an error in it, no get_config, or not a usable configuration.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigFileError(f"--config={path}: {error.strerror}") from error
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        with _importable(path.resolve().parent.parent, path.resolve().parent, Path.cwd()):
            exec(compile(source, str(path), "exec"), namespace)
            if not callable(namespace.get("get_config")):
                raise ConfigFileError(f"{path} has no function get_config()")
            found = namespace["get_config"]()
    except ConfigFileError:
        raise
    except SyntaxError as error:
        raise ConfigFileError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f":{f.lineno}" for f in reversed(frames) if f.filename == str(path)), "")
        reason = str(error).partition("\n")[0]
        raise ConfigFileError(f"{path}{line}: {type(error).__name__}: {reason}") from error
    if not isinstance(found, ml_collections.ConfigDict):
        raise ConfigFileError(
            f"{path}: get_config() must return a ConfigDict, got {type(found).__name__}; "
            "start from configs/base.py"
        )
    try:
        return configuration.from_config_dict(found)
    except ConfigError as error:
        raise ConfigFileError(f"{path}: {error}") from error


def override(config: Config, overrides: Overrides) -> Config:
    """`config` with some keys replaced by values as they are written on a command line.

    Raises:
      UsageError: a value of the wrong type.
      ConfigError: values that cannot be used together.
    """
    values = configuration.to_config_dict(config)
    for key, text in overrides:
        argument = f"--config.{key}={text}"
        private = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", values, flag_values=private, sys_argv=[argument])
        default = configuration.get(config, key)
        try:
            private([PROGRAM, argument])
            parsed = configuration.get(values, key)  # type: ignore[arg-type]
            if isinstance(default, tuple) and not all(type(item) is int for item in parsed):
                raise ValueError("not whole numbers")
        except (flags.Error, ValueError, TypeError, SyntaxError) as error:
            raise UsageError(f"--config.{key} must be {_KINDS[type(default)]}, got {text!r}") from error
    return configuration.from_config_dict(values)


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "whole numbers separated by commas",
}


@contextlib.contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """Lets a configuration file import its neighbours."""
    before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders]
    try:
        yield
    finally:
        sys.path[:] = before
