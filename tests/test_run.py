import dataclasses
import json

import pytest

from janus_jax import run
from janus_jax.config import Config, DecodeConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from janus_jax.run import RunError
from janus_jax.text import Vocabulary


def test_a_claimed_folder_opens_with_its_configuration(tmp_path):
    config = Config(model=ModelConfig(dim=64), seed=3)
    run.claim(tmp_path / "deep" / "run", config)
    opened = run.open_run(tmp_path / "deep" / "run")
    assert opened.config == config
    assert opened.checkpoints == opened.folder / "checkpoints"
    assert opened.data_folder == opened.folder / "data"
    assert json.loads((opened.folder / "versions.json").read_text())["jax"]


def test_data_may_lie_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = Config(data=dataclasses.replace(Config().data, dir="~/sets"))
    assert str(run.Run(tmp_path, config).data_folder) == "/home/someone/sets"


def test_what_does_not_change_what_is_learnt_may_change(tmp_path):
    run.claim(tmp_path, Config())
    changed = Config(
        train=TrainConfig(steps=99, log_every=1),
        decode=DecodeConfig(beam=2),
        model=ModelConfig(remat=True),
        data=dataclasses.replace(Config().data, test_split="val"),
    )
    run.claim(tmp_path, changed)
    assert run.open_run(tmp_path).config == changed


def checkpointed(folder):
    (folder / "checkpoints" / "1").mkdir(parents=True)


def test_what_nothing_was_made_with_may_change(tmp_path):
    run.claim(tmp_path, Config(model=ModelConfig(vocab_size=90_000)))
    run.claim(tmp_path, Config(seed=1))
    (tmp_path / "vocab.model").write_bytes(b"")
    run.claim(tmp_path, Config(seed=2, optim=OptimConfig(lr=1.0)))
    for other in (
        Config(model=ModelConfig(vocab_size=90_000)),
        Config(data=dataclasses.replace(Config().data, source="en", target="de")),
    ):
        with pytest.raises(RunError, match="belongs to a run with another configuration"):
            run.claim(tmp_path, other)
    assert run.open_run(tmp_path).config == Config(seed=2, optim=OptimConfig(lr=1.0))


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    run.claim(tmp_path, Config())
    checkpointed(tmp_path)
    with pytest.raises(RunError) as caught:
        run.claim(tmp_path, Config(seed=1, model=ModelConfig(dim=64)))
    assert str(caught.value).splitlines() == [
        f"{tmp_path} belongs to a run with another configuration:",
        "  seed: 0 there, 1 asked for",
        "  model.dim: 256 there, 64 asked for",
        "choose another --workdir, or leave --config out to go on with that run",
    ]
    assert run.open_run(tmp_path).config == Config()


def test_the_end_of_a_polynomial_schedule_is_fixed(tmp_path):
    run.claim(tmp_path, Config(optim=OptimConfig(schedule="polynomial")))
    checkpointed(tmp_path)
    with pytest.raises(RunError, match=r"train.steps: 20000 there, 5 asked for"):
        run.claim(tmp_path, Config(optim=OptimConfig(schedule="polynomial"), train=TrainConfig(steps=5)))


@pytest.mark.parametrize("key", ["kl_warmup", "kl_decay"])
def test_the_end_of_a_run_whose_ties_change_is_fixed(tmp_path, key):
    changing = Config(loss=LossConfig(**{key: 0.5}))
    run.claim(tmp_path, changing)
    checkpointed(tmp_path)
    with pytest.raises(RunError, match=r"train.steps: 20000 there, 5 asked for"):
        run.claim(tmp_path, dataclasses.replace(changing, train=TrainConfig(steps=5)))


def test_what_a_run_was_trained_with_is_kept_until_it_goes_on(tiny_copy):
    other = dataclasses.replace(tiny_copy.config, decode=DecodeConfig(beam=7))
    opened = run.claim(tiny_copy.folder, other)
    assert run.open_run(tiny_copy.folder).config == tiny_copy.config
    opened.record()
    assert run.open_run(tiny_copy.folder).config == other


def test_the_training_data_of_the_checkpoints_are_remembered(tiny_copy):
    opened = run.open_run(tiny_copy.folder)
    opened.bind_data("1" * 64)  # a run of before: bound as it goes on
    opened.bind_data("1" * 64)
    for write in (True, False):
        with pytest.raises(RunError, match=r"made with other training data: .*set data.dir and data.raw_dir"):
            opened.bind_data("2" * 64, write=write)


def test_no_average_over_more_than_a_run_keeps(tiny_copy):
    kept = dataclasses.replace(tiny_copy.config, train=TrainConfig(keep_last=1))
    with pytest.raises(RunError, match=r"last 2 checkpoints of .*: train.keep_last is 1; ask for 1 to 1"):
        run.Run(tiny_copy.folder, kept).params("average:2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be used: "),
        ("[]", "cannot be used: "),
        ('{"model": {"dmi": 3}}', r"unknown key 'model.dmi'; did you mean 'model.dim'\?"),
        ('{"model": {"dim": "3"}}', r"model.dim must be int, got '3'"),
    ],
)
def test_a_config_json_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=f"config.json .*(?s:.*){message}"):
        run.open_run(tmp_path)


def test_one_process_at_a_time(tmp_path):
    busy = pytest.raises(RunError, match=r"is in use by another janus-jax process")
    with run.locked(tmp_path), busy, run.locked(tmp_path):
        pass
    with run.locked(tmp_path):
        pass


def test_the_vocabulary_of_the_checkpoints_is_remembered(tiny_copy):
    opened = run.open_run(tiny_copy.folder)
    mine = opened.vocabulary()
    text = [line for path in sorted(tiny_copy.raw.iterdir()) for line in path.read_text().splitlines()]
    other = Vocabulary.train([*text, "more words"], mine.config, len(mine), mine.ids)
    assert other.sha256 != mine.sha256
    other.save(tiny_copy.folder)
    with pytest.raises(RunError, match=f"sha256 {other.sha256}, the model has {mine.sha256}"):
        opened.vocabulary()
    opened.bind_vocabulary(other)
    assert opened.vocabulary().sha256 == other.sha256


def test_special_ids_must_be_those_of_the_model(tiny_copy):
    path = tiny_copy.folder / "config.json"
    values = json.loads(path.read_text())
    values["model"]["ids"] |= {"unk": 4, "mask": 3}
    path.write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"special ids SpecialIds\(.*; put back the vocab.model"):
        run.open_run(tiny_copy.folder).vocabulary()


def test_checkpoints_without_a_config_are_not_adopted(tiny_copy):
    (tiny_copy.folder / "config.json").unlink()
    with pytest.raises(run.RunError, match=r"checkpoints but no config\.json"):
        run.claim(tiny_copy.folder, tiny_copy.config)
    assert not (tiny_copy.folder / "config.json").exists()
