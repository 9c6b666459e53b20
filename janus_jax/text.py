"""Text to token ids and back: one joint SentencePiece vocabulary, with identity round trips.

`decode(encode(text)) == clean_line(text)` for every string without lone surrogates (those become
U+FFFD, since UTF-8 cannot hold them).  Three things make it so: no Unicode normalisation, bytes for
characters that are no piece of their own, and an escape for the few code points that SentencePiece
uses internally.  Symbols with a meaning (pad, bos, eos, unk, mask) are never produced by text, not
even by text that spells them.

A saved vocabulary is two files: `vocab.model` (SentencePiece) and `vocab.json` (its hash, size, ids,
settings and versions), so that a model can tell whether it was trained with this very vocabulary.

Room: [disk] reads and writes these two files.  Imports config and paths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

from janus_jax import paths
from janus_jax.config import SpecialIds, VocabConfig

MODEL_FILE = "vocab.model"
INFO_FILE = "vocab.json"
MASK_PIECE = "[M]"

_SAMPLE_SEED = 0  # which sentences are drawn when there are more than vocab.max_sentences
_LONGEST_SENTENCE = 1 << 20  # bytes; SentencePiece would silently skip lines of more than 4192

# SentencePiece writes a space as U+2581, so a real one would come back as a space; U+2585 and NUL are
# reserved while it trains.  They travel as the escape character and a digit.
_ESCAPE = "\ue000"
_ESCAPED = (_ESCAPE, "\u2581", "\u2585", "\0")
_ESCAPES = {char: _ESCAPE + str(i) for i, char in enumerate(_ESCAPED)}
_TO_ESCAPE = re.compile("[" + "".join(_ESCAPED) + "\ud800-\udfff]")
_TO_UNESCAPE = re.compile(f"{_ESCAPE}([0-{len(_ESCAPED) - 1}])")
_REPLACEMENT = "\ufffd"


class VocabularyError(ValueError):
    """A vocabulary that cannot be trained, read or used; the message names the remedy."""


def clean_line(text: str) -> str:
    """`text` without blanks at its ends, and with any run of blanks in between as one space.

    Blanks are all that Unicode calls white space: tab, no-break space, line separators and so on.
    Everything else stays, control characters and zero-width ones too.
    """
    return " ".join(text.split())


class Vocabulary:
    """A trained vocabulary: `encode`, `decode`, `ids`, `sha256`, and its length."""

    def __init__(self, model: bytes, ids: SpecialIds, config: VocabConfig) -> None:
        """Wraps a serialised SentencePiece `model` whose special symbols lie at `ids`.

        Raises:
          VocabularyError: not a SentencePiece model, or its symbols lie elsewhere.
        """
        self._model = model
        self._processor = _processor(model)
        self.ids = ids
        self.config = config
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._special = {ids.pad, ids.bos, ids.eos, ids.unk, ids.mask}
        _check_ids(self._processor, ids)

    def __len__(self) -> int:
        """Number of entries."""
        return self._processor.get_piece_size()

    @classmethod
    def train(cls, sentences: Iterable[str], config: VocabConfig, size: int, ids: SpecialIds) -> Vocabulary:
        """Learns `size` entries from `sentences`; the same input gives the same bytes.

        Args:
          sentences: text of all languages together; at most `config.max_sentences` of them, drawn
            evenly, are used.
          config: kind of vocabulary and its coverage.
          size: entries, special symbols and byte pieces included.
          ids: where the special symbols shall lie; they must be the lowest ids.

        Raises:
          VocabularyError: no text, a size that this text cannot fill or that cannot hold its
            characters (the message has the bound), or ids that SentencePiece cannot arrange.
        """
        chosen = [_escape(clean_line(s)) for s in _sample(sentences, config.max_sentences)]
        chosen = [s for s in chosen if s]
        if not chosen:
            raise VocabularyError("cannot train a vocabulary: the text has no sentence that is not empty")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(chosen),
                model_writer=model,
                vocab_size=size,
                model_type=config.kind,
                character_coverage=config.character_coverage,
                byte_fallback=config.byte_fallback,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                max_sentence_length=_LONGEST_SENTENCE,
                pad_id=ids.pad,
                bos_id=ids.bos,
                eos_id=ids.eos,
                unk_id=ids.unk,
                control_symbols=[] if ids.mask == ids.unk else [MASK_PIECE],
                num_threads=1,  # sums of floats: another number of threads could change the pieces
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise VocabularyError(_explain(str(error), size)) from error
        return cls(model.getvalue(), ids, config)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` after `clean_line`: bos, pieces, eos."""
        pieces = self._processor.encode(_escape(clean_line(text)))
        return [self.ids.bos, *pieces, self.ids.eos]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` up to the first eos, all of them if there is none.

        A start symbol in front is skipped, even if it equals eos (BART); special symbols have no
        text.  Bytes that are no UTF-8 become U+FFFD.
        """
        listed = ids if isinstance(ids, list) else np.asarray(ids).tolist()
        if listed[:1] == [self.ids.start]:
            listed = listed[1:]
        if self.ids.eos in listed:
            listed = listed[: listed.index(self.ids.eos)]
        text = self._processor.decode([i for i in listed if i not in self._special])
        return _TO_UNESCAPE.sub(lambda found: _ESCAPED[int(found[1])], text)

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The written form of each id, special symbols included: for pictures and reports."""
        return [self._processor.id_to_piece(int(i)) for i in ids]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes both files into `folder`, which is made if needed; each appears whole or not at all."""
        folder = paths.as_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        info = {
            "format": 1,
            "sha256": self.sha256,
            "size": len(self),
            "ids": dataclasses.asdict(self.ids),
            "settings": dataclasses.asdict(self.config),
            "versions": {"sentencepiece": sentencepiece.__version__},
        }
        _replace(folder / MODEL_FILE, self._model)
        _replace(folder / INFO_FILE, (json.dumps(info, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Vocabulary:
        """The vocabulary that `save` left in `folder`.

        Raises:
          VocabularyError: a file is missing or unreadable, or the model is not the one that
            `vocab.json` describes.
        """
        folder = paths.as_path(folder)
        model_path, info_path = folder / MODEL_FILE, folder / INFO_FILE
        for path in (model_path, info_path):
            if not path.is_file():
                raise VocabularyError(f"no vocabulary: {path} is missing; `janus-jax prepare` makes it")
        model = model_path.read_bytes()
        try:
            info = json.loads(info_path.read_text(encoding="utf-8"))
            expected, size = info["sha256"], info["size"]
            ids, config = SpecialIds(**info["ids"]), VocabConfig(**info["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise VocabularyError(f"{info_path} is damaged ({error}); prepare it again") from error
        actual = hashlib.sha256(model).hexdigest()
        if actual != expected:
            raise VocabularyError(
                f"{model_path} is not the vocabulary that {info_path} describes: its sha256 is {actual}, "
                f"not {expected}; restore both files from one run"
            )
        vocabulary = cls(model, ids, config)
        if len(vocabulary) != size:
            raise VocabularyError(f"{info_path} says {size} entries, {model_path} has {len(vocabulary)}")
        return vocabulary


def _escape(text: str) -> str:
    return _TO_ESCAPE.sub(lambda found: _ESCAPES.get(found[0], _REPLACEMENT), text)


def _sample(sentences: Iterable[str], limit: int) -> list[str]:
    """All sentences if there are at most `limit`, else `limit` of them, each with equal chance."""
    rng = np.random.default_rng(_SAMPLE_SEED)
    chosen: list[str] = []
    for i, sentence in enumerate(sentences):
        if i < limit:
            chosen.append(sentence)
        elif (slot := int(rng.integers(i + 1))) < limit:  # reservoir sampling
            chosen[slot] = sentence
    return chosen


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        raise VocabularyError(f"not a SentencePiece model: {error}") from error


def _check_ids(processor: sentencepiece.SentencePieceProcessor, ids: SpecialIds) -> None:
    actual = {
        "pad": processor.pad_id(),
        "bos": processor.bos_id(),
        "eos": processor.eos_id(),
        "unk": processor.unk_id(),
        "mask": processor.unk_id() if ids.mask == ids.unk else processor.piece_to_id(MASK_PIECE),
    }
    wrong = [f"model.ids.{n} is {getattr(ids, n)}, in the vocabulary {i}" for n, i in _differing(actual, ids)]
    if wrong:
        raise VocabularyError(
            f"special symbols do not lie at their ids: {'; '.join(wrong)}; pad, bos, eos, unk and mask must "
            "be the lowest ids, one after the other (mask may be that of unk)"
        )


def _differing(actual: dict[str, int], ids: SpecialIds) -> Iterator[tuple[str, int]]:
    return ((name, i) for name, i in actual.items() if i != getattr(ids, name))


def _explain(error: str, size: int) -> str:
    """SentencePiece's complaint about the size in terms of our keys."""
    if found := re.search(r"too high \(\d+\).*<= (\d+)", error):
        return (
            f"model.vocab_size = {size} is too large for this text: the largest possible is {found[1]}; "
            "lower model.vocab_size or prepare more text"
        )
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", error):
        return (
            f"model.vocab_size = {size} cannot hold the characters of this text: that takes at least "
            f"{found[1]}; raise model.vocab_size or lower vocab.character_coverage"
        )
    return f"SentencePiece could not train a vocabulary of {size} entries: {error}"


def _replace(path: paths.AnyPath, content: bytes) -> None:
    if paths.is_remote(path):
        path.write_bytes(content)  # an object appears whole
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
