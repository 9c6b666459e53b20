"""The configuration: every key once, typed, with its meaning; and its validation.

The dataclasses below are the single definition.  `configs/base.py` turns them into an
`ml_collections.ConfigDict` for the command line (`to_config_dict`), experiment files change a few
keys of it, and `from_config_dict` brings it back as one frozen, checked `Config`.

Room: pure core.  Imports nothing of ours; touches no file, no device, no clock.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections

OBJECTIVES = ("janus", "ar", "cmlm", "rdrop")
KL_LEARNERS = {"all": ("ar", "nar", "aux"), "nar_aux": ("nar", "aux"), "ar": ("ar",)}
KL_FORMS = ("symmetric", "one_way")
AR_POSITIONS = ("code", "figure", "aligned")
AR_STREAMS = ("query", "content")
SAMPLERS = ("span", "uniform")
ORDERS = ("sentence", "random")
SCHEDULES = ("inverse_sqrt", "polynomial", "constant")
MOST = 1000  # beams, candidates, passes, drafted tokens: what shapes and 32-bit counts bear
STEEPEST = 10  # exponent of a length by which scores are divided: what float32 bears


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names every key at fault and the remedy."""


@dataclass(frozen=True)
class SpecialIds:
    """Vocabulary entries with a meaning of their own."""

    pad: int = 0
    bos: int = 1  # first symbol of every source and target
    eos: int = 2  # last symbol of every source and target
    unk: int = 3
    mask: int = 4  # [M]; a converted fairseq JANUS uses unk for it
    start: int = 1  # first symbol the decoder is fed; bos, but eos in BART


@dataclass(frozen=True)
class DataConfig:
    """Which pairs of text, and in which direction."""

    name: str = "multi30k"  # multi30k | parallel_text | phrases | iwslt14 | wmt14 | wmt16
    source: str = "de"  # language translated from
    target: str = "en"  # language translated into
    train_split: str = "train"
    dev_split: str = "val"
    test_split: str = "test_2016_flickr"
    dir: str = ""  # where prepared data lies, a local folder; "" means <workdir>/data, or for a workdir on
    # gs:// a folder below ~/.cache/janus_jax/data ($JANUS_JAX_CACHE) on each machine
    raw_dir: str = ""  # folder of the raw files, for sets read from one; "" means download
    size: int = 0  # training pairs to use (phrases: to generate); 0 means all (phrases: its default)


@dataclass(frozen=True)
class VocabConfig:
    """The joint SentencePiece vocabulary; its size is model.vocab_size, its ids model.ids."""

    kind: str = "unigram"  # unigram | bpe
    character_coverage: float = 1.0
    byte_fallback: bool = True  # any character is representable, so <unk> never appears
    max_sentences: int = 2_000_000  # sentences sampled to train it


@dataclass(frozen=True)
class BatchConfig:
    """Batches: few fixed shapes, a token budget, and the corruption of the target."""

    buckets: tuple[int, ...] = (16, 24, 32, 48, 64)  # padded lengths, source and target alike
    tokens: int = 2048  # slots of one side per update (rows x bucket), over all devices
    device_tokens: int = 8192  # with train.microbatches = 0: most slots of one side on a device at a time
    sampler: str = "span"  # span (Poisson spans) | uniform (CMLM)
    mask_rate: float = 0.7  # span sampler: budget as a share of the target
    span_mean: float = 2.0  # span sampler: mean of the Poisson of span lengths
    order: str = "sentence"  # sentence | random: in which order over M the tokens are true ones to AUX
    workers: int = 2  # reading threads
    prefetch: int = 16  # batches read ahead


@dataclass(frozen=True)
class ModelConfig:
    """One Transformer encoder-decoder and how its streams are fed."""

    vocab_size: int = 4000
    dim: int = 256  # D
    ffn: int = 512  # F
    heads: int = 4  # H
    encoder_layers: int = 4
    decoder_layers: int = 4
    max_positions: int = 256  # rows of the learned position tables
    max_length: int = 255  # largest target length (with BOS and EOS) the length table knows
    length_gradient: bool = True  # the length loss trains the encoder, too; False: the length table alone
    norm: str = "post"  # post | pre
    norm_eps: float = 1e-5
    positions: str = "learned"  # learned | sinusoidal
    activation: str = "relu"  # relu | gelu (the exact one)
    ar_positions: str = "aligned"  # code (the release) | figure | aligned: models/streams.py
    ar_stream: str = "query"  # query (JANUS) | content (classic Transformer, BART)
    share_embeddings: bool = True  # source and target use one table
    tie_output: bool = True  # the output projection is the target table
    output_bias: bool = False  # a bias per vocabulary entry (BART's final_logits_bias)
    scale_embeddings: bool = True  # multiply token embeddings by sqrt(D)
    embed_norm: bool = False  # layer norm right after the embeddings (BART)
    dropout: float = 0.3
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    dtype: str = "float32"  # float32 | bfloat16 computation; parameters are always float32
    scan_layers: bool = False  # compile one layer and loop; same parameters either way
    remat: bool = False  # recompute layer activations in the backward pass
    remat_keep: str = "nothing"  # nothing | products: with the latter, no matrix product is computed again
    ids: SpecialIds = field(default_factory=SpecialIds)


@dataclass(frozen=True)
class InitConfig:
    """What the parameters are before the first update."""

    run: str = ""  # a run directory, whose parameters and vocabulary this run starts from; "" draws them
    checkpoint: str = "best"  # of that run: best | latest | a step | average:N


@dataclass(frozen=True)
class LossConfig:
    """The objective and the weight of each of its terms (docs/method.md section 4)."""

    objective: str = "janus"  # janus | ar | cmlm | rdrop
    label_smoothing: float = 0.1
    ar: float = 1.0
    nar: float = 0.5
    aux: float = 0.5  # with kl_nar_aux = kl_ar_aux = 0 too, the AUX streams are not computed
    length: float = 0.1
    kl_nar_aux: float = 1.0
    kl_ar_aux: float = 3.0
    kl_ar_nar: float = 1.0
    kl_warmup: float = 0.0  # share of the updates over which these three rise from 0 to what they are above
    kl_decay: float = 0.0  # share of the updates over which they fall to 0, from the first on; 0: they stay
    kl_learners: str = "all"  # all | nar_aux | ar: whom these three teach; nar_aux leaves AR as it is
    # symmetric | one_way: in place of the mean of both divergences, the one from the first of AUX, AR, NAR
    kl_form: str = "symmetric"
    rdrop_alpha: float = 5.0  # objective rdrop: weight of its KL, as in the R-Drop paper
    chunk: int = 128  # slots whose logits exist at a time, on each device; 0: all of them (same numbers)
    # The decoder computes only what the loss reads; False: every stream at every place in every layer
    # (same numbers, but for the draws of dropout).
    gather: bool = True

    @property
    def ties_change(self) -> bool:
        """Whether the weights of the KL terms depend on how much of the training is done."""
        return self.objective == "janus" and bool(self.kl_warmup or self.kl_decay)


@dataclass(frozen=True)
class OptimConfig:
    """Adam with decoupled weight decay, and its learning-rate schedule."""

    lr: float = 5e-4  # peak
    schedule: str = "inverse_sqrt"  # inverse_sqrt | polynomial | constant
    warmup_steps: int = 4000
    init_lr: float = 1e-7  # where the warm-up starts
    end_lr: float = 0.0  # polynomial: the last value
    power: float = 1.0  # polynomial: 1 is linear
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: float = 0.0  # clip the global gradient norm to this; 0 means no clipping
    ema: float = 0.0  # decay of an exponential average of the parameters; 0 means none


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often, and what to do when something goes wrong."""

    steps: int = 20_000  # updates
    microbatches: int = 1  # gradient accumulation: parts of one update's batch; 0: see batch.device_tokens
    log_every: int = 50
    eval_every: int = 1000  # dev loss and dev BLEU in both modes
    dev_sentences: int = 500  # dev sentences decoded for BLEU; 0 means all, and -1 none
    dev_beam: int = 1  # beam of dev BLEU's AR decoding; 1 is greedy
    dev_iterations: int = 4  # passes of dev BLEU's NAR decoding
    checkpoint_every: int = 1000
    keep_last: int = 5  # newest checkpoints kept; the best on dev is kept besides
    best: str = "bleu"  # what chooses the best: bleu (mean over the modes trained) | loss
    nonfinite: str = "stop"  # stop | skip an update whose loss or gradient is not finite or explodes
    max_grad_norm: float = 1e4  # a larger gradient norm counts as exploded
    max_skipped: int = 20  # nonfinite = skip: consecutive skipped updates that stop the run all the same
    tensorboard: bool = True


@dataclass(frozen=True)
class DecodeConfig:
    """Defaults of decoding; each has a flag of the same name on evaluate and translate."""

    beam: int = 5
    length_penalty: float = 1.0  # AR score = sum log p / length ** this
    max_length_a: float = 1.5  # AR: at most a * source length + b tokens
    max_length_b: int = 10
    iterations: int = 10  # NAR: decoder passes, T
    candidates: int = 3  # NAR: target lengths tried
    early_stop: bool = False  # NAR: a sentence stops when a pass changes nothing: fewer passes, worse text
    rescore: bool = False  # NAR: choose among candidates by the AR score of the same model
    draft_block: int = 8  # draft: tokens that AR verifies in a pass
    draft_branches: int = 8  # draft: and other symbols for their places, verified in the same pass
    draft_top_k: int = 1  # draft: accepted among AR's best so many; 1 writes what greedy AR writes
    draft_margin: float = 1.0  # draft_top_k > 1: and at most this below AR's best, in log p
    ban_unk: bool = True  # never emit <unk>
    tokens: int = 8192  # slots of one decoding batch (rows x beams or candidates x length)


@dataclass(frozen=True)
class MeshConfig:
    """Devices and how the arrays lie on them: data x fsdp x tensor devices."""

    data: int = -1  # replicas, across slices first; -1 means all devices that the other axes leave
    fsdp: int = 1  # devices that share rows as well as parameters and optimiser state
    tensor: int = 1  # devices that share heads, ffn width and vocabulary of the same rows
    # CPUs: the same numbers to the last digit on x86-64 processors of several makes, however many cores they
    # have (docs/parity.md says how far that goes); two threads, unless $NPROC says otherwise.
    portable: bool = False
    startup_timeout: int = 300  # seconds to wait for the other processes to come
    heartbeat_timeout: int = 100  # seconds without a sign of life after which a process counts as dead


@dataclass(frozen=True)
class Config:
    """Everything one run needs; see the sections."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    vocab: VocabConfig = field(default_factory=VocabConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict with JSON types, tuples as lists."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        return plain(dataclasses.asdict(self))


def microbatches(config: Config, shares: int) -> int:
    """Parts that an update's batch is computed in, on a mesh that cuts rows into `shares`.

    `train.microbatches`, or for 0 as few as keep `batch.device_tokens`; the global batch is the same.
    """
    if config.train.microbatches:
        return config.train.microbatches
    return -(-config.batch.tokens // (shares * config.batch.device_tokens))


def to_config_dict(config: Config | None = None) -> ml_collections.ConfigDict:
    """`config` (default: all defaults) as a ConfigDict for experiment files and flags."""
    return ml_collections.ConfigDict(dataclasses.asdict(config or Config()))


def from_dict(values: Mapping[str, Any]) -> Config:
    """A checked `Config` from nested mappings (a ConfigDict's or a config.json's).

    Raises:
      ConfigError: an unknown key (with the nearest real one), a wrong type, or values that cannot
        be used together; all faults in one message.
    """
    faults: list[str] = []
    config = _build(Config, values, "", faults)
    if not faults:
        faults.extend(_faults(config))
    if faults:
        raise ConfigError("unusable configuration:\n" + "\n".join(f"  {f}" for f in faults))
    return config


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """`from_dict` of a ConfigDict."""
    return from_dict(config.to_dict())


def key_names() -> tuple[str, ...]:
    """Every key, dotted: ('seed', 'data.name', ...)."""
    return tuple(_leaves(Config, ""))


def nearest_key(name: str) -> str | None:
    """The real key that looks most like `name`, or None."""
    leaves = key_names()
    names = [*leaves, *{k.rsplit(".", 1)[0] for k in leaves if "." in k}]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return close[0]
    same_leaf = [k for k in leaves if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return same_leaf[0] if same_leaf else None


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value in a, value in b)} where the two differ."""
    return {k: (x, y) for k in key_names() if (x := get(a, k)) != (y := get(b, k))}


def get(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _leaves(cls: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _leaves(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def _build(cls: type, values: Mapping[str, Any], prefix: str, faults: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    built: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        if name not in hints:
            near = nearest_key(key)
            faults.append(f"unknown key {key!r}" + (f"; did you mean {near!r}?" if near else ""))
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                built[name] = _build(hints[name], value, key + ".", faults)  # type: ignore[arg-type]
            else:
                faults.append(f"{key} is a section, not a value: got {value!r}")
        else:
            built[name] = _coerce(key, hints[name], value, faults)
    return cls(**built)


def _coerce(key: str, kind: Any, value: Any, faults: list[str]) -> Any:
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            return tuple(value)
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    name = getattr(kind, "__name__", None) if typing.get_origin(kind) is None else str(kind)
    faults.append(f"{key} must be {name or kind}, got {value!r} ({type(value).__name__})")
    return value


def _faults(c: Config) -> Iterator[str]:
    """One line per value that cannot be used, by name."""

    def one_of(key: str, choices: tuple[str, ...]) -> Iterator[str]:
        if get(c, key) not in choices:
            yield f"{key} must be one of {', '.join(choices)}, got {get(c, key)!r}"

    def at_least(low: float, *keys: str) -> Iterator[str]:
        for key in keys:
            if not get(c, key) >= low:  # also catches NaN
                yield f"{key} must be at least {low}, got {get(c, key)}"

    def finite(*keys: str) -> Iterator[str]:
        for key in keys:
            if not math.isfinite(get(c, key)):
                yield f"{key} must be a finite number, got {get(c, key)}"

    def within(low: float, high: float, *keys: str) -> Iterator[str]:
        for key in keys:
            if not low <= get(c, key) < high:
                yield f"{key} must lie in [{low}, {high}), got {get(c, key)}"

    yield from one_of("loss.objective", OBJECTIVES)
    yield from one_of("loss.kl_learners", tuple(KL_LEARNERS))
    yield from one_of("loss.kl_form", KL_FORMS)
    yield from one_of("model.ar_positions", AR_POSITIONS)
    yield from one_of("model.ar_stream", AR_STREAMS)
    yield from one_of("model.norm", ("post", "pre"))
    yield from one_of("model.positions", ("learned", "sinusoidal"))
    yield from one_of("model.activation", ("relu", "gelu"))
    yield from one_of("model.remat_keep", ("nothing", "products"))
    yield from one_of("model.dtype", ("float32", "bfloat16"))
    yield from one_of("batch.sampler", SAMPLERS)
    yield from one_of("batch.order", ORDERS)
    yield from one_of("optim.schedule", SCHEDULES)
    yield from one_of("vocab.kind", ("unigram", "bpe"))
    yield from one_of("train.nonfinite", ("stop", "skip"))
    yield from one_of("train.best", ("bleu", "loss"))
    yield from at_least(1, "model.dim", "model.ffn", "model.heads", "model.encoder_layers")
    yield from at_least(1, "model.decoder_layers", "batch.workers", "train.steps")
    yield from at_least(1, "train.log_every", "train.eval_every", "train.checkpoint_every")
    yield from at_least(1, "train.keep_last", "decode.beam", "decode.iterations", "decode.candidates")
    yield from at_least(1, "train.max_skipped", "vocab.max_sentences")
    yield from at_least(2, "model.max_length")
    yield from at_least(1, "train.dev_beam", "train.dev_iterations")
    yield from at_least(-1, "train.dev_sentences")
    yield from at_least(
        0,
        "decode.draft_margin",
        "decode.draft_branches",
        "seed",
        "data.size",
        "batch.prefetch",
        "train.microbatches",
        "decode.max_length_a",
        "loss.chunk",
    )
    yield from finite("decode.max_length_a", "decode.length_penalty")
    yield from at_least(1, "decode.max_length_b", "decode.tokens", "decode.draft_block", "decode.draft_top_k")
    yield from at_least(0, "optim.lr", "optim.warmup_steps", "optim.weight_decay", "optim.clip_norm")
    yield from at_least(0, "loss.ar", "loss.nar", "loss.aux", "loss.length", "loss.rdrop_alpha")
    yield from at_least(0, "loss.kl_nar_aux", "loss.kl_ar_aux", "loss.kl_ar_nar")
    yield from within(0, 1, "model.dropout", "model.attention_dropout", "model.activation_dropout")
    yield from within(0, 1, "loss.label_smoothing", "loss.kl_warmup", "loss.kl_decay")
    yield from within(0, 1, "optim.ema", "optim.b1", "optim.b2")
    if not re.fullmatch(r"best|latest|\d+|average:\d+", c.init.checkpoint):
        yield f"init.checkpoint must be best, latest, a step or average:N, got {c.init.checkpoint!r}"
    if not 0 < c.batch.mask_rate <= 1:
        yield f"batch.mask_rate must lie in (0, 1], got {c.batch.mask_rate}"
    if not 0 < c.batch.span_mean <= 100:
        yield f"batch.span_mean must lie in (0, 100], got {c.batch.span_mean}"
    if not c.optim.eps > 0:
        yield f"optim.eps must be above 0, got {c.optim.eps}"
    if not c.seed < 2**32:
        yield f"seed must be below 2**32, got {c.seed}"
    for key in ("beam", "iterations", "candidates", "draft_block", "draft_branches", "draft_top_k"):
        if getattr(c.decode, key) > MOST:
            yield f"decode.{key} must be at most {MOST}, got {getattr(c.decode, key)}"
    if abs(c.decode.length_penalty) > STEEPEST:
        yield f"decode.length_penalty must lie in [-{STEEPEST}, {STEEPEST}], got {c.decode.length_penalty}"
    if c.model.heads > 0 and c.model.dim % c.model.heads:
        yield f"model.heads ({c.model.heads}) must divide model.dim ({c.model.dim})"
    yield from at_least(1, "mesh.fsdp", "mesh.tensor", "batch.device_tokens")
    yield from at_least(1, "mesh.startup_timeout", "mesh.heartbeat_timeout")
    for axis, key in (
        *((c.mesh.tensor, key) for key in ("model.heads", "model.ffn", "model.vocab_size")),
        (c.mesh.fsdp, "model.dim"),
    ):
        name = "mesh.fsdp" if key == "model.dim" else "mesh.tensor"
        if axis > 1 and get(c, key) % axis:
            yield f"{name} ({axis}) must divide {key} ({get(c, key)})"
    if c.mesh.data != -1 and c.mesh.data < 1:
        yield f"mesh.data must be -1 (all devices) or at least 1, got {c.mesh.data}"

    buckets = c.batch.buckets
    if not buckets or any(b < 3 for b in buckets) or list(buckets) != sorted(set(buckets)):
        yield f"batch.buckets must be increasing lengths of at least 3, got {buckets}"
    else:
        if buckets[-1] > c.batch.tokens:
            yield f"batch.tokens ({c.batch.tokens}) must hold a row of the largest bucket ({buckets[-1]})"
        if c.model.positions == "learned" and buckets[-1] > c.model.max_positions:
            yield (
                f"model.max_positions ({c.model.max_positions}) must be at least the largest of "
                f"batch.buckets ({buckets[-1]})"
            )

    ids = c.model.ids
    named = {n: getattr(ids, n) for n in ("pad", "bos", "eos", "unk", "mask")}
    for name, value in {**named, "start": ids.start}.items():
        if not 0 <= value < c.model.vocab_size:
            yield f"model.ids.{name} ({value}) must lie inside model.vocab_size ({c.model.vocab_size})"
    distinct = {n: v for n, v in named.items() if not (n == "mask" and v == ids.unk)}
    if len(set(distinct.values())) < len(distinct):
        yield f"model.ids must differ from each other (mask may equal unk), got {named}"
    if ids.start not in (ids.bos, ids.eos):
        yield f"model.ids.start ({ids.start}) must be bos ({ids.bos}) or eos ({ids.eos})"
    if c.loss.objective in ("janus", "cmlm") and c.model.max_length + 1 < (buckets[-1] if buckets else 0):
        yield (
            f"model.max_length ({c.model.max_length}) must be at least the largest of batch.buckets "
            f"({buckets[-1]}) less one"
        )
    if c.train.dev_sentences < 0 and c.train.best == "bleu":
        yield "train.best = bleu needs dev BLEU: set train.dev_sentences to 0 or more, or train.best = loss"
    learners = KL_LEARNERS.get(c.loss.kl_learners, ())
    weights = (
        c.loss.ar,
        c.loss.nar,
        ("ar" in learners) * (c.loss.kl_ar_aux + c.loss.kl_ar_nar),
        ("nar" in learners) * (c.loss.kl_nar_aux + c.loss.kl_ar_nar),
    )
    if c.loss.objective == "janus" and not any(weights):
        yield (
            "loss.objective = janus needs a weight that teaches AR or NAR: loss.ar, loss.nar, or a tie that "
            f"one of them learns by (loss.kl_learners = {c.loss.kl_learners})"
        )
    if c.loss.objective == "janus" and c.model.ar_stream != "query":
        yield "loss.objective = janus needs model.ar_stream = query"
