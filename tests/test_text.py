"""The vocabulary: round trips of any string, symbols that text cannot forge, and clear errors."""

import json
import random

import pytest

from janus_jax import text as X
from janus_jax.config import SpecialIds, VocabConfig

WORDS = X.clean_line(
    "ein Hund rennt über die grüne Wiese am frühen Morgen während seine Besitzerin fröhlich winkt "
    "a dog runs across the green field early in the morning while its owner waves happily at noon"
).split()
IDS = SpecialIds()


def sentences(count=400, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def vocabulary():
    return X.Vocabulary.train(sentences(), VocabConfig(), 300, IDS)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a  b ", "a b"),
        ("a\u00a0\tb\u2028c\x1cd\r\n", "a b c d"),
        ("\u200bzero\u200dwidth\x01", "\u200bzero\u200dwidth\x01"),
        (" \t ", ""),
    ],
)
def test_clean_line(text, cleaned):
    assert X.clean_line(text) == cleaned
    assert X.clean_line(cleaned) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "ein Hund",
        "",
        "   leading and trailing   ",
        "NUL\0inside\0",
        "real \u2581 lower\u2581blocks",
        "\u2585 reserved",
        "private \ue000 use \ue0000 \ue0001\ue000",
        "controls \x01\x1b\x7f",
        "byte order \ufeff mark",
        "replacement \ufffd",
        "combining e\u0301 and composed \u00e9, ﬁ ligature, Å",
        "\u200b\u200d",
        "日本語 🙂🏽 ‮rtl‬",
        "\U0010ffff \uffff \ufdd0",
        "[M] <mask> <s> </s> <pad> <unk> <0x41> ⁇",
    ],
)
def test_round_trip(vocabulary, text):
    ids = vocabulary.encode(text)
    assert (ids[0], ids[-1]) == (IDS.bos, IDS.eos)
    assert not {IDS.pad, IDS.bos, IDS.eos, IDS.unk, IDS.mask} & set(ids[1:-1])
    assert vocabulary.decode(ids) == X.clean_line(text)


def test_round_trip_of_random_code_points(vocabulary):
    rng = random.Random(0)
    scalar = [*range(0xD800), *range(0xE000, 0x110000)]
    for _ in range(300):
        text = "".join(chr(c) for c in rng.choices(scalar, k=20)) + "".join(
            rng.choices("\ue000\u25810 ", k=6)
        )
        assert vocabulary.decode(vocabulary.encode(text)) == X.clean_line(text)


def test_lone_surrogates_become_replacement_characters(vocabulary):
    assert vocabulary.decode(vocabulary.encode("a \ud800b")) == "a \ufffdb"


def test_reserved_characters_do_not_hide_a_sentence_from_training():
    odd = [f"{a}\0{b}\u2585 \u2581{c}" for a, b, c in zip(WORDS, WORDS[1:], WORDS[2:], strict=False)] * 20
    vocabulary = X.Vocabulary.train(odd, VocabConfig(), 300, IDS)
    assert not any(p.startswith("<0x") for p in vocabulary.pieces(vocabulary.encode(odd[0])))
    assert vocabulary.decode(vocabulary.encode(odd[0])) == odd[0]


def test_decode_stops_at_the_first_end(vocabulary):
    words = vocabulary.encode("ein Hund")[1:-1]
    more = vocabulary.encode("rennt")[1:-1]
    assert vocabulary.decode([IDS.bos, *words, IDS.eos, *more, IDS.eos]) == "ein Hund"
    assert vocabulary.decode([IDS.bos, *words, *more]) == "ein Hund rennt"  # no end: the whole sequence
    assert vocabulary.decode([*words, IDS.eos, IDS.pad]) == "ein Hund"
    assert vocabulary.decode([IDS.bos, IDS.mask, *words, IDS.pad, IDS.unk]) == "ein Hund"
    assert vocabulary.decode([]) == vocabulary.decode([IDS.eos]) == ""


def test_decode_skips_a_start_symbol_that_is_the_end_symbol():
    ids = SpecialIds(start=2)
    vocabulary = X.Vocabulary.train(sentences(), VocabConfig(), 300, ids)
    words = vocabulary.encode("ein Hund")[1:-1]
    assert vocabulary.decode([ids.eos, *words, ids.eos, *words]) == "ein Hund"


def test_training_is_deterministic_and_size_is_exact(vocabulary):
    again = X.Vocabulary.train(iter(sentences()), VocabConfig(), 300, IDS)
    assert again.sha256 == vocabulary.sha256
    assert len(vocabulary) == 300
    assert vocabulary.pieces([4]) == [X.MASK_PIECE]


def test_bpe_round_trips_too():
    vocabulary = X.Vocabulary.train(sentences(), VocabConfig(kind="bpe"), 300, IDS)
    assert vocabulary.decode(vocabulary.encode("über 🙂 Hund")) == "über 🙂 Hund"


def test_at_most_max_sentences_are_used_evenly():
    chosen = X._sample((str(i) for i in range(1000)), 100)
    assert len(set(chosen)) == 100
    assert 350 < sum(map(int, chosen)) / 100 < 650
    assert X._sample(["a", "b"], 5) == ["a", "b"]


def test_other_ids():
    ids = SpecialIds(pad=1, bos=0, eos=2, unk=3, mask=3)
    vocabulary = X.Vocabulary.train(sentences(), VocabConfig(), 300, ids)
    assert vocabulary.encode("Hund")[0] == 0
    assert vocabulary.decode(vocabulary.encode("Hund [M]")) == "Hund [M]"


def test_ids_that_cannot_be_arranged():
    with pytest.raises(X.VocabularyError, match=r"model.ids.mask is 9, in the vocabulary 4"):
        X.Vocabulary.train(sentences(), VocabConfig(), 300, SpecialIds(mask=9))


def test_too_little_text_names_the_largest_size():
    with pytest.raises(X.VocabularyError, match=r"vocab_size = 4000 .* largest possible is \d+") as caught:
        X.Vocabulary.train(sentences(20), VocabConfig(), 4000, IDS)
    largest = int(str(caught.value).split("largest possible is ")[1].split(";")[0])
    assert len(X.Vocabulary.train(sentences(20), VocabConfig(), largest, IDS)) == largest


def test_too_small_a_size_names_the_smallest():
    with pytest.raises(X.VocabularyError, match=r"vocab_size = 262 cannot hold .* at least \d+"):
        X.Vocabulary.train(sentences(), VocabConfig(), 262, IDS)


def test_no_text():
    with pytest.raises(X.VocabularyError, match="no sentence that is not empty"):
        X.Vocabulary.train(["", "  "], VocabConfig(), 300, IDS)


def test_save_and_load(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "run")
    loaded = X.Vocabulary.load(tmp_path / "run")
    assert (loaded.sha256, loaded.ids, loaded.config) == (vocabulary.sha256, IDS, VocabConfig())
    assert loaded.encode("ein Hund") == vocabulary.encode("ein Hund")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [X.INFO_FILE, X.MODEL_FILE]


def test_a_tampered_model_is_refused(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    other = X.Vocabulary.train(sentences(seed=1), VocabConfig(), 300, IDS)
    other.save(tmp_path / "other")
    (tmp_path / "other" / X.MODEL_FILE).replace(tmp_path / X.MODEL_FILE)
    with pytest.raises(X.VocabularyError, match="is not the vocabulary that"):
        X.Vocabulary.load(tmp_path)


@pytest.mark.parametrize("missing", [X.MODEL_FILE, X.INFO_FILE])
def test_a_missing_file_is_named(vocabulary, tmp_path, missing):
    vocabulary.save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(X.VocabularyError, match=f"{missing} is missing"):
        X.Vocabulary.load(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"sha256": "x", "size": 1, "ids": {"odd": 1}, "settings": {}}']
)
def test_damaged_info_is_named(vocabulary, tmp_path, content):
    vocabulary.save(tmp_path)
    (tmp_path / X.INFO_FILE).write_text(content)
    with pytest.raises(X.VocabularyError, match=r"vocab\.json is damaged"):
        X.Vocabulary.load(tmp_path)


def test_a_model_that_is_none(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    info = json.loads((tmp_path / X.INFO_FILE).read_text())
    with pytest.raises(X.VocabularyError, match="not a SentencePiece model"):
        X.Vocabulary(b"junk", SpecialIds(**info["ids"]), VocabConfig())
