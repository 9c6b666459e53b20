"""What all tests share: eight virtual CPU devices, quick compiling, a tiny run, the reference numbers."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

os.environ.setdefault("NPROC", "16")  # virtual CPU devices can deadlock with fewer threads than devices
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of a test's time is compiling: optimise little, and compile the same program once a session.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += ("--xla_cpu_use_fusion_emitters=false",)  # a third less compiling; later ones know no such flag
for flag in FLAGS:
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="janus-jax-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name  # reaches the processes that tests start, too
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import pytest  # noqa: E402

if TYPE_CHECKING:
    from janus_jax.config import Config
    from janus_jax.translator import Translator

# A worker takes a file at a time: the long ones begin first, so that none is left at the end by itself.
LONG = ("test_processes.py", "test_layouts.py", "test_step.py", "test_model.py", "test_generate.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests, which stay in order within a file."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Folder of the numbers computed by the reference implementation."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip(f"reference numbers are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def corpora() -> pathlib.Path:
    """Folder of the real corpora."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"corpora are not at {folder}")
    return folder


class TinyRun(NamedTuple):
    """A run directory with everything but training: real data, a vocabulary, random parameters."""

    folder: pathlib.Path
    raw: pathlib.Path  # the raw text files
    config: Config


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Not to be changed; tests that must change it take a copy (`tiny_copy`)."""
    import jax

    from janus_jax import config, prepare, run, step
    from janus_jax.checkpoint import Checkpoints

    folder, raw = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("raw")
    nouns = {"Hund": "dog", "Mann": "man", "Ball": "ball", "Baum": "tree", "Fluss": "river"}
    verbs = {"sieht": "sees", "malt": "paints", "findet": "finds"}
    pairs = [
        (f"Ein {a} {v} den {b}.", f"A {nouns[a]} {verbs[v]} the {nouns[b]}.")
        for a in nouns
        for v in verbs
        for b in nouns
    ]
    for split, chosen in (("train", pairs[:60]), ("val", pairs[60:68]), ("test", pairs[68:])):
        for side, language in enumerate(("de", "en")):
            (raw / f"{split}.{language}").write_text("".join(f"{p[side]}\n" for p in chosen), "utf-8")
    made = config.from_dict(
        {
            "data": {"name": "parallel_text", "raw_dir": str(raw), "test_split": "test"},
            "batch": {"buckets": (24,), "tokens": 192},
            "model": {
                "vocab_size": 300,
                "dim": 16,
                "ffn": 32,
                "heads": 2,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "max_positions": 64,
            },
            "decode": {"beam": 2, "iterations": 3, "tokens": 256},
            "mesh": {"data": 1},
        }
    )
    opened = run.claim(folder, made)
    vocabulary = prepare.prepare(made, folder).vocabulary
    opened.bind_vocabulary(vocabulary)
    with Checkpoints(opened.checkpoints, best_metric="bleu") as checkpoints:
        state = jax.jit(lambda: step.init_state(made))()._asdict()
        checkpoints.save(1, state, {"bleu": 2.0})
        state["params"] = jax.tree.map(lambda x: x * 1.5, state["params"])
        checkpoints.save(2, state, {"bleu": 1.0})
    return TinyRun(folder, raw, made)


@pytest.fixture
def tiny_copy(tiny_run: TinyRun, tmp_path: pathlib.Path) -> TinyRun:
    """The tiny run in a folder of its own."""
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    return tiny_run._replace(folder=folder)


@pytest.fixture(scope="session")
def tiny_translator(tiny_run: TinyRun) -> Translator:
    """The model of the tiny run; shared, because compiling takes longer than decoding."""
    from janus_jax.translator import Translator

    return Translator.from_run(tiny_run.folder)


@pytest.fixture
def off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[object]]:
    """Call it, and what is traced from then on takes its form for accelerators; gives a list of those."""
    import jax

    def off() -> list[object]:
        forms: list[object] = []

        def accelerator_s(*args: object, default: Callable[..., object], **_: object) -> object:
            forms.append(default)
            return default(*args)

        monkeypatch.setattr(jax.lax, "platform_dependent", accelerator_s)
        return forms

    return off
