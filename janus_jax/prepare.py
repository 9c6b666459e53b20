"""`janus-jax prepare`: the data set, the vocabulary and the encoded splits of a run.

Whatever is there already is checked and kept, so a second run does nothing but say so.
Room: shell.  Composes data, text and run; prints to the terminal.
"""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

from rich import progress as bars
from rich.console import Console
from rich.table import Table

from janus_jax import paths, run
from janus_jax.config import Config
from janus_jax.data import encoded, sources
from janus_jax.data.catalogue import Progress
from janus_jax.data.encoded import EncodedSource
from janus_jax.data.lines import DataError
from janus_jax.data.pipeline import BatchPlan
from janus_jax.data.sources import DatasetReport
from janus_jax.paths import AnyPath
from janus_jax.text import INFO_FILE, MODEL_FILE, Vocabulary, VocabularyError

LOCK = ".data.lock"  # another name than that of a run: data.dir may be the folder of one


@dataclass(frozen=True)
class Prepared:
    """What `prepare` found or made; `fresh` names the parts that it made."""

    dataset: DatasetReport
    vocabulary: Vocabulary
    splits: dict[str, EncodedSource]
    fresh: tuple[str, ...]


def data_folder(config: Config, workdir: AnyPath) -> pathlib.Path:
    """Where the prepared data of a run lie."""
    return paths.data_folder(config.data.dir, workdir)


def bring_data(config: Config, workdir: AnyPath) -> None:
    """Makes the data set on this machine if the run is remote, and so was prepared on another one.

    Raises:
      DataError: as `prepare`.
    """
    if paths.is_remote(workdir):
        folder = data_folder(config, workdir)
        with alone(folder), _bars() as progress:
            sources.prepare_dataset(config.data, folder, progress)


def load_split(config: Config, workdir: AnyPath, vocabulary: Vocabulary, split: str) -> EncodedSource:
    """A prepared split as token ids, encoded now if it is not yet.

    Raises:
      DataError: the data set is not prepared or has no such split.
    """
    folder = data_folder(config, workdir)
    return encoded.encode_split(sources.open_split(config.data, folder, split), vocabulary, folder)


def prepare(config: Config, workdir: AnyPath, console: Console | None = None) -> Prepared:
    """Makes what training needs: the data set, `workdir`'s vocabulary, and the encoded splits.

    Args:
      config: sections data, vocab and batch, and of model the vocabulary size and ids.
      workdir: the run's folder, made if needed.
      console: where the report goes; standard output by default.

    Raises:
      DataError: data that cannot be used, or no dev pair that fits a bucket; the message names file, line or
        key.
      VocabularyError: no vocabulary of this size can be trained, or `workdir` has another one.
      run.RunError: as `run.start_of`.
    """
    console = console or Console()
    folder = data_folder(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    wanted = dict.fromkeys((config.data.train_split, config.data.dev_split, config.data.test_split))
    with alone(folder), _bars() as progress:
        dataset = sources.prepare_dataset(config.data, folder, progress)
        fresh = ["data set"] if dataset.fresh else []
        pairs = {split: sources.open_split(config.data, folder, split) for split in wanted}
        vocabulary = _existing_vocabulary(config, workdir, "use another workdir")
        origin = run.start_of(config) if vocabulary is None else None
        if origin is not None:
            vocabulary = _vocabulary_of(origin, config)
            vocabulary.save(workdir)
            fresh.append(f"vocabulary, that of {config.init.run}")
        if vocabulary is None:
            progress("train vocabulary", 0, None)
            text = (side for pair in pairs[config.data.train_split] for side in pair)
            vocabulary = Vocabulary.train(text, config.vocab, config.model.vocab_size, config.model.ids)
            vocabulary.save(workdir)
            progress("train vocabulary", 1, 1)
            fresh.append("vocabulary")
        splits = {}
        for split, source in pairs.items():
            if not encoded.is_encoded(source, vocabulary, folder):
                fresh.append(f"encoded {split}")
            splits[split] = encoded.encode_split(source, vocabulary, folder, _about(progress, split))
    _check_dev(config, splits[config.data.dev_split])
    prepared = Prepared(dataset, vocabulary, splits, tuple(fresh))
    _report(config, prepared, console)
    return prepared


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """Where no other process of this machine makes data in `folder`; waits for one that does.

    A folder that cannot be written needs no lock: what is not there already cannot be made, either.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # nor can a file system without locks be helped
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / LOCK, "a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_dev(config: Config, dev: EncodedSource) -> None:
    """Sees to it that there is something to measure on dev, before the first update rather than after many.

    Raises:
      DataError: none of its examples fits into a bucket.
    """
    longest = config.batch.buckets[-1]
    if not (dev.lengths <= longest).any():
        raise DataError(
            f"data.dev_split {config.data.dev_split!r}: none of its {len(dev):,} pairs fits into the largest "
            f"of batch.buckets ({longest}); raise that, or name another split"
        )


def _vocabulary_of(origin: run.Run, config: Config) -> Vocabulary:
    """The vocabulary of the run that this one starts from: its parameters mean nothing with another."""
    vocabulary = _existing_vocabulary(config, origin.folder, "start from another init.run")
    if vocabulary is None:
        raise VocabularyError(f"init.run = {origin.folder} has no {MODEL_FILE} and {INFO_FILE}")
    return vocabulary


def _existing_vocabulary(config: Config, workdir: AnyPath, otherwise: str) -> Vocabulary | None:
    """The vocabulary in `workdir`, or None if it has none; an error if it is another one.

    Args:
      config: whose vocabulary it is to be.
      workdir: folder of a run.
      otherwise: what to do in that case, but for setting things back.
    """
    if not ((workdir / MODEL_FILE).exists() and (workdir / INFO_FILE).exists()):
        return None  # half a vocabulary is what a killed run left: it is made again
    vocabulary = Vocabulary.load(workdir)
    settings = {
        "model.vocab_size": (len(vocabulary), config.model.vocab_size),
        "model.ids": (vocabulary.ids, config.model.ids),
        "vocab": (vocabulary.config, config.vocab),
    }
    differing = [f"{key} is {new} now, was {old}" for key, (old, new) in settings.items() if new != old]
    if differing:
        raise VocabularyError(
            f"{workdir / MODEL_FILE} was made with other settings ({'; '.join(differing)}): "
            f"set them back, or {otherwise}"
        )
    return vocabulary


def _report(config: Config, prepared: Prepared, console: Console) -> None:
    data, vocabulary = config.data, prepared.vocabulary
    table = Table(title=f"{data.name} {data.source} -> {data.target}", title_justify="left")
    for column in ("split", "pairs", "dropped", "empty", "over-long", "tokens/source", "tokens/target"):
        table.add_column(column, justify="left" if column == "split" else "right")
    longest = config.batch.buckets[-1]
    for split, counts in prepared.dataset.splits.items():
        row = [split, f"{counts.pairs:,}", f"{counts.dropped:,}", f"{counts.empty:,}"]
        if (examples := prepared.splits.get(split)) is not None:
            row[1] = f"{len(examples):,}"
            row.append(f"{int((examples.lengths > longest).sum()):,}")
            row += [f"{x.mean():.1f}" for x in (examples.source_lengths, examples.target_lengths)]
        table.add_row(*row)
    console.print(table)

    plan = BatchPlan(prepared.splits[data.train_split].lengths, config.batch, seed=config.seed)
    shapes = Table(title="training batches", title_justify="left")
    for column in ("length", "rows", "padding"):
        shapes.add_column(column, justify="right")
    padding = plan.padding()
    for rows, length in plan.shapes:
        shapes.add_row(str(length), str(rows), f"{padding[length]:.0%}")
    console.print(shapes)
    console.print(f"{plan.batches_per_epoch:,} batches an epoch, up to {config.batch.tokens:,} slots a side")
    if len(plan.overlong):
        console.print(
            f"[yellow]over-long training pairs, not trained on: {len(plan.overlong):,} "
            f"(the last of batch.buckets is {longest})[/]"
        )
    console.print(f"vocabulary: {len(vocabulary):,} entries, sha256 {vocabulary.sha256[:16]}")
    if prepared.fresh:
        console.print(f"made: {', '.join(prepared.fresh)}")
    else:
        console.print("nothing to do: data set, vocabulary and encoded splits were already there")


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    """Progress bars on standard error, one for each thing that is reported."""
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn())
    console = Console(stderr=True)
    with bars.Progress(*columns, bars.TimeElapsedColumn(), console=console, transient=True) as shown:
        tasks: dict[str, bars.TaskID] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield report


def _about(progress: Progress, split: str) -> Progress:
    return lambda what, done, total: progress(f"{what} {split}", done, total)
