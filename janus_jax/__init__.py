"""JANUS in JAX: one Transformer that writes autoregressively and non-autoregressively.

    from janus_jax import Translator
    translate = Translator.from_run("runs/m30k")
    translate(["Ein Hund rennt über die Wiese."], decode="nar", iterations=4)

Room: none.  Names are looked up when they are used, so that `import janus_jax` does not import jax.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from janus_jax.translator import Translator

    __version__: str

__all__ = ["Translator", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Translator":
        return importlib.import_module("janus_jax.translator").Translator
    if name == "__version__":
        try:
            return importlib.metadata.version("janus-jax")
        except importlib.metadata.PackageNotFoundError:
            return "source"  # a checkout that is on the path, but not installed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
