"""The page of a prediction: what it holds, and what a reader can do with it in a real browser."""

import base64
import io
import json
import re
import shutil
import zlib
from dataclasses import asdict
from html.parser import HTMLParser

import anndata
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from heclip import page
from heclip.files import InputError
from heclip.settings import recipe_settings

# Of the small prediction. Steps of 0 to 255 hold the 18 values of its spots exactly.
GENES, COLUMNS, ROWS = 5, 6, 3
HOSTILE = "S</script><script>alert(1)</script><b>&amp;\"'é"
SECTION = HOSTILE.replace("/", "")  # h5ad has no such names


def model_facts(n_genes, **changes):
    """What a model says of itself, as `Trained.facts` does."""
    return {"settings": asdict(recipe_settings("heclip")) | {"dataset": "D"}, "panel": None,
            "reference": {"A": "x"}, "patch_um": 100.0, "validation": [0.5] * n_genes, "epoch": 3,
            "digest": "d" * 64, "versions": {"torch": "2.9"}} | changes


def small(name="Section", measured=True, n_genes=GENES, **model):
    """A prediction on a lattice of COLUMNS × ROWS spots. Gene g has g + the number of the spot."""
    row, column = (axis.ravel() for axis in np.mgrid[:ROWS, :COLUMNS])
    n = len(row)
    values = np.arange(n, dtype=np.float32)[:, None] + np.arange(n_genes, dtype=np.float32)
    obs = pd.DataFrame({"in_tissue": True, "array_row": row, "array_col": column * 1,
                        "similarity": row / 4, "spread": column / 9},
                       index=[f"spot{i}" for i in range(n)])
    var = pd.DataFrame({"symbol": [f"Gene{g}" for g in range(n_genes)], "marker": False,
                        "pearson": np.linspace(0.9, 0.1, n_genes)},
                       index=[f"ENSG{g}" for g in range(n_genes)])
    library = {"images": {"hires": np.full((100, 140, 3), 240, np.uint8)},
               "scalefactors": {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 110.0},
               "metadata": {"mpp": 1.0, "source_image_path": "S.jpg"}}
    about = {"query": name, "reference": ["A"], "how": {"k": 50}, "unit": "log-normalised",
             "model": model_facts(n_genes, **model)}
    return anndata.AnnData(
        values[::-1].copy() if measured else values, obs, var,
        layers={"true": values} if measured else None,
        obsm={"spatial": np.column_stack([200 + 200.0 * column, 200 + 200.0 * row])},
        uns={"spatial": {name: library}, "heclip": json.dumps(about)})


def write_files(folder, adata, scores=None):
    """Write a prediction's h5ad and scores."""
    adata.write_h5ad(folder / "p.h5ad")
    if scores:
        (folder / "s.json").write_text(json.dumps(scores))


def write(folder, adata, scores=None, **options):
    """Write a prediction's h5ad, scores and page. Returns the path of the page."""
    write_files(folder, adata, scores)
    page.write_page(folder / "p.html", folder / "p.h5ad", scores and folder / "s.json", **options)
    return folder / "p.html"


def scores_of(name="Section", **changes):
    """The scores of a section as infer.py writes them."""
    values = {"Pearson": 0.327, "HEG-50": 0.5, "undefined": None}
    return {"query": name, "n_genes": GENES, "n_spots": 18, "protocol": "strict", "scores": {
        "both": values, "untrained gene": {"Pearson": -0.1},
        "untrained image": {"Pearson": 0.26}, "random": {"Pearson": 0.006}}} | changes


# ------------------------------------------------------------------------------ what the page holds


def test_a_stored_value_is_within_half_a_step_of_the_prediction(tmp_path):
    adata = small()
    rng = np.random.default_rng(0)
    adata.X = rng.normal(size=adata.shape).astype(np.float32)
    adata.X[:, 2] = 1.5  # a gene that does not vary
    kept, steps, lines, ranges = page.pack(adata, "p.h5ad")
    assert kept == list(range(GENES))
    for layer, values in (("measured", adata.layers["true"]), ("predicted", adata.X)):
        for gene, line in zip(kept, lines, strict=True):
            stored = np.frombuffer(zlib.decompress(base64.b64decode(line)), np.uint8)
            stored = stored.reshape(2, -1)[int(layer == "predicted")]
            low, high = ranges[layer][gene]
            read = low + stored / (steps - 1) * (high - low)
            assert np.abs(read - values[:, gene]).max() <= (high - low) / (steps - 1) / 2 + 1e-6


@pytest.mark.parametrize(("most", "steps", "n_genes"), [
    pytest.param(10**6, {256}, 40, id="all fits"),
    pytest.param(23_000, set(page.STEPS) - {256, 32}, 40, id="coarser steps"),
    pytest.param(9_000, {32}, None, id="genes are left out")])
def test_a_page_has_the_finest_steps_and_the_most_genes_that_fit(most, steps, n_genes, monkeypatch):
    values = np.random.default_rng(0).normal(size=(500, 40)).astype(np.float32)
    adata = anndata.AnnData(values, var=pd.DataFrame({"marker": np.arange(40) == 30}))
    monkeypatch.setattr(page, "MOST_BYTES", most)
    kept, found, lines, _ = page.pack(adata, "p.h5ad")
    assert len("\n".join(lines)) <= most
    assert kept[0] == 30  # a marker is never the one that is left out
    assert found in steps
    assert len(kept) == n_genes or (n_genes is None and 10 < len(kept) < 40)


class Tags(HTMLParser):
    """Counts the elements of a page, and collects its text outside scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.attributes = [], "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.text += data


def test_hostile_names_are_text(tmp_path):
    plain = Tags(write(tmp_path, small(), scores_of(), command="c", warned=["w"]))
    adata = small(SECTION)
    adata.var["symbol"] = HOSTILE
    adata.obs_names = [f"{HOSTILE}{i}" for i in range(adata.n_obs)]
    scores = scores_of(SECTION)
    scores["scores"][HOSTILE] = {"Pearson": 0.1}
    path = write(tmp_path, adata, scores, command=HOSTILE, warned=[HOSTILE])
    hostile = Tags(path)
    assert hostile.tags.count("script") == plain.tags.count("script")
    assert "b" not in hostile.tags
    assert SECTION + ": predicted gene expression" in hostile.text
    data = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert json.loads(data)["genes"]["symbols"] == [HOSTILE] * GENES


def test_a_page_names_no_resource_outside_itself(tmp_path):
    found = Tags(write(tmp_path, small(), scores_of()))
    linked = [value for name, value in found.attributes if name in ("src", "href", "srcset")]
    assert linked == ["data:,"]  # the icon, which is empty
    policy = next(value for _, value in found.attributes if value and "default-src" in value)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_the_same_prediction_gives_the_same_page_but_for_bokehs_counter(tmp_path):
    def text():
        return re.sub(r"\bp\d{4,}\b", "p", write(tmp_path, small(measured=False)).read_text())

    assert text() == text()


@pytest.mark.parametrize(("change", "message"), [
    pytest.param(lambda folder: (folder / "p.h5ad").unlink(), "p.h5ad is missing", id="missing"),
    pytest.param(lambda folder: (folder / "p.h5ad").write_text("x"), "not written by infer.py",
                 id="damaged"),
    pytest.param(lambda folder: anndata.AnnData(np.ones((2, 2))).write_h5ad(folder / "p.h5ad"),
                 "not written by infer.py", id="another program's"),
    pytest.param(lambda folder: (folder / "s.json").write_text('{"scores": {}'),
                 "s.json is missing", id="damaged scores"),
    pytest.param(lambda folder: (folder / "s.json").write_text(json.dumps(scores_of("B"))),
                 "s.json is of B", id="scores of another query")])
def test_wrong_files_are_refused_by_name(change, message, tmp_path):
    write_files(tmp_path, small(), scores_of())
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        page.write_page(tmp_path / "new.html", tmp_path / "p.h5ad", tmp_path / "s.json")
    assert not (tmp_path / "new.html").exists()


def test_a_section_without_scores_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"p\.h5ad holds measured expression"):
        write(tmp_path, small())


def test_values_that_are_not_numbers_are_refused(tmp_path):
    adata = small()
    adata.X[3, 1] = np.nan
    with pytest.raises(InputError, match="predicted values that are not numbers"):
        write(tmp_path, adata, scores_of())


@pytest.mark.parametrize(("model", "scores", "said", "not_said"), [
    pytest.param({}, scores_of(), ["mean Pearson r of 0.327 across 18 spots", "give 0.006",
                                   "reaches 0.260 at best", r"by \+0.067", "3 of 5 genes reach",
                                   "No ceiling was measured", "did not see in training"],
                 ["No expression was measured"], id="section"),
    pytest.param({}, None, ["No expression was measured on Section", "median r of 0.500"],
                 ["mean Pearson", "ceiling"], id="slide"),
    pytest.param({"validation": None}, None, ["not validated in training"], ["median r"],
                 id="slide, model without validation"),
    pytest.param({"reference": None}, scores_of(), ["has seen it is not known"],
                 ["did not see"], id="published model"),
    pytest.param({}, scores_of(protocol="paper"), ["not scores of an unseen section"], [],
                 id="paper protocol"),
    pytest.param({}, scores_of(scores={"both": {"Pearson": None}, "random": {"Pearson": None}}),
                 ["mean Pearson r of undefined", "infer.py --untrained shows it"], [],
                 id="undefined scores"),
    pytest.param({"settings": asdict(recipe_settings("regression"))}, None,
                 ["no measure of uncertainty"], ["spread is"], id="regression")])
def test_sentences_say_what_was_measured_and_no_more(model, scores, said, not_said):
    adata = small(measured=scores is not None, **model)
    about = json.loads(adata.uns["heclip"])
    text = " ".join(page.sentences("Section", about, page.gene_table(adata, about), scores))
    for sentence in said:
        assert re.search(sentence, text), sentence
    for sentence in not_said:
        assert sentence not in text


def test_scores_checks_warnings_and_origin_are_on_the_page(tmp_path):
    path = write(tmp_path, small(), scores_of(), command="python code/infer.py", warned=["too few"])
    text = " ".join(Tags(path).text.split())
    for part in ("both retrievals", "0.327", "undefined", "18 of 18", "Warning: too few",
                 "no tissue is recognised", "200 µm", "python code/infer.py", "d" * 64,
                 "torch 2.9", "bokeh"):
        assert part in text, part


# ----------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that is driven through Selenium; the tests skip without one."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("Chromium and ChromeDriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,1000"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def section_page(tmp_path_factory):
    """The page of the small section."""
    return write(tmp_path_factory.mktemp("page"), small(SECTION), scores_of(SECTION))


def opened(browser, path, width=1400, height=1000):
    """Open a page in a window of that size and wait until its maps are there."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
    browser.get(path.as_uri())
    WebDriverWait(browser, 60).until(
        lambda _: browser.execute_script("return document.body.dataset.ready"))
    return browser


def drawn(browser):
    """Wait until Bokeh has drawn what changed."""
    browser.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => "
                                 "requestAnimationFrame(() => requestAnimationFrame(done)))")


def colour_of(browser, name, adata, spot):
    """The colour of the middle of a spot on a map, as a screenshot shows it: (3,)."""
    where = "const map = document.querySelector(`[data-map=${arguments[0]}]`);"
    browser.execute_script(where + "map.scrollIntoView({block: 'center'})", name)
    drawn(browser)
    left, top, width, height, x0, x1, y0, y1 = browser.execute_script(
        where + "const box = map.getBoundingClientRect(); "
        "const x = model('x'), y = model('y'); return [box.left, box.top, box.width, box.height, "
        "x.start, x.end, y.end, y.start]", name)
    x, y = adata.obsm["spatial"][spot] / 1000  # in mm; 1 µm a pixel
    at = (left + (x - x0) / (x1 - x0) * width, top + (y - y0) / (y1 - y0) * height)
    with Image.open(io.BytesIO(browser.get_screenshot_as_png())) as shot:
        return np.array(shot.convert("RGB").getpixel(tuple(round(side) for side in at)), int)


def rgb(colour):
    """A colour like #aabbcc as (3,)."""
    return np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)])


def test_a_gene_is_searched_and_its_spots_have_the_right_colours(browser, section_page):
    adata = small()
    opened(browser, section_page)
    search = browser.find_element("id", "search")
    search.send_keys("gene3\n")
    drawn(browser)
    assert browser.find_element("id", "symbol").text == "Gene3"
    palette = page.COLOURS["expression"]
    expected = {"measured": [palette[0], palette[-1]], "predicted": [palette[-1], palette[0]],
                "difference": [page.COLOURS["difference"][-1], page.COLOURS["difference"][0]],
                "spread": [page.COLOURS["certainty"][0], page.COLOURS["certainty"][-1]]}
    spots = {"spread": [0, COLUMNS - 1]}
    for name, colours in expected.items():
        for spot, colour in zip(spots.get(name, [0, adata.n_obs - 1]), colours, strict=True):
            seen = colour_of(browser, name, adata, spot)
            assert np.abs(seen - rgb(colour)).max() <= 12, (name, spot, seen, colour)
    middle = colour_of(browser, "measured", adata, 6)  # 6 of 0 to 17
    assert np.abs(middle - rgb(palette[round(6 / 17 * 255)])).max() <= 12
    faults = [entry for entry in browser.get_log("browser")
              if entry["level"] in ("SEVERE", "WARNING")]
    assert not faults
    fetched = browser.execute_script("return performance.getEntriesByType('resource')"
                                     ".map((entry) => entry.name)")
    assert not [name for name in fetched if not name.startswith(("data:", "blob:"))]


def test_pointing_at_a_spot_shows_its_values(browser, section_page):
    opened(browser, section_page)
    browser.execute_script(
        "const map = document.querySelector('[data-map=predicted]'), spot = 8;"
        "const box = map.getBoundingClientRect(), x = model('x'), y = model('y');"
        "const at = model('fixed').data, init = {pointerType: 'mouse', bubbles: true,"
        "clientX: box.left + (at.x[spot] - x.start) / (x.end - x.start) * box.width,"
        "clientY: box.top + (at.y[spot] - y.end) / (y.start - y.end) * box.height};"
        "map.dispatchEvent(new PointerEvent('pointermove', init));")
    said = browser.find_element("id", "spot").text
    assert said.startswith("Spot spot8 · Gene0: measured 8.00 · predicted 9.00 ±")
    assert "difference 1.00" in said
    assert "similarity 0.25" in said
    assert browser.find_element("id", "tip").is_displayed()


def test_dragging_one_map_moves_all_by_the_same_way(browser, section_page):
    from selenium.webdriver import ActionChains

    opened(browser, section_page)
    before = browser.execute_script("return [model('x').start, model('x').end]")
    found = browser.find_element("css selector", "[data-map=predicted]")
    drag = ActionChains(browser, duration=20).move_to_element(found).click_and_hold()
    drag.move_by_offset(30, 0).move_by_offset(30, 0).release().perform()
    drawn(browser)
    after = browser.execute_script("return [model('x').start, model('x').end]")
    share = (before[0] - after[0]) / (before[1] - before[0])
    assert share * found.size["width"] == pytest.approx(60, abs=3)
    assert colour_of(browser, "measured", small(), 0) == pytest.approx(
        rgb(page.COLOURS["expression"][0]), abs=12)


def test_all_works_by_keyboard(browser, section_page):
    from selenium.webdriver import ActionChains, Keys

    opened(browser, section_page)

    def press(*keys):
        ActionChains(browser).send_keys(*keys).perform()
        drawn(browser)

    def focus():
        return browser.switch_to.active_element

    press(Keys.TAB)
    assert focus().get_attribute("id") == "search"
    press("gene4", Keys.ENTER)
    assert browser.find_element("id", "symbol").text == "Gene4"
    press(Keys.BACKSPACE, Keys.ARROW_UP)
    assert browser.find_element("id", "symbol").text == "Gene3"
    press(Keys.TAB, Keys.TAB)  # over the table to its first heading
    assert focus().text == "gene"
    press(Keys.ENTER)  # sorted by symbol
    assert browser.find_element("css selector", "#rows button").text == "Gene0"
    for _ in range(60):
        if focus().get_attribute("id") == "maps":
            break
        press(Keys.TAB)
    assert focus().get_attribute("id") == "maps"
    assert focus().value_of_css_property("outline-style") == "solid"
    width = "const x = model('x'); return x.end - x.start"
    before = browser.execute_script(width)
    press("+")
    assert browser.execute_script(width) == pytest.approx(before / 1.5)
    press("0", "n", "n")
    assert browser.execute_script(width) == pytest.approx(before)
    assert "Spot spot1" in browser.find_element("id", "spot").text


def test_a_phone_shows_all_of_it(browser, section_page):
    opened(browser, section_page, 390, 844)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.find_element("id", "search").send_keys("ENSG2\n")
    assert browser.find_element("id", "symbol").text == "Gene2"
    maps = browser.find_elements("css selector", ".map")
    assert len(maps) == 6
    assert all(150 < found.size["width"] < 390 for found in maps)


def test_a_slide_without_expression_shows_its_prediction(browser, tmp_path):
    opened(browser, write(tmp_path, small(measured=False)))
    assert [found.get_attribute("data-map") for found in browser.find_elements(
        "css selector", ".map")] == ["slide", "predicted", "spread", "similarity"]
    browser.find_element("id", "next").click()
    assert browser.find_element("id", "spot").text.startswith("Spot spot0 · Gene0: predicted 0.00")
    assert not browser.find_elements("id", "scale")
