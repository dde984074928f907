"""Download the public files of a dataset to where its preprocess script looks for them.

    python GSE/download.py MOB
    python GSE/download.py GSE240429 --section C73_A1 C73_C1

A file is received as `.<name>.part`. It gets its name when it is complete: it has the size that the
server states, a gzip can be read to its end, and the SHA-256 is that of `SHA256SUMS` next to this
script, if the file is listed there. The next run continues a part (HTTP ranges, RFC 9110 section
14), unless the file on the server has changed since. If several processes want the same file, one
downloads it and the others wait.
"""

import argparse
import functools
import gzip
import html
import os
import re
import shutil
import sys
import time
import zlib
from fnmatch import fnmatchcase
from glob import escape, glob
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urljoin
from urllib.request import Request, urlopen

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

from heclip import command
from heclip.dataset import ROOT
from heclip.files import InputError, flush, flush_names, locked, sha256

WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each further attempt
TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 20  # bytes read at a time
SUMS_PATH = Path(__file__).with_name("SHA256SUMS")
SUMS = dict(line.split()[::-1] for line in SUMS_PATH.read_text().splitlines())  # digest by path


# ------------------------------------------------------------------------------------ what is where


class Source(NamedTuple):
    """A file on a server. Its URL is server + path; it is stored at `path` in the dataset's folder.

    A path with * is a pattern: the name is looked up in the server's listing.
    """

    server: str
    path: str


def geo(sample, image):
    """One section's files on GEO. They are patterns, because not all exact names are certain."""
    folder = f"https://ftp.ncbi.nlm.nih.gov/geo/samples/{sample[:-3]}nnn/{sample}/suppl/"
    patterns = ["*matrix.mtx.gz", "*barcodes.tsv.gz", "*features.tsv.gz",
                "*tissue_positions_list.csv.gz", image]
    return [Source(folder, f"{sample}_{pattern}") for pattern in patterns]


def cortex(section):
    """One section's files on the servers of LieberInstitute/HumanPilot."""
    bucket = "https://spatial-dlpfc.s3.us-east-2.amazonaws.com"
    return [Source(f"{bucket}/h5/", f"{section}_filtered_feature_bc_matrix.h5"),
            Source(f"{bucket}/images/", f"{section}_full_image.tif"),
            Source("https://raw.githubusercontent.com/LieberInstitute/HumanPilot/master/10X/",
                   f"{section}/tissue_positions_list.txt")]


def bulb(section):
    """One section's files of STUtility, and the gene symbols that all sections share."""
    extdata = ("https://raw.githubusercontent.com/jbergenstrahle/STUtility/"
               "9a8f421499e58b13340ee386db07b0eba923c88c/inst/extdata/")
    names = [f"{section}.tsv", f"alignment_table_{section}.tsv", f"{section}.jpg"]
    own = [Source(f"{extdata}counts/", name) for name in names]
    return [*own, Source(extdata, "mouse_genes.tsv.gz")]


DATASETS = {
    "GSE240429": {f"C73_{area}": geo(f"GSM76978{number}", f"*GEX_C73_{area}_Merged.tif*")
                  for area, number in (("A1", 68), ("B1", 69), ("C1", 70), ("D1", 71))},
    "GSE245620": {f"PSC011_{area}": geo(f"GSM78459{number}", f"GEX_PSC011-4_{area}_Merged.tif*")
                  for area, number in (("A1", 14), ("B1", 15), ("C1", 16), ("D1", 17))},
    "spatialLIBD_1": {str(section): cortex(section) for section in range(151507, 151511)},
    "spatialLIBD_2": {str(section): cortex(section) for section in range(151669, 151677)},
    "MOB": {section: bulb(section) for section in ("MOB1", "MOB2", "MOB3", "MOB4")},
}


# ----------------------------------------------------------------------------------- asking servers


class NotDownloaded(Exception):
    """One file cannot be downloaded; the text says why. The others still can."""


class Temporary(NotDownloaded):
    """A fault that may be gone at the next attempt."""


class Unreachable(InputError):
    """The server does not answer, so the other files cannot be downloaded either."""


def with_retries(attempt, *args, received=lambda: 0):
    """Return what `attempt(*args)` returns; repeat it after longer and longer waits if it fails.

    Only faults that may be temporary are retried. received: a function that returns the bytes
    received so far; an attempt that adds to them starts the waits again from the first.
    Raises the error of the last attempt.
    """
    most, waits = received(), iter(WAITS)
    while True:
        try:
            return attempt(*args)
        except (Temporary, Unreachable) as error:
            if received() > most:
                most, waits = received(), iter(WAITS)
            if (wait := next(waits, None)) is None:
                raise
            tqdm.write(f"{error}; again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def ask(url, method="GET", headers=None):
    """Open a URL: http.client.HTTPResponse, of which no body is read. Redirections are followed.

    Raises Unreachable, Temporary or NotDownloaded; the last also for a web page in place of a file.
    """
    headers = {"User-Agent": "HECLIP", **(headers or {})}
    try:
        answer = urlopen(Request(url, None, headers, method=method), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        kind = Temporary if error.code in (408, 429) or error.code >= 500 else NotDownloaded
        raise kind(f"{url}: {error.code} {error.reason}") from None
    except URLError as error:
        raise Unreachable(f"{url}: the server cannot be reached ({error.reason}). Check the "
                          "network") from None
    except (OSError, HTTPException) as error:
        raise Temporary(f"{url}: the server broke off ({error})") from None
    if answer.headers.get_content_type() == "text/html" and not url.endswith("/"):
        answer.close()
        raise NotDownloaded(f"{url}: the server sent a web page instead of the file")
    return answer


def blocks(answer, url):
    """Yield the bytes of an answer as they arrive.

    Raises Temporary if the connection is lost, or if they are fewer than announced.
    """
    received, length = 0, length_of(answer)
    try:
        while block := answer.read1(BLOCK):
            received += len(block)
            yield block
    except (OSError, HTTPException) as error:
        raise Temporary(f"{url}: the connection was lost ({error})") from None
    if length is not None and received != length:
        raise Temporary(f"{url}: the connection was lost after {received:,} of {length:,} bytes")


def length_of(answer):
    """The announced number of bytes, or None."""
    length = answer.headers["Content-Length"] or ""
    return int(length) if length.isdigit() else None


def version_of(answer):
    """The text that identifies a file's version and may be sent as If-Range; empty if none may."""
    tag = answer.headers["ETag"] or "W/"
    if tag.startswith("W/"):  # a weak tag, which is not valid for ranges
        return answer.headers["Last-Modified"] or ""
    return tag


@functools.cache
def listing(server):
    """The names of the files in a server's folder, from the page that lists them."""
    with ask(server) as answer:
        page = b"".join(blocks(answer, server)).decode(errors="replace")
    links = {urljoin(server, html.unescape(link)) for link in re.findall(r'href="([^"]+)"', page)}
    names = {unquote(link.removeprefix(server)) for link in links}
    # Neither other pages nor paths that lead out of the folder.
    return sorted(name for name in names if re.fullmatch(r"[^/\\?#\0]+", name))


# ----------------------------------------------------------------------------------------- one file


class File(NamedTuple):
    """A file whose name is known."""

    path: Path  # where it is stored
    url: str
    size: int | None  # bytes; None if the server does not state it
    digest: str | None  # SHA-256, if it is known
    present: bool  # nothing is left to download

    @property
    def part(self):
        """The file that holds the bytes received so far."""
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def tag(self):
        """The file that holds the version of the part, as `version_of` gives it."""
        return self.path.with_name(f".{self.path.name}.part.version")

    def received(self):
        """The bytes of earlier attempts, from which the next can continue."""
        if not self.part.exists() or not self.tag.exists() or not self.tag.read_text():
            return 0
        received = self.part.stat().st_size
        return received if self.size is None or received <= self.size else 0


def look_up(source, dataset, folder):
    """The File of a Source: its name and size, and whether it is in the dataset's folder already.

    Raises NotDownloaded if the name is ambiguous, the server lacks the file, or another file is in
    its place.
    """
    name = one_name(source, folder)
    url, digest = source.server + quote(name), SUMS.get(f"{dataset}/{name}")

    # The preprocess scripts find a file anywhere below the folder, and unpacked too.
    as_named = find_below(folder, name)
    unpacked = find_below(folder, name.removesuffix(".gz"))
    path = next(iter(as_named), folder / name)
    if path.exists() and digest:
        if sha256(path) != digest:
            raise NotDownloaded(f"{path} is there, but its SHA-256 is not that of {url}. Move it "
                                "away and run again")
        return File(path, url, path.stat().st_size, digest, present=True)
    with ask(url, "HEAD") as answer:
        size = length_of(answer)
    if path.exists():
        check_size(path, url, size)
    return File(path, url, size, digest, present=bool(as_named or unpacked))


def one_name(source, folder):
    """The name of a source's file; a pattern is looked up on the server."""
    if "*" not in source.path:
        return source.path
    listed = listing(source.server)
    names = [name for name in listed if fnmatchcase(name, source.path)]
    if len(names) != 1:
        raise NotDownloaded(f"{len(names) or 'none'} of the files at {source.server} match. There "
                            f"are {', '.join(listed) or 'none at all'}. Put the right one into "
                            f"{folder} by hand")
    return names[0]


def find_below(folder, name):
    """The paths of the files of this name, anywhere below the folder."""
    return [folder / match for match in glob(f"**/{escape(name)}", root_dir=folder, recursive=True)]


def check_size(path, url, size):
    """Raise NotDownloaded if an existing file does not have the size that the server states."""
    actual = path.stat().st_size
    if size not in (None, actual):
        raise NotDownloaded(f"{path} is there with {actual:,} bytes, but {url} has {size:,}. Move "
                            "it away and run again")


def download(file):
    """Download one file, check it and give it its name, unless another process has done so.

    The part has the same name in every process, so that any of them can continue it. The lock lets
    only one at a time do so. Raises NotDownloaded if the server does not deliver the file, and
    InputError if it cannot be written.
    """
    with locked(file.path):
        if file.path.exists():  # another process finished it since we looked
            return check_size(file.path, file.url, file.size)
        with tqdm(desc=file.path.name, total=file.size, unit="B", unit_scale=True, leave=False,
                  disable=None) as bar:
            try:
                with_retries(receive, file, bar, received=file.received)
                flush(file.part)
            except OSError as error:
                raise InputError(f"{file.part}: {error.strerror}. What was received is kept. Fix "
                                 "this and run again") from None
            bar.set_description(f"{file.path.name}, checking")
            if fault := fault_of(file):
                file.part.unlink()
                file.tag.unlink()
                raise NotDownloaded(f"{file.url}: {fault}. What was received is deleted. Run again "
                                    "to download it from the start")
        os.replace(file.part, file.path)
        file.tag.unlink()
        flush_names(file.path.parent)


def receive(file, bar):
    """Add the missing bytes to the part, from one answer of the server."""
    # The last byte is requested again, so that there is one to send even if the part is complete.
    start = max(file.received() - 1, 0)
    version, headers = "", None
    if start:
        version = file.tag.read_text()
        headers = {"Range": f"bytes={start}-", "If-Range": version}
    with ask(file.url, headers=headers) as answer:
        if answer.status == 206:
            content = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers["Content-Range"] or "")
            if not content or int(content[1]) != start or version_of(answer) != version:
                file.part.unlink(missing_ok=True)
                raise Temporary(f"{file.url}: it has changed since {start:,} bytes of it were "
                                "received. Starting over")
            size = int(content[2])
        else:
            start, size = 0, length_of(answer)
        if file.size is not None and size not in (None, file.size):
            raise NotDownloaded(f"{file.url}: the server stated {file.size:,} bytes at first and "
                                f"{size:,} now. Run again, in case it is being changed")
        if not start:
            file.part.write_bytes(b"")  # first, so that no part ever has the tag of another version
            file.tag.write_text(version_of(answer))
        bar.total, bar.n, bar.last_print_n, bar.initial = size, start, start, start
        with open(file.part, "r+b") as part:
            part.seek(start)
            for block in blocks(answer, file.url):
                part.write(block)
                part.flush()  # so that the block is there if the run is killed
                bar.update(len(block))
    received = file.part.stat().st_size
    if received != (size or file.size or received):
        raise Temporary(f"{file.url}: {received:,} of {size or file.size:,} bytes were received")


def fault_of(file):
    """The fault of a part that was received completely, as text; None if there is none."""
    if not file.part.stat().st_size:
        return "is empty"
    if file.digest and sha256(file.part) != file.digest:
        return f"its SHA-256 is not the known one, {file.digest}"
    if file.path.suffix == ".gz":
        try:
            with gzip.open(file.part) as content:
                while content.read(BLOCK):
                    pass
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            return f"is damaged on the server or was on the way ({error})"
    return None


# ---------------------------------------------------------------------------------------- all files


def main(argv=None):
    flags = argparse.ArgumentParser(description="Download the public files of a dataset.")
    flags.add_argument("dataset", choices=DATASETS)
    flags.add_argument("--section", nargs="+", metavar="NAME", help="only these sections")
    flags.add_argument("--to", type=Path, metavar="DIR",
                       help="folder for the files; default: GSE/<dataset>. Give another one to the "
                            "preprocess script as --raw")
    flags.add_argument("--list", action="store_true",
                       help="print URLs and sizes in bytes, and download nothing")
    args = flags.parse_args(argv)
    sections = DATASETS[args.dataset]
    if unknown := set(args.section or ()) - set(sections):
        raise InputError(f"--section {' '.join(sorted(unknown))}: {args.dataset} has "
                         f"{', '.join(sections)}")
    folder = args.to or ROOT / "GSE" / args.dataset

    chosen = args.section or sections
    sources = list(dict.fromkeys(source for name in chosen for source in sections[name]))
    files, n_failed = look_up_all(sources, args.dataset, folder)
    if args.list:
        print_list(files)
    else:
        absent = [file for file in files if not file.present]
        print(f"{args.dataset}: {len(files) - len(absent)} of {len(sources)} files are here. "
              f"To download: {len(absent)} ({size_of(absent)}), to {folder}", flush=True)
        check_room(absent, folder)
        n_failed += download_all(absent, folder)
    if n_failed:
        raise InputError(f"{n_failed} of {len(sources)} files of {args.dataset} are missing; see "
                         "above for each. The next run downloads only those")
    if not args.list:
        section = f" --section {' '.join(args.section)}" if args.section else ""
        raw = f" --raw {args.to}" if args.to else ""
        print(f"All files are here. Next: python code/preprocess_{args.dataset}.py{raw}{section}")


def look_up_all(sources, dataset, folder):
    """Returns (list of File, number of sources that failed). Failures are printed."""
    files, n_failed = [], 0
    for source in tqdm(sources, "asking the servers", leave=False, disable=None):
        try:
            files.append(with_retries(look_up, source, dataset, folder))
        except NotDownloaded as error:
            n_failed += 1
            tqdm.write(f"missing: {source.path}: {error}", file=sys.stderr)
    return files, n_failed


def print_list(files):
    """Print the size in bytes and the URL of each file."""
    for file in files:
        size = "unknown" if file.size is None else f"{file.size:,}"
        mark = "  (is here)" if file.present else ""
        print(f"{size:>15}  {file.url}{mark}")


def bytes_left(files):
    """The number of bytes to download, as far as sizes are known."""
    return sum(max(file.size - file.received(), 0) for file in files if file.size is not None)


def size_of(files):
    """The size of a download, in words."""
    n_unknown = sum(file.size is None for file in files)
    unknown = f" and {n_unknown} of unknown size" if n_unknown else ""
    return f"{bytes_left(files):,} bytes{unknown}"


def check_room(files, folder):
    """Raise InputError if the disk of the folder has no room for the download."""
    parents = (folder.absolute(), *folder.absolute().parents)
    disk = next(parent for parent in parents if parent.exists())
    if (free := shutil.disk_usage(disk).free) < (n_bytes := bytes_left(files)):
        raise InputError(f"{folder}: {n_bytes:,} bytes are needed, but {free:,} are free there. "
                         "Make room, choose sections with --section, or another disk with --to")


def download_all(files, folder):
    """Download the files, and print the name of each. Returns the number that failed."""
    n_failed = 0
    for file in files:
        name = file.path.relative_to(folder)
        try:
            download(file)
            print(f"  {name}", flush=True)
        except NotDownloaded as error:
            n_failed += 1
            print(f"missing: {name}: {error}", file=sys.stderr)
    return n_failed


if __name__ == "__main__":
    command.run(main)
