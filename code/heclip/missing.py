"""Spots that cannot be used: a few are left out and reported, many are an error."""

from .files import InputError

SMALL_SHARE = 0.1  # of a section's spots; more show that its files do not belong together


def leave_out(missing, fault, remedy):
    """Say which spots are left out, or refuse to leave out so many.

    missing: bool (n,), over the spots under tissue. fault: what is wrong with them, as a predicate
    ("have no counts in a.h5"). remedy: what to do if they are too many, a sentence without its dot.
    Returns the note to show, or None if no spot is missing.
    Raises InputError if more than SMALL_SHARE of the spots are missing.
    """
    n, total = int(missing.sum()), len(missing)
    if not n:
        return None
    text = f"{n:,} of {total:,} spots under tissue {fault}"
    if n > SMALL_SHARE * total:
        raise InputError(f"{text}; at most {SMALL_SHARE:.0%} may be left out. {remedy}")
    return f"{text}; left out"


def add_note(adata, note):
    """Keep a note of `leave_out` with the section: a line of uns["left_out"]."""
    earlier = adata.uns.get("left_out", "")
    adata.uns["left_out"] = "\n".join(line for line in (earlier, note) if line)
