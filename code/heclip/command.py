"""What the scripts' command lines share: their common flags, the device, and how an error is shown."""

import argparse
import errno
import signal
import sys

from .files import InputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main):
    """Call `main()` as a script does: a user's mistake ends in one line and exit code 1, not in a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that half-written files are removed
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        # HDF5 wraps the system's error into a text of its own and drops the number.
        if error.errno in DISK_FULL or "No space left" in str(error) or "File too large" in str(error):
            sys.exit(f"error: the disk is full ({error}). Nothing half-written was left: free some space and run again")
        if error.errno is not None and error.filename is not None:
            sys.exit(f"error: {error.filename}: {error.strerror}")
        raise


def parser(description):
    """An argument parser with the flags that `main.py` and `infer.py` share."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--dataset", default="GSE240429", help="a dataset that a preprocess script has prepared")
    flags.add_argument("--type", default="heg", choices=["heg", "hvg"],
                       help="heg: images and highly expressed genes meet in 256 dimensions; hvg: images are embedded "
                            "into the space of the highly variable genes")
    flags.add_argument("--panel", choices=["heg", "hvg"], help="genes of the other type; default: those of --type")
    flags.add_argument("--query", nargs="+", metavar="SECTION",
                       help="hold out these sections; default: those with the role query. The others are the "
                            "reference, and choose the panel")
    flags.add_argument("--protocol", default="strict", choices=["strict", "paper"],
                       help="strict: the query section chooses and corrects nothing; "
                            "paper: panel and Harmony over all sections, as published (preprocess with it too)")
    flags.add_argument("--save_path", metavar="DIR",
                       help="where this run's results go; default: save, ebd and figure at the top of the project")
    flags.add_argument("--batch_size", type=positive, default=128, help="patches per step")
    flags.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    flags.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="compile the encoder: about a minute at first, then faster. main.py does so on CUDA GPUs")
    flags.add_argument("--seed", type=int, default=42, help="same seed, same result")
    return flags


def positive(text):
    """An argument that must be a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def above_zero(text):
    """An argument that must be a number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def not_negative(text):
    """An argument that must be a number of at least 0."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return number


def pick_device(name):
    """The torch device of that name; `auto` takes a GPU, then Apple's, then the CPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not usable on this machine ({reason}). Try --device cpu") from None
    return device


def autocast(device):
    """bfloat16 on GPUs that have it, where it halves the time; float32 elsewhere."""
    import torch

    return torch.autocast(device.type, torch.bfloat16,
                          enabled=device.type == "cuda" and torch.cuda.is_bf16_supported())
