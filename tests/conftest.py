"""Every test runs below a project root of its own: none touches the real data or results."""

import io
import os
import sys
import tempfile
from pathlib import Path

import pytest

# Threads that spin while they wait slow a busy machine tenfold. The tests run side by side, and
# sums in one order are equal to the last bit.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["OMP_NUM_THREADS"] = "1"
# Before heclip is imported, which reads it once.
os.environ["HECLIP_ROOT"] = tempfile.mkdtemp(prefix="heclip-tests-")

# Before pytest-cov begins to trace, under which these imports take twice as long.
import scanpy  # noqa: F401
import timm  # noqa: F401

PROJECT = Path(__file__).resolve().parents[1]
# Real data: HECLIP_SHARED, or the folder next to the checkout.
SHARED = Path(os.environ.get("HECLIP_SHARED") or PROJECT.parent / "shared" / "data")


@pytest.fixture
def project():
    """The checkout itself."""
    return PROJECT


@pytest.fixture
def real_data():
    """A function that gives the folder of a real data set, or skips the test if it is absent."""
    def folder(name):
        if not (SHARED / name).is_dir():
            pytest.skip(f"the real data set {name} is not here ({SHARED / name})")
        return SHARED / name

    return folder


@pytest.fixture
def when_waiting(monkeypatch):
    """A function that has another one called as soon as a process says that it waits for a lock."""
    def call(function):
        class Stderr(io.StringIO):
            def write(self, text):
                if "another process is writing it; waiting" in text:
                    function()
                return super().write(text)

        monkeypatch.setattr(sys, "stderr", Stderr())
        return sys.stderr

    return call
