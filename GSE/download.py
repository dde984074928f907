"""Download the public files of a dataset to where its preprocess script looks for them.

    python GSE/download.py MOB
    python GSE/download.py GSE240429 --section C73_A1 C73_C1

A file is received as `.<name>.part`. It gets its name when it is whole: it has the size that the
server states, a gzip was read to its end, and the SHA-256 is that of `SHA256SUMS` next to this
script, if it is listed there. The next run continues a part (HTTP ranges, RFC 9110 section 14),
unless the server's file is no longer the one that the part began with. Of several processes that
want the same file, one downloads it and the others wait.
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
BLOCK = 1 << 20
SUMS = dict(line.split()[::-1] for line in Path(__file__).with_name("SHA256SUMS").read_text().splitlines())


# ---------------------------------------------------------------------------------------------- what is where


class Source(NamedTuple):
    """A file on a server. Its URL is server + path; it is stored at `path` in the dataset's folder.

    A path with * is a pattern: the name is looked up in the server's listing.
    """

    server: str
    path: str


def geo(sample, image):
    """One section's files on GEO, where not all exact names are certain."""
    return [Source(f"https://ftp.ncbi.nlm.nih.gov/geo/samples/{sample[:-3]}nnn/{sample}/suppl/", f"{sample}_{pattern}")
            for pattern in ("*matrix.mtx.gz", "*barcodes.tsv.gz", "*features.tsv.gz", "*tissue_positions_list.csv.gz",
                            image)]


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
    return [*(Source(f"{extdata}counts/", name)
              for name in (f"{section}.tsv", f"alignment_table_{section}.tsv", f"{section}.jpg")),
            Source(extdata, "mouse_genes.tsv.gz")]


DATASETS = {
    "GSE240429": {f"C73_{area}": geo(f"GSM76978{number}", f"*GEX_C73_{area}_Merged.tif*")
                  for area, number in (("A1", 68), ("B1", 69), ("C1", 70), ("D1", 71))},
    "GSE245620": {f"PSC011_{area}": geo(f"GSM78459{number}", f"GEX_PSC011-4_{area}_Merged.tif*")
                  for area, number in (("A1", 14), ("B1", 15), ("C1", 16), ("D1", 17))},
    "spatialLIBD_1": {str(section): cortex(section) for section in range(151507, 151511)},
    "spatialLIBD_2": {str(section): cortex(section) for section in range(151669, 151677)},
    "MOB": {section: bulb(section) for section in ("MOB1", "MOB2", "MOB3", "MOB4")},
}


# ---------------------------------------------------------------------------------------------- asking servers


class NotFetched(Exception):
    """One file cannot be downloaded, and why. The others still can."""


class Passing(NotFetched):
    """A fault that may be gone at the next attempt."""


class Unreachable(InputError):
    """No server answers: not for this file, nor for the others."""


def patiently(attempt, *args, received=lambda: 0):
    """What `attempt(*args)` returns. While its fault may pass, it is repeated after longer waits.

    received: the bytes received so far. Only attempts that add none to those of earlier ones are
    counted. Raises the error of the last attempt.
    """
    furthest, waits = received(), iter(WAITS)
    while True:
        try:
            return attempt(*args)
        except (Passing, Unreachable) as error:
            if received() > furthest:
                furthest, waits = received(), iter(WAITS)
            if (wait := next(waits, None)) is None:
                raise
            tqdm.write(f"{error}; again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def ask(url, method="GET", headers=None):
    """A server's answer (http.client.HTTPResponse), once it has begun; redirections are followed."""
    try:
        answer = urlopen(Request(url, None, {"User-Agent": "HECLIP", **(headers or {})}, method=method),
                         timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        kind = Passing if error.code in (408, 429) or error.code >= 500 else NotFetched
        raise kind(f"{url}: {error.code} {error.reason}") from None
    except URLError as error:
        raise Unreachable(f"{url}: the server cannot be reached ({error.reason}): check the network") from None
    except (OSError, HTTPException) as error:
        raise Passing(f"{url}: the server broke off ({error})") from None
    if answer.headers.get_content_type() == "text/html" and not url.endswith("/"):
        answer.close()
        raise NotFetched(f"{url}: the server sent a web page in the place of the file")
    return answer


def blocks(answer, url):
    """The bytes of an answer, as they arrive. Raises Passing if they are fewer than announced."""
    received, length = 0, length_of(answer)
    try:
        while block := answer.read1(BLOCK):
            received += len(block)
            yield block
    except (OSError, HTTPException) as error:
        raise Passing(f"{url}: the connection was lost ({error})") from None
    if length is not None and received != length:
        raise Passing(f"{url}: the connection was lost after {received:,} of {length:,} bytes")


def length_of(answer):
    """The announced number of bytes, None where none is."""
    length = answer.headers["Content-Length"] or ""
    return int(length) if length.isdigit() else None


def version_of(answer):
    """What differs between versions of a file and may be sent as If-Range; empty if nothing."""
    tag = answer.headers["ETag"] or "W/"
    return answer.headers["Last-Modified"] or "" if tag.startswith("W/") else tag  # W/: weak, not for ranges


@functools.cache
def listing(server):
    """The names of the files in a server's folder, from the page that lists them."""
    with ask(server) as answer:
        page = b"".join(blocks(answer, server)).decode(errors="replace")
    links = {urljoin(server, html.unescape(link)) for link in re.findall(r'href="([^"]+)"', page)}
    names = {unquote(link.removeprefix(server)) for link in links}
    return sorted(name for name in names if re.fullmatch(r"[^/\\?#\0]+", name))  # no other page, no way out of a folder


# ---------------------------------------------------------------------------------------------- one file


class File(NamedTuple):
    """A file whose name is known.

    size: bytes, None if the server does not state it. here: nothing is left to download.
    """

    path: Path
    url: str
    size: int | None
    digest: str | None
    here: bool

    @property
    def part(self):
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
    """Find out a file's name and size, and whether it is here."""
    name = source.path
    if "*" in name:
        names = [name for name in listing(source.server) if fnmatchcase(name, source.path)]
        if len(names) != 1:
            there = ", ".join(listing(source.server)) or "none at all"
            raise NotFetched(f"{len(names) or 'none'} of the files at {source.server} match. There are {there}. "
                             f"Put the right one into {folder} by hand")
        name = names[0]
    url, digest = source.server + quote(name), SUMS.get(f"{dataset}/{name}")

    # The preprocess scripts find a file anywhere below the folder, and unpacked too.
    found = {path: [folder / match for match in glob(f"**/{escape(path)}", root_dir=folder, recursive=True)]
             for path in (name, name.removesuffix(".gz"))}
    path = next(iter(found[name]), folder / name)
    if path.exists() and digest:
        if sha256(path) != digest:
            raise NotFetched(f"{path} is there, but its SHA-256 is not that of {url}. Move it away and run again")
        return File(path, url, path.stat().st_size, digest, here=True)
    with ask(url, "HEAD") as answer:
        size = length_of(answer)
    if path.exists():
        check_size(path, url, size)
    return File(path, url, size, digest, here=any(found.values()))


def check_size(path, url, size):
    """Raise NotFetched if a file that is here has not the size that the server states."""
    there = path.stat().st_size
    if size not in (None, there):
        raise NotFetched(f"{path} is there with {there:,} bytes, but {url} has {size:,}. "
                         "Move it away and run again")


def fetch(file):
    """Download one file, check it and give it its name, unless another process has done so.

    The part has the same name in every process, so that any of them can continue it. The lock lets
    one at a time do so. Raises NotFetched if the server does not give the file, InputError if the
    disk does not take it.
    """
    with locked(file.path):
        if file.path.exists():  # another process finished it since we looked
            return check_size(file.path, file.url, file.size)
        with tqdm(desc=file.path.name, total=file.size, unit="B", unit_scale=True, leave=False,
                  disable=None) as bar:
            try:
                patiently(receive, file, bar, received=file.received)
                flush(file.part)
            except OSError as error:
                raise InputError(f"{file.part}: {error.strerror}. What was received is kept. Fix "
                                 "this and run again") from None
            bar.set_description(f"{file.path.name}, checking")
            if fault := fault_of(file):
                file.part.unlink()
                file.tag.unlink()
                raise NotFetched(f"{file.url}: {fault}. What was received is deleted. Run again to "
                                 "download it from the start")
        os.replace(file.part, file.path)
        file.tag.unlink()
        flush_names(file.path.parent)


def receive(file, bar):
    """Add what is missing to the part, from one answer of the server."""
    # The last byte is asked for again, so that there is one to send even if the part is whole.
    start = max(file.received() - 1, 0)
    version = file.tag.read_text() if start else ""
    with ask(file.url, headers={"Range": f"bytes={start}-", "If-Range": version} if start else None) as answer:
        if answer.status == 206:
            content = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers["Content-Range"] or "")
            if not content or int(content[1]) != start or version_of(answer) != version:
                file.part.unlink(missing_ok=True)
                raise Passing(f"{file.url}: it has changed since {start:,} bytes of it were "
                              "received. Starting over")
            size = int(content[2])
        else:
            start, size = 0, length_of(answer)
        if file.size is not None and size not in (None, file.size):
            raise NotFetched(f"{file.url}: the server stated {file.size:,} bytes at first and "
                             f"{size:,} now. Run again, in case it is being changed")
        if not start:
            file.part.write_bytes(b"")  # first, so that no part ever has the tag of another version
            file.tag.write_text(version_of(answer))
        bar.total, bar.n, bar.last_print_n, bar.initial = size, start, start, start
        with open(file.part, "r+b") as part:
            part.seek(start)
            for block in blocks(answer, file.url):
                part.write(block)
                part.flush()  # so that a killed run keeps it
                bar.update(len(block))
    received = file.part.stat().st_size
    if received != (size or file.size or received):
        raise Passing(f"{file.url}: {received:,} of {size or file.size:,} bytes were received")


def fault_of(file):
    """What is wrong with a part of which all bytes were received; None if nothing is."""
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


# ---------------------------------------------------------------------------------------------- all files


def main(argv=None):
    flags = argparse.ArgumentParser(description="Download the public files of a dataset.")
    flags.add_argument("dataset", choices=DATASETS)
    flags.add_argument("--section", nargs="+", metavar="NAME", help="these sections only")
    flags.add_argument("--to", type=Path, metavar="DIR", help="default: GSE/<dataset>; give the preprocess script "
                       "another one as --raw")
    flags.add_argument("--list", action="store_true", help="print URLs and sizes in bytes, and fetch nothing")
    args = flags.parse_args(argv)
    sections = DATASETS[args.dataset]
    if unknown := set(args.section or ()) - set(sections):
        raise InputError(f"--section {' '.join(sorted(unknown))}: {args.dataset} has {', '.join(sections)}")
    folder = args.to or ROOT / "GSE" / args.dataset

    sources = list(dict.fromkeys(source for name in args.section or sections for source in sections[name]))
    files, failed = [], 0
    for source in tqdm(sources, "asking the servers", leave=False, disable=None):
        try:
            files.append(patiently(look_up, source, args.dataset, folder))
        except NotFetched as error:
            failed += 1
            tqdm.write(f"missing: {source.path}: {error}", file=sys.stderr)

    if args.list:
        for file in files:
            size = "unknown" if file.size is None else f"{file.size:,}"
            print(f"{size:>15}  {file.url}{'  (is here)' if file.here else ''}")
        absent = []
    else:
        absent = [file for file in files if not file.here]
        n_bytes = sum(max(file.size - file.received(), 0)
                      for file in absent if file.size is not None)
        unknown = sum(file.size is None for file in absent)
        print(f"{args.dataset}: {len(files) - len(absent)} of {len(sources)} files are here. To fetch: {len(absent)} "
              f"({n_bytes:,} bytes{f' and {unknown} of unknown size' if unknown else ''}), to {folder}", flush=True)
        disk = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        if (free := shutil.disk_usage(disk).free) < n_bytes:
            raise InputError(f"{folder}: {n_bytes:,} bytes are needed, but {free:,} are free "
                             "there. Make room, choose sections with --section, or another disk "
                             "with --to")
    for file in absent:
        try:
            fetch(file)
            print(f"  {file.path.relative_to(folder)}", flush=True)
        except NotFetched as error:
            failed += 1
            print(f"missing: {file.path.relative_to(folder)}: {error}", file=sys.stderr)
    if failed:
        raise InputError(f"{failed} of {len(sources)} files of {args.dataset} are missing; see above for each. "
                         "The next run fetches only those")
    if not args.list:
        chosen = f" --section {' '.join(args.section)}" if args.section else ""
        raw = f" --raw {args.to}" if args.to else ""
        print(f"All there. Next: python code/preprocess_{args.dataset}.py{raw}{chosen}")


if __name__ == "__main__":
    command.run(main)
