"""The benchmark at a tiny size: every stage is measured, and the plain ways give what ours give."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import benchmark
import benchmark_plain
from heclip import metrics
from heclip.retrieval import retrieve

SMALL = ["--spots", "40", "--image", "400", "500", "--all_genes", "300", "--genes", "60", "--encoder", "test_resnet",
         "--image_size", "32", "--batch_size", "8", "--epochs", "1", "--queries", "30", "--reference", "200",
         "--device", "cpu"]


def test_every_stage_is_measured_and_agrees_with_its_plain_way(tmp_path, capsys):
    jobs = [("raw", "data")] + [(stage, way) for stage in benchmark.STAGES for way in ("ours", "plain")]
    for stage, way in jobs[:3] + jobs[1:]:  # preprocessing in two rounds; each plain way compares its results with ours
        benchmark.main([*SMALL, "--job", stage, way, str(tmp_path)])
    assert capsys.readouterr().out.count("S0: reading") == 2  # not taken as done in the second round
    for stage, way in jobs[1:]:
        found = json.loads((tmp_path / f"{stage} {way}.json").read_text())
        assert found["seconds"] > 0
        assert way == "plain" or found["ceiling"] > 0


def test_the_command_prints_and_saves_a_table(project, tmp_path):
    command = [sys.executable, project / "code" / "benchmark.py", *SMALL, "--stages", "retrieval", "scoring",
               "--rounds", "2"]
    done = subprocess.run(command, text=True, capture_output=True, env=os.environ | {"HECLIP_ROOT": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    machine, *_ = (tmp_path / "save" / "benchmark.csv").read_text().splitlines()
    assert "cores" in machine
    assert machine.removeprefix("# ") in done.stdout
    table = pd.read_csv(tmp_path / "save" / "benchmark.csv", comment="#", index_col="stage")
    assert list(table.index) == ["retrieval", "scoring"]
    assert np.isfinite(table.drop(columns=["unit", "faiss s", "faiss/ours"]).to_numpy(float)).all()
    assert table["share"].sum() == pytest.approx(1)


def test_of_several_rounds_the_fastest_counts_and_the_most_memory():
    rounds = [{"seconds": seconds, "ceiling": 7 * seconds, "mb": mb, "mapped_mb": 0, "gpu_mb": mb}
              for seconds, mb in ((3, 10), (2, 30), (4, 20))]
    assert benchmark.fastest(rounds) == {"seconds": 2, "ceiling": 14, "mb": 30, "mapped_mb": 0, "gpu_mb": 30}
    assert benchmark.fastest([{}, {}]) == {}  # no plain way


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
    query, reference = rng.standard_normal((20, 16), np.float32), rng.standard_normal((90, 16), np.float32)
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


def test_peak_memory_is_that_of_the_work_alone(project):
    """In a process of its own, as the benchmark runs each stage: one that has done much else holds memory to reuse."""
    code = """
import json, numpy as np, torch, benchmark
torch.ones(30_000_000).sum()  # 120 MB, given back before the measurement
print(json.dumps(benchmark.measure(lambda: np.ones(5_000_000).sum())[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(project / "code")})
    cost = json.loads(done.stdout)
    assert 30 < cost["mb"] < 80
    assert cost["seconds"] > 0


def test_peak_memory_of_workers_is_that_of_the_largest():
    for size in (60_000_000, 20_000_000):
        subprocess.run([sys.executable, "-c", f"b'x' * {size}"], check=True)
    assert benchmark.peak_of_children() > 60_000_000


def test_real_sizes_give_way_to_flags():
    args = benchmark.parse(["--gpu_full", "--spots", "7"])
    assert (args.encoder, args.image_size, args.batch_size, args.genes) == ("resnet50", 256, 128, 3467)
    assert args.spots == 7
