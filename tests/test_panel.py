"""Panels against scanpy and against their definition, and as files that are what was chosen."""

import json

import numpy as np
import pandas as pd
import pytest
import scanpy
from makers import panel_of
from test_expression import prepared, random_section

from heclip import sources
from heclip.files import InputError
from heclip.panel import choose_panel, given_panel, read_panel, run_name


def tables(**columns):
    """Gene tables by hand: section -> {gene: (mean, dispersion, n_expressed)}."""
    made = {}
    for name, genes in columns.items():
        made[name] = pd.DataFrame.from_dict(
            genes, orient="index", columns=["mean", "dispersion", "n_expressed"])
        made[name]["symbol"] = made[name].index.str.lower()
    return made


def scanpy_flags(adata, n_top):
    ranking = scanpy.pp.highly_variable_genes(adata, n_top_genes=n_top, inplace=False)
    return set(adata.var_names[ranking["highly_variable"].to_numpy()])


@pytest.fixture(scope="module")
def adatas():
    return {f"S{seed}": prepared(random_section(seed)) for seed in (1, 2, 3)}


def var_of(adatas):
    return {name: adata.var for name, adata in adatas.items()}


# ------------------------------------------------------------------------------ how it is chosen


@pytest.mark.parametrize("n_top", [1, 20, 75])
def test_the_hvg_panel_is_the_union_of_what_scanpy_flags_in_each_section(adatas, n_top):
    flags = {name: scanpy_flags(adata, n_top) for name, adata in adatas.items()}
    panel = choose_panel("hvg", var_of(adatas), n_top)
    assert set(panel.ids) == set.union(*flags.values())
    assert len(panel) > n_top
    for name, flagged in flags.items():
        assert set(panel.ids[panel.genes[f"rank_{name}"] <= n_top]) == flagged


@pytest.mark.parametrize("n_top", [1, 20, 75])
def test_the_heg_panel_is_the_union_of_the_highest_means_of_genes_present_everywhere(adatas, n_top):
    panel = choose_panel("heg", var_of(adatas), n_top)
    dense = {name: adata.X.toarray().astype(float) for name, adata in adatas.items()}
    everywhere = [g for g in range(300) if all(x[:, g].any() for x in dense.values())]
    expected = set()
    for x in dense.values():
        expected |= set(sorted(everywhere, key=lambda g: -x[:, g].mean())[:n_top])
    assert list(panel.ids) == [f"ENS{g:04}" for g in sorted(expected)]


def test_a_panel_of_all_genes_holds_every_gene_that_has_a_dispersion(adatas):
    adata = adatas["S1"]
    panel = choose_panel("hvg", {"S1": adata.var}, 1000)
    assert set(panel.ids) == set(adata.var_names[adata.var["dispersion"].notna()])


def test_ranks_count_from_one_over_the_candidates_and_symbols_travel_along():
    genes = tables(
        A={"G1": (5, 0.1, 9), "G2": (4, 0.9, 9), "G3": (3, 0.5, 9), "G4": (9, 9.0, 0)},
        B={"G1": (1, 0.3, 2), "G2": (2, 0.2, 2), "G3": (8, 0.1, 2), "G4": (9, 0.9, 3)})
    panel = choose_panel("heg", genes, 1, markers=["g3", "g2", "absent"])
    assert panel.genes.to_dict("index") == {
        "G1": {"symbol": "g1", "marker": False, "rank_A": 1, "rank_B": 3},
        "G3": {"symbol": "g3", "marker": True, "rank_A": 3, "rank_B": 1}}
    assert panel.genes.index.name == "gene_id"
    assert panel.is_marker.tolist() == [False, True]
    panel = choose_panel("hvg", genes, 1)  # also ranks genes that one section lacks
    assert panel.genes.to_dict("index") == {
        "G4": {"symbol": "g4", "marker": False, "rank_A": 1, "rank_B": 1}}


@pytest.mark.parametrize("protocol", ["strict", "paper"])
def test_a_panel_says_what_it_is_and_by_which_sections_it_was_chosen(protocol):
    genes = tables(A={"G1": (5, 5, 9), "G2": (4, 4, 9)}, B={"G1": (5, 5, 9), "G2": (4, 4, 9)})
    panel = choose_panel("heg", genes, 1, markers=("g2",), protocol=protocol)
    assert (panel.kind, panel.protocol, panel.sections) == ("heg", protocol, ["A", "B"])
    assert (panel.n_top, panel.markers, len(panel)) == (1, ["g2"], 1)
    assert panel.name == ("heg" if protocol == "strict" else "heg_paper")


def test_a_gene_without_dispersion_ranks_last_and_is_never_chosen():
    genes = tables(A={"G1": (5, np.nan, 9), "G2": (4, -0.9, 9)},
                   B={"G1": (5, 0.3, 9), "G2": (4, np.nan, 9)})
    panel = choose_panel("hvg", genes, 2)
    assert panel.genes[["rank_A", "rank_B"]].to_dict("index") == {
        "G1": {"rank_A": 2, "rank_B": 1}, "G2": {"rank_A": 1, "rank_B": 2}}
    assert choose_panel("hvg", {"A": genes["A"]}, 2).ids.tolist() == ["G2"]


@pytest.mark.parametrize("kind", ["hvg", "heg"])
def test_the_query_is_asked_for_its_gene_names_and_for_nothing_else(kind):
    genes = tables(A={"G1": (1, 1, 5), "G2": (2, 2, 5), "G3": (3, 3, 5)})
    assert choose_panel(kind, genes, 1).ids.tolist() == ["G3"]
    panel = choose_panel(kind, genes, 1, present_in=[pd.Index(["G2", "G9", "G1"])])
    assert panel.ids.tolist() == ["G2"]
    assert panel.genes.columns.tolist() == ["symbol", "marker", "rank_A"]
    assert panel.sections == ["A"]


@pytest.mark.parametrize("kind", ["hvg", "heg"])
def test_the_panel_keeps_the_first_sections_gene_order_and_pairs_the_others_by_id(kind):
    genes = tables(
        A={"G3": (3, 3, 5), "G1": (1, 1, 5), "G2": (2, 2, 5)},
        B={"G1": (10, 10, 5), "G9": (99, 99, 5), "G2": (30, 30, 5), "G3": (20, 20, 5)})
    panel = choose_panel(kind, genes, 2)
    assert panel.genes.drop(columns="marker").to_dict("index") == {
        "G3": {"symbol": "g3", "rank_A": 1, "rank_B": 2},
        "G2": {"symbol": "g2", "rank_A": 2, "rank_B": 1}}
    assert list(panel.genes.index) == ["G3", "G2"]


@pytest.mark.parametrize("other", ["G9", "G1"])
def test_an_empty_panel_is_an_error_that_names_the_sections(other):
    # No common gene, or one that B does not express.
    genes = tables(A={"G1": (1, 1, 5)}, B={other: (1, 1, 0)})
    with pytest.raises(InputError, match="heg panel of A, B is empty"):
        choose_panel("heg", genes, 5)


def test_flags_equal_scanpys_on_real_sections(real_data):
    folder = real_data("MOB") / "inst" / "extdata" / "counts"
    for name in ("MOB1", "MOB3"):
        adata = sources.read_counts(folder / f"{name}.tsv")
        adata = prepared(adata[np.asarray(adata.X.sum(axis=1)).ravel() >= 100].copy())
        panel = choose_panel("hvg", {name: adata.var}, 500)
        assert set(panel.ids) == scanpy_flags(adata, 500)
        assert len(panel) == 500


# ------------------------------------------------------------------------------ its file


def assert_same(one, two):
    pd.testing.assert_frame_equal(one.genes, two.genes)
    for name in ("kind", "protocol", "sections", "n_top", "markers"):
        assert getattr(one, name) == getattr(two, name), name


@pytest.mark.parametrize(("kind", "protocol"), [("heg", "strict"), ("hvg", "paper")])
def test_a_panel_reads_back_as_it_was_written(adatas, tmp_path, kind, protocol):
    panel = choose_panel(kind, var_of(adatas), 20, markers=["sym-ENS0003", "gone"],
                         protocol=protocol)
    panel.write(tmp_path / "panel.csv")
    assert_same(read_panel(tmp_path / "panel.csv"), panel)
    assert [path.name for path in tmp_path.iterdir()] == ["panel.csv"]


@pytest.mark.parametrize("ids", [("NA", "007", "nan", "1e5", ""), ("007", "12"), ("NA",)])
def test_genes_whose_names_look_like_something_else_stay_text(tmp_path, ids):
    panel = panel_of(*ids, markers=ids[:1])
    panel.write(tmp_path / "panel.csv")
    assert_same(read_panel(tmp_path / "panel.csv"), panel)


def test_the_first_line_says_how_the_panel_was_chosen_and_what_it_lacks(tmp_path):
    panel = panel_of("G1", "G2", kind="hvg", sections=["A"], markers=["G2", "gone"])
    panel.write(tmp_path / "panel.csv")
    first, second, *_ = (tmp_path / "panel.csv").read_text().splitlines()
    assert json.loads(first.removeprefix("# ")) == {
        "type": "hvg", "protocol": "strict", "sections": ["A"], "n_top": 2,
        "ranked_by": "normalised dispersion", "markers": ["G2", "gone"],
        "markers_not_in_panel": ["gone"]}
    assert second == "gene_id,symbol,marker"


@pytest.mark.parametrize("text", ["", "gene_id,symbol\nG1,g1\n", "# {}\ngene_id,symbol\nG1,g1\n",
                                  "# [1]\ngene_id\nG1\n", "\x00\x01"])
def test_another_file_is_no_panel_and_the_error_names_it(tmp_path, text):
    (tmp_path / "panel.csv").write_text(text)
    with pytest.raises(InputError,
                       match=r"panel\.csv is not a panel that a preprocess script wrote"):
        read_panel(tmp_path / "panel.csv")


def test_a_run_is_named_by_its_kind_and_by_its_protocol_unless_that_is_strict():
    names = [run_name(kind, protocol) for kind in ("heg", "hvg")
             for protocol in ("strict", "paper")]
    assert names == ["heg", "heg_paper", "hvg", "hvg_paper"]


# ------------------------------------------------------------------------- genes that are given


SECTION = pd.DataFrame({"symbol": ["a", "b", "c", "d"]},
                       index=pd.Index(["G1", "007", "G3", "NA"], name="gene_id"))


@pytest.mark.parametrize("before", ["", "# a comment\n"])
def test_given_genes_keep_their_files_order_and_take_their_symbols_from_the_section(
        tmp_path, before):
    (tmp_path / "genes.csv").write_text(before + "id,anything\nNA,1\nG1,2\n007,3\n")
    own = panel_of("G1", "G3", markers=["a", "d"])
    panel = given_panel(tmp_path / "genes.csv", own, SECTION)
    assert panel.genes.to_dict("index") == {
        "NA": {"symbol": "d", "marker": True}, "G1": {"symbol": "a", "marker": True},
        "007": {"symbol": "b", "marker": False}}
    assert list(panel.ids) == ["NA", "G1", "007"]
    assert panel.genes.index.name == "gene_id"
    assert panel.sections == []  # no section chose it
    assert (panel.kind, panel.protocol, panel.markers) == ("heg", "strict", ["a", "d"])


@pytest.mark.parametrize(("text", "says"), [
    ("id\n", "it holds no genes"),
    ("id\nG1\nG3\nG1\n", "it lists gene 'G1' twice"),
    ("id\nG1\nG7\nG8\n", "2 of its 3 genes are in no section, 'G7' first"),
    ("id\nG1,2\n\x00", "."),
])
def test_a_list_that_does_not_fit_the_section_is_refused(tmp_path, text, says):
    (tmp_path / "genes.csv").write_text(text)
    with pytest.raises(InputError, match=rf"--panel_file .*genes\.csv: .*{says}"):
        given_panel(tmp_path / "genes.csv", panel_of("G1"), SECTION)


@pytest.mark.parametrize("text", [None, ""])
def test_a_list_that_is_missing_or_empty_is_an_error_that_names_the_flag(tmp_path, text):
    if text is not None:
        (tmp_path / "genes.csv").write_text(text)
    with pytest.raises(InputError, match=r"--panel_file .*It takes a CSV with a header"):
        given_panel(tmp_path / "genes.csv", panel_of("G1"), SECTION)


@pytest.mark.parametrize(("old", "new"), [
    ("# {", "# " + "[" * 100_000), ("# {", "# [] {"), ('"heg"', '"hag"'), ('"strict"', "1"),
    ('"markers": []', '"markers": [1]'), ('"n_top": 2', '"n_top": "2"'), ("False", "Falsch"),
    ("\nG2", "\nG1"), ("symbol", "symb")])
def test_a_damaged_panel_is_an_error_that_names_it(tmp_path, old, new):
    path = tmp_path / "panel_heg.csv"
    panel_of("G1", "G2").write(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=r"panel_heg\.csv is not a panel"):
        read_panel(path)
