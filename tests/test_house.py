"""The house rules: who may import whom, and who may touch devices."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "janus_jax"
SHELLS = {
    "auto",
    "train",
    "evaluate",
    "translate",
    "prepare",
    "bench",
    "results",
    "compile",
    "demo",
    "export",
    "cli",
    "__main__",
    "__init__",
}

# room -> rooms of ours that it may import (itself always)
ALLOWED = {
    "config": set(),
    "masks": set(),
    "sharding": set(),
    "score": set(),
    "processes": set(),
    "mesh": {"gpus", "sharding", "config"},
    "checkpoint": set(),
    "paths": set(),
    "report": {"paths"},
    "plots": {"report", "paths"},
    "tables": {"config", "score", "ways"},
    "ways": set(),
    "hlo": set(),
    "chips": set(),
    "gpus": {"chips"},
    "cost": {"losses", "decode", "batch", "config"},
    "batch": {"config"},
    "optim": {"config"},
    "models": {"masks", "sharding", "batch", "config"},
    "losses": {"batch", "config"},
    "chunked": {"losses", "sharding", "config"},
    "decode": {"batch", "config"},
    "step": {"models", "losses", "chunked", "optim", "batch", "config"},
    "generate": {"models", "decode", "config"},
    "text": {"batch", "config", "paths"},
    "data": {"text", "batch", "config"},
    "convert": {"config"},
    "run": {"config", "text", "checkpoint", "report", "paths"},
    "exported": set(),  # a copy of it runs where nothing of ours is
    "engine": {"config", "sharding", "generate", "models", "mesh"},
    "translator": {
        "config",
        "generate",
        "engine",
        "losses",
        "mesh",
        "models",
        "processes",
        "run",
        "text",
        "ways",
    },
}


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[pathlib.Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported_rooms(path: pathlib.Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {p[1] for p in parts if p[0] == "janus_jax" and len(p) > 1}
    return {name for name in found if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_house_rules(path):
    name = room(path)
    if name in SHELLS:
        return
    assert name in ALLOWED, f"{name} has no rule yet: add it to ALLOWED, and to the README's map"
    assert imported_rooms(path) <= ALLOWED[name] | {name}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_mesh_asks_for_devices_and_only_models_knows_flax(path):
    text = path.read_text(encoding="utf-8")
    if room(path) not in ("mesh", "processes"):
        for call in ("jax.devices(", "jax.local_devices(", "process_index()", "jax.device_count("):
            assert call not in text, f"{call} belongs in mesh.py or processes.py"
    if room(path) != "models":
        assert "import flax" not in text
        assert "from flax" not in text


def test_no_room_imports_tensorflow_or_torch_at_the_top():
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"tensorflow", "torch"}, path
