"""The embedded set: right words, many answers, nothing shared between the splits."""

import collections

import pytest

from janus_jax.data import phrases
from janus_jax.data.lines import DataError
from janus_jax.data.phrases import english, german, romanian


@pytest.fixture(scope="module")
def records():
    return phrases.generate("en", "de", 3000)


def test_sizes_and_determinism(records):
    assert {k: len(v) for k, v in records.items()} == {"train": 3000, "valid": 500, "test": 500}
    phrases.generate.cache_clear()
    assert phrases.generate("en", "de", 3000) == records


def test_splits_share_no_source(records):
    sources = {split: {r[0] for r in rs} for split, rs in records.items()}
    assert len(sources["test"]) == len(sources["valid"]) == 500
    assert not sources["train"] & sources["test"]
    assert not sources["train"] & sources["valid"]
    assert not sources["valid"] & sources["test"]


def test_test_words_all_occur_in_train(records):
    def words(split, side):
        return {word for r in records[split] for word in r[side].replace("-", " ").split()}

    assert words("test", 0) <= words("train", 0)
    # German joins its numbers into one word, so compare the pieces that an unseen one is made of.
    unseen = words("test", 1) - words("train", 1)
    assert all(any(part in word for part in ("hundert", "tausend", "und")) for word in unseen)


def test_a_target_is_one_of_its_references_and_a_source_has_one_set_of_them(records):
    answers = collections.defaultdict(set)
    for split in records.values():
        for source, target, references in split:
            assert target in references
            assert len(set(references)) == len(references)
            answers[source].add(references)
    assert all(len(sets) == 1 for sets in answers.values())
    assert sum(len(r[2]) > 1 for r in records["test"]) > 150  # the many-answers problem is there


def test_train_has_sources_with_several_targets_but_no_pair_twice(records):
    pairs = [r[:2] for r in records["train"]]
    assert len(set(pairs)) == len(pairs)
    assert len({source for source, _ in pairs}) < len(pairs)


@pytest.mark.parametrize(("source", "target"), [("de", "en"), ("en", "ro"), ("ro", "de")])
def test_other_directions(source, target):
    assert len(phrases.generate(source, target, 50)["train"]) == 50


def test_a_size_beyond_the_grammar(monkeypatch):
    monkeypatch.setattr(phrases, "_DRAWS_PER_PAIR", 1)  # as if the draws were used up
    with pytest.raises(DataError, match=r"data.size = 4000 is too large for phrases: set it to \d+"):
        phrases.generate("en", "de", 4000)


def test_english():
    assert english.weekday(0, 18, 30) == (
        "on Monday at half past six in the evening",
        "on Monday at six thirty p.m.",
    )
    assert english.weekday(1, 20, 45)[0] == "on Tuesday at a quarter to nine in the evening"
    assert english.weekday(1, 9, 0) == (
        "on Tuesday at nine o'clock in the morning",
        "on Tuesday at nine a.m.",
    )
    assert english.count(1234) == ("one thousand two hundred and thirty-four inhabitants",)
    assert english.price("EUR", 12, 50) == ("twelve euros and fifty cents", "twelve euros fifty")
    assert english.date(3, 5, 1984)[0] == "on the third of May nineteen eighty-four"


def test_german():
    assert german.weekday(0, 18, 30) == (
        "am Montag um halb sieben abends",
        "am Montag um achtzehn Uhr dreißig",
    )
    assert german.weekday(5, 13, 0) == ("am Samstag um ein Uhr nachmittags", "am Samstag um dreizehn Uhr")
    assert german.weekday(5, 13, 15)[0] == "am Samstag um Viertel nach eins nachmittags"
    assert german.weekday(5, 6, 35)[0] == "am Samstag um fünf nach halb sieben morgens"
    assert german.count(1234)[1] == "tausendzweihundertvierunddreißig Einwohner"
    assert german.date(3, 5, 1984) == ("am dritten Mai neunzehnhundertvierundachtzig",)
    assert german.price("USD", 2, 0) == ("zwei US-Dollar",)


def test_romanian():
    assert romanian.weekday(0, 18, 30) == (
        "luni la ora șase și jumătate seara",
        "luni la ora optsprezece și treizeci",
    )
    assert romanian.weekday(0, 13, 45)[0] == "luni la ora două fără un sfert după-amiaza"
    assert romanian.weekday(0, 21, 0)[1] == "luni la ora douăzeci și una"
    assert romanian.count(12) == ("doisprezece locuitori",)
    assert romanian.count(122) == ("o sută douăzeci și doi de locuitori",)
    assert romanian.date(1, 5, 2000)[0] == "pe întâi mai două mii"
    assert romanian.duration(22, 5) == ("douăzeci și două de ore și cinci minute",)
