"""What the tables train: the rows, each by what it changes of a configuration, and the sets, by scale.

`run.py` makes commands of it.  Everything that is not named here is the same for all rows of a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]  # dotted key of the configuration -> value


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    settings: Settings
    base: bool = False  # one of the methods compared; the others change one thing of `janus`


NO_TIES = {"loss.kl_ar_aux": 0.0, "loss.kl_nar_aux": 0.0, "loss.kl_ar_nar": 0.0}

ROWS: dict[str, Row] = {
    "ar_content": Row(
        "classic Transformer", {"loss.objective": "ar", "model.ar_stream": "content"}, base=True
    ),
    "ar": Row("AR, read from the query stream", {"loss.objective": "ar"}, base=True),
    "rdrop": Row("AR + R-Drop", {"loss.objective": "rdrop"}, base=True),
    "cmlm": Row("mask-predict alone", {"loss.objective": "cmlm"}, base=True),
    "janus": Row("JANUS, weights of the released code", {"loss.objective": "janus"}, base=True),
    "no_aux": Row("KL AR-NAR alone", {"loss.aux": 0.0, "loss.kl_ar_aux": 0.0, "loss.kl_nar_aux": 0.0}),
    "no_kl_ar_aux": Row("w_aa = 0", {"loss.kl_ar_aux": 0.0}),
    "no_kl_nar_aux": Row("w_na = 0", {"loss.kl_nar_aux": 0.0}),
    "no_kl_ar_nar": Row("w_an = 0: the paper's picture", {"loss.kl_ar_nar": 0.0}),
    "kl_ar_aux_1": Row("w_aa = 1", {"loss.kl_ar_aux": 1.0}),
    "ties_30": Row(
        "KL weights at 30 % of the released ones",
        {"loss.kl_ar_aux": 0.9, "loss.kl_nar_aux": 0.3, "loss.kl_ar_nar": 0.3},
    ),
    "ties_10": Row(
        "KL weights at 10 % of the released ones",
        {"loss.kl_ar_aux": 0.3, "loss.kl_nar_aux": 0.1, "loss.kl_ar_nar": 0.1},
    ),
    "kl_warmup": Row("KL weights rising from 0 over the first half", {"loss.kl_warmup": 0.5}),
    "kl_decay": Row("KL weights falling to 0 over the first half", {"loss.kl_decay": 0.5}),
    "one_way": Row("one-way KLs: KL(AUX || AR), KL(AUX || NAR), KL(AR || NAR)", {"loss.kl_form": "one_way"}),
    "ar_teaches": Row("KL teaches NAR and AUX alone", {"loss.kl_learners": "nar_aux"}),
    "ar_learns": Row("KL teaches AR alone", {"loss.kl_learners": "ar"}),
    "ar_learns_aux": Row(
        "KL(AR, AUX) alone, which teaches AR alone",
        {"loss.kl_learners": "ar", "loss.kl_nar_aux": 0.0, "loss.kl_ar_nar": 0.0},
    ),
    "no_kl": Row(
        "AR and NAR side by side, no AUX, no KL",
        {"loss.aux": 0.0, **NO_TIES},
    ),
    "no_ties": Row("AR, NAR and AUX side by side, no KL", NO_TIES),
    "code": Row("AR positions of the released code", {"model.ar_positions": "code"}),
    "figure": Row("AR positions as in the paper's picture", {"model.ar_positions": "figure"}),
    "aligned": Row("AR positions aligned", {"model.ar_positions": "aligned"}),
    "uniform": Row("mask sampler of CMLM", {"batch.sampler": "uniform"}),
    "mask_50": Row("half of the target as the budget of masks", {"batch.mask_rate": 0.5}),
    "mask_90": Row("nine tenths of it", {"batch.mask_rate": 0.9}),
    "length_gradient": Row("the length loss trains the encoder, too", {"model.length_gradient": True}),
    "random_order": Row("random order over the masked slots", {"batch.order": "random"}),
}
SMOKE_ROWS = ("ar_content", "ar", "rdrop", "cmlm", "janus", "no_aux")


@dataclass(frozen=True)
class Scale:
    """How large: a configuration, what is changed of it, and rows side by side on one device."""

    config: str
    settings: Settings = field(default_factory=dict)
    jobs: int = 1


@dataclass(frozen=True)
class Set:
    """A data set: its directions, the first being the default, and its scales."""

    what: str
    directions: tuple[str, ...]  # ende: English to German
    scales: dict[str, Scale]
    raw: str = ""  # what --raw_dir is to hold; "" if it may be left out
    cut: bool = False  # dev is cut from train, and `valid` is the test set


# The runs of docs/results.md: five epochs of Multi30k.
CPU = {"train.steps": 2275, "train.eval_every": 455, "train.checkpoint_every": 455}
LONG = {"batch.buckets": "24,48,72,96,128,160", "model.max_positions": 192}

# Generated text, so no data, no network, and the same figures each time; as small as shows all of it.
SMOKE = Scale(
    "configs/demo.py",
    {
        "data.size": 1500,
        "vocab.max_sentences": 1500,
        "batch.tokens": 256,
        "batch.sampler": "span",
        "model.vocab_size": 256,
        "model.dim": 32,
        "model.ffn": 64,
        "model.encoder_layers": 1,
        "model.decoder_layers": 1,
        "model.ar_positions": "code",
        "loss.nar": 0.5,
        "loss.kl_ar_aux": 3.0,
        "optim.lr": 5e-3,
        "optim.warmup_steps": 20,
        "train.steps": 300,
        "train.eval_every": 150,
        "train.checkpoint_every": 150,
        "train.dev_sentences": 50,
        "train.tensorboard": False,
        "decode.candidates": 3,
        "decode.rescore": False,
    },
)

_SMALL = "configs/multi30k_deen.py"
_PAIRS = {"data.name": "parallel_text", "data.dev_split": "val", "data.test_split": "test"}
_IWSLT = {"data.name": "iwslt14", "data.dev_split": "valid", "data.test_split": "test"}
_WMT = {"data.dev_split": "validation", "data.test_split": "test", "data.size": 200_000}

SETS: dict[str, Set] = {
    "multi30k": Set(
        "Multi30k, image captions, 29k pairs",
        ("ende", "deen"),
        {
            "smoke": SMOKE,
            "cpu": Scale(_SMALL, CPU),
            "full": Scale("configs/multi30k_deen_gpu.py", jobs=5),
        },
    ),
    "tatoeba": Set(
        "Tatoeba, everyday sentences, 164k pairs",
        ("ende", "deen"),
        {
            "smoke": SMOKE,
            "cpu": Scale(_SMALL, {**_PAIRS, **CPU}),
            "full": Scale("configs/multi30k_deen_gpu.py", {**_PAIRS, "train.steps": 20_000}, jobs=5),
        },
        raw="train and valid as .en[.gz] and .de[.gz]",
        cut=True,
    ),
    "canlaw": Set(
        "Canadian federal law, long sentences, 161k pairs",
        ("enfr", "fren"),
        {
            "smoke": SMOKE,
            "cpu": Scale(_SMALL, {**_PAIRS, **CPU, **LONG, "batch.tokens": 3072}),
            "full": Scale(
                "configs/multi30k_deen_gpu.py",
                {**_PAIRS, **LONG, "train.steps": 20_000, "batch.tokens": 16_384},
                jobs=3,
            ),
        },
        raw="train and valid as .en[.gz] and .fr[.gz]",
        cut=True,
    ),
    "iwslt14": Set(
        "IWSLT14, talks, 160k pairs",
        ("deen", "ende"),
        {
            "smoke": SMOKE,
            "cpu": Scale(_SMALL, {**_IWSLT, **CPU, **LONG}),
            "full": Scale("configs/iwslt14_deen.py"),
        },
        raw="train, valid and test as .de[.gz] and .en[.gz]",
    ),
    "wmt14": Set(
        "WMT14, news, 4.5M pairs",
        ("ende", "deen"),
        {
            "smoke": SMOKE,
            "cpu": Scale(_SMALL, {"data.name": "wmt14", **_WMT, **CPU, **LONG}),
            "full": Scale("configs/wmt14_ende.py"),
        },
    ),
    "wmt16": Set(
        "WMT16, news, 610k pairs",
        ("enro", "roen"),
        {
            "smoke": SMOKE,
            "cpu": Scale(_SMALL, {"data.name": "wmt16", **_WMT, **CPU, **LONG}),
            "full": Scale("configs/wmt16_enro.py"),
        },
    ),
}
