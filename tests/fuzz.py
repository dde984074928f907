"""Mutate files of every format that the project reads, and read them: a campaign.

    python tests/fuzz.py --files 20000 --seed 0

Each file must end in a valid value or in one InputError, within SECONDS and GB of memory, and must
leave nothing behind. Prints one table by format. Files that fail are kept in --keep with their
error. The same seed makes the same files.
"""

import argparse
import ctypes
import gc
import gzip
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
SECONDS = 10
GB = 1  # beyond what the process has before it reads the file
NUMBERS = [0, 1, 2, -1, 127, 255, 32767, 65535, 10**6, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**62,
           2**63 - 1]
WORDS = ["0", "-1", "1", "2", "1000000000", "99999999999999999999", "1e308", "1e-300", "1e999",
         "nan", "inf", "NA", "", "1.5", "0x1F", "\0", "\ufeff", "é", '"', "1,1", "null", "true"]

# -------------------------------------------------------------------------------------- mutations


def place(content, draw):
    """A place in a file: often near its beginning, where headers are."""
    end = len(content) if draw.random() < 0.6 else min(len(content), 512)
    return draw.randrange(end + 1)


def span(content, draw):
    """Where a block of a file begins and ends."""
    start = place(content, draw)
    return start, min(len(content), start + 2 ** draw.randrange(11))


def flip_bits(content, draw):
    """Flip one to eight bits."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        if changed:
            changed[place(content, draw) % len(changed)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def write_number(content, draw):
    """Write a number that readers trip over, in binary."""
    size, at = draw.choice([1, 2, 4, 8]), place(content, draw)
    number = draw.choice(NUMBERS) % 2 ** (8 * size)
    order = draw.choice(["little", "big"])
    return content[:at] + number.to_bytes(size, order) + content[at + size:]


def write_word(content, draw):
    """Replace a number in a text, or some bytes, by a word that readers trip over."""
    at = start = place(content, draw)
    while start < len(content) and not content[start:start + 1].isdigit():
        start += 1
    end = start
    while end < len(content) and content[end:end + 1].isdigit():
        end += 1
    if start == len(content):
        start, end = at, at + 1
    return content[:start] + draw.choice(WORDS).encode() + content[end:]


def truncate(content, draw):
    """Keep the beginning."""
    return content[:place(content, draw)]


def delete(content, draw):
    """Delete a block."""
    start, end = span(content, draw)
    return content[:start] + content[end:]


def insert(content, draw):
    """Insert a block: zeros, noise, or what stands elsewhere in the file."""
    at, (start, end) = place(content, draw), span(content, draw)
    kind = draw.randrange(3)
    block = [bytes(end - start), draw.randbytes(end - start), content[start:end]][kind]
    return content[:at] + block + content[at:]


def exchange(content, draw):
    """Exchange two blocks."""
    (start, end), (other, last) = sorted([span(content, draw), span(content, draw)])
    if end > other:
        return content[:start] + content[other:last] + content[end:]
    return (content[:start] + content[other:last] + content[end:other] + content[start:end]
            + content[last:])


def nest(content, draw):
    """Insert brackets, many levels deep."""
    at, depth = place(content, draw), draw.choice([10, 1000, 50_000])
    bracket = draw.choice([b"[", b"(", b"{", b'{"a":', b"<a>", b'"'])
    return content[:at] + bracket * depth + content[at:]


def repeat_line(content, draw):
    """Repeat a line many times."""
    lines = content.split(b"\n")
    number = draw.randrange(len(lines))
    return b"\n".join(lines[:number] + lines[number:number + 1] * draw.choice([2, 3, 1000])
                      + lines[number + 1:])


MUTATIONS = [flip_bits, flip_bits, write_number, write_number, write_word, write_word, truncate,
             delete, insert, exchange, nest, repeat_line]


def mutate(content, draw, others=()):
    """The bytes of a file after one to three mutations; or the bytes of another format's file.

    draw: random.Random. What is packed with a checksum (gzip, zip, PNG) is mutated inside half of
    the times, and gets a right checksum.
    """
    if others and draw.random() < 0.03:
        return draw.choice(others)
    if draw.random() < 0.5:
        if content[:2] == b"\x1f\x8b":
            return gzip.compress(mutate(gzip.decompress(content), draw), 1, mtime=0)
        if content[:4] == b"PK\3\4":
            return mutate_member(content, draw)
        if content[:4] == b"\x89PNG":
            return with_right_sums(mutate(content, draw))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        content = draw.choice(MUTATIONS)(content, draw)
    return content


def mutate_member(content, draw):
    """A zip file with one member mutated, the small ones most often."""
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        members = {name: source.read(name) for name in source.namelist()}
    names = sorted(members, key=lambda name: len(members[name]))
    chosen = names[-1] if draw.random() < 0.5 else draw.choice(names)
    if any(name.endswith("data.pkl") for name in names) and draw.random() < 0.7:
        chosen = next(name for name in names if name.endswith("data.pkl"))
    members[chosen] = mutate(members[chosen], draw)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name, member in members.items():
            target.writestr(name, member)
    return out.getvalue()


def with_right_sums(content):
    """A PNG whose chunks have right checksums, as far as their lengths can be followed."""
    content, at = bytearray(content), 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at:at + 4], "big")
        if end + 4 <= len(content):
            content[end:end + 4] = zlib.crc32(content[at + 4:end]).to_bytes(4, "big")
        at = end + 4
    return bytes(content)


# ------------------------------------------------------------------------------------- one file


@dataclass(frozen=True)
class Outcome:
    """How reading a file ended: read, refused or another word, with the error's text."""

    kind: str
    error: str = ""
    seconds: float = 0
    mb: float = 0

    @property
    def right(self):
        """Whether it ended as it should."""
        return self.kind in ("read", "refused")


class TimeUp(BaseException):
    """The alarm of a file that takes too long. No reader catches it."""


def attempt(read, folder):
    """Read the files in a folder: an Outcome without time and memory."""
    from heclip.files import LONGEST, InputError

    before = contents(folder)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            read(folder)
        kind, error = "read", ""
        if casts := [str(one.message) for one in warned if "cast" in str(one.message)]:
            kind, error = "warned", casts[0]
    except InputError as found:
        kind, error = "refused", str(found)
        if within(found, MemoryError) or "Unable to allocate" in error:
            kind = "memory"
        if "\n" in error or len(error) > LONGEST:
            kind = "long text"
    except TimeUp:
        kind, error = "time", "".join(traceback.format_stack(limit=3))
    except BaseException as found:
        kind = "memory" if isinstance(found, MemoryError) else "other"
        error = "".join(traceback.format_exception(found)[-6:])
    if kind in ("read", "refused") and contents(folder) != before:
        kind, error = "left behind", ", ".join(sorted(contents(folder)))
    return Outcome(kind, error)


def within(error, kind):
    """Whether an error of a kind led to this one."""
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def contents(folder):
    """The bytes of every file below a folder, and of the system's temporary folder the names."""
    inside = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return inside | dict.fromkeys(os.listdir(tempfile.gettempdir()))


def write_case(known, changes, folder):
    """Write a format's files to a folder; changes: name -> bytes that are other than honest."""
    for name, content in (known.files | changes).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def changes_of(formats, name, number, seed):
    """The changed files of a case: name -> bytes. A format's first cases are its hostile files."""
    known = formats[name]
    hostile = list(known.hostile.values())
    if number < len(hostile):
        content = hostile[number]
        return {known.targets[0]: content() if callable(content) else content}
    draw = random.Random(f"{seed} {name} {number}")
    target = draw.choice(known.targets)
    others = [next(iter(other.files.values())) for other in formats.values()]
    return {target: mutate(known.files[target], draw, others)}


# ------------------------------------------------------------------------------------- the worker


def serve(pipe, formats, seed, top):
    """Read cases as they are asked for, in a process of its own, until it is killed.

    top: the folder of the cases, and of temporary files.
    """
    ctypes.CDLL(None).mallopt(-8, 1)  # one arena, so that threads reserve no address space
    tempfile.tempdir = tempfile.mkdtemp(dir=top)
    signal.signal(signal.SIGALRM, stop)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.dup2(sys.stderr.fileno(), 2)
    while True:
        name, number = pipe.recv()
        with tempfile.TemporaryDirectory(dir=top) as folder:
            folder = Path(folder)
            write_case(formats[name], changes_of(formats, name, number, seed), folder)
            pipe.send(measured(formats[name].read, folder))


def stop(*_):
    raise TimeUp


def measured(read, folder):
    """The Outcome of reading a folder's files, under the limits of time and memory."""
    gc.collect(0)
    Path("/proc/self/clear_refs").write_text("5")  # begins the record of the most memory again
    sizes = memory()
    limit = sizes["VmSize"] + (GB << 30) + (256 << 20)  # the latter for stacks of threads
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    begun = time.perf_counter()
    signal.alarm(SECONDS)
    outcome = attempt(read, folder)
    signal.alarm(0)
    seconds = time.perf_counter() - begun
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    mb = (memory()["VmHWM"] - sizes["VmRSS"]) / 2**20
    kind = "memory" if mb > 1024 * GB and outcome.right else outcome.kind
    return Outcome(kind, outcome.error, seconds, mb)


def memory():
    """Sizes of this process in bytes, as the system names them."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0][:-1]: int(line[1]) << 10 for line in lines
            if line[0] in ("VmSize:", "VmRSS:", "VmHWM:")}


class Worker:
    """A process that reads files. It is replaced when it dies, or takes too long."""

    def __init__(self, formats, seed):
        self.formats, self.seed, self.process, self.top = formats, seed, None, None

    def start(self):
        """Start the process, with everything imported."""
        context = multiprocessing.get_context("fork")
        self.pipe, inner = context.Pipe()
        memory_disk = Path("/dev/shm")
        self.top = tempfile.mkdtemp(dir=memory_disk if memory_disk.is_dir() else None)
        given = inner, self.formats, self.seed, self.top
        self.process = context.Process(target=serve, args=given, daemon=True)
        self.process.start()
        inner.close()
        self.n_read = 0

    def read(self, name, number):
        """The Outcome of one case."""
        if self.process is None or self.n_read == 1000:
            self.end()
            self.start()
        self.n_read += 1
        try:
            self.pipe.send((name, number))
            if self.pipe.poll(3 * SECONDS):
                return self.pipe.recv()
            outcome = Outcome("time", "it did not stop", 3 * SECONDS)
        except (EOFError, OSError):
            self.process.join()
            outcome = Outcome("crash", f"the process ended with {self.process.exitcode}")
        except UnicodeDecodeError as error:  # its memory is damaged
            outcome = Outcome("crash", f"the answer is damaged: {error.object!r}")
        self.end()
        return outcome

    def end(self):
        """End the process and remove what it left."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            shutil.rmtree(self.top, ignore_errors=True)
        self.process = None


# ------------------------------------------------------------------------------------ the campaign


def campaign(args):
    """Read all files, and print the table. Returns the number of failures."""
    import fuzz_formats

    formats = {name: known for name, known in fuzz_formats.FORMATS.items()
               if not args.format or name in args.format}
    names = list(formats)
    worker, results, seen = Worker(formats, args.seed), {name: [] for name in names}, Counter()
    for case in range(args.first * len(names), args.files):
        name, number = names[case % len(names)], case // len(names)
        outcome = worker.read(name, number)
        results[name].append(outcome)
        if not outcome.right:
            signature = name, outcome.kind, outcome.error.strip().split("\n")[-1][:150]
            seen[signature] += 1
            if seen[signature] <= 2:
                error = outcome.error[-args.tail:]
                print(f"{name} {number}: {outcome.kind}: {error}\n", flush=True)
                keep(args.keep, formats[name], name, number,
                     changes_of(formats, name, number, args.seed))
    worker.end()
    print(table(results))
    for (name, kind, error), times in seen.most_common():
        print(f"{times:6} x {name}: {kind}: {error}")
    return sum(seen.values())


def keep(folder, known, name, number, changes):
    """Keep the files of a case that failed."""
    place = Path(folder, f"{name.replace(' ', '_').replace(',', '')}-{number}")
    place.mkdir(parents=True, exist_ok=True)
    write_case(known, changes, place)


def table(results):
    """The results by format as a table in Markdown."""
    lines = ["| format | files | read | refused | other | slowest, s | memory, MB |",
             "|---|--:|--:|--:|--:|--:|--:|"]
    every = [outcome for outcomes in results.values() for outcome in outcomes]
    for name, outcomes in [*results.items(), ("all", every)]:
        kinds = Counter(outcome.kind for outcome in outcomes)
        other = len(outcomes) - kinds["read"] - kinds["refused"]
        slowest = max((outcome.seconds for outcome in outcomes), default=0)
        most = max((outcome.mb for outcome in outcomes), default=0)
        lines.append(f"| {name} | {len(outcomes)} | {kinds['read']} | {kinds['refused']} | {other} "
                     f"| {slowest:.2f} | {most:.0f} |")
    return "\n".join(lines)


def parse():
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--files", type=int, default=20_000, help="how many files, over all formats")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--first", type=int, default=0, help="number of each format's first file")
    flags.add_argument("--format", nargs="+", help="these formats only")
    flags.add_argument("--tail", type=int, default=600, help="characters of an error to print")
    flags.add_argument("--keep", default=Path(tempfile.gettempdir(), "fuzz-failures"),
                       help="folder for the files that failed")
    return flags.parse_args()


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system",
                   "HF_HUB_OFFLINE": "1"}
    sys.path[:0] = [str(TESTS.parent / "code"), str(TESTS)]
    sys.exit(campaign(parse()) > 0)
