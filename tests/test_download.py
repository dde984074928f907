"""download.py against a local server that fails as servers do: the right file, or none and why."""

import contextlib
import errno
import gzip
import hashlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from urllib.parse import quote, unquote

import download
import numpy as np
import pytest

from heclip import sources
from heclip.files import InputError

BODY = np.random.default_rng(0).bytes(100_000)


class Handler(BaseHTTPRequestHandler):
    """Answers from `server.files`; `server.faults[path]` lists the faults of the next GETs."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer("HEAD")

    def do_GET(self):
        self.answer("GET")

    def log_message(self, *_):
        pass

    def answer(self, method):
        server, path = self.server, unquote(self.path)
        span = self.headers["Range"]
        seen = {"method": method, "path": path, "range": span, "sent": 0}
        server.seen.append(seen)
        self.close_connection = True
        faults = server.faults.get(path, []) if method == "GET" else []
        fault = faults.pop(0) if faults else None
        if fault == "drop":
            return
        if path in server.moved:
            return self.head(302, Location=server.url + server.moved[path])
        status = 200 if path in server.files else 404
        if isinstance(fault, int):
            status = fault
        status = server.status.get(path, status)
        if status != 200:
            return self.head(status, Content_Length=0)
        body = server.files[path]
        kind = "text/html" if path.endswith("/") else "application/octet-stream"
        headers = {"Content_Type": kind, **server.version(body)}
        start = 0
        unchanged = self.headers["If-Range"] in (None, *server.version(body).values())
        if server.ignores == "If-Range":
            unchanged = True
        if span and unchanged and server.ignores != "Range":
            start = int(span.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.head(416, Content_Length=0)
            body = body[:start + server.most_of_a_range]
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(server.files[path])}"
        announced = len(body) - start + (server.extra_bytes if method == "GET" else 0)
        self.head(206 if start else 200, Content_Length=announced, **headers)
        if method == "GET":
            end = (start + len(body)) // 2 if fault in ("cut", "wait") else len(body)
            seen["sent"] = end - start  # before the client can have it, and look
            self.wfile.write(body[start:end])
            if fault == "wait":
                server.go_on.wait(60)

    def head(self, status, **headers):
        self.send_response(status)
        for name, value in {**headers, "Connection": "close"}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()


class Server(ThreadingTCPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files, self.faults, self.status, self.moved, self.seen = {}, {}, {}, {}, []
        self.ignores = None  # a header that the server ignores
        self.extra_bytes = 0  # added to the announced length
        self.most_of_a_range = 1 << 30  # bytes sent for one request of a range
        self.go_on = threading.Event()
        self.version = lambda body: {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        pass  # a client that was killed

    def gets(self):
        return [seen for seen in self.seen if seen["method"] == "GET"]

    def list_folders(self):
        """Write the page that lists the files of each folder, with the usual other links."""
        for path in [path for path in self.files if not path.endswith("/")]:
            folder = path.rpartition("/")[0] + "/"
            inside = [name for name in self.files if name.startswith(folder) and name != folder]
            names = [name.removeprefix(folder) for name in inside]
            lines = [f'<a href="{quote(name, safe="")}">{name}</a>  2026-01-01 12:00  1.2M\n'
                     for name in names]
            head = ('<a href="?C=N;O=D">Name</a> <a href="/geo/samples/">Parent</a> '
                    '<a href="miniml/">miniml/</a>\n')
            self.files[folder] = "".join([head, *lines]).encode()


@pytest.fixture
def server(monkeypatch):
    """The local server in place of the real ones. Their names begin the paths on it."""
    server = Server()

    def local(source):
        return source._replace(server=source.server.replace("https://", f"{server.url}/"))

    datasets = {}
    for name, sections in download.DATASETS.items():
        datasets[name] = {section: [*map(local, sources)] for section, sources in sections.items()}
    monkeypatch.setattr(download, "DATASETS", datasets)
    monkeypatch.setattr(download, "WAITS", (0, 0))
    monkeypatch.setattr(download, "TIMEOUT", 20)
    download.listing.cache_clear()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def one(server, monkeypatch, tmp_path):
    """A function that publishes a dataset of one file, and returns a function that downloads it."""
    def publish(name="slide.tif", body=BODY, digest=None):
        source = download.Source(f"{server.url}/data/", name)
        monkeypatch.setattr(download, "DATASETS", {"MOB": {"MOB1": [source]}})
        monkeypatch.setattr(download, "SUMS", {f"MOB/{name}": digest} if digest else {})
        server.files[f"/data/{name}"] = body
        return lambda *flags: download.main(["MOB", "--to", str(tmp_path / "to"), *flags])

    return publish


def change_headers(monkeypatch, **changes):
    """Let the server send these headers instead of its own; None: not at all."""
    original = Handler.head

    def head(self, status, **headers):
        original(self, status, **{**headers, **changes})

    monkeypatch.setattr(Handler, "head", head)


def contents(folder):
    """The files below a folder: path -> bytes. Locks are left out, because they may stay or not."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".lock"}


def only_a_part(folder, name="slide.tif"):
    return set(contents(folder)) <= {f".{name}.part", f".{name}.part.version"}


# ------------------------------------------------------------------ the datasets as they are stated


def published_name(dataset, section, source):
    """The name of a file on its server. For a pattern, it is one that GEO could have."""
    if "*" not in source.path:
        return source.path
    sample = source.path.partition("_")[0]
    if "Merged" in source.path:
        return {"GSE240429": f"{sample}_GEX_{section}_Merged.tiff.gz",
                "GSE245620": f"{sample}_GEX_PSC011-4_{section[-2:]}_Merged.tif.gz"}[dataset]
    stem = {"GSE240429": section.replace("_", ""), "GSE245620": f"{section}_VISIUM"}[dataset]
    return f"{sample}_{stem}_{source.path.rpartition('*')[2]}"


def publish(server, dataset, monkeypatch):
    """Put something under every name of a dataset."""
    monkeypatch.setattr(download, "SUMS", {})
    for section, listed in download.DATASETS[dataset].items():
        for source in listed:
            name, body = published_name(dataset, section, source), repr(source).encode()
            server.files[source.server.removeprefix(server.url) + name] = (
                gzip.compress(body) if name.endswith(".gz") else body)
    server.list_folders()


@pytest.mark.parametrize("dataset", download.DATASETS)
def test_the_preprocess_script_finds_every_downloaded_file(server, dataset, monkeypatch, tmp_path):
    publish(server, dataset, monkeypatch)
    download.main([dataset, "--to", str(tmp_path)])
    stated = importlib.import_module(f"preprocess_{dataset}").DATASET
    assert [section.name for section in stated.sections] == list(download.DATASETS[dataset])
    found = []
    for section in stated.sections:
        found += sources.files_of(sources.find(tmp_path, section.counts, "counts"))
        found.append(sources.find(tmp_path, section.positions, "positions"))
        found.append(sources.find(tmp_path, section.image, "image"))
    if stated.symbols:
        found.append(sources.find(tmp_path, stated.symbols, "symbols"))
    assert sorted(found) == sorted(tmp_path / path for path in contents(tmp_path))
    assert len(set(found)) == len(set().union(*download.DATASETS[dataset].values()))


def test_one_section_downloads_its_own_files_and_those_that_all_share(
        server, monkeypatch, tmp_path, capsys):
    publish(server, "MOB", monkeypatch)
    download.main(["MOB", "--to", str(tmp_path), "--section", "MOB2"])
    assert set(contents(tmp_path)) == {
        "MOB2.tsv", "MOB2.jpg", "alignment_table_MOB2.tsv", "mouse_genes.tsv.gz"}
    again = f"python code/preprocess_MOB.py --raw {tmp_path} --section MOB2"
    assert again in capsys.readouterr().out


def test_the_known_sums_are_those_of_the_real_files(real_data):
    names = {"MOB": [*real_data("MOB").glob("inst/extdata/counts/*"),
                     real_data("MOB") / "inst/extdata/mouse_genes.tsv.gz"],
             "spatialLIBD": [*real_data("spatialLIBD").glob("*/tissue_positions_list.txt")]}
    sums = {path.name: download.sha256(path) for path in names["MOB"]}
    for path in names["spatialLIBD"]:
        sums[f"{path.parent.name}/{path.name}"] = download.sha256(path)
    assert {path.partition("/")[2]: digest for path, digest in download.SUMS.items()} == sums
    stated = set()
    for dataset, sections in download.DATASETS.items():
        stated |= {f"{dataset}/{source.path}" for source in set().union(*sections.values())}
    assert set(download.SUMS) <= stated


def test_the_real_bulb_is_downloaded_and_preprocessed(server, real_data, tmp_path):
    import preprocess_MOB
    from heclip.dataset import Processed

    extdata = real_data("MOB") / "inst/extdata"
    for source in set().union(*download.DATASETS["MOB"].values()):
        url = source.server + source.path
        body = (extdata / url.partition("/inst/extdata/")[2]).read_bytes()
        server.files[url.removeprefix(server.url)] = body
    cut = next(path for path in server.files if path.endswith("MOB4.tsv"))
    server.faults[cut] = ["cut"]
    download.main(["MOB", "--to", str(tmp_path)])
    assert sum(seen["sent"] for seen in server.gets()) == sum(map(len, server.files.values())) + 1
    preprocess_MOB.main(["--raw", str(tmp_path), "--section", "MOB3"])
    assert Processed("MOB").read("MOB3").n_obs == 438


# ----------------------------------------------------------------------- interrupted, and continued


def test_a_download_continues_after_a_cut_connection(server, one, tmp_path):
    get = one()
    server.faults["/data/slide.tif"] = ["cut"] * 8  # WAITS has two, but each attempt adds bytes
    get()
    assert contents(tmp_path / "to") == {"slide.tif": BODY}
    assert len(server.gets()) == 9
    # One byte is sent twice at each joint.
    assert sum(seen["sent"] for seen in server.gets()) == len(BODY) + 8


def test_the_next_run_continues_the_part(server, one, monkeypatch, tmp_path, capsys):
    get = one()
    server.faults["/data/slide.tif"] = ["cut"]
    monkeypatch.setattr(download, "WAITS", ())
    with pytest.raises(InputError, match="1 of 1 files of MOB are missing"):
        get()
    error = "slide.tif: the connection was lost after 50,000 of 100,000 bytes"
    assert error in capsys.readouterr().err
    assert contents(tmp_path / "to")[".slide.tif.part"] == BODY[:50_000]
    assert only_a_part(tmp_path / "to")
    server.seen.clear()
    get()
    assert "To download: 1 (50,000 bytes)" in capsys.readouterr().out
    assert contents(tmp_path / "to") == {"slide.tif": BODY}
    assert [(seen["range"], seen["sent"]) for seen in server.gets()] == [("bytes=49999-", 50_001)]


def test_of_a_complete_part_only_the_last_byte_is_downloaded_again(server, one, tmp_path):
    get = one()
    get()
    (tmp_path / "to/slide.tif").rename(tmp_path / "to/.slide.tif.part")
    (tmp_path / "to/.slide.tif.part.version").write_text(server.version(BODY)["ETag"])
    server.seen.clear()
    get()
    assert contents(tmp_path / "to") == {"slide.tif": BODY}
    assert [seen["sent"] for seen in server.gets()] == [1]


@pytest.mark.parametrize("version", [
    lambda body: {}, lambda body: {"ETag": 'W/"1"'},
    lambda body: {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}],
    ids=["no version", "weak", "date"])
def test_only_a_part_of_a_certain_version_is_continued(server, one, version, tmp_path):
    server.version = version
    get = one()
    server.faults["/data/slide.tif"] = ["cut"]
    get()
    assert contents(tmp_path / "to") == {"slide.tif": BODY}
    again = "bytes=49999-" if "Last-Modified" in version(BODY) else None
    assert [seen["range"] for seen in server.gets()] == [None, again]


def test_a_server_that_ignores_ranges_sends_all_again(server, one, tmp_path):
    get = one()
    server.ignores = "Range"
    server.faults["/data/slide.tif"] = ["cut"]
    get()
    assert contents(tmp_path / "to") == {"slide.tif": BODY}
    assert [seen["sent"] for seen in server.gets()] == [50_000, 100_000]


def test_a_server_that_sends_less_than_the_range_is_asked_for_the_rest(server, one, tmp_path):
    get = one()
    server.most_of_a_range = 20_000
    server.faults["/data/slide.tif"] = ["cut"]
    get()
    assert contents(tmp_path / "to") == {"slide.tif": BODY}
    # One byte is sent twice at each joint.
    assert [seen["sent"] for seen in server.gets()] == [50_000, 20_000, 20_000, 10_003]


@pytest.mark.parametrize("ignores", [None, "If-Range"])
@pytest.mark.parametrize("length", [100_000, 60_000, 140_000, 30_000])
def test_a_file_that_changed_between_two_runs_starts_over(
        server, one, ignores, length, monkeypatch, tmp_path):
    get = one()
    server.ignores = ignores
    server.faults["/data/slide.tif"] = ["cut"]
    monkeypatch.setattr(download, "WAITS", ())
    with pytest.raises(InputError):
        get()
    changed = np.random.default_rng(1).bytes(length)
    server.files["/data/slide.tif"] = changed
    monkeypatch.setattr(download, "WAITS", (0,) if ignores else ())  # If-Range spares an attempt
    get()
    assert contents(tmp_path / "to") == {"slide.tif": changed}


@pytest.mark.parametrize(("length", "says"),
                         [(100_000, None), (60_000, "100,000 bytes at first and 60,000 now")])
def test_a_file_that_changes_during_a_run_is_never_mixed(
        server, one, length, says, monkeypatch, tmp_path, capsys):
    get = one()
    changed = np.random.default_rng(1).bytes(length)
    server.faults["/data/slide.tif"] = ["cut"]
    monkeypatch.setattr(download.time, "sleep",
                        lambda _: server.files.update({"/data/slide.tif": changed}))
    if says:
        with pytest.raises(InputError):
            get()
        assert says in capsys.readouterr().err
        assert only_a_part(tmp_path / "to")
    get()
    assert contents(tmp_path / "to") == {"slide.tif": changed}


@pytest.mark.parametrize(("kill", "code"),
                         [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_killed_run_leaves_a_part_that_the_next_continues(
        server, one, kill, code, project, tmp_path):
    get = one(body=BODY[:5000])  # less than a file object's buffer
    server.faults["/data/slide.tif"] = ["wait"]
    # The parent process may ignore SIGINT, which is inherited.
    script = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
              "sys.path.insert(0, 'GSE'); import download; download.DATASETS = "
              f"{{'MOB': {{'MOB1': [download.Source('{server.url}/data/', 'slide.tif')]}}}}; "
              "download.command.run(download.main)")
    run = subprocess.Popen([sys.executable, "-c", script, "MOB", "--to", tmp_path / "to"],
                           cwd=project,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "to/.slide.tif.part"
    give_up = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size == 2500) and time.monotonic() < give_up:
        time.sleep(0.02)
    run.send_signal(kill)
    assert "Traceback" not in run.communicate(timeout=60)[1]
    assert run.returncode == code
    assert only_a_part(tmp_path / "to")
    server.go_on.set()
    server.seen.clear()
    get()
    assert contents(tmp_path / "to") == {"slide.tif": BODY[:5000]}
    assert sum(seen["sent"] for seen in server.gets()) == 2501


# -------------------------------------------------------------------------------------- two at once


def test_two_downloads_of_one_file_never_write_to_the_same_part(
        server, one, tmp_path, when_waiting):
    get = one()
    server.faults["/data/slide.tif"] = ["wait"]
    errors = []

    def first():
        try:
            get()
        except InputError as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    give_up = time.monotonic() + 30
    while not server.gets() and time.monotonic() < give_up:
        time.sleep(0.02)
    stderr = when_waiting(server.go_on.set)
    get()
    server.go_on.set()
    thread.join()
    assert errors == []
    assert contents(tmp_path / "to") == {"slide.tif": BODY}
    assert sum(seen["sent"] for seen in server.gets()) == len(BODY) + 1  # all of it by the first
    assert "slide.tif: another process is writing it; waiting" in stderr.getvalue()


@pytest.mark.parametrize("body", [BODY, BODY[:-1]])
def test_a_file_that_appears_during_the_wait_is_checked(
        server, one, monkeypatch, tmp_path, capsys, body):
    @contextlib.contextmanager
    def finished_by_another(path):
        path.parent.mkdir()
        path.write_bytes(body)
        yield

    monkeypatch.setattr(download, "locked", finished_by_another)
    get = one()
    with contextlib.nullcontext() if body == BODY else pytest.raises(InputError):
        get()
    assert not server.gets()
    assert contents(tmp_path / "to") == {"slide.tif": body}
    refused = "slide.tif is there with 99,999 bytes, but http://" in capsys.readouterr().err
    assert refused == (body != BODY)


def test_a_disk_that_is_full_at_last_keeps_the_part(server, one, monkeypatch, tmp_path):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    get = one()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(InputError, match=r"\.slide\.tif\.part: No space left on device"):
            get()
    assert contents(tmp_path / "to")[".slide.tif.part"] == BODY
    get()
    assert contents(tmp_path / "to") == {"slide.tif": BODY}


# ---------------------------------------------------------------------- servers that refuse, or lie


def test_a_redirection_is_followed_by_ranges_too(server, one, tmp_path):
    get = one()
    server.files["/elsewhere"] = server.files.pop("/data/slide.tif")
    server.moved["/data/slide.tif"] = "/elsewhere"
    server.faults["/elsewhere"] = ["cut", "cut"]
    get()
    assert contents(tmp_path / "to") == {"slide.tif": BODY}
    assert any(seen["range"] and seen["path"] == "/elsewhere" for seen in server.gets())


@pytest.mark.parametrize("status", [404, 403])
def test_a_refused_file_is_named_and_the_others_are_downloaded(
        server, status, monkeypatch, tmp_path, capsys):
    publish(server, "spatialLIBD_1", monkeypatch)
    path = "/spatial-dlpfc.s3.us-east-2.amazonaws.com/images/151508_full_image.tif"
    server.status[path] = status
    with pytest.raises(InputError, match="1 of 12 files of spatialLIBD_1 are missing"):
        download.main(["spatialLIBD_1", "--to", str(tmp_path)])
    errors = capsys.readouterr().err
    assert f"missing: 151508_full_image.tif: {server.url}{path}: {status} " in errors
    assert len(contents(tmp_path)) == 11
    # A refused file is not requested again.
    assert [seen["path"] for seen in server.seen].count(path) == 1


@pytest.mark.parametrize("fault", [503, 429, "drop"])
def test_a_server_in_trouble_is_asked_again_but_not_forever(server, one, fault, tmp_path, capsys):
    get = one()
    server.faults["/data/slide.tif"] = [fault] * 2
    get()
    assert contents(tmp_path / "to") == {"slide.tif": BODY}
    (tmp_path / "to/slide.tif").unlink()
    server.faults["/data/slide.tif"] = [fault] * 99
    server.seen.clear()
    with pytest.raises(InputError, match="missing"):
        get()
    assert len(server.gets()) == 3  # WAITS has two
    assert "missing: slide.tif: http://" in capsys.readouterr().err
    assert not contents(tmp_path / "to")


def test_the_waits_grow_and_progress_resets_them(server, one, monkeypatch):
    waited = []
    get = one()
    monkeypatch.setattr(download, "WAITS", (1, 2, 4))
    monkeypatch.setattr(download.time, "sleep", waited.append)
    server.faults["/data/slide.tif"] = [503, 503, "cut", "drop", "drop"]
    get()
    assert waited == [1, 2, 1, 2, 4]


def test_a_silent_server_is_asked_again(server, one, monkeypatch, tmp_path, capsys):
    get = one()
    monkeypatch.setattr(download, "TIMEOUT", 1)
    server.faults["/data/slide.tif"] = ["wait"]
    get()
    assert "slide.tif: the connection was lost (timed out); again in 0 s" in capsys.readouterr().err
    assert contents(tmp_path / "to") == {"slide.tif": BODY}


def test_an_unreachable_server_ends_the_run(server, one, monkeypatch, tmp_path):
    waited = []
    get = one()
    monkeypatch.setattr(download.time, "sleep", waited.append)
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError,
                       match=r"slide.tif: the server cannot be reached .*\. Check the network"):
        get()
    assert waited == [0, 0]
    assert not (tmp_path / "to").exists()


def test_fewer_bytes_than_announced_never_make_a_file(server, one, tmp_path, capsys):
    get = one()
    server.extra_bytes = 10
    with pytest.raises(InputError):
        get()
    assert "bytes at first and 100,010 now" in capsys.readouterr().err
    server.extra_bytes = 0
    server.faults["/data/slide.tif"] = ["cut"] * 99
    server.ignores = "Range"
    with pytest.raises(InputError):
        get()
    assert "the connection was lost after 50,000 of 100,000 bytes" in capsys.readouterr().err
    assert only_a_part(tmp_path / "to")


def test_a_short_file_is_not_taken_for_the_whole(server, one, tmp_path, capsys):
    get = one()
    server.extra_bytes = -40_000
    with pytest.raises(InputError):
        get()
    assert "100,000 bytes at first and 60,000 now" in capsys.readouterr().err
    assert not contents(tmp_path / "to")


ZIPPED = gzip.compress(BODY)


@pytest.mark.parametrize(("body", "says"), [
    (ZIPPED[:-4000], "is damaged on the server or was on the way (Compressed file ended"),
    (ZIPPED[:-4], "is damaged"),  # the last four bytes, its length, are cut off
    (ZIPPED[:-8] + bytes(4) + ZIPPED[-4:], "CRC check failed"),
    (ZIPPED[:-4] + bytes(4), "Incorrect length"),
    (ZIPPED[:2000] + bytes(50) + ZIPPED[2050:], "is damaged"),
    (gzip.compress(b"ACGT" * 9999)[:20] + bytes(99), "while decompressing data"),
    (b"<html>busy</html>", "Not a gzipped file"),
    (b"", "is empty"),
], ids=["cut", "cut in its end", "crc", "length", "bytes lost", "other bytes", "not a gzip",
        "empty"])
def test_a_bad_gzip_is_deleted_and_named(server, one, body, says, tmp_path, capsys):
    with pytest.raises(InputError, match="missing"):
        one("matrix.mtx.gz", body)()
    errors = capsys.readouterr().err
    assert "missing: matrix.mtx.gz: http://" in errors
    assert says in errors
    assert not contents(tmp_path / "to")
    one("matrix.mtx.gz", ZIPPED)()
    assert contents(tmp_path / "to") == {"matrix.mtx.gz": ZIPPED}


def test_a_gzip_of_several_members_is_whole(one, tmp_path):
    one("matrix.mtx.gz", ZIPPED + ZIPPED)()
    assert contents(tmp_path / "to") == {"matrix.mtx.gz": ZIPPED + ZIPPED}


def test_another_sum_than_the_known_one_is_refused(one, tmp_path, capsys):
    digest = hashlib.sha256(BODY).hexdigest()
    with pytest.raises(InputError):
        one("MOB1.tsv", BODY[::-1], digest)()
    assert f"its SHA-256 is not the known one, {digest}" in capsys.readouterr().err
    assert not contents(tmp_path / "to")
    one("MOB1.tsv", BODY, digest)()
    assert contents(tmp_path / "to") == {"MOB1.tsv": BODY}


def test_a_web_page_instead_of_a_file_is_refused(server, one, monkeypatch, tmp_path, capsys):
    get = one()
    change_headers(monkeypatch, Content_Type="text/html; charset=utf-8")
    with pytest.raises(InputError):
        get()
    assert "slide.tif: the server sent a web page" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_a_full_or_forbidden_disk_is_named_and_keeps_the_part(server, one, tmp_path):
    get = one()
    (tmp_path / "to/.slide.tif.part").mkdir(parents=True)
    with pytest.raises(InputError, match=r"\.slide\.tif\.part: Is a directory"):
        get()


# ----------------------------------------------------------------- names that only the server knows


@pytest.mark.parametrize(("names", "says"), [
    (["A_filtered_matrix.mtx.gz", "A_raw_matrix.mtx.gz", "A.tiff.gz"],
     "2 of the files at URL match. There are A.tiff.gz, A_filtered_matrix.mtx.gz, "
     "A_raw_matrix.mtx.gz."),
    (["B_matrix.mtx.gz"], "none of the files at URL match. There are B_matrix.mtx.gz."),
    ([], "none of the files at URL match. There are none at all."),
])
def test_a_pattern_must_match_one_file_of_the_server(server, one, names, says, tmp_path, capsys):
    get = one("A_*matrix.mtx.gz")
    server.files = {f"/data/{name}": ZIPPED for name in names} or {"/data/": b"<html></html>"}
    server.list_folders()
    with pytest.raises(InputError):
        get()
    errors = capsys.readouterr().err
    assert "missing: A_*matrix.mtx.gz: " + says.replace("URL", f"{server.url}/data/") in errors
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("link", ["A_x&amp;y%20matrix.mtx.gz", "/data/A_x&amp;y%20matrix.mtx.gz",
                                  "URL/data/A_x&amp;y%20matrix.mtx.gz"])
def test_a_listed_name_may_be_a_link_of_any_form_but_never_leads_elsewhere(
        server, one, link, tmp_path):
    get = one("A_*matrix.mtx.gz")
    links = ["A_..%2F..%2Fmatrix.mtx.gz", "A_%5Cmatrix.mtx.gz", "/A_matrix.mtx.gz",
             "http://elsewhere/A_matrix.mtx.gz",
             "A_/matrix.mtx.gz", "?A_matrix.mtx.gz", link.replace("URL", server.url)]
    server.files = {"/data/": "".join(f'<a href="{link}">x</a>' for link in links).encode(),
                    "/data/A_x&y matrix.mtx.gz": ZIPPED}
    get()
    assert contents(tmp_path) == {"to/A_x&y matrix.mtx.gz": ZIPPED}


def test_a_folder_that_the_server_lacks_is_named_for_each_of_its_files(
        server, monkeypatch, tmp_path, capsys):
    publish(server, "GSE245620", monkeypatch)
    server.status["/ftp.ncbi.nlm.nih.gov/geo/samples/GSM7845nnn/GSM7845916/suppl/"] = 404
    with pytest.raises(InputError, match="5 of 20 files"):
        download.main(["GSE245620", "--to", str(tmp_path)])
    missing = r"^missing: GSM7845916_.*/GSM7845916/suppl/: 404"
    assert len(re.findall(missing, capsys.readouterr().err, re.M)) == 5
    assert len(contents(tmp_path)) == 15


# ----------------------------------------------------------------------------- what is here already


def test_a_second_run_downloads_nothing(server, monkeypatch, tmp_path, capsys):
    publish(server, "GSE245620", monkeypatch)
    download.main(["GSE245620", "--to", str(tmp_path)])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    server.seen.clear()
    download.main(["GSE245620", "--to", str(tmp_path)])
    assert not server.gets()  # the listings are remembered
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert "20 of 20 files are here. To download: 0 (0 bytes)" in capsys.readouterr().out


def test_a_file_of_known_sum_is_checked_without_the_server(server, one):
    get = one(digest=hashlib.sha256(BODY).hexdigest())
    get()
    server.seen.clear()
    get()
    assert not server.seen


@pytest.mark.parametrize("path", ["data/1/matrix.mtx.gz", "data/1/matrix.mtx"])
def test_a_file_that_preprocessing_would_find_is_not_downloaded_again(server, one, path, tmp_path):
    get = one("matrix.mtx.gz", ZIPPED)
    (tmp_path / "to/data/1").mkdir(parents=True)
    (tmp_path / "to" / path).write_bytes(ZIPPED if path.endswith(".gz") else BODY)
    get()
    assert set(contents(tmp_path / "to")) == {path}


@pytest.mark.parametrize("digest", [None, hashlib.sha256(BODY).hexdigest()])
def test_another_file_in_its_place_is_neither_taken_nor_touched(
        server, one, digest, tmp_path, capsys):
    get = one(digest=digest)
    (tmp_path / "to").mkdir()
    (tmp_path / "to/slide.tif").write_bytes(BODY[:-1])
    with pytest.raises(InputError):
        get()
    assert f"{tmp_path / 'to/slide.tif'} is there" in (errors := capsys.readouterr().err)
    assert "Move it away and run again" in errors
    assert contents(tmp_path / "to") == {"slide.tif": BODY[:-1]}


# -------------------------------------------------------------------- before anything is downloaded


def test_list_prints_urls_and_sizes_and_downloads_nothing(server, monkeypatch, tmp_path, capsys):
    publish(server, "GSE240429", monkeypatch)
    download.main(["GSE240429", "--section", "C73_D1", "--to", str(tmp_path / "to"), "--list"])
    lines = capsys.readouterr().out.splitlines()
    url = f"{server.url}/ftp.ncbi.nlm.nih.gov/geo/samples/GSM7697nnn/GSM7697871/suppl/GSM7697871_"
    assert [line.split()[1].removeprefix(url) for line in lines] == [
        "C73D1_matrix.mtx.gz", "C73D1_barcodes.tsv.gz", "C73D1_features.tsv.gz",
        "C73D1_tissue_positions_list.csv.gz",
        "GEX_C73_D1_Merged.tiff.gz"]
    for line in lines:
        size, url = line.split()
        assert int(size.replace(",", "")) == len(server.files[url.removeprefix(server.url)])
    assert not (tmp_path / "to").exists()


def test_bytes_are_announced_and_the_disk_must_have_room_for_them(
        server, one, monkeypatch, tmp_path, capsys):
    get = one()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=99_999))
    with pytest.raises(InputError, match="100,000 bytes are needed, but 99,999 are free"):
        get()
    announced = "MOB: 0 of 1 files are here. To download: 1 (100,000 bytes), to "
    assert f"{announced}{tmp_path / 'to'}\n" in capsys.readouterr().out
    assert not (tmp_path / "to").exists()
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    get()


def test_a_size_that_the_server_does_not_state_is_shown_as_unknown(
        server, one, monkeypatch, tmp_path, capsys):
    get = one()
    change_headers(monkeypatch, Content_Length=None)
    get()
    get("--list")
    assert "(0 bytes and 1 of unknown size)" in (printed := capsys.readouterr().out)
    assert "        unknown  http://" in printed
    assert contents(tmp_path / "to") == {"slide.tif": BODY}


@pytest.mark.parametrize(("flags", "code", "says"), [
    (["MOB", "--section", "MOB5", "A"], 1,
     "error: --section A MOB5: MOB has MOB1, MOB2, MOB3, MOB4\n"),
    (["MOUSE"], 2, "invalid choice: 'MOUSE'"),
])
def test_as_a_script_a_mistake_ends_in_one_clear_line(project, flags, code, says):
    done = subprocess.run([sys.executable, project / "GSE/download.py", *flags],
                          capture_output=True, text=True,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, timeout=60,
                          check=False)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
