"""What all tests share: eight virtual CPU devices, and where the reference numbers lie."""

import os
import pathlib

os.environ.setdefault("NPROC", "16")  # virtual CPU devices can deadlock with fewer threads than devices
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pytest

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
