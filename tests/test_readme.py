"""What README.md tells a user to write in Python works."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np

README = (pathlib.Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")


def block(mention):
    """The one block of Python that mentions it."""
    (found,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if mention in b]
    return found


def test_weights_of_others(golden):
    stored = np.load(golden / "janus_small.npz")
    source = jnp.asarray(stored["in/src_tokens"])
    seen = {"source": source}
    text = block("load_fairseq").replace("janus.npz", str(golden / "janus_small.npz"))
    exec(compile(text, "README.md", "exec"), seen)
    assert seen["beams"].tokens.shape[:2] == (len(source), 5)
    assert (np.sum(np.asarray(seen["beams"].tokens[:, 0]) == 2, axis=1) == 1).all()  # each ends, once
    assert seen["best"].tokens.shape == (len(source), seen["generate"].slots(source.shape[1]) + 1)
    assert (np.asarray(seen["best"].tokens[:, 0]) == 0).all()
