"""What a model costs on this machine: `janus-jax bench --workdir=...`, or `--config=...` with random weights.

  training   one update, split into waiting for data, handing work to the device, waiting for it;
             target tokens a second; compile time apart
  decoding   AR greedy and beam, NAR at 1, 4 and 10 passes, draft and verify, at batch 1, 16 and 128:
             sentences a second, and the time of one batch (median and 95th percentile)

Everything that a user would wait for is counted (encoder, length prediction, the way to the device
and back), compiling apart.  With random weights NAR writes as many tokens as the source has, and AR at most
that (random weights hardly ever end a sentence); with a run, its own test sentences are decoded and each side
writes what it writes.

Room: shell.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from janus_jax import losses, mesh, report, run, ways
from janus_jax.batch import Batch, corrupted, example_rng
from janus_jax.config import Config, microbatches
from janus_jax.data.encoded import EncodedSource, encode_split
from janus_jax.data.pipeline import BatchPlan, train_batches
from janus_jax.data.sources import open_split
from janus_jax.engine import Engine, Report
from janus_jax.generate import Generator, with_options
from janus_jax.paths import AnyPath
from janus_jax.prepare import bring_data
from janus_jax.step import init_state, train_step
from janus_jax.translator import check_params

UPDATES = 10
BATCHES = (1, 16, 128)
SENTENCES = {1: 32, 16: 64, 128: 256}  # decoded at each batch size, cut to what the test set has
SYSTEMS = (
    ways.GREEDY,
    ways.BEAM,
    *(ways.nar(passes) for passes in (1, 4, 10)),
    *(ways.nar(passes, rescore=True) for passes in (4, 10)),
    ways.STRICT,
)


def bench(config: Config, workdir: AnyPath | None) -> int:
    """Prints both tables; writes them to `workdir`/bench.json where there is a run.

    Args:
      config: the model and batches to measure.
      workdir: a run with checkpoints, whose weights and test sentences are used; None for random weights.

    Raises:
      run.RunError: `config` is of another model than the checkpoint.
      checkpoint.NoCheckpointError: the run has none.
    """
    opened = run.open_run(workdir) if workdir else None
    if opened:
        check_params(opened.params("best")[0], config.model, opened)
        bring_data(config, opened.folder)
    subject = f"{workdir}, trained weights" if workdir else "random weights, outputs as long as the source"
    trained = training(config, opened)
    report.table(f"one update: {subject}", list(trained), [list(trained.values())])
    decoded = decoding(config, opened)
    columns = list(decoded[0])
    report.table(
        f"decoding: {subject}, {ways.CANDIDATES} length candidates",
        columns,
        [list(row.values()) for row in decoded],
    )
    memory = report.peak_memory(mesh.device_memory_stats())
    print(
        f"peak memory: host {memory.host / 2**20:.0f} MiB"
        + (f", device {memory.device / 2**20:.0f} MiB" if memory.device else "")
        + f"; {mesh.device_kind()}, {config.model.dtype}"
    )
    if opened:
        found = {
            "training": trained,
            "decoding": decoded,
            "peak_host_bytes": memory.host,
            "peak_device_bytes": memory.device,
            "device": mesh.device_kind(),
            "versions": report.versions(),
        }
        report.write_json(opened.folder / "bench.json", found)
        print(f"written to {opened.folder / 'bench.json'}")
    return 0


def training(config: Config, opened: run.Run | None) -> dict[str, float]:
    """Seconds of one update by where they go, at the batch shape of the middle bucket."""
    devices = mesh.make_mesh(config.mesh)
    parts = microbatches(config, mesh.row_shares(devices))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=parts))
    share = mesh.row_shares(devices) * parts
    length = middle_bucket(config, opened)
    batches = batches_of(config, opened, length, share)
    shardings = mesh.state_shardings(devices, jax.eval_shape(functools.partial(init_state, config)))
    state = jax.jit(functools.partial(init_state, config), out_shardings=shardings)()
    first = mesh.global_batch(devices, next(batches))
    start = time.perf_counter()
    step = jax.jit(functools.partial(train_step, config=config), donate_argnums=0)
    with jax.set_mesh(devices):
        compiled = step.lower(state, first).compile()
    compile_seconds = time.perf_counter() - start
    state, metrics = compiled(state, first)  # the first call still sets things up
    jax.block_until_ready(metrics)
    timer, tokens = report.Timer(), 0.0
    start = time.perf_counter()
    with report.progress(UPDATES, "bench: updates") as shown:
        for _ in range(UPDATES):
            with timer("data"):
                batch = next(batches)
            with timer("step"):
                state, metrics = compiled(state, mesh.global_batch(devices, batch))
            with timer("wait"):
                tokens += float(metrics["tokens"])
            shown.advance()
    seconds = time.perf_counter() - start
    spans = {f"{name} s": value / UPDATES for name, value in timer.take().items()}
    rows = batch["target"].shape[0]
    shape = {"rows": rows, "length": length}
    return {
        **shape,
        "update s": seconds / UPDATES,
        **spans,
        "target tokens/s": tokens / seconds,
        "compile s": compile_seconds,
    }


def decoding(config: Config, opened: run.Run | None) -> list[dict[str, Any]]:
    """One row for each system and batch size."""
    length = middle_bucket(config, opened)
    sources = _sources(config, opened, length)
    if opened:
        params, _ = opened.params("best")
    else:
        params = jax.jit(lambda: init_state(config).params)()
        config = dataclasses.replace(
            config, decode=dataclasses.replace(config.decode, max_length_a=1.0, max_length_b=1)
        )
    engine = Engine(params, config)
    taught = losses.taught(config.loss)
    systems = [way for way in SYSTEMS if taught.issuperset(way.sides)]
    rows = []
    with report.progress(len(systems) * len(BATCHES), "bench: decoding", unit="system") as shown:
        for way, size in itertools.product(systems, BATCHES):
            generator = Generator(config.model, with_options(config.decode, **way.options))
            rates = _decode(engine, generator, way.decode, sources, size, predicted=opened is not None)
            rows.append({"system": way.label, "batch": size, **rates})
            shown.advance(system=f"{way.label}, batch {size}")
    return rows


def _decode(
    engine: Engine, generator: Generator, mode: str, sources: np.ndarray, size: int, *, predicted: bool
) -> dict[str, float]:
    """Rates and times; `predicted` lengths, or those of the sources, which random weights would not tell."""
    given = None if predicted else np.full(size, sources.shape[1], np.int32)
    count = min(SENTENCES[size], len(sources))
    chunks = [np.resize(sources[i : i + size], (size, sources.shape[1])) for i in range(0, count, size)]
    warm = Report()
    for chunk in chunks[:3]:  # compiles; canvases differ a little in length
        engine.start(mode, generator, chunk, warm, given)()
    seconds, compiled, tokens = [], Report(), 0
    for chunk in chunks:
        start, before = time.perf_counter(), compiled.compile_seconds
        written, _, _ = engine.start(mode, generator, chunk, compiled, given)()
        seconds.append(time.perf_counter() - start - (compiled.compile_seconds - before))
        tokens += int(np.sum(written[:, 0] > generator.model.ids.mask))
    total = sum(seconds)
    return {
        "sentences/s": size * len(chunks) / total,
        "tokens/s": tokens / total,
        "p50 ms": 1000 * float(np.percentile(seconds, 50)),
        "p95 ms": 1000 * float(np.percentile(seconds, 95)),
        "compile s": warm.compile_seconds + compiled.compile_seconds,
    }


def middle_bucket(config: Config, opened: run.Run | None = None) -> int:
    """The padded length everything is measured at: the middle bucket, of those that the run has pairs for."""
    lengths = lengths_of(config, opened) if opened else config.batch.buckets
    return lengths[len(lengths) // 2]


def lengths_of(config: Config, opened: run.Run) -> tuple[int, ...]:
    """The buckets that training pairs of a run fall into."""
    plan = BatchPlan(_training_pairs(config, opened).lengths, config.batch)
    return tuple(length for _, length in plan.shapes)


def _training_pairs(config: Config, opened: run.Run) -> EncodedSource:
    pairs = open_split(config.data, opened.data_folder, config.data.train_split)
    return encode_split(pairs, opened.vocabulary(), opened.data_folder)


def batches_of(config: Config, opened: run.Run | None, length: int, share: int) -> Iterator[Batch]:
    """Training batches of one length: the run's own through its pipeline, or random ones.

    Raises:
      RunError: the run has no training pair of that length.
    """
    if opened:
        if length not in (there := lengths_of(config, opened)):
            raise run.RunError(
                f"{opened.folder}: no training pair falls into the bucket of {length}; there are pairs for "
                f"{', '.join(map(str, there))}"
            )
        every = train_batches(
            _training_pairs(config, opened), config.batch, seed=config.seed, row_multiple=share
        )
        yield from (batch for batch in every if batch["target"].shape[1] == length)
    rows = max(share, config.batch.tokens // length // share * share)
    rng, ids = np.random.default_rng(config.seed), config.model.ids
    tokens = _random_sources(config, rows, length, rng)
    for step in itertools.count():
        rngs = [example_rng(config.seed, step, i) for i in range(rows)]
        yield corrupted(np.arange(rows, dtype=np.int32), tokens, tokens, rngs, config.batch, ids)


def _sources(config: Config, opened: run.Run | None, length: int) -> np.ndarray:
    """[sentences, length] int32 to decode: test sentences that fit, in order, or random ones."""
    most = max(SENTENCES.values())
    if not opened:
        return _random_sources(config, most, length, np.random.default_rng(config.seed))
    pairs = open_split(config.data, opened.data_folder, config.data.test_split)
    vocabulary = opened.vocabulary()
    fitting: list[list[int]] = []
    for source, _ in itertools.islice(pairs, 4 * most):
        ids = vocabulary.encode(source)
        if 2 < len(ids) <= length and len(fitting) < most:
            fitting.append(ids + [config.model.ids.pad] * (length - len(ids)))
    if not fitting:
        raise run.RunError(
            f"{opened.folder}: no sentence of {config.data.test_split} has at most {length} tokens"
        )
    return np.asarray(fitting, np.int32)


def _random_sources(config: Config, rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """[rows, length] int32 full rows of ordinary tokens between BOS and EOS."""
    ids = config.model.ids
    tokens = rng.integers(
        max(dataclasses.astuple(ids)) + 1, config.model.vocab_size, (rows, length), np.int32
    )
    tokens[:, 0], tokens[:, -1] = ids.bos, ids.eos
    return tokens
