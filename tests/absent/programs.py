"""A small configuration, and what holds of its update wherever it is compiled for."""

from janus_jax import compile, config, hlo

# As in tests/test_compile.py: 251 is a factor of the vocabulary alone, 3 of numbers of slots alone.
VALUES = {
    "batch": {"buckets": (24,), "tokens": 24 * 48},
    "model": {
        "vocab_size": 502, "dim": 64, "ffn": 128, "heads": 2, "encoder_layers": 1, "decoder_layers": 2,
        "max_positions": 64, "dtype": "bfloat16", "scan_layers": True,
    },
    "loss": {"chunk": 24},
    "decode": {"beam": 2, "iterations": 3, "tokens": 384},
}  # fmt: skip
MESHES = [{}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2}]


def tiny(**axes):
    return config.from_dict({**VALUES, "mesh": axes})


def write(folder):
    """The configuration as a file."""
    path = folder / "c.py"
    path.write_text(
        "from janus_jax import config\n"
        f"def get_config():\n    return config.to_config_dict(config.from_dict({VALUES!r}))\n"
    )
    return path


def check_the_update(topology, devices, axes):
    """It moves no logits, and under fsdp no device keeps an array of the state whole."""
    machine = compile.find_machine(topology, 1)
    compiled = compile.build_and_compile(compile.build_train(tiny(**axes), machine))
    counts = hlo.Counts(compiled.program.loops)
    found = hlo.collectives(hlo.parse(compiled.executable.as_text()), counts, devices=devices)
    assert found
    assert not hlo.logits_moved(found, 502, 64)
    assert not counts.unknown
    assert not any(c.crosses for c in found)
    if axes:
        assert compile.whole_arrays(compiled) == []
