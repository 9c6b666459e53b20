"""Ours against Hugging Face `generate` on PyTorch and against CTranslate2: `benchmarks/peers.sh`.

One BART of random weights is written, and all three load it: they compute the same function, and the share of
equal symbols is printed as the proof.  Sources are full rows of random symbols; every engine writes the same
number of symbols, whatever its EOS says.  Same machine, same cores (--threads; every engine is told), one
process for ours, one for theirs, rounds over all systems in turn; conversion, compiling, warm-up are apart.

Ours is timed four ways: AR greedy and beam 5 as the same function; AR greedy with JANUS's query stream, which
feeds two slots a step where BART feeds one (other symbols, the price of the method); NAR at 1, 4 and 10
passes, one candidate (other symbols: nobody trained it; what it costs is the same).

The peers run in an environment of their own, as a server (peer_engines.py).  Writes peers.json and peers.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from benchmarks import common, forced
from janus_jax import mesh, report
from janus_jax.config import ModelConfig
from janus_jax.convert import load_bart
from janus_jax.models import apart

SETTLE = 0.2  # seconds before each system: threads of the other process may still spin
ORDINARY = 5  # symbols below are special
GAIN, PLACES = 0.5, 0.5  # of the random weights, and of their position tables; see `write_bart`


@dataclass(frozen=True)
class Size:
    """A BART."""

    dim: int
    ffn: int
    heads: int
    layers: int  # of encoder and decoder each
    vocabulary: int


SIZES = {
    "small": Size(dim=256, ffn=1024, heads=4, layers=4, vocabulary=8000),
    "base": Size(dim=768, ffn=3072, heads=12, layers=6, vocabulary=50265),
}


@dataclass(frozen=True)
class Shape:
    """What is decoded."""

    source: int = 24  # symbols of each source
    length: int = 24  # symbols written
    batches: tuple[int, ...] = (1, 16, 128)


@dataclass(frozen=True)
class Timed:
    """One call of one system: its time, and what it wrote."""

    seconds: list[float]
    tokens: np.ndarray  # [B, length] int32


Run = Callable[[np.ndarray, int, int], Timed]  # sources [B, S], length, calls


def write_bart(folder: Path, size: Size, seed: int = 0, max_positions: int = 256) -> None:
    """A BART of random weights, as Hugging Face stores one: config.json and model.safetensors.

    Scaled so that the symbol written changes from place to place and with the source.  Drawn as for training,
    or larger, one symbol is written for ever, and that engines agree on it would prove little.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, *shape: int, scale: float) -> None:
        weights[name] = (rng.standard_normal(shape) * scale).astype(np.float32)

    def dense(name: str, fan_in: int, fan_out: int) -> None:
        matrix(f"{name}.weight", fan_out, fan_in, scale=GAIN * fan_in**-0.5)
        matrix(f"{name}.bias", fan_out, scale=0.02)

    def norm(name: str) -> None:
        matrix(f"{name}.bias", size.dim, scale=0.02)
        weights[f"{name}.weight"] = np.ones(size.dim, np.float32)

    matrix("model.shared.weight", size.vocabulary, size.dim, scale=0.1)
    weights["final_logits_bias"] = np.zeros((1, size.vocabulary), np.float32)
    for side, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        matrix(f"model.{side}.embed_positions.weight", max_positions + 2, size.dim, scale=PLACES)
        norm(f"model.{side}.layernorm_embedding")
        for i in range(size.layers):
            layer = f"model.{side}.layers.{i}"
            for attention in attentions:
                for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    dense(f"{layer}.{attention}.{part}", size.dim, size.dim)
                norm(f"{layer}.{attention}_layer_norm")
            dense(f"{layer}.fc1", size.dim, size.ffn)
            dense(f"{layer}.fc2", size.ffn, size.dim)
            norm(f"{layer}.final_layer_norm")
    config = {
        "model_type": "bart",
        "architectures": ["BartForConditionalGeneration"],
        "vocab_size": size.vocabulary,
        "d_model": size.dim,
        "encoder_ffn_dim": size.ffn,
        "decoder_ffn_dim": size.ffn,
        "encoder_attention_heads": size.heads,
        "decoder_attention_heads": size.heads,
        "encoder_layers": size.layers,
        "decoder_layers": size.layers,
        "max_position_embeddings": max_positions,
        "activation_function": "gelu",
        "scale_embedding": False,
        "normalize_before": False,  # the last two for CTranslate2's converter
        "normalize_embedding": True,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


# -- the peers ----------------------------------------------------------------------------------------


class Peer:
    """The server of the other engines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Talks to a running one."""
        self._process = process

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer.

        Raises:
          BenchmarkError: the server has died, answered no JSON, or reports an error.
        """
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise common.BenchmarkError(f"the peers' process ended with code {code}; see its messages above")
        try:
            answer = json.loads(line)
        except ValueError:
            raise common.BenchmarkError(f"the peers' process answered no JSON: {line[:200]!r}") from None
        if "error" in answer:
            raise common.BenchmarkError(f"the peers' process: {answer['error']}")
        return answer

    def run(self, system: str, source: np.ndarray, length: int, calls: int) -> Timed:
        """Times one of its systems."""
        found = self.ask(do="run", system=system, source=source.tolist(), length=length, calls=calls)
        return Timed(found["seconds"], np.asarray([row[:length] for row in found["tokens"]], np.int32))


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[Peer]:
    """A server while the block runs.

    Raises:
      BenchmarkError: the command cannot be started.
    """
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise common.BenchmarkError(
            f"{command[0]}: {error.strerror}: the peers need an environment of their own; "
            "benchmarks/peers.sh makes it and starts this"
        ) from error
    with process:
        try:
            yield Peer(process)
            with contextlib.suppress(BrokenPipeError):
                process.communicate('{"do": "stop"}\n', timeout=30)
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):  # words that it did not live to read
                process.stdin.close()  # type: ignore[union-attr]


# -- ours ---------------------------------------------------------------------------------------------


def ours(params: Any, model: ModelConfig) -> dict[str, tuple[dict[str, Any], Run]]:
    """Description and runner of each of our systems."""
    janus = dataclasses.replace(model, ar_stream="query")
    ar, nar = forced.autoregressive, forced.non_autoregressive
    table: list[tuple[str, ModelConfig, Any, int | None]] = [
        ("greedy", model, functools.partial(ar, width=1), 1),
        ("beam 5", model, functools.partial(ar, width=5), 5),
        ("greedy, JANUS's two slots", janus, functools.partial(ar, width=1), None),
        *(
            (f"NAR T = {t}", model, functools.partial(nar, iterations=t), None)
            for t in (1, 4, 10)
        ),
    ]  # fmt: skip
    precision = model.dtype
    return {
        f"janus_jax {precision}, {label}": (
            {"engine": "janus_jax", "precision": precision, "beam": width},
            functools.partial(_run, functools.partial(program, params, model=config)),
        )
        for label, config, program, width in table
    }


def _run(program: Callable[..., jax.Array], source: np.ndarray, length: int, calls: int) -> Timed:
    seconds: list[float] = []
    tokens = np.zeros((0, 0), np.int32)
    for _ in range(calls):
        start = time.perf_counter()
        tokens = np.asarray(program(source, length=length))  # the way there and back
        seconds.append(time.perf_counter() - start)
    return Timed(seconds, tokens[:, :length])


# -- the comparison -----------------------------------------------------------------------------------


def compare(
    output: Path,
    command: Sequence[str],
    *,
    size: Size,
    shape: Shape = Shape(),
    rounds: int = 5,
    calls: int = 5,
    dtype: str = "float32",
    settle: float = SETTLE,
) -> dict[str, Any]:
    """Measures, writes and returns everything.

    Args:
      output: folder of what is written.
      command: starts the peers' server.
      size: the model.
      shape: what is decoded.
      rounds: how often every system is timed.
      calls: times in a row, in each round, at batch 1; at larger batches fewer, but one.
      dtype: of ours.
      settle: seconds of quiet before each.

    Raises:
      BenchmarkError: as `Peer.ask` and `started`.
    """
    facts = common.facts(dtype)
    device = "cpu" if mesh.device_kind() == "cpu" else "cuda"
    with tempfile.TemporaryDirectory(prefix="janus-jax-peers-") as name, started(command) as peer:
        folder = Path(name)
        write_bart(folder, size, max_positions=max(64, shape.source + 2, shape.length + 2))
        model, params = load_bart(folder / "model.safetensors", folder / "config.json")
        model = dataclasses.replace(model, dtype=dtype, max_length=max(model.max_length, shape.length + 2))
        laid_out = jax.device_put(apart(params, model))
        loaded = peer.ask(do="load", model=name, threads=facts["threads"], device=device)
        for system, why in loaded["absent"].items():
            print(f"left out: {system}: {why}", file=sys.stderr)
        described = {system: dict(value) for system, value in loaded["systems"].items()}
        runs: dict[str, Run] = {system: functools.partial(peer.run, system) for system in described}
        for system, (description, run) in ours(laid_out, model).items():
            described[system], runs[system] = description, run
        measured = {
            system: {**description, "batches": {}} for system, description in described.items()
        }  # fmt: skip
        with report.progress(len(runs) * len(shape.batches) * (1 + rounds), "peers", unit="system") as bar:
            for batch in shape.batches:
                source = sources(batch, shape.source, size.vocabulary, model)
                found = _at_batch(runs, source, shape.length, rounds, max(1, calls // batch), settle, bar)
                for system, row in _compared(described, found).items():
                    measured[system]["batches"][str(batch)] = row
    versions = facts["versions"] | loaded["versions"]
    result = {
        **facts,
        "versions": versions,
        "absent": loaded["absent"],
        "size": dataclasses.asdict(size),
        "shape": dataclasses.asdict(shape),
        "rounds": rounds,
        "systems": measured,
    }
    _publish(result, output)
    return result


def sources(batch: int, length: int, vocabulary: int, model: ModelConfig) -> np.ndarray:
    """[batch, length] int32 full rows of random ordinary symbols between BOS and EOS."""
    tokens = np.random.default_rng(batch).integers(ORDINARY, vocabulary, (batch, length), np.int32)
    tokens[:, 0], tokens[:, -1] = model.ids.bos, model.ids.eos
    return tokens


def _at_batch(
    runs: dict[str, Run],
    source: np.ndarray,
    length: int,
    rounds: int,
    calls: int,
    settle: float,
    bar: report.Progress,
) -> dict[str, tuple[float, list[Timed]]]:
    """Seconds of each system's first call, and its rounds."""
    first = {}
    for system, run in runs.items():
        first[system] = run(source, length, 1).seconds[0]
        run(source, length, 1)
        bar.advance(batch=len(source), now=f"{system}, warm")
    again = {s: functools.partial(run, source, length, calls) for s, run in runs.items()}
    timed = common.interleaved(
        again, rounds, settle=settle, advance=lambda s: bar.advance(batch=len(source), now=s)
    )
    return {system: (first[system], timed[system]) for system in runs}


def _compared(
    described: dict[str, dict[str, Any]], found: dict[str, tuple[float, list[Timed]]]
) -> dict[str, dict[str, Any]]:
    """Figures of each system at one batch, beside PyTorch's with the same beam (NAR: with greedy)."""
    rows = {}
    for system, (first, timed) in found.items():
        beam = described[system]["beam"]
        everything = list(itertools.chain.from_iterable(t.seconds for t in timed))
        batch = len(timed[0].tokens)
        row: dict[str, Any] = {
            **common.percentiles(everything),
            "sentences_per_s": batch / float(np.median(everything)),
            "first_call_s": first,
            "distinct_symbols": len(np.unique(timed[-1].tokens)),
        }
        for base, key in ((beam or 1, "times_pytorch"), (5, "times_pytorch_beam")):
            if theirs := _pytorch(described, found, base):
                ratio = common.speed_up(*([sum(t.seconds) for t in x] for x in (theirs, timed)))
                row[key] = ratio._asdict()
        if beam and (theirs := _pytorch(described, found, beam)):
            same = theirs[-1].tokens == timed[-1].tokens
            row["equal_tokens"], row["equal_sentences"] = float(same.mean()), float(same.all(axis=1).mean())
        rows[system] = row
    return rows


def _pytorch(
    described: dict[str, dict[str, Any]], found: dict[str, tuple[float, list[Timed]]], beam: int
) -> list[Timed] | None:
    for system, value in described.items():
        if value["engine"] == "PyTorch" and value["beam"] == beam:
            return found[system][1]
    return None


def _publish(result: dict[str, Any], output: Path) -> None:
    size, shape = result["size"], result["shape"]
    columns = [
        "", "batch", "p50 ms", "p95 ms", "sent/s", "x PyTorch", "range", "x PyTorch beam 5",
        "equal symbols, %", "equal sentences, %", "different symbols", "first call s",
    ]  # fmt: skip
    rows = []
    for batch, (system, value) in itertools.product(shape["batches"], result["systems"].items()):
        row = value["batches"][str(batch)]
        times, beam = row.get("times_pytorch"), row.get("times_pytorch_beam")
        equal = [100 * row[k] if k in row else None for k in ("equal_tokens", "equal_sentences")]
        rows.append([
            system, batch, row["p50_ms"], row["p95_ms"], row["sentences_per_s"],
            times and times["median"], times and f"{times['low']:.2f} to {times['high']:.2f}",
            beam and beam["median"], *equal, row["distinct_symbols"], row["first_call_s"],
        ])  # fmt: skip
    title = (
        f"BART of random weights, d {size['dim']}, ffn {size['ffn']}, {size['layers']}+{size['layers']} "
        f"layers, {size['vocabulary']:,} symbols; {shape['source']} in, {shape['length']} out; "
        f"{result['rounds']} rounds; "
        f"{result['device']}, {result['threads']} threads each, load before {result['load_before']:.1f}"
    )
    common.publish(output, "peers", title, result, columns, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--python", required=True, help="python of the peers' environment")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batches", type=common.numbers, default=Shape.batches)
    parser.add_argument("--source", type=common.at_least_one, default=Shape.source)
    parser.add_argument("--length", type=common.at_least_one, default=Shape.length)
    parser.add_argument("--rounds", type=common.at_least_one, default=5)
    parser.add_argument("--threads", type=common.at_least_one, help="cores; default all that there are")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of ours; default as the peers'")
    args = parser.parse_args(argv)

    def work() -> int:
        if args.threads:
            common.use_threads(args.threads)
        dtype = args.dtype or ("float32" if mesh.device_kind() == "cpu" else "bfloat16")
        # -P: this folder's names hide none of the libraries' (theirs import `profile`, for one).
        server = [args.python, "-P", str(Path(__file__).with_name("peer_engines.py"))]
        shape = Shape(args.source, args.length, args.batches)
        output = common.folder(args.output_dir)
        compare(output, server, size=SIZES[args.size], shape=shape, rounds=args.rounds, dtype=dtype)
        return 0

    return common.guarded(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
