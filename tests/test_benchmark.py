"""The benchmark at a tiny size: every stage is measured, and the plain ways give what ours give."""

import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import benchmark
import benchmark_plain
from heclip import metrics
from heclip.dataset import ROOT
from heclip.files import InputError
from heclip.retrieval import retrieve

SMALL = benchmark.Sizes(
    spots=40, image=(400, 500), all_genes=300, genes=60, encoder="test_resnet", image_size=32,
    batch_size=8, epochs=1, queries=30, reference=200, device="cpu")
FLAGS = ("--spots 40 --image 400 500 --all_genes 300 --genes 60 --encoder test_resnet "
         "--image_size 32 --batch_size 8 --epochs 1 --queries 30 --reference 200 "
         "--device cpu").split()


def test_flags_are_sizes():
    args = vars(benchmark.parse(FLAGS))
    assert benchmark.Sizes(**{name: args[name] for name in vars(SMALL)}) == SMALL


def test_real_sizes_give_way_to_flags():
    args = benchmark.parse(["--gpu_full", "--spots", "7"])
    assert (args.encoder, args.image_size, args.image) == ("resnet50", 256, (9000, 11000))
    assert args.spots == 7


def test_every_stage_has_its_ways():
    assert list(benchmark.WAYS) == benchmark.STAGES + benchmark.BIG
    assert all(benchmark.WAYS[stage][1] for stage in benchmark.STAGES)


def test_every_stage_is_measured_and_agrees_with_its_plain_way(capsys):
    """In this process, for speed; each plain way compares its results with ours.

    With several sections the panel must stay as it is written: training chooses another one if its
    sections are not the reference.
    """
    sizes = replace(SMALL, sections=2, spots=80)  # more than are averaged
    benchmark.raw_data(sizes)
    for stage in ["preprocessing", *benchmark.STAGES]:  # preprocessing in two rounds
        ours_way, plain_way = benchmark.WAYS[stage]
        ours = ours_way(sizes)
        theirs = plain_way(sizes, ours.found)
        assert ours.seconds > 0, stage
        assert theirs.seconds > 0, stage
        assert ours.ceiling > 0, stage
    printed = capsys.readouterr().out
    assert printed.count("S0: reading") == 2  # not taken as done in the second round
    assert "60 genes; S0, S1" in printed
    assert (ROOT / "save" / "benchmark" / "heg_best.pt").exists()


def killed(sizes):
    os.abort()


def wrong(sizes, found):
    raise AssertionError("\nNot equal to tolerance")


def refused(sizes):
    raise InputError("there is no such encoder")


def own_root(sizes):
    return benchmark.Measured(1.0, 2.0, 3.0, 4.0, items=6, found=str(ROOT))


def in_this_process(root, work, *arguments):
    """What benchmark.in_own_process does, without the seconds that a process takes to start."""
    if work is killed:
        raise BrokenProcessPool
    return work(*arguments)


def test_the_command_prints_and_saves_a_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "in_own_process", in_this_process)
    benchmark.main([*FLAGS, "--stages", "scoring"])
    machine, *_ = (tmp_path / "save" / "benchmark.csv").read_text().splitlines()
    assert "cores" in machine
    assert machine.removeprefix("# ") in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["save"]  # all else went to the temporary folder
    table = pd.read_csv(tmp_path / "save" / "benchmark.csv", comment="#", index_col="stage")
    assert list(table.index) == ["scoring"]
    numbers = table.drop(columns=["unit", "faiss s", "faiss/ours"]).to_numpy(float)
    assert np.isfinite(numbers).all()
    assert table["share"].sum() == pytest.approx(1)


def test_after_a_failure_the_other_jobs_still_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "WAYS", {
        "scoring": (killed, wrong), "retrieval": (own_root, wrong), "encoding": (own_root, None)})
    monkeypatch.setattr(benchmark, "raw_data", refused)
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "in_own_process", in_this_process)
    with pytest.raises(InputError) as failure:
        benchmark.main(["--stages", "encoding", "retrieval", "scoring", "--rounds", "2"])
    assert str(failure.value).endswith("raw data; scoring, our way; retrieval, plain way")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: raw data: there is no such encoder",
        "error: scoring, our way: its process was ended from outside. Perhaps it ran out of memory",
        "error: retrieval, plain way: AssertionError: Not equal to tolerance"]
    table = pd.read_csv(tmp_path / "save" / "benchmark.csv", comment="#", index_col="stage")
    assert list(table.index) == ["retrieval"]
    assert table.loc["retrieval", "items/s"] == 6
    assert np.isnan(table.loc["retrieval", "plain s"])


def test_of_several_rounds_the_fastest_counts_and_the_most_memory():
    rounds = [benchmark.Measured(seconds, mb, 0, mb, ceiling=7 * seconds)
              for seconds, mb in ((3, 10), (2, 30), (4, 20))]
    assert benchmark.fastest(rounds) == replace(rounds[1], mb=30, gpu_mb=30)
    assert np.isnan(benchmark.fastest([]).seconds)  # no plain way


def test_plain_scores_are_ours():
    rng = np.random.default_rng(0)
    truth, prediction = rng.gamma(1, 1, (40, 12)), rng.gamma(1, 1, (40, 12))
    plain = benchmark_plain.score(pd.DataFrame(prediction), pd.DataFrame(truth))
    per_gene, summary = metrics.score(prediction, truth, truth)
    assert {*plain} == {*summary} - {"undefined genes"}
    for name, values in plain.items():
        np.testing.assert_allclose((summary | per_gene)[name], values, rtol=1e-9, err_msg=name)


def test_plain_retrieval_is_ours():
    rng = np.random.default_rng(0)
    query = rng.standard_normal((20, 16), np.float32)
    reference = rng.standard_normal((90, 16), np.float32)
    index, similarity = benchmark_plain.retrieve(query, reference, 7)
    ours, ours_similarity = retrieve(query, reference, 7)
    np.testing.assert_array_equal(ours, index)
    np.testing.assert_allclose(ours_similarity, similarity, atol=1e-6)


def test_generated_spots_stay_inside_the_slide_on_a_staggered_lattice():
    _, row, col, y, x = benchmark.lattice(50, 400, 500, 32).T
    assert len({*zip(row, col, strict=True)}) == 50
    assert ((row + col) % 2 == 0).all()
    assert min(x.min(), y.min()) >= 16
    assert x.max() <= 500 - 16
    assert y.max() <= 400 - 16


def work_of_40_mb():
    import torch

    torch.ones(30_000_000).sum()  # 120 MB, given back before the measurement
    return str(ROOT), benchmark.measure(lambda: np.ones(5_000_000).sum())[1]


def test_a_job_has_a_root_of_its_own_and_its_peak_memory_is_that_of_the_work_alone(tmp_path):
    """In a process of its own: one that has done much else holds memory that it uses again."""
    before = os.environ["HECLIP_ROOT"]
    root, cost = benchmark.in_own_process(tmp_path, work_of_40_mb)
    assert root == str(tmp_path)
    assert os.environ["HECLIP_ROOT"] == before
    assert 30 < cost.mb < 80
    assert cost.seconds > 0


def test_peak_memory_of_workers_is_that_of_the_largest():
    for size in (60_000_000, 20_000_000):
        subprocess.run([sys.executable, "-c", f"b'x' * {size}"], check=True)
    assert benchmark.peak_of_children() > 60_000_000
