"""What each stage costs, beside the plain way of doing the same and beside the best that this machine could do.

    python code/benchmark.py                          every stage, small: about 3 minutes on 2 cores
    python code/benchmark.py --gpu_full               ResNet-50, 12,000 patches of 256 px, batch 128, 3,467 genes
    python code/benchmark.py --big --stages           only a very large slide, and a million reference spots

All data is generated below a temporary folder. Every measurement runs in a process of its own, so that its peak memory
is its own: above what imports and inputs take. Of worker processes only preprocessing's count (--workers): with their
imports, and each as much as the largest. Pages of mapped files, which the system can take back at any time, count too;
the column "mapped MB" says how many were held at the end.
Plain ways: the same work on the same data as a straightforward author writes it (whole slides and dense matrices in
memory, one patch at a time with table look-ups, float32, loops over genes); their results are compared with ours.
Ceilings: preprocessing, the raw files' bytes read once, from the page cache; training and encoding, the model alone on
one batch; retrieval, the bare matrix product; scoring, one pass over both matrices.
"""

import argparse
import gzip
import io
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse
import tifffile
import torch

import benchmark_plain as plain
import main as train
from heclip import command, metrics, preprocess, slide
from heclip.batches import Patches, encode_patches, to_pixels
from heclip.dataset import ROOT, Dataset, Processed, Section
from heclip.expression import choose_panel
from heclip.files import atomic_path
from heclip.loss import image_centric_loss
from heclip.model import HECLIP, configure
from heclip.retrieval import retrieve

STAGES = ["preprocessing", "training", "encoding", "retrieval", "scoring"]
BIG = {"big slide": (25_000, 26_000, 2_300), "big retrieval": (2_000, 1_000_000)}  # H, W, spots; queries, reference
MAXRSS = 1 if sys.platform == "darwin" else 1024  # bytes in the unit of ru_maxrss
WIDTH, K = 256, 50  # of an embedding; neighbours retrieved
GPU_FULL = {"sections": 5, "spots": 2400, "image": (9000, 11000), "all_genes": 36601, "genes": 3467,
            "encoder": "resnet50", "image_size": 256, "batch_size": 128, "queries": 2400, "reference": 12000}


def parse(argv=None):
    flags = argparse.ArgumentParser(description="Measure every stage, beside the plain way of doing the same.",
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    size = command.positive
    flags.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    flags.add_argument("--sections", type=size, default=1)
    flags.add_argument("--workers", type=size, default=1, help="of preprocessing")
    flags.add_argument("--spots", type=size, default=600, help="of a section")
    flags.add_argument("--image", type=size, nargs=2, default=(3000, 4000), metavar=("H", "W"), help="of a slide, px")
    flags.add_argument("--all_genes", type=size, default=5000, help="of a raw section")
    flags.add_argument("--genes", type=size, default=1500, help="of the panel")
    flags.add_argument("--encoder", default="tf_efficientnet_lite0")
    flags.add_argument("--image_size", type=size, default=64, metavar="PX", help="side of a patch")
    flags.add_argument("--batch_size", type=size, default=32)
    flags.add_argument("--epochs", type=size, default=3, help="of training; the first warms up")
    flags.add_argument("--queries", type=size, default=2000, help="spots to retrieve for, and to score")
    flags.add_argument("--reference", type=size, default=20000, help="spots to retrieve from")
    flags.add_argument("--device", default="auto", help="of training and encoding; the rest runs on the CPU")
    flags.add_argument("--compile", action=argparse.BooleanOptionalAction, help="as of main.py and infer.py")
    flags.add_argument("--gpu_full", action="store_true", help="the sizes of real data, where no flag says otherwise")
    flags.add_argument("--rounds", type=size, default=1,
                       help="measure each stage so often, both ways in turn; the fastest counts, and the most memory")
    flags.add_argument("--big", action="store_true", help="also a very large slide and a very large reference")
    flags.add_argument("--job", nargs=3, help=argparse.SUPPRESS)  # stage, way, folder: in a process of its own
    if flags.parse_args(argv).gpu_full:
        flags.set_defaults(**GPU_FULL)
    return flags.parse_args(argv)


def main(argv=None):
    args, argv = parse(argv), sys.argv[1:] if argv is None else argv
    if args.job:
        stage, way, folder = args.job
        found = globals()[f"{stage}_{way}".replace(" ", "_")](args, Path(folder))
        return Path(folder, f"{stage} {way}.json").write_text(json.dumps(found))
    machine, rows = hardware(args), []
    print(machine, flush=True)
    with tempfile.TemporaryDirectory(prefix="heclip-benchmark-") as folder:
        def job(stage, way):
            subprocess.run([sys.executable, __file__, *argv, "--job", stage, way, folder], check=True,
                           env=os.environ | {"HECLIP_ROOT": folder})
            return json.loads(Path(folder, f"{stage} {way}.json").read_text())

        if {"preprocessing", "training", "encoding"} & set(args.stages):
            job("raw", "data")
            if "preprocessing" not in args.stages:
                job("preprocessing", "ours")  # the others start from its files
        for stage in [stage for stage in STAGES if stage in args.stages] + list(BIG) * args.big:
            rounds = [(job(stage, "ours"), job(stage, "plain") if stage in STAGES else {}) for _ in range(args.rounds)]
            rows.append(table_row(stage, *map(fastest, zip(*rounds, strict=True))))
    table = pd.DataFrame(rows).set_index("stage")
    seconds = table["ours s"].where(table.index.isin(STAGES))
    table.insert(4, "share", seconds / seconds.sum())
    with atomic_path(ROOT / "save" / "benchmark.csv") as path, open(path, "w") as file:
        file.write(f"# {machine}\n")
        table.to_csv(file)
    print(table.to_string(float_format=lambda x: f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}", na_rep="-"))
    print(f"table in {ROOT / 'save' / 'benchmark.csv'}")


def fastest(rounds):
    """The fastest measurement of the same work, with the most memory that any took; {} if there was none."""
    if not all(rounds):
        return {}
    most = {what: max(cost[what] for cost in rounds) for what in ("mb", "mapped_mb", "gpu_mb")}
    return min(rounds, key=lambda cost: cost["seconds"]) | most


def table_row(stage, ours, plain):
    """A line of the table, from what the processes of a stage have measured."""
    return {"stage": stage, "items": ours["items"], "unit": ours["unit"], "ours s": ours["seconds"],
            "items/s": ours["items"] / ours["seconds"], "plain s": plain.get("seconds", np.nan),
            "plain/ours": plain.get("seconds", np.nan) / ours["seconds"], "ceiling s": ours["ceiling"],
            "ceiling/ours": ours["ceiling"] / ours["seconds"], "faiss s": ours.get("faiss", np.nan),
            "faiss/ours": ours.get("faiss", np.nan) / ours["seconds"],
            "MB": ours["mb"], "mapped MB": ours["mapped_mb"], "plain MB": plain.get("mb", np.nan),
            "GPU MB": ours["gpu_mb"], "plain GPU MB": plain.get("gpu_mb", np.nan)}


def hardware(args):
    """In one line: processor, cores, GPU, torch, commit."""
    cpuinfo, device = Path("/proc/cpuinfo"), command.pick_device(args.device)
    named = re.search("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, text=True,
                                capture_output=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return (f"{named[1] if named else platform.processor()}, {os.cpu_count()} cores, {gpu}, "
            f"torch {torch.__version__}, commit {commit or 'unknown'}")


def measure(work, repeat=1):
    """`work()`'s result, and its best seconds and peak memory above what the process held before.

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
    return result, {"seconds": min(seconds), "mb": (memory("VmHWM") - before) / 1e6,
                    "mapped_mb": (memory("RssFile") - mapped) / 1e6,
                    "gpu_mb": torch.cuda.max_memory_allocated() / 1e6 if gpu else 0}


def memory(what):
    """Bytes of this process's memory: now (VmRSS), of it mapped files (RssFile), at its peak (VmHWM)."""
    if Path("/proc/self/status").exists():
        return int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS


def peak_of_children():
    """Bytes of memory at the peak of the largest process that this one has started and seen end; 0 if none."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * MAXRSS


# ------------------------------------------------------------------------------------- raw data, preprocessing


def dataset(args):
    sections = [Section(f"S{i}", donor="made", role="reference", n_spots=args.spots, counts=[f"S{i}.matrix.mtx"],
                        positions=[f"S{i}.positions.csv"], image=[f"S{i}.tif"]) for i in range(args.sections)]
    return Dataset("benchmark", sections, n_hvg=args.genes, n_heg=args.genes, patch_px=args.image_size)


def raw_data(args, folder):
    """Write each section's raw files: a staggered lattice, counts of which a tenth are not zero, a slide of noise."""
    rng, raw = np.random.default_rng(0), dataset(args).raw
    raw.mkdir(parents=True)
    for section in dataset(args).sections:
        barcodes = [f"BARCODE{i:09d}-1" for i in range(args.spots)]
        place = lattice(args.spots, *args.image, args.image_size)[rng.permutation(args.spots)]
        pd.DataFrame(place, barcodes).to_csv(raw / section.positions[0], header=False)
        share = np.cumsum(rng.lognormal(0, 2, args.all_genes))
        gene = np.searchsorted(share / share[-1], rng.random(args.spots * args.all_genes // 4))
        spot = rng.integers(0, args.spots, len(gene))
        counts = scipy.sparse.csc_matrix((np.ones(len(gene), np.int32), (gene, spot)), (args.all_genes, args.spots))
        features = [f"ENSG{i:011d}\tGENE{i}\tGene Expression" for i in range(args.all_genes)]
        for name, lines in (("barcodes", barcodes), ("features", features)):
            (raw / f"{section.name}.{name}.tsv").write_text("\n".join(lines) + "\n")
        with gzip.open(raw / f"{section.name}.matrix.mtx.gz", "wb", compresslevel=1) as file:
            scipy.io.mmwrite(file, counts, field="integer", symmetry="general")
        rgba = np.full((*args.image, 4), 255, np.uint8)
        rgba[..., :3] = rng.integers(0, 256, (*args.image, 3), np.uint8)
        tifffile.imwrite(raw / section.image[0], rgba, photometric="rgb", extrasamples=["unassalpha"], metadata=None)


def lattice(n_spots, height, width, patch_px):
    """in_tissue, array_row, array_col, y, x of spots that fill a slide, half a patch from its edge: int (n, 5)."""
    n_rows = max(2, round((n_spots * height / width) ** 0.5))
    n_cols = -(-n_spots // n_rows)
    row, col = np.divmod(np.arange(n_spots), n_cols)
    y = patch_px // 2 + (row + 0.5) * (height - patch_px) / n_rows
    x = patch_px // 2 + (col + 0.25 + row % 2 / 2) * (width - patch_px) / n_cols
    return np.column_stack([np.ones(n_spots), row, 2 * col + row % 2, y, x]).astype(int)


def preprocessing_ours(args, folder):
    made, processed = dataset(args), Processed("benchmark")
    shutil.rmtree(processed.folder, ignore_errors=True)  # of an earlier round: what is up to date is not made again
    rows, cost = measure(lambda: preprocess.preprocess_sections(
        [(made, section, made.raw, processed) for section in made.sections], args.workers))
    if (workers := min(args.workers, args.sections)) > 1:
        cost["mb"] += workers * peak_of_children() / 1e6
    pd.DataFrame(rows).set_index("section").to_csv(processed.sections_path)
    with open(processed.panel_path("heg"), "w") as file:  # of one section: a union's size cannot be chosen
        file.write(f'# {json.dumps({"sections": processed.roles()[0], "markers": []})}\n')
        genes = {"S0": processed.genes("S0")}
        choose_panel("heg", genes, args.genes).assign(marker=False).to_csv(file)
    _, ceiling = measure(lambda: [read_through(path) for path in made.raw.glob("*.*")])
    return cost | {"items": args.sections * args.spots, "unit": "spots", "ceiling": ceiling["seconds"]}


def read_through(path):
    block = bytearray(1 << 24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def preprocessing_plain(args, folder):
    for path in folder.glob("*.npy"):
        path.unlink()  # of an earlier round, as ours
    sections, cost = measure(lambda: plain.preprocess(args.image_size, dataset(args), folder))
    for name, theirs in sections.items():
        ours = Processed("benchmark").read(name)
        assert list(ours.obs_names) == theirs["barcodes"]
        np.testing.assert_allclose(ours.X.toarray(), theirs["expression"], rtol=1e-4)
        np.testing.assert_array_equal(Processed("benchmark").patches(name), np.load(folder / f"{name}.patches.npy"))
        same = np.isclose(ours.var["dispersion"], theirs["genes"]["dispersions_norm"], 0.01, 0.01, equal_nan=True)
        assert same.mean() > 0.98, same.mean()  # a gene on the border of two bins may fall in either
    return cost


# ------------------------------------------------------------------------------------- training, encoding


def untrained(args):
    """The device, and the model before training, the same in every process."""
    torch.manual_seed(0)
    config = configure(args.encoder, "heg", len(Processed("benchmark").panel("heg")), args.image_size)
    return command.pick_device(args.device), HECLIP(config)


def fixed_batch(batch_size, config, device):
    """Pixels and expression of one batch of noise, on the device."""
    patches = torch.randint(0, 256, (batch_size, config.image_size, config.image_size, 3), dtype=torch.uint8)
    return to_pixels(patches.to(device), config), torch.rand(batch_size, config.n_genes, device=device)


def alone(step, steps):
    """Seconds of that many steps, from at most 20 of them, after three to warm up."""
    for _ in range(3):
        step()
    _, cost = measure(lambda: [step() for _ in range(min(steps, 20))])
    return cost["seconds"] / min(steps, 20) * steps


def training_ours(args, folder):
    """main.py itself; its speed is what it prints, over the epochs after the first."""
    argv = f"--dataset benchmark --no-pretrained --encoder {args.encoder} --batch_size {args.batch_size}".split()
    argv += ["--recipe", "published", "--max_epochs", str(args.epochs)]  # what the plain way does too
    argv += ["--device", args.device, "--save_path", str(folder / "run")]
    argv += [] if args.compile is None else ["--compile" if args.compile else "--no-compile"]
    with redirect_stdout(io.StringIO()) as said:
        _, cost = measure(lambda: train.main(argv))
    speeds = [float(speed.replace(",", "")) for speed in re.findall(r"([\d,]+) patches/s", said.getvalue())]
    n = int(re.search(r"(\d+) training", said.getvalue())[1])
    batch_size = min(args.batch_size, n)

    device, model = untrained(args)
    model.to(device, memory_format=torch.channels_last)
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.image_encoder.compile()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3, fused=device.type == "cuda")
    batch = fixed_batch(batch_size, model.config, device)

    def step():
        with command.autocast(device):
            image, expression, _ = model(*batch)
        loss = image_centric_loss(image.float(), expression.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    items = n // batch_size * batch_size
    return cost | {"items": items, "unit": "patches", "seconds": items / np.median(speeds[1:] or speeds), "n": n,
                   "batch_size": batch_size, "ceiling": alone(step, n // batch_size)}


def training_plain(args, folder):
    """As published: float32, one item at a time, the loss read at every step. As many patches as ours had."""
    ours, (device, model) = json.loads((folder / "training ours.json").read_text()), untrained(args)
    model.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)

    def run():
        seconds, patches = [], plain.Patches(args.image_size, dataset(args), model.config, training=True)
        for _ in range(args.epochs):
            start, total = time.perf_counter(), 0
            for batch in patches.loader(ours["n"], ours["batch_size"], device):
                image, expression, _ = model(batch["image"].to(device), batch["expression"].to(device))
                loss = image_centric_loss(image, expression)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item()
            seconds.append(time.perf_counter() - start)
        return np.median(seconds[1:] or seconds)

    seconds, cost = measure(run)
    return cost | {"seconds": seconds}


@torch.inference_mode()
def encoding_ours(args, folder):
    """As infer.py: every section's patches -> embeddings."""
    device, model = untrained(args)
    model.eval().to(device, memory_format=torch.channels_last)
    if args.compile:
        model.image_encoder.compile()
    pixels, _ = fixed_batch(args.batch_size, model.config, device)

    def step():
        with command.autocast(device):
            model.encode_image(pixels)

    n = args.sections * args.spots
    ceiling = alone(step, -(-n // args.batch_size))  # and warms up
    maps = [Processed("benchmark").patches(section.name) for section in dataset(args).sections]
    found, cost = measure(lambda: encode_patches(model, Patches(maps, device), torch.arange(n), args.batch_size).cpu())
    np.save(folder / "encoding.npy", found.numpy())
    return cost | {"items": n, "unit": "patches", "ceiling": ceiling}


@torch.inference_mode()
def encoding_plain(args, folder):
    device, model = untrained(args)
    model.eval().to(device)
    model.encode_image(fixed_batch(args.batch_size, model.config, device)[0].contiguous())  # warms up

    def run():
        patches = plain.Patches(args.image_size, dataset(args), model.config, training=False)
        start = time.perf_counter()
        found = [model.encode_image(batch["image"].to(device)).cpu()
                 for batch in patches.loader(len(patches), args.batch_size, device)]
        return torch.cat(found).numpy(), time.perf_counter() - start

    (found, seconds), cost = measure(run)
    np.testing.assert_allclose(np.load(folder / "encoding.npy"), found, atol=1e-3 if device.type == "cpu" else 0.2)
    return cost | {"seconds": seconds}


# ------------------------------------------------------------------------------------- retrieval, scoring


def embeddings(*sizes):
    rng = np.random.default_rng(1)
    return [rng.standard_normal((n, WIDTH), np.float32) for n in sizes]


def retrieval_ours(args, folder):
    query, reference = embeddings(args.queries, args.reference)
    (index, similarity), cost = measure(lambda: retrieve(query, reference, K), repeat=3)
    np.savez(folder / "retrieval.npz", index=index, similarity=similarity)
    cost |= {"items": args.queries, "unit": "queries", "ceiling": product(query, reference)}
    return cost | faiss_search(query, reference, index, similarity)


def faiss_search(query, reference, index, similarity, block=1 << 14):
    """Seconds of faiss's exact index (Johnson et al., IEEE Trans Big Data 2021), if installed; finds must agree."""
    try:
        import faiss
    except ImportError:
        return {}
    faiss.omp_set_num_threads(torch.get_num_threads())
    exact = faiss.IndexFlatIP(WIDTH)
    for start in range(0, len(reference), block):
        rows = reference[start:start + block]
        exact.add(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    query = query / np.linalg.norm(query, axis=1, keepdims=True)
    (their_similarity, their_index), cost = measure(lambda: exact.search(query, K), repeat=3)
    np.testing.assert_allclose(similarity, their_similarity, atol=1e-5)
    assert (index != their_index).mean() < 0.01  # ties, within rounding, may stand in another order
    return {"faiss": cost["seconds"]}


def product(query, reference, block=4096):
    """Seconds of the bare matrix product, block by block."""
    query, reference = torch.as_tensor(query), torch.as_tensor(reference)
    _, cost = measure(lambda: [torch.mm(rows, columns.T).shape for rows in query.split(block)
                               for columns in reference.split(block)], repeat=3)
    return cost["seconds"]


def retrieval_plain(args, folder):
    query, reference = embeddings(args.queries, args.reference)
    (index, similarity), cost = measure(lambda: plain.retrieve(query, reference, K), repeat=3)
    ours = np.load(folder / "retrieval.npz")
    np.testing.assert_allclose(ours["similarity"], similarity, atol=1e-5)
    assert (ours["index"] != index).mean() < 0.01  # ties, within rounding, may stand in another order
    return cost


def expressions(args):
    """Predicted and true expression."""
    rng = np.random.default_rng(2)
    truth = rng.gamma(0.5, 1.0, (args.queries, args.genes)).astype(np.float32)
    return 0.3 * truth + rng.gamma(1.0, 0.5, truth.shape).astype(np.float32), truth


def scoring_ours(args, folder):
    prediction, truth = expressions(args)
    (per_gene, summary), cost = measure(lambda: metrics.score(prediction, truth, truth), repeat=3)
    np.savez(folder / "scoring.npz", **(summary | per_gene))
    _, ceiling = measure(lambda: (prediction * truth).mean(axis=0), repeat=3)
    return cost | {"items": args.genes, "unit": "genes", "ceiling": ceiling["seconds"]}


def scoring_plain(args, folder):
    prediction, truth = (pd.DataFrame(x.astype(np.float64)) for x in expressions(args))
    theirs, cost = measure(lambda: plain.score(prediction, truth))
    ours = np.load(folder / "scoring.npz")
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    return cost


# ------------------------------------------------------------------------------------- very large inputs


def big_slide_ours(args, folder):
    height, width, n_spots = BIG["big slide"]
    image = tifffile.memmap(folder / "big.tif", shape=(height, width, 4), dtype=np.uint8, photometric="rgb",
                            extrasamples=["unassalpha"])
    image[:] = 255
    del image
    xy = lattice(n_spots, height, width, 256)[:, :2:-1]
    with slide.open_slide(folder / "big.tif") as opened:
        _, cost = measure(lambda: slide.crop_patches(opened, xy, 256, folder / "big.npy"))
    _, ceiling = measure(lambda: read_through(folder / "big.tif"))
    (folder / "big.tif").unlink()
    return cost | {"items": n_spots, "unit": "patches", "ceiling": ceiling["seconds"]}


def big_retrieval_ours(args, folder):
    n_query, n_reference = BIG["big retrieval"]
    rng = np.random.default_rng(1)
    with open(folder / "big.f32", "wb") as file:
        for start in range(0, n_reference, 1 << 14):
            rng.standard_normal((min(1 << 14, n_reference - start), WIDTH), np.float32).tofile(file)
    query, reference = *embeddings(n_query), np.memmap(folder / "big.f32", np.float32, "c", shape=(n_reference, WIDTH))
    found, cost = measure(lambda: retrieve(query, reference, K))
    cost |= {"items": n_query, "unit": "queries", "ceiling": product(query, reference)}
    return cost | faiss_search(query, reference, *found)


if __name__ == "__main__":
    command.run(main)
