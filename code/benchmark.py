"""What each stage costs, next to the plain way of doing the same and the best of this machine.

    python code/benchmark.py                      every stage, small: about 3 minutes on 2 cores
    python code/benchmark.py --gpu_full           ResNet-50, 12,000 patches of 256 px, 3,467 genes
    python code/benchmark.py --big --stages       only a very large slide and a very large reference

prints a table and writes it to save/benchmark.csv. All data is generated below a temporary folder.

Memory. Every measurement runs in a process of its own, so that its peak memory is its own: above
what imports and inputs take. Of worker processes only those of preprocessing count (--workers),
with their imports, and each as much as the largest. Pages of mapped files, which the system can
take back at any time, count too; the column "mapped MB" says how many were held at the end.

Plain ways (benchmark_plain.py). The same work on the same data as a straightforward author writes
it: whole slides and dense matrices in memory, one patch at a time with table look-ups, float32,
loops over genes. Their results are compared with ours.

Ceilings. Preprocessing: the bytes of the raw files read once, from the page cache. Training and
encoding: the model alone on one batch. Retrieval: the bare matrix product. Scoring: one pass over
both matrices.
"""

import argparse
from dataclasses import dataclass, fields, replace

from heclip import command
from heclip.settings import HELP, SWITCH, add_flags, flag

STAGES = ["preprocessing", "training", "encoding", "retrieval", "scoring"]
BIG = ["big slide", "big retrieval"]  # stages of --big, which have no plain way and no flags
ON_DATA = ["preprocessing", "training", "encoding"]  # stages that start from generated files


@dataclass(frozen=True)
class Sizes:
    """How much data each stage works on, and how. Each field is a flag."""

    sections: int = flag(1, "of the dataset", type=command.positive)
    spots: int = flag(600, "of a section", type=command.positive)
    image: tuple = flag((3000, 4000), "of a slide, px", type=command.positive, nargs=2,
                        metavar=("H", "W"))
    all_genes: int = flag(5000, "of a raw section", type=command.positive)
    genes: int = flag(1500, "of the panel", type=command.positive)
    encoder: str = flag("tf_efficientnet_lite0", "as of main.py")
    image_size: int = flag(64, "side of a patch", type=command.positive, metavar="PX")
    batch_size: int = flag(32, "patches per step", type=command.positive)
    epochs: int = flag(3, "of training; the first warms up", type=command.positive)
    queries: int = flag(2000, "spots to retrieve for, and to score", type=command.positive)
    reference: int = flag(20000, "spots to retrieve from", type=command.positive)
    workers: int = flag(1, "processes of preprocessing", type=command.positive)
    device: str = flag("auto", "of training and encoding; the rest runs on the CPU")
    compile: bool | None = flag(None, "compile the encoder; default: as main.py and infer.py do",
                                action=SWITCH)


REAL = Sizes(sections=5, spots=2400, image=(9000, 11000), all_genes=36601, genes=3467,
             encoder="resnet50", image_size=256, batch_size=128, queries=2400, reference=12000)


def parse(argv=None):
    flags = argparse.ArgumentParser(
        description="Measure every stage, next to the plain way of doing the same.",
        formatter_class=HELP)
    flags.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    flags.add_argument("--big", action="store_true",
                       help="also a very large slide and a very large reference")
    flags.add_argument("--rounds", type=command.positive, default=1,
                       help="measure each stage this often, both ways in turn; the fastest counts, "
                            "and the most memory")
    flags.add_argument("--gpu_full", action="store_true",
                       help="the sizes of real data, where no flag says otherwise")
    add_flags(flags, Sizes())
    if flags.parse_args(argv).gpu_full:
        flags.set_defaults(**vars(REAL))
    args = flags.parse_args(argv)
    args.image = tuple(args.image)
    return args


if __name__ == "__main__":
    command.run(parse)  # a wrong flag is answered here: the imports below take seconds

import gzip
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse
import tifffile
import torch

import benchmark_plain as plain
from heclip import metrics, slide
from heclip.batches import Patches, encode_patches, to_pixels
from heclip.dataset import ROOT, Dataset, Processed, Run, Section
from heclip.files import InputError, atomic_path
from heclip.loss import image_centric_loss
from heclip.model import HECLIP, configure
from heclip.panel import choose_panel
from heclip.preprocess import preprocess_sections
from heclip.retrieval import retrieve
from heclip.settings import TRAINING
from main import train

WIDTH, K = 256, 50  # of an embedding; neighbours retrieved
BIG_SLIDE = (25_000, 26_000, 2_300)  # height, width, spots
BIG_RETRIEVAL = (2_000, 1_000_000)  # queries, reference spots
MAXRSS = 1 if sys.platform == "darwin" else 1024  # bytes in the unit of ru_maxrss


def main(argv=None):
    args = parse(argv)
    sizes = Sizes(**{item.name: getattr(args, item.name) for item in fields(Sizes)})
    stages = [stage for stage in WAYS if stage in args.stages or (args.big and stage in BIG)]
    machine = hardware(sizes.device)
    print(machine, flush=True)
    with tempfile.TemporaryDirectory(prefix="heclip-benchmark-") as root:
        rows, failed = run_stages(stages, sizes, args.rounds, root)
    if rows:
        write_table(pd.DataFrame(rows).set_index("stage"), machine)
    if failed:
        raise InputError(f"failed, as said above: {'; '.join(failed)}")


def hardware(device):
    """In one line: processor, cores, GPU, torch, commit."""
    processor, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        processor = described(cpuinfo).get("model name", processor)
    device = command.pick_device(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
                             text=True, capture_output=True)
        commit = git.stdout.strip() or "unknown"
    except OSError:  # no git here
        commit = "unknown"
    return (f"{processor}, {os.cpu_count()} cores, {gpu}, torch {torch.__version__}, "
            f"commit {commit}")


def described(path):
    """A file of /proc with lines `name: value`, as a dict; of equal names the last counts."""
    pairs = [line.split(":", 1) for line in path.read_text().splitlines() if ":" in line]
    return {name.strip(): value.strip() for name, value in pairs}


# --------------------------------------------------------------------- jobs in processes, the table


@dataclass(frozen=True)
class Measured:
    """What a job has measured. A plain way leaves all but the first four as they are.

    seconds: of the fastest repeat. mb: peak memory above what the process held before. mapped_mb:
    of it, mapped files that were held at the end. gpu_mb: peak memory on the GPU.
    items, unit: what the job worked through. ceiling, faiss: seconds of the best possible and of
    faiss. found: the result that the plain way must find too; in training, the number of spots that
    it must train on too.
    """

    seconds: float
    mb: float
    mapped_mb: float
    gpu_mb: float
    items: int = 0
    unit: str = ""
    ceiling: float = np.nan
    faiss: float = np.nan
    found: Any = None


NOT_MEASURED = Measured(np.nan, np.nan, np.nan, np.nan)


def run_stages(stages, sizes, n_rounds, root):
    """Measure some stages, each job in a process of its own whose files go below the folder `root`.

    Returns (the rows of the table, the names of the jobs that failed). After a failure, what does
    not depend on it still runs.
    """
    rows, failed = [], []

    def job(name, work, *arguments):
        """The result of `work(*arguments)`; None if it failed, which is reported."""
        try:
            return in_own_process(root, work, *arguments)
        except Exception as error:
            failed.append(name)
            report(name, error)

    if set(stages) & set(ON_DATA):
        job("raw data", raw_data, sizes)
        if "preprocessing" not in stages and not failed:
            job("preprocessing, our way", preprocessing_ours, sizes)
    for stage in stages:
        missing = [name for name in failed if name in ("raw data", "preprocessing, our way")]
        if stage in ON_DATA and missing:
            print(f"{stage} is left out, because it starts from: {missing[0]}", file=sys.stderr)
            continue
        ours, theirs = [], []
        plain_way = WAYS[stage][1]
        for _ in range(n_rounds):
            measured = job(f"{stage}, our way", WAYS[stage][0], sizes)
            if measured is None:
                break
            ours.append(measured)
            if plain_way:
                measured = job(f"{stage}, plain way", plain_way, sizes, measured.found)
                if measured is None:
                    break
                theirs.append(measured)
        if ours:
            rows.append(table_row(stage, fastest(ours), fastest(theirs)))
    return rows, failed


def in_own_process(root, work, *arguments):
    """The result of `work(*arguments)` in a new process, with `root` as the top of the project.

    heclip reads HECLIP_ROOT when it is imported, so it is set before the process starts.
    """
    before = os.environ.get("HECLIP_ROOT")
    os.environ["HECLIP_ROOT"] = str(root)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(work, *arguments).result()
            except (KeyboardInterrupt, SystemExit):  # the pool would wait for the work to end
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    finally:
        if before is None:
            del os.environ["HECLIP_ROOT"]
        else:
            os.environ["HECLIP_ROOT"] = before


def report(name, error):
    """Print why a job failed: one line, after the traceback if the code is at fault."""
    if isinstance(error, BrokenProcessPool):
        text = "its process was ended from outside. Perhaps it ran out of memory"
    elif isinstance(error, InputError):
        text = str(error)
    else:
        traceback.print_exception(error)
        first, *_ = str(error).strip().splitlines() or [""]
        text = f"{type(error).__name__}: {first}"
    print(f"error: {name}: {text}", file=sys.stderr, flush=True)


def fastest(rounds):
    """The fastest measurement of the same work, with the most memory that any took."""
    if not rounds:
        return NOT_MEASURED
    most = {what: max(getattr(measured, what) for measured in rounds)
            for what in ("mb", "mapped_mb", "gpu_mb")}
    return replace(min(rounds, key=lambda measured: measured.seconds), **most)


def table_row(stage, ours, theirs):
    """A row of the table; ours, theirs: what was measured of our way and of the plain way."""
    return {"stage": stage, "items": ours.items, "unit": ours.unit, "ours s": ours.seconds,
            "items/s": ours.items / ours.seconds, "plain s": theirs.seconds,
            "plain/ours": theirs.seconds / ours.seconds, "ceiling s": ours.ceiling,
            "ceiling/ours": ours.ceiling / ours.seconds, "faiss s": ours.faiss,
            "faiss/ours": ours.faiss / ours.seconds, "MB": ours.mb, "mapped MB": ours.mapped_mb,
            "plain MB": theirs.mb, "GPU MB": ours.gpu_mb, "plain GPU MB": theirs.gpu_mb}


def write_table(table, machine):
    """Print the table and save it, with each stage's share of our time. machine: its first line."""
    seconds = table["ours s"].where(table.index.isin(STAGES))
    table.insert(4, "share", seconds / seconds.sum())
    target = ROOT / "save" / "benchmark.csv"
    with atomic_path(target) as path, open(path, "w") as file:
        file.write(f"# {machine}\n")
        table.to_csv(file)

    def shown(x):
        return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"

    print(table.to_string(float_format=shown, na_rep="-"))
    print(f"table in {target}")


# -------------------------------------------------------------------------------------- measuring


def measure(work, repeat=1):
    """Do the work and measure it. Returns (`work()`, Measured).

    repeat: how often work of less than a second is done.
    """
    os.sync()  # so that no measurement shares the disk with what was written or removed before
    before, mapped, seconds, gpu = memory("VmRSS"), memory("RssFile"), [], torch.cuda.is_available()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    while not seconds or (len(seconds) < repeat and sum(seconds) < 1):
        start = time.perf_counter()
        result = work()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    mb = (memory("VmHWM") - before) / 1e6
    mapped_mb = (memory("RssFile") - mapped) / 1e6
    gpu_mb = torch.cuda.max_memory_allocated() / 1e6 if gpu else 0.0
    return result, Measured(min(seconds), mb, mapped_mb, gpu_mb)


def memory(what):
    """Bytes of this process: held now (VmRSS), of it mapped files (RssFile), at most (VmHWM)."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(described(status)[what].removesuffix(" kB")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS


def peak_of_children():
    """Bytes at the peak of the largest process that this one started and that has ended; else 0."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * MAXRSS


# Each job below takes Sizes and returns Measured; a plain way also takes what our way found, and
# compares. A job runs in a process of its own, where ROOT is the temporary folder. Results are
# passed back, 12 MB at most, except for processed sections: these are gigabytes, and files are what
# preprocessing is for.

# ------------------------------------------------------------------------ raw data, preprocessing


def dataset(sizes):
    """The generated dataset: sections S0, S1 ..."""
    sections = [Section(f"S{i}", donor="made", role="reference", n_spots=sizes.spots,
                        counts=[f"S{i}.matrix.mtx"], positions=[f"S{i}.positions.csv"],
                        image=[f"S{i}.tif"])
                for i in range(sizes.sections)]
    return Dataset("benchmark", sections, n_hvg=sizes.genes, n_heg=sizes.genes,
                   patch_px=sizes.image_size)


def raw_data(sizes):
    """Write each section's raw files."""
    rng, made = np.random.default_rng(0), dataset(sizes)
    made.raw.mkdir(parents=True)
    for section in made.sections:
        write_raw_section(made.raw, section, sizes, rng)


def write_raw_section(raw, section, sizes, rng):
    """A staggered lattice, counts of which about a tenth are not zero, and a slide of noise."""
    barcodes = [f"BARCODE{i:09d}-1" for i in range(sizes.spots)]
    place = lattice(sizes.spots, *sizes.image, sizes.image_size)[rng.permutation(sizes.spots)]
    pd.DataFrame(place, barcodes).to_csv(raw / section.positions[0], header=False)

    share = np.cumsum(rng.lognormal(0, 2, sizes.all_genes))
    gene = np.searchsorted(share / share[-1], rng.random(sizes.spots * sizes.all_genes // 4))
    spot = rng.integers(0, sizes.spots, len(gene))
    counts = scipy.sparse.csc_matrix((np.ones(len(gene), np.int32), (gene, spot)),
                                     (sizes.all_genes, sizes.spots))
    features = [f"ENSG{i:011d}\tGENE{i}\tGene Expression" for i in range(sizes.all_genes)]
    for name, lines in (("barcodes", barcodes), ("features", features)):
        (raw / f"{section.name}.{name}.tsv").write_text("\n".join(lines) + "\n")
    with gzip.open(raw / f"{section.name}.matrix.mtx.gz", "wb", compresslevel=1) as file:
        scipy.io.mmwrite(file, counts, field="integer", symmetry="general")

    rgba = np.full((*sizes.image, 4), 255, np.uint8)
    rgba[..., :3] = rng.integers(0, 256, (*sizes.image, 3), np.uint8)
    tifffile.imwrite(raw / section.image[0], rgba, photometric="rgb", extrasamples=["unassalpha"],
                     metadata=None)


def lattice(n_spots, height, width, patch_px):
    """in_tissue, array_row, array_col, y, x of spots that fill a slide, int (n, 5).

    No spot is nearer to the edge than half a patch.
    """
    n_rows = max(2, round((n_spots * height / width) ** 0.5))
    n_cols = -(-n_spots // n_rows)
    row, col = np.divmod(np.arange(n_spots), n_cols)
    y = patch_px // 2 + (row + 0.5) * (height - patch_px) / n_rows
    x = patch_px // 2 + (col + 0.25 + row % 2 / 2) * (width - patch_px) / n_cols
    return np.column_stack([np.ones(n_spots), row, 2 * col + row % 2, y, x]).astype(int)


def preprocessing_ours(sizes):
    made, processed = dataset(sizes), Processed("benchmark")
    if processed.folder.exists():  # of an earlier round: what is up to date is not made again
        shutil.rmtree(processed.folder)
    jobs = [(made, section, made.raw, processed) for section in made.sections]
    rows, cost = measure(lambda: preprocess_sections(jobs, sizes.workers))
    workers, mb = min(sizes.workers, sizes.sections), cost.mb
    if workers > 1:
        mb += workers * peak_of_children() / 1e6
    pd.DataFrame(rows).set_index("section").to_csv(processed.sections_path)
    write_panel(processed, sizes.genes)
    raw_files = list(made.raw.glob("*.*"))
    _, ceiling = measure(lambda: [read_through(path) for path in raw_files])
    return replace(cost, mb=mb, items=sizes.sections * sizes.spots, unit="spots",
                   ceiling=ceiling.seconds)


def write_panel(processed, n_genes):
    """The panel of the later stages. One section chooses it, for the size of a union varies.

    It is written as chosen by all sections, because training would choose it again otherwise.
    """
    panel = choose_panel("heg", {"S0": processed.genes("S0")}, n_genes)
    reference, _ = processed.roles()
    replace(panel, sections=reference).write(processed.panel_path("heg"))


def read_through(path):
    """Read a file from beginning to end."""
    block = bytearray(1 << 24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def preprocessing_plain(sizes, _):
    folder, processed = ROOT / "plain", Processed("benchmark")
    if folder.exists():  # of an earlier round, removed as ours are
        shutil.rmtree(folder)
    folder.mkdir()
    sections, cost = measure(lambda: plain.preprocess(sizes.image_size, dataset(sizes), folder))
    for name, theirs in sections.items():
        ours, their_patches = processed.read(name), np.load(folder / f"{name}.patches.npy")
        np.testing.assert_array_equal(ours.obs_names, theirs["barcodes"])
        np.testing.assert_allclose(ours.X.toarray(), theirs["expression"], rtol=1e-4)
        np.testing.assert_array_equal(processed.patches(name), their_patches)
        same = np.isclose(ours.var["dispersion"], theirs["genes"]["dispersions_norm"], 0.01, 0.01,
                          equal_nan=True)
        assert same.mean() > 0.98, same.mean()  # a gene between two bins may fall in either
    return cost


# ----------------------------------------------------------------------------- training, encoding


def untrained(sizes):
    """The device, and the model before training, the same in every process."""
    torch.manual_seed(0)
    n_genes = len(Processed("benchmark").panel("heg"))
    config = configure(sizes.encoder, "heg", n_genes, sizes.image_size)
    return command.pick_device(sizes.device), HECLIP(config)


def fixed_batch(batch_size, config, device):
    """Pixels and expression of one batch of noise, on the device: (B, 3, S, S) and (B, G)."""
    shape = (batch_size, config.image_size, config.image_size, 3)
    patches = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    return to_pixels(patches, config), torch.rand(batch_size, config.n_genes, device=device)


def alone(step, steps):
    """Seconds of that many steps, from at most 20 of them, after three to warm up."""
    for _ in range(3):
        step()
    timed = min(steps, 20)
    _, cost = measure(lambda: [step() for _ in range(timed)])
    return cost.seconds / timed * steps


def training_ours(sizes):
    """train() of main.py, by the recipe that the plain way follows too."""
    settings = replace(
        TRAINING["published"], dataset="benchmark", pretrained=False, encoder=sizes.encoder,
        batch_size=sizes.batch_size, max_epochs=sizes.epochs, device=sizes.device,
        compile=sizes.compile, overwrite=True)
    history, cost = measure(lambda: train(settings, Run("benchmark", "heg")))
    batch_size = min(sizes.batch_size, history.n_training)
    steps = history.n_training // batch_size
    speed = np.median(history.patches_per_second[1:] or history.patches_per_second)
    items = steps * batch_size
    return replace(cost, seconds=items / speed, items=items, unit="patches",
                   ceiling=alone(training_step(sizes, batch_size), steps), found=history.n_training)


def training_step(sizes, batch_size):
    """A function that does one step of training on a fixed batch, as main.py does it."""
    device, model = untrained(sizes)
    model.to(device, memory_format=torch.channels_last)
    if sizes.compile or (sizes.compile is None and device.type == "cuda"):
        model.image_encoder.compile()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3,
                                  fused=device.type == "cuda")
    batch = fixed_batch(batch_size, model.config, device)

    def step():
        with command.autocast(device):
            image, expression, _ = model(*batch)
        loss = image_centric_loss(image.float(), expression.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def training_plain(sizes, n_training):
    """As published: float32, one item at a time, the loss read at every step.

    n_training: the number of spots that our way trained on.
    """
    device, model = untrained(sizes)
    model.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)
    batch_size = min(sizes.batch_size, n_training)

    def run():
        patches = plain.Patches(sizes.image_size, dataset(sizes), model.config, training=True)
        seconds = []
        for _ in range(sizes.epochs):
            start, total = time.perf_counter(), 0
            for batch in patches.loader(n_training, batch_size, device):
                image, expression, _ = model(batch["image"].to(device),
                                             batch["expression"].to(device))
                loss = image_centric_loss(image, expression)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item()
            seconds.append(time.perf_counter() - start)
        return np.median(seconds[1:] or seconds)

    seconds, cost = measure(run)
    return replace(cost, seconds=seconds)


@torch.inference_mode()
def encoding_ours(sizes):
    """As infer.py with one view: every section's patches -> embeddings."""
    device, model = untrained(sizes)
    model.eval().to(device, memory_format=torch.channels_last)
    if sizes.compile:
        model.image_encoder.compile()
    pixels, _ = fixed_batch(sizes.batch_size, model.config, device)

    def step():
        with command.autocast(device):
            model.encode_image(pixels)

    n = sizes.sections * sizes.spots
    ceiling = alone(step, -(-n // sizes.batch_size))  # and warms up
    processed = Processed("benchmark")
    maps = [processed.patches(section.name) for section in dataset(sizes).sections]

    def work():
        return encode_patches(model, Patches(maps, device), torch.arange(n), sizes.batch_size).cpu()

    found, cost = measure(work)
    return replace(cost, items=n, unit="patches", ceiling=ceiling, found=found.numpy())


@torch.inference_mode()
def encoding_plain(sizes, ours):
    device, model = untrained(sizes)
    model.eval().to(device)
    pixels, _ = fixed_batch(sizes.batch_size, model.config, device)
    model.encode_image(pixels.contiguous())  # warms up

    def run():
        patches = plain.Patches(sizes.image_size, dataset(sizes), model.config, training=False)
        start = time.perf_counter()
        found = [model.encode_image(batch["image"].to(device)).cpu()
                 for batch in patches.loader(len(patches), sizes.batch_size, device)]
        return torch.cat(found).numpy(), time.perf_counter() - start

    (found, seconds), cost = measure(run)
    bfloat16 = device.type != "cpu"
    np.testing.assert_allclose(ours, found, atol=0.2 if bfloat16 else 1e-3)
    return replace(cost, seconds=seconds)


# ----------------------------------------------------------------------------- retrieval, scoring


def embeddings(*numbers):
    """Random embeddings, float32 (n, WIDTH) for each n."""
    rng = np.random.default_rng(1)
    return [rng.standard_normal((n, WIDTH), np.float32) for n in numbers]


def retrieval_ours(sizes):
    query, reference = embeddings(sizes.queries, sizes.reference)
    found, cost = measure(lambda: retrieve(query, reference, K), repeat=3)
    return replace(cost, items=sizes.queries, unit="queries", ceiling=product(query, reference),
                   faiss=faiss_search(query, reference, *found), found=found)


def faiss_search(query, reference, index, similarity, block=1 << 14):
    """Seconds of faiss's exact index (Johnson et al., IEEE Trans Big Data 2021); NaN without faiss.

    It must find the same: index, similarity (n, K).
    """
    try:
        import faiss
    except ImportError:
        return np.nan
    faiss.omp_set_num_threads(torch.get_num_threads())
    exact = faiss.IndexFlatIP(WIDTH)
    for start in range(0, len(reference), block):
        rows = reference[start:start + block]
        exact.add(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    query = query / np.linalg.norm(query, axis=1, keepdims=True)
    (their_similarity, their_index), cost = measure(lambda: exact.search(query, K), repeat=3)
    check_found(index, similarity, their_index, their_similarity)
    return cost.seconds


def check_found(index, similarity, their_index, their_similarity):
    """Raise AssertionError unless two searches found the same, (n, K) each."""
    np.testing.assert_allclose(similarity, their_similarity, atol=1e-5)
    assert (index != their_index).mean() < 0.01  # ties, within rounding, may be in another order


def product(query, reference, block=4096):
    """Seconds of the bare matrix product, block by block."""
    query, reference = torch.as_tensor(query), torch.as_tensor(reference)

    def multiply():
        for rows in query.split(block):
            for columns in reference.split(block):
                torch.mm(rows, columns.T)

    return measure(multiply, repeat=3)[1].seconds


def retrieval_plain(sizes, ours):
    query, reference = embeddings(sizes.queries, sizes.reference)
    found, cost = measure(lambda: plain.retrieve(query, reference, K), repeat=3)
    check_found(*ours, *found)
    return cost


def expressions(sizes):
    """Predicted and true expression, float32 (queries, genes) each."""
    rng = np.random.default_rng(2)
    truth = rng.gamma(0.5, 1.0, (sizes.queries, sizes.genes)).astype(np.float32)
    return 0.3 * truth + rng.gamma(1.0, 0.5, truth.shape).astype(np.float32), truth


def scoring_ours(sizes):
    prediction, truth = expressions(sizes)
    (per_gene, summary), cost = measure(lambda: metrics.score(prediction, truth, truth), repeat=3)
    _, ceiling = measure(lambda: (prediction * truth).mean(axis=0), repeat=3)
    return replace(cost, items=sizes.genes, unit="genes", ceiling=ceiling.seconds,
                   found=summary | per_gene)


def scoring_plain(sizes, ours):
    prediction, truth = (pd.DataFrame(x.astype(np.float64)) for x in expressions(sizes))
    theirs, cost = measure(lambda: plain.score(prediction, truth))
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    return cost


# ------------------------------------------------------------------------------ very large inputs


def big_slide_ours(_):
    height, width, n_spots = BIG_SLIDE
    path = ROOT / "big.tif"
    image = tifffile.memmap(path, shape=(height, width, 4), dtype=np.uint8, photometric="rgb",
                            extrasamples=["unassalpha"])
    image[:] = 255
    del image
    xy = lattice(n_spots, height, width, 256)[:, :2:-1]
    with slide.open_slide(path) as opened:
        _, cost = measure(lambda: slide.crop_patches(opened, xy, 256, ROOT / "big.npy"))
    _, ceiling = measure(lambda: read_through(path))
    path.unlink()
    return replace(cost, items=n_spots, unit="patches", ceiling=ceiling.seconds)


def big_retrieval_ours(_):
    n_query, n_reference = BIG_RETRIEVAL
    rng, path = np.random.default_rng(1), ROOT / "big.f32"
    with open(path, "wb") as file:
        for start in range(0, n_reference, 1 << 14):
            n = min(1 << 14, n_reference - start)
            rng.standard_normal((n, WIDTH), np.float32).tofile(file)
    query, = embeddings(n_query)
    reference = np.memmap(path, np.float32, "c", shape=(n_reference, WIDTH))
    found, cost = measure(lambda: retrieve(query, reference, K))
    return replace(cost, items=n_query, unit="queries", ceiling=product(query, reference),
                   faiss=faiss_search(query, reference, *found))


WAYS = {  # stage -> (our way, the plain way)
    "preprocessing": (preprocessing_ours, preprocessing_plain),
    "training": (training_ours, training_plain),
    "encoding": (encoding_ours, encoding_plain),
    "retrieval": (retrieval_ours, retrieval_plain),
    "scoring": (scoring_ours, scoring_plain),
    "big slide": (big_slide_ours, None),
    "big retrieval": (big_retrieval_ours, None),
}


if __name__ == "__main__":
    command.run(main)
