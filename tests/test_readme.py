"""What README.md and docs/ tell a user holds: links, keys, verbs, options, and the Python."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import cli
from janus_jax.config import key_names

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


def anchors(path):
    """The anchors of its headings, as GitHub makes them: lower case, no punctuation, dashes for spaces."""
    prose = re.sub(r"(?ms)^```.*?^```", "", path.read_text("utf-8"))
    titles = re.findall(r"(?m)^#{1,6} +(.+?) *$", prose)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@document
def test_links_lead_somewhere(path):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    assert not dead


@document
def test_keys_exist(path):
    named = set(re.findall(r"--config\.([a-z_]+\.[a-z_0-9]+)", path.read_text("utf-8"))) - {"any.key"}
    assert named <= set(key_names())


@document
def test_commands_have_the_options_they_are_given(path):
    _, verbs = cli._parser()
    text = path.read_text("utf-8").replace("\\\n", " ")
    for verb, rest in re.findall(r"(?m)^(?:    |\$ )*janus-jax ([a-z]+)(.*)$", text):
        options = set(re.findall(r" (--[a-z_]+)(?![a-z_.])", rest.split("#")[0]))
        assert options - {"--config"} <= set(verbs[verb]._option_string_actions), f"{verb}{rest}"


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
