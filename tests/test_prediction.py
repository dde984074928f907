"""The one way to predict, on matrices, against a slow and obvious definition; saved embeddings."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import QUERY, REFERENCE, prepare, untrained
from test_spots import slow_smooth

from heclip import prediction
from heclip.dataset import Processed, Run
from heclip.files import InputError
from heclip.prediction import Reference, predict
from heclip.settings import Predicting

# ------------------------------------------------------------------- the definition, spot by spot


def slow_predict(image, xy, sections, how):
    """What `predict` must give: (expression, retrieved rows, their similarities), a row per patch.

    image: (n, D). sections: a list of {"gene", "image", "expression"}, (N_s, D or G) each.
    """
    expression = np.concatenate([section["expression"] for section in sections])
    kinds = ["gene", "image"] if how.retrieval == "both" else [how.retrieval]
    found, similarities = [], []
    for patch in image:
        rows, cosines = [], []
        for kind in kinds:
            query, nearest = patch, np.concatenate([section[kind] for section in sections])
            if how.centre:
                query = patch - (image.sum(axis=0) + 20 * nearest.mean(axis=0)) / (len(image) + 20)
                nearest = np.concatenate(
                    [section[kind] - section[kind].mean(axis=0) for section in sections])
            cosine = nearest @ query / np.linalg.norm(nearest, axis=1) / np.linalg.norm(query)
            best = np.argsort(-cosine)[:how.k]
            rows.extend(best)
            cosines.extend(cosine[best])
        found.append(rows)
        similarities.append(cosines)
    average = np.array([expression[rows].mean(axis=0) for rows in found])
    if how.smoothing:
        average = slow_smooth(average, xy, how.smoothing)
    return average, np.array(found), np.array(similarities)


def matrices(seed=0):
    """Image embeddings of 40 patches on a 5 x 8 grid, their centres, three reference sections."""
    rng = np.random.default_rng(seed)
    image = rng.normal(0.5, 1, (40, 6)).astype(np.float32)
    xy = np.argwhere(np.ones((5, 8))) * 130.0
    sections = [{"gene": rng.normal(shift, 1, (n, 6)).astype(np.float32),
                 "image": rng.normal(-shift, 2, (n, 6)).astype(np.float32),
                 "expression": rng.gamma(1, 1, (n, 7)).astype(np.float32)}
                for n, shift in ((31, 0.3), (17, 3), (24, -2))]
    return image, xy, sections


def as_reference(sections):
    def stack(part):
        return np.concatenate([section[part] for section in sections])

    return Reference(["A", "B", "C"], [len(section["gene"]) for section in sections],
                     stack("expression"), {kind: stack(kind) for kind in ("gene", "image")})


@pytest.mark.parametrize("how", [
    Predicting("gene", k=5, centre=False, smoothing=0.0),
    Predicting("gene", k=5, centre=True, smoothing=0.5),
    Predicting("image", k=5, centre=True, smoothing=0.0),
    Predicting("image", k=1, centre=False, smoothing=2.0),
    Predicting("both", k=5, centre=True, smoothing=0.5),
    Predicting("both", k=9, centre=False, smoothing=0.0),
    Predicting("both", k=100, centre=True, smoothing=0.0),  # more than there are: all of them
], ids=lambda how: f"{how.retrieval}-k{how.k}-centre_{how.centre}-smoothing_{how.smoothing:g}")
def test_prediction_is_the_mean_of_the_nearest_spots_smoothed(how):
    image, xy, sections = matrices()
    reference = as_reference(sections)
    expression, rows, similarity = slow_predict(image, xy, sections, how)
    predicted = predict(image, xy, reference, how)
    assert predicted.expression.dtype == np.float32
    np.testing.assert_allclose(predicted.expression, expression, rtol=1e-4)
    np.testing.assert_array_equal(predicted.index, rows)
    np.testing.assert_allclose(predicted.similarity, similarity, atol=1e-5)
    certainty = predicted.certainty(reference)
    assert set(certainty) == {"similarity", "spread"}
    np.testing.assert_allclose(certainty["similarity"], similarity.mean(axis=1), atol=1e-5)
    spread = [reference.expression[found].std(axis=0).mean() for found in rows]
    np.testing.assert_allclose(certainty["spread"], spread, atol=2e-3)


def test_with_both_retrievals_each_alone_is_what_it_would_be_by_itself():
    image, xy, sections = matrices()
    reference, how = as_reference(sections), Predicting("both", k=5)
    both = predict(image, xy, reference, how)
    assert list(both.alone) == ["gene", "image"]
    for kind, alone in both.alone.items():
        by_itself = predict(image, xy, reference, replace(how, retrieval=kind))
        np.testing.assert_array_equal(alone.expression, by_itself.expression)
        np.testing.assert_array_equal(alone.index, by_itself.index)
        assert by_itself.alone is None
    assert not np.array_equal(both.alone["gene"].expression, both.alone["image"].expression)


def test_a_single_retrieval_needs_no_embeddings_of_the_other_kind():
    image, xy, sections = matrices()
    for kind in ("gene", "image"):
        whole = as_reference(sections)
        part = replace(whole, embeddings={kind: whole.embeddings[kind]})
        how = Predicting(kind, k=5)
        np.testing.assert_array_equal(predict(image, xy, part, how).expression,
                                      predict(image, xy, whole, how).expression)


@pytest.mark.parametrize("width", [0.0, 0.5])
def test_a_regression_predicts_itself_smoothed_and_has_neither_similarity_nor_spread(width):
    image, xy, sections = matrices()
    reference = as_reference(sections)
    predicted = predict(image, xy, reference, Predicting("both", smoothing=width), regression=True)
    expected = slow_smooth(image, xy, width) if width else image
    np.testing.assert_allclose(predicted.expression, expected, rtol=1e-4, atol=1e-6)
    assert predicted.index is predicted.similarity is predicted.alone is None
    assert predicted.certainty(reference) == {}


def test_tensors_and_arrays_give_the_same():
    image, xy, sections = matrices()
    reference = as_reference(sections)
    tensors = replace(reference, embeddings={kind: torch.from_numpy(rows) for kind, rows
                                             in reference.embeddings.items()})
    for how in (Predicting("both", k=5), Predicting("gene", k=5, centre=False)):
        np.testing.assert_array_equal(
            predict(torch.from_numpy(image), xy, tensors, how).expression,
            predict(image, xy, reference, how).expression)


def test_a_reference_is_its_sections_in_their_order():
    _, _, sections = matrices()
    names = ["B", "C", "A"]
    by_name = dict(zip("ABC", sections, strict=True))
    expression = {name: by_name[name]["expression"] for name in "ABC"}
    reference = prediction.reference_of(names, expression, by_name)
    assert (reference.sections, reference.sizes) == (names, [17, 24, 31])
    for name, rows in zip(names, reference.by_section("image"), strict=True):
        np.testing.assert_array_equal(rows, by_name[name]["image"])
    np.testing.assert_array_equal(reference.expression[17:41], by_name["C"]["expression"])
    np.testing.assert_array_equal(reference.embeddings["gene"][41:], by_name["A"]["gene"])


# --------------------------------------------------------------------------- embeddings on disk


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Embeddings of the small data set, saved: (run, processed, trained, section -> embeddings)."""
    prepare("embedded")
    processed = Processed("embedded")
    run = Run("embedded", "heg", tmp_path_factory.mktemp("embedded"))
    trained = untrained(run.checkpoint, "embedded")
    expression = {section: processed.expression(section, trained.panel)
                  for section in [*REFERENCE, QUERY]}
    device = torch.device("cpu")
    embeddings = prediction.embed_sections(trained, processed, expression, 2, device, 64)
    prediction.save_embeddings(run, trained, processed, embeddings, REFERENCE, 2)
    return run, processed, trained, embeddings


def test_embeddings_on_disk_are_those_that_were_saved_and_know_their_model(saved):
    run, processed, trained, embeddings = saved
    again, sections, read, views = prediction.read_embeddings(run, processed, QUERY, None)
    assert (sections, views) == (REFERENCE, 2)
    assert again.network is None
    assert again.facts() == trained.facts()
    assert set(read) == {*REFERENCE, QUERY}
    for section, by_kind in read.items():
        for kind, rows in by_kind.items():
            np.testing.assert_array_equal(rows, embeddings[section][kind])


def test_embeddings_of_a_regression_are_the_predicted_expression(saved, tmp_path):
    _, processed, _, _ = saved
    trained = untrained(tmp_path / "model.pt", "embedded", recipe="regression")
    expression = {QUERY: processed.expression(QUERY, trained.panel)}
    found = prediction.embed_sections(trained, processed, expression, 1, torch.device("cpu"), 64)
    assert found[QUERY]["image"].shape == expression[QUERY].shape
    np.testing.assert_array_equal(found[QUERY]["gene"], expression[QUERY])


def rewrite(path, **changes):
    """Save an ebd file again with other arrays; `about` is a dict of what changes in it."""
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"])) | changes.pop("about", {})
    with open(path, "wb") as file:
        np.savez(file, **arrays | {"about": json.dumps(about)} | changes)


def other_spots(path):
    with np.load(path) as file:
        barcodes = file["barcode"]
    rewrite(path, barcode=barcodes[::-1])


@pytest.mark.parametrize(("spoil", "says"), [
    (other_spots, "was made from other spots than DEMO_B1 has now"),
    (lambda path: rewrite(path, about={"section": "0" * 16}),
     "was made before DEMO_B1 was preprocessed again"),
    (lambda path: rewrite(path, about={"views": 8}), "averages 8 views of each patch, not the 2"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is damaged"),
    (lambda path: path.write_text("no zip"), "is damaged, or of an older version"),
    (lambda path: rewrite(path, gene=np.full((3, 8), np.nan)),
     r"is damaged, .*\(its gene embeddings are not finite"),
    (lambda path: rewrite(path, image=np.zeros(3)),
     r"is damaged, .*\(its image embeddings are not finite"),
    (lambda path: rewrite(path, about={"reference": [1]}),
     r"is damaged, .*\(it does not name its sections"),
    (lambda path: rewrite(path, about={"trained": {}}), "is damaged, or of an older version"),
    (lambda path: path.unlink(), "is missing"),
])
def test_embeddings_of_something_else_are_refused_and_named(saved, spoil, says):
    run, processed, _, _ = saved
    path = run.embeddings("DEMO_B1")
    before = path.read_bytes()
    try:
        spoil(path)
        with pytest.raises(InputError, match=rf"DEMO_B1\.npz {says}.* without --from_ebd"):
            prediction.read_embeddings(run, processed, QUERY, None)
    finally:
        path.write_bytes(before)


def test_embeddings_of_an_earlier_model_are_refused_while_the_later_one_is_there(saved):
    run, processed, trained, _ = saved
    before = run.checkpoint.read_bytes()
    try:
        untrained(run.checkpoint, "embedded", seed=1)
        with pytest.raises(InputError, match="was made by another model than the one"):
            prediction.read_embeddings(run, processed, QUERY, None)
        run.checkpoint.unlink()  # the embeddings themselves are enough
        assert prediction.read_embeddings(run, processed, QUERY, 2)[0].digest == trained.digest
    finally:
        run.checkpoint.write_bytes(before)


def test_views_that_the_saved_embeddings_do_not_have_are_refused(saved):
    run, processed, _, _ = saved
    with pytest.raises(InputError, match="averages 2 views of each patch, not the 8 of --views"):
        prediction.read_embeddings(run, processed, QUERY, 8)
    assert prediction.read_embeddings(run, processed, QUERY, 2)[3] == 2
