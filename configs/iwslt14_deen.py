"""IWSLT14, German to English, in the size and with the recipe of the released JANUS script.

    janus-jax prepare  --config=configs/iwslt14_deen.py --workdir=RUN --config.data.raw_dir=FOLDER
    janus-jax train    --config=configs/iwslt14_deen.py --workdir=RUN
    janus-jax evaluate --workdir=RUN --checkpoint=average:5 --decode=ar --beam=5
    janus-jax evaluate --workdir=RUN --checkpoint=average:5 --decode=nar --iterations=10 --candidates=3

FOLDER holds train|valid|test.de|en[.gz], as the usual scripts leave them.  An update is 2 x 4096 slots on
any number of devices; meant for one or two GPUs, or a TPU slice of 4 or 8 chips.  The vocabulary is
ours.  Not run here: no score of ours.

Theirs, on test, tokenised and lower-cased BLEU: AR 37.24, NAR 34.21 (README of dropreg/JANUS; the two are
not scored alike: only the NAR script splits compounds).
"""

import ml_collections

from janus_jax.config import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = to_config_dict()
    config.data.name = "iwslt14"
    config.data.source, config.data.target = "de", "en"
    config.data.dev_split, config.data.test_split = "valid", "test"
    config.batch.buckets = (16, 24, 32, 48, 64, 96, 128)
    config.batch.tokens = 2 * 4096
    config.batch.device_tokens = 4096
    config.model.vocab_size = 10_000
    config.model.dim, config.model.ffn, config.model.heads = 512, 1024, 4
    config.model.encoder_layers = config.model.decoder_layers = 6
    config.model.max_positions = 256
    config.model.dropout = 0.3
    config.model.ar_positions = "code"  # as the release has it
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.loss.chunk = 1024
    config.optim.lr = 5e-4
    config.optim.warmup_steps = 10_000
    config.optim.weight_decay = 1e-4
    config.train.steps = 200_000
    config.train.microbatches = 0  # as many as the devices need
    config.train.log_every = 100
    config.train.eval_every = config.train.checkpoint_every = 2000
    return config
