"""WMT14, English to German, in the size and with the recipe of the released JANUS script.

    janus-jax prepare  --config=configs/wmt14_ende.py --workdir=RUN     # with the extra [prepare]
    janus-jax train    --config=configs/wmt14_ende.py --workdir=RUN
    janus-jax evaluate --workdir=RUN --checkpoint=average:5 --decode=ar --beam=5
    janus-jax evaluate --workdir=RUN --checkpoint=average:5 --decode=nar --iterations=10 --candidates=3

An update is 4 x 8192 x 4 slots on any number of devices; meant for 4 GPUs or more, or a TPU slice of 8
chips or more.  The data are the whole public set, neither filtered nor distilled; the vocabulary is
ours.  Not run here: no score of ours.
"""

import ml_collections

from janus_jax.config import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = to_config_dict()
    config.data.name = "wmt14"
    config.data.source, config.data.target = "en", "de"
    config.data.dev_split, config.data.test_split = "validation", "test"
    config.batch.buckets = (16, 24, 32, 48, 64, 96, 128)
    config.batch.tokens = 4 * 8192 * 4
    config.batch.device_tokens = 8192
    config.model.vocab_size = 32_000
    config.model.dim, config.model.ffn, config.model.heads = 512, 2048, 8
    config.model.encoder_layers = config.model.decoder_layers = 6
    config.model.max_positions = 256
    config.model.dropout = 0.2
    config.model.ar_positions = "code"  # as the release has it
    config.model.dtype = "bfloat16"
    config.model.scan_layers = False  # 0.72 of the time of a scan on an H200, docs/performance.md
    config.loss.chunk = 1024
    config.optim.lr = 7e-4
    config.optim.warmup_steps = 10_000
    config.optim.weight_decay = 0.01
    config.train.steps = 200_000
    config.train.microbatches = 0  # as many as the devices need
    config.train.log_every = 100
    config.train.eval_every = config.train.checkpoint_every = 5000
    return config
