"""Damaged and hostile files of every format end in a valid value or in one InputError.

tests/fuzz.py does the same with thousands of files, under limits of time and memory.
"""

import shutil
import tempfile
from pathlib import Path

import fuzz
import pytest
from fuzz_formats import FORMATS
from hypothesis import HealthCheck, given, settings, strategies

# Those that hold the same kinds of members as others, but take longer to read, are left out.
FAST = [name for name in FORMATS if name not in ("checkpoint", "processed h5ad", "HEST metadata")]


def outcome(name, changes):
    """How reading a format's files ends, with some of them changed."""
    folder = Path(tempfile.mkdtemp())
    try:
        fuzz.write_case(FORMATS[name], changes, folder)
        return fuzz.attempt(FORMATS[name].read, folder)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_the_honest_file_of_a_format_is_read(name):
    assert outcome(name, {}) == fuzz.Outcome("read")


@settings(max_examples=50, derandomize=True, deadline=None, database=None,
          suppress_health_check=list(HealthCheck))
@given(strategies.sampled_from(FAST), strategies.randoms(use_true_random=False))
def test_a_mutated_file_is_read_or_refused(name, draw):
    target = draw.choice(FORMATS[name].targets)
    content = fuzz.mutate(FORMATS[name].files[target], draw)
    found = outcome(name, {target: content})
    assert found.right, found.error


# Those that are small: the others are functions.
BYTES = [(name, case) for name in FAST for case, content in FORMATS[name].hostile.items()
         if not callable(content) and name not in ("mtx.gz", "TIFF, LZW")]


@pytest.mark.parametrize(("name", "case"), BYTES)
def test_a_hostile_file_is_read_or_refused(name, case):
    found = outcome(name, {FORMATS[name].targets[0]: FORMATS[name].hostile[case]})
    assert found.right, found.error
