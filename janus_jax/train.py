"""Train one JANUS: `janus-jax train --config=... --workdir=...`; started again, it goes on where it was.

What happens in order, and why in this order:

  1. mesh                               devices that do not fit leave no trace
  2. claim, lock and prepare            by process 0; the others follow when it is known to be ours
  3. state, restore                     parameters are born, or restored, where they belong
  4. per update: batch, step, read the *previous* update's metrics, so that the host never waits for
     the device it has just given work
  5. at a cadence: dev loss, dev BLEU in the modes trained, then the checkpoint.  Rows of step k are
     on disk before the checkpoint of step k, and a resumed run drops the rows after its step: the
     metrics of an interrupted run equal those of an uninterrupted one, bit for bit

Room: shell.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console

from janus_jax import losses, mesh, paths, plots, prepare, processes, report, run, score, sharding
from janus_jax.batch import Batch
from janus_jax.checkpoint import Checkpoints
from janus_jax.config import Config, microbatches
from janus_jax.data.encoded import EncodedSource, encode_split
from janus_jax.data.pipeline import BatchPlan, eval_batches, train_batches
from janus_jax.data.sources import PairSource, open_split
from janus_jax.step import TrainState, eval_step, init_state, train_step
from janus_jax.text import Vocabulary
from janus_jax.translator import Translator, decode_together

DONE, STOPPED = 0, processes.STOPPED  # exit codes; stopped: on request, saved, start again to go on


class TrainingError(ValueError):
    """Training that cannot go on; the message names the update, the batch and the remedy."""


@dataclass
class Pending:
    """An update that the device may still be at; read when the next one is under way."""

    step: int
    metrics: dict[str, jax.Array]
    shape: tuple[int, ...]
    examples: np.ndarray  # numbers of the training examples in its batch


def train(config: Config, workdir: paths.Name) -> int:
    """Trains `config` in `workdir` up to `train.steps` updates, from wherever it is.

    Returns:
      DONE, or STOPPED when SIGTERM or Ctrl-C asked it to save and stop.

    Raises:
      run.RunError: the folder belongs to another run or is in use.
      checkpoint.NoCheckpointError: `init.run` has no checkpoint `init.checkpoint`.
      paths.PathError: a URL that cannot hold a run.
      TrainingError: an update was not finite (`train.nonfinite` = stop).
      data.DataError, text.VocabularyError: unusable data.
    """
    workdir = paths.as_path(workdir)
    devices = mesh.make_mesh(config.mesh)
    with ExitStack() as stack:
        _check_start(config, workdir)
        opened = processes.main_first(functools.partial(_open_run, config, workdir, stack))
        processes.say(f"{_described(devices)}, objective {config.loss.objective}")
        with (
            Checkpoints(
                opened.checkpoints, config.train.keep_last, *_best(config), say=processes.say
            ) as checkpoints,
            processes.stop_requests() as stop,
        ):
            code = _Training(opened, devices, checkpoints, stop).run()
    if processes.is_main():
        _draw(workdir)
    return code


def _draw(workdir: paths.AnyPath) -> None:
    """The training curves; what is saved is saved, whether or not they can be drawn."""
    try:
        plots.plot_training(report.read_metrics(workdir), workdir / "training.png")
    except (report.ReportError, OSError) as error:  # stopped before the first row, or a full disk
        print(f"no training curves: {error}", file=sys.stderr)
    else:
        print(f"training curves: {workdir / 'training.png'}")


def _check_start(config: Config, workdir: paths.AnyPath) -> None:
    """Looks for what a new run is to start from before anything is made, as `Run.start` reads it after that.

    Called by all processes: Orbax opens no checkpoints for one of several.
    """
    if not run.Run(workdir, config).has_checkpoints() and (origin := run.start_of(config)):
        origin.find(config.init.checkpoint)


def _open_run(config: Config, workdir: paths.AnyPath, stack: ExitStack) -> run.Run:
    """The run directory with everything that training needs; `stack` keeps it locked.

    The main process claims it; the others find it claimed, and prepare what they do not share with it.
    """
    if not processes.is_main():
        prepared = prepare.prepare(config, workdir, Console(quiet=True))
        opened = run.Run(workdir, config)
        opened.bind_data(prepared.splits[config.data.train_split].sha256(), write=False)
        return opened
    stack.enter_context(run.locked(workdir))
    opened = run.claim(workdir, config)
    prepared = prepare.prepare(config, workdir)
    vocabulary = opened.vocabulary()
    if not opened.has_checkpoints():
        opened.bind_vocabulary(vocabulary)
    opened.bind_data(prepared.splits[config.data.train_split].sha256())
    return opened


class _Training:
    """The loop and what it needs."""

    def __init__(
        self,
        opened: run.Run,
        devices: jax.sharding.Mesh,
        checkpoints: Checkpoints,
        stop: Callable[[int], str | None],
    ) -> None:
        shares = mesh.row_shares(devices)
        parts = microbatches(opened.config, shares)
        train_config = dataclasses.replace(opened.config.train, microbatches=parts)
        self.config = dataclasses.replace(opened.config, train=train_config)
        self.opened, self.mesh = opened, devices
        self.checkpoints, self.stop = checkpoints, stop
        self.timer = report.Timer()
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self.compile_seconds = 0.0
        self.origin: str | None = None  # what the parameters were before the first update
        self.vocabulary = opened.vocabulary()
        self.rows = shares * parts
        self.train_set = _open(opened, self.config.data.train_split, self.vocabulary)
        self.dev = _Dev(self)

    def run(self) -> int:
        config = self.config
        state, start = self._start()
        if start >= config.train.steps:
            processes.say(
                f"already trained: {start} updates of {config.train.steps}; raise train.steps to go on"
            )
            return DONE
        if processes.is_main():
            self.opened.record()
        console = Console(stderr=True, quiet=not processes.is_main())
        with (
            self._writer(start) as self.writer,
            report.progress(config.train.steps, "train", start=start, console=console) as self.progress,
        ):
            told = {"event": "resumed" if start else "started", "device": mesh.device_kind()}
            if self.origin:
                told["init"] = self.origin
            self.writer.write(start, "event", told | {"commit": report.commit() or "unknown"})
            return self._loop(state, start)

    def _writer(self, start: int) -> report.MetricsWriter:
        if not processes.is_main():
            return report.SilentWriter()
        resume_step = start if start else -1
        return report.MetricsWriter(self.opened.folder, self.config.train.tensorboard, resume_step)

    def _loop(self, state: TrainState, start: int) -> int:
        config = self.config
        batches = self._batches(start)
        pending: Pending | None = None
        self.since, self.tokens = time.perf_counter(), 0.0
        for done in range(start + 1, config.train.steps + 1):
            with self.timer("data"):
                batch = next(batches)
            with self.timer("step"):
                placed = mesh.global_batch(self.mesh, batch)
                state, metrics = self._update(state, placed)
            if pending:
                self._read(pending)
            pending = Pending(done, metrics, batch["target"].shape, batch["index"])
            last, reason = done == config.train.steps, self.stop(done)
            evaluate = last or done % config.train.eval_every == 0
            if not (evaluate or reason or done % config.train.checkpoint_every == 0):
                continue
            self._read(pending)
            pending = None
            found: dict[str, float] = {}
            if evaluate:
                found = self._evaluate(done, state)
            self.writer.flush()
            self.checkpoints.save(done, state._asdict(), found)
            if reason and not last:
                self.checkpoints.wait()
                self.progress.say(
                    f"{reason}: saved step {done} and stopped; the same command goes on from there"
                )
                self.writer.write(done, "event", {"event": "stopped", "reason": reason})
                return STOPPED
            self.since, self.tokens = time.perf_counter(), 0.0
            self.timer.take()
        self.checkpoints.wait()
        return DONE

    def _start(self) -> tuple[TrainState, int]:
        """The newest state that can be restored, or a fresh one, laid out on the mesh."""
        initial = functools.partial(init_state, self.config)
        abstract = jax.eval_shape(initial)
        self.shardings = shardings = mesh.state_shardings(self.mesh, abstract)
        self._show_shardings(abstract)
        if self.checkpoints.latest() is not None:
            wanted = mesh.with_shardings(abstract, shardings)._asdict()
            values, step = self.checkpoints.restore(wanted)
            processes.say(f"resuming from step {step}")
            return TrainState(**values), step
        start = self.opened.start()
        if start is None:
            return jax.jit(initial, out_shardings=shardings)(), 0
        params, what = start
        processes.say(f"starting from {what}")
        self.origin = what
        return jax.jit(initial, out_shardings=shardings)(params), 0

    def _show_shardings(self, abstract: TrainState) -> None:
        """Where every parameter lies, if they are cut at all; the optimiser's lie as theirs do."""
        if mesh.row_shares(self.mesh) == self.mesh.shape[sharding.DATA] == self.mesh.size:
            return
        rows = mesh.sharding_table(abstract.params, self.shardings.params)
        total = sum(size for *_, size in mesh.sharding_table(abstract, self.shardings))
        title = f"parameters; state on each device: {total / 2**20:,.1f} MiB"
        if processes.is_main():
            report.table(title, ["path", "type and shape", "cut over", "bytes on each device"], rows)

    def _batches(self, start: int) -> Iterator[Batch]:
        config = self.config
        plan = BatchPlan(self.train_set.lengths, config.batch, seed=config.seed, row_multiple=self.rows)
        if start and len(plan.overlong):  # `prepare` says so at the first start
            processes.say(
                f"{len(plan.overlong)} of {len(self.train_set)} training pairs are over-long and left out"
            )
        return train_batches(
            self.train_set,
            config.batch,
            seed=config.seed,
            start_step=start,
            part=mesh.part_of(self.mesh),
            row_multiple=self.rows,
        )

    def _update(
        self, state: TrainState, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One donated update, compiled once per batch shape."""
        step = functools.partial(train_step, config=self.config)
        laid = (self.shardings, mesh.replicated(self.mesh))
        return self.call("train", step, (state, batch), donate_argnums=0, out_shardings=laid)

    def call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> Any:
        """Calls the compiled form of `function`, one per name and batch shape; keeps compile time apart."""
        key = (name, *args[-1]["target"].shape)
        if key not in self.compiled:
            jax.block_until_ready(args)  # the update before would seem to cost no time
            start = time.perf_counter()
            with jax.set_mesh(self.mesh):
                self.compiled[key] = jax.jit(function, **options).lower(*args).compile()
            self.compile_seconds += time.perf_counter() - start
            self.since += time.perf_counter() - start
        return self.compiled[key](*args)

    def _read(self, update: Pending) -> None:
        """Waits for an update and writes what it had to say."""
        with self.timer("wait"):
            metrics = {name: float(value) for name, value in jax.device_get(update.metrics).items()}
        self.tokens += metrics["tokens"]
        self._check(update, metrics)
        seconds = max(time.perf_counter() - self.since, 1e-9)
        shown = {"loss": metrics["loss"], "tok/s": self.tokens / seconds}
        self.progress.update(update.step, **shown)
        if update.step % self.config.train.log_every == 0 or update.step == self.config.train.steps:
            memory = report.peak_memory(mesh.device_memory_stats())
            timing = {f"{name}_s": value for name, value in self.timer.take().items()} | {
                "tokens_per_s": self.tokens / seconds,
                "compile_s": self.compile_seconds,
                "peak_host_bytes": memory.host,
                "peak_device_bytes": memory.device,
            }
            del metrics["ok"], metrics["skipped"]
            self.writer.write(update.step, "train", metrics, timing)
            self.since, self.tokens = time.perf_counter(), 0.0

    def _check(self, update: Pending, metrics: dict[str, float]) -> None:
        """Counts or refuses an update that was not applied."""
        if metrics["ok"]:
            return
        examples = [int(i) for i in update.examples if i >= 0]
        listed = ", ".join(map(str, examples[:8])) + (", ..." if len(examples) > 8 else "")
        what = (
            f"update {update.step} was not applied: loss {metrics['loss']:g}, gradient norm "
            f"{metrics['grad_norm']:g} (limit {self.config.train.max_grad_norm:g}); "
            f"batch of shape {update.shape}, training examples {listed}"
        )
        row = {"event": "skipped", "loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
        self.writer.write(update.step, "event", row | {"examples": " ".join(map(str, examples))})
        in_a_row = int(metrics["skipped"])
        if self.config.train.nonfinite == "stop" or in_a_row >= self.config.train.max_skipped:
            latest = self.checkpoints.latest()
            newest = "there is none yet" if latest is None else f"it is step {latest}"
            raise TrainingError(
                f"{what}\nsuch updates in a row: {in_a_row}; newest checkpoint: {newest}.  Raise "
                "train.max_grad_norm or set train.nonfinite = skip and go on; or lower optim.lr or set "
                f"optim.clip_norm{'' if latest is None else ', in another --workdir'}"
            )
        self.progress.say(f"skipped: {what}")

    def _evaluate(self, done: int, state: TrainState) -> dict[str, float]:
        """Dev loss and BLEU of the parameters that decoding would use."""
        params = state.ema if self.config.optim.ema else state.params
        start = time.perf_counter()
        found = self.dev.evaluate(params)
        self.writer.write(done, "dev", found, {"seconds": time.perf_counter() - start})
        names = [n for n in ("loss", "nll_ar", "nll_nar", "bleu_ar", "bleu_nar") if n in found]
        self.progress.say(f"step {done}   dev " + "   ".join(f"{n} {found[n]:.3f}" for n in names))
        return found


class _Dev:
    """The dev set: loss over all of it, BLEU over its first `train.dev_sentences`."""

    def __init__(self, training: _Training) -> None:
        self.training, config = training, training.config
        self.examples = _open(training.opened, config.data.dev_split, training.vocabulary)
        pairs = open_split(config.data, training.opened.data_folder, config.data.dev_split)
        wanted = config.train.dev_sentences
        count = len(pairs) if wanted == 0 else min(max(wanted, 0), len(pairs))
        self.sources = [pairs[i][0] for i in range(count)]
        self.references = [pairs.references(i) for i in range(count)]
        self.translator: Translator | None = None

    def evaluate(self, params: Any) -> dict[str, float]:
        """`loss`, every term, `bleu_ar` and `bleu_nar` for the modes trained, and `bleu`, their mean."""
        config = self.training.config
        terms: defaultdict[str, float] = defaultdict(float)
        weights: defaultdict[str, float] = defaultdict(float)
        batches = eval_batches(
            self.examples,
            config.batch,
            part=mesh.part_of(self.training.mesh),
            row_multiple=mesh.row_shares(self.training.mesh),
        )
        for batch in batches:
            placed = mesh.global_batch(self.training.mesh, batch)
            step = functools.partial(eval_step, config=config)
            for name, (value, weight) in jax.device_get(
                self.training.call("dev", step, (params, placed))
            ).items():
                terms[name] += float(value)
                weights[name] += float(weight)
        found = {name: terms[name] / max(weights[name], 1.0) for name in terms}
        used = losses.coefficients(config.loss)
        found = {"loss": sum(c * found[name] for name, c in used.items() if name in found), **found}
        if not self.sources:
            return found
        params = processes.to_host(params)
        if self.translator is None:
            self.translator = Translator(params, config, self.training.vocabulary)
        self.translator.set_params(params)
        options: dict[str, dict[str, Any]] = {
            "ar": {"beam": config.train.dev_beam},
            "nar": {"iterations": config.train.dev_iterations},
        }
        bleu = {}
        for mode in options:
            if mode not in self.translator.modes:
                continue
            found_here, _ = decode_together(self.translator, self.sources, mode, **options[mode])
            lines = [best.text for best, *_ in found_here]
            bleu[f"bleu_{mode}"] = score.score(lines, self.references).bleu
        return {**found, **bleu, "bleu": sum(bleu.values()) / len(bleu)}


def _described(devices: jax.sharding.Mesh) -> str:
    """The mesh in words: "8 x cpu (data 2 x fsdp 2 x tensor 2)"."""
    axes = " x ".join(f"{axis} {size}" for axis, size in devices.shape.items())
    return f"{devices.size} x {mesh.device_kind()} ({axes})"


def _open(opened: run.Run, split: str, vocabulary: Vocabulary) -> EncodedSource:
    pairs: PairSource = open_split(opened.config.data, opened.data_folder, split)
    return encode_split(pairs, vocabulary, opened.data_folder)


def _best(config: Config) -> tuple[str, str]:
    """The dev metric that chooses the best checkpoint, and which end of it is good."""
    return ("bleu", "max") if config.train.best == "bleu" else ("loss", "min")
