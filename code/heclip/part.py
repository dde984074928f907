"""Parts of a file: one of the sections that an AnnData holds, or one region of a section.

A part is written as conditions, such as `library_id=A` or `array_row>=20 and array_col<64`. Those
on PLACES apply to the table of positions. All others apply to columns of an AnnData's obs.
"""

import operator
import re
from typing import NamedTuple

import numpy as np
import pandas as pd

from .files import InputError

PLACES = ("array_row", "array_col", "x", "y")  # x and y are in pixels of the section's image
SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
         "=": operator.eq, "!=": operator.ne}


class Condition(NamedTuple):
    """What the spots of a part have in one column. value: text, as written."""

    column: str
    sign: str
    value: str

    def __str__(self):
        return f"{self.column}{self.sign}{self.value}"


def read_part(text):
    """The conditions in a text, joined by `and`: a tuple of Condition; empty text: none.

    Raises InputError for anything else.
    """
    part = []
    for words in re.split(r"\s+and\s+", text.strip()) if text.strip() else []:
        found = re.fullmatch(r"\s*([^<>=!]+?)\s*(<=|>=|!=|<|>|==?)\s*([^<>=!]+?)\s*", words)
        if not found:
            raise InputError(f"part is {text!r}, expected conditions such as array_col<64 or "
                             "library_id=A, joined by 'and'")
        column, sign, value = found.groups()
        if column in PLACES and number(value) is None:
            raise InputError(f"part is {text!r}, but {value!r} is not a number to compare "
                             f"{column} with")
        part.append(Condition(column, sign.replace("==", "="), value))
    return tuple(part)


def of_places(part):
    """The conditions of a part that the table of positions decides."""
    return tuple(condition for condition in part if condition.column in PLACES)


def of_obs(part):
    """The conditions of a part that an AnnData's obs decides."""
    return tuple(condition for condition in part if condition.column not in PLACES)


def selected(table, part, path):
    """Which rows of a table meet all conditions: bool (n,).

    path: the table's file, for error messages. Numbers are compared as numbers, all else as text,
    so that NA and 007 are names. A missing value meets no condition.
    Raises InputError if a column is absent, if text is compared by size, or if no row is left.
    """
    rows = np.ones(len(table), bool)
    for condition in part:
        if condition.column not in table:
            raise InputError(f"{path} has no column {condition.column}, which part {condition} "
                             f"asks for, but {', '.join(map(str, table.columns))}")
        rows &= meets(table[condition.column], condition, path)
    if not rows.any():
        given = " and ".join(map(str, part))
        raise InputError(f"{path}: no spot is in the part {given}. Correct the column part")
    return rows


def meets(column, condition, path):
    """Which values of a column meet a condition: bool (n,)."""
    known = column.notna().to_numpy()
    compare = SIGNS[condition.sign]
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        value = number(condition.value)
        if value is None:
            raise InputError(f"{path}: part {condition} compares the numbers of "
                             f"{condition.column} with {condition.value!r}. Give a number")
        return known & compare(column.to_numpy(float, na_value=np.nan), value)
    if condition.sign not in ("=", "!="):
        raise InputError(f"{path}: part {condition} compares {condition.column} by size, but it "
                         "holds text. Use = or !=")
    return known & compare(column.astype(str).to_numpy(str), condition.value)


def number(text):
    """The number that a text is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
