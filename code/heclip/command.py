"""What the scripts' command lines share: types of arguments, the device, how errors are shown."""

import argparse
import errno
import signal
import sys

from .files import InputError

DEVICE_HELP = "auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:N or mps"
SAVE_PATH_HELP = "where the results go; default: save, ebd and figure at the top of the project"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main):
    """Call `main()` as a script. A user's mistake ends in one line and exit code 1.

    It shows no traceback.
    """
    # An exit unwinds, so that half-written files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        # HDF5 puts the system's error into its own text and drops the number.
        text = str(error)
        if error.errno in DISK_FULL or "No space left" in text or "File too large" in text:
            sys.exit(f"error: the disk is full ({text}). No half-written file is left. Free some "
                     "space and run again")
        if error.errno is not None and error.filename is not None:
            sys.exit(f"error: {error.filename}: {error.strerror}")
        raise


def positive(text):
    """An argument that must be a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def seed(text):
    """An argument that numpy and torch take as a seed: a whole number from 0 to 2^32 - 1."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {2**32 - 1}")
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


def fraction(text):
    """An argument that must be a number of at least 0 and below 1."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return number


def pick_device(name):
    """The torch device of that name; `auto` is a CUDA GPU if there is one, else the CPU.

    Apple's MPS is used only when it is asked for, because asynchronous copies and batch norm in the
    channels-last layout are silently wrong there (pytorch #139550, #175189). Raises InputError if
    the device is not usable.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not usable on this machine ({reason}). "
                         "Try --device cpu") from None
    return device


def autocast(device):
    """A context of bfloat16 on GPUs that have it, where it halves the time; else of float32."""
    import torch

    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
