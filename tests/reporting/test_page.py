"""page.py: the page is complete, small, safe from the rows that it shows, and works in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from markupsafe import escape

from car_datasets import SelectionReport, explain, select_car
from car_datasets.reporting.page import PAGE_ROWS, _shortened, page_environment
from car_datasets.reporting.plots import PLOTS
from tests.reporting.test_plots import make_pool

HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "{{ 7 * 7 }}{% raw %}",
    "\u2028\u2029 ]]> &amp; \x00 \\u003c '\"`${document.title='owned'}",
    "<a href=\"javascript:document.title='owned'\">click</a>",
]


TREES = ["alder", "ash", "beech", "birch", "cedar", "elm", "hazel", "larch", "maple", "oak", "pine", "willow"]


HEAD = {"dataset": f"{HOSTILE[2]} (abc)", "settings": "n1 = 40"}


@pytest.fixture(scope="module")
def pool() -> Dataset:
    """Return 300 rows with hostile text in the column of text, in ids, in a column of few values, and in a chat.

    The chats of each cluster are about a tree of its own.
    """
    texts = [f"row number {i} about {'poems' if i % 50 == 0 else 'prose'} " + HOSTILE[i % 6] for i in range(300)]
    asked = [f"{TREES[c]} {HOSTILE[i % 6]}" for i, c in enumerate(make_pool()["cluster"])]
    chats = [[{"content": text, "role": "user"}, {"content": "x", "role": "assistant"}] for text in asked]
    return make_pool(
        cluster_distance=[float((7 * i) % 300) for i in range(300)],
        text=texts,
        messages=chats,
        source_index=[f"{HOSTILE[i % 6]} {i}" for i in range(300)],
        source=[HOSTILE[i % 3] for i in range(300)],
        iqs_status=["truncated" if i == 9 else "ok" for i in range(300)],
    )


@pytest.fixture(scope="module")
def selected(pool: Dataset) -> Dataset:
    return select_car(pool.remove_columns("embedding"), 40, 1)


@pytest.fixture(scope="module")
def page(pool: Dataset, selected: Dataset) -> str:
    return SelectionReport.from_selection(pool, selected).to_html(pool, selected, head=HEAD)


class Reader(HTMLParser):
    """Parse the tags of a page, the content of its scripts, and the text of its tables' cells by the table's id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.cells: dict[str, list[str]] = {}
        self.inside, self.table, self.in_cell = "", "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "table":
            self.table = str(dict(attrs).get("id"))
        if tag in ("td", "th"):
            self.cells.setdefault(self.table, []).append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)
        if self.in_cell:
            self.cells[self.table][-1] += data


def data_of(page: str) -> dict[str, Any]:
    return json.loads(Reader(page).scripts[0])


# what is on it --------------------------------------------------------------------------------------------------------


def test_nothing_of_the_page_lies_elsewhere(page: str) -> None:
    tags = Reader(page).tags
    places = {f"#{attributes['id']}" for _, attributes in tags if "id" in attributes}
    for tag, attributes in tags:
        for name in ("src", "href", "srcset", "action"):
            value = attributes.get(name) or "data:image/png"
            assert value.startswith("data:image/png") or (tag == "a" and value in places)
        assert not [name for name in attributes if name.startswith("on")]
    assert [tag for tag, _ in tags].count("script") == 2
    assert [tag for tag, _ in tags].count("img") == len(PLOTS) - 1  # the map is drawn by the page itself
    assert "default-src 'none'" in page


def test_its_head_tells_the_origin_and_the_verdict(page: str, pool: Dataset, selected: Dataset) -> None:
    first, second = SelectionReport.from_selection(pool, selected).verdict()
    assert f"<h1>Selection report: {escape(HOSTILE[2])}</h1>" in page
    assert "<dt>Settings</dt><dd>n1 = 40</dd>" in page
    assert f"{len(selected)} of 300 rows were selected" in first
    assert escape(first) in page and escape(second) in page


def test_the_report_the_ledger_and_the_audit_are_on_it(page: str, pool: Dataset, selected: Dataset) -> None:
    report, cells = SelectionReport.from_selection(pool, selected), Reader(page).cells
    assert cells["comparison"] == [cell for row in report.comparison() for cell in row]
    for name, count in report.selected_by.items():
        place = cells["ledger"].index(name)
        assert cells["ledger"][place + 1 : place + 3] == [str(count), f"{100 * count / len(selected):.1f} %"]
    lines = [cells["audit"][i : i + 7] for i in range(7, len(cells["audit"]), 7)]
    assert lines[0][1:3] == ["all scored rows", "300"]
    by_length = [line for line in lines if line[0] == "tokens"]
    by_source = [line for line in lines if line[0] == "source"]
    assert len(by_length) == 5
    assert len(by_source) == 3
    for group in (by_length, by_source):
        assert sum(int(line[2]) for line in group) == 300
        assert sum(int(line[4]) for line in group) == len(selected)
    present = [line for line in re.findall(r'<tr class="present">(.*?)</tr>', page)]
    assert len(present) == 1
    assert "<td>40</td><td>1</td><td>12</td>" in present[0]


def test_rows_are_what_the_datasets_hold(page: str, pool: Dataset, selected: Dataset) -> None:
    data = data_of(page)
    kept = dict(zip(selected["source_index"][:], selected["selected_by"][:], strict=True))
    for row, own in zip(data["rows"], pool, strict=True):
        assert row["id"] == own["source_index"]
        assert row["score"] == pytest.approx(own["iqs_score"], abs=1e-5)
        assert (row["cluster"], row["length"], row["by"]) == (
            own["cluster"],
            own["iqs_tokens"],
            kept.get(row["id"], ""),
        )
        assert -1 <= row["x"] <= 1
    assert [row["cut"] for row in data["rows"]].count(True) == 1
    assert [len(tenth["rows"]) for tenth in data["deciles"]] == [10] * 10
    means = [np.mean([data["rows"][i]["score"] for i in tenth["rows"]]) for tenth in data["deciles"]]
    assert means == sorted(means, reverse=True)
    assert sum(data["sizes"].values()) == 300
    for cluster in data["clusters"]:
        members = [row for row in data["rows"] if row["cluster"] == cluster["label"]]
        scores = sorted((row["score"] for row in members), reverse=True)
        assert (cluster["rows"], cluster["kept"]) == (len(members), sum(row["by"] != "" for row in members))
        assert cluster["mean"] == pytest.approx(np.mean(scores), abs=1e-3)
        assert [data["rows"][i]["score"] for i in cluster["best"]] == scores[:3]
        assert [data["rows"][i]["score"] for i in cluster["worst"]] == scores[-3:]
        distances = {pool["cluster_distance"][i]: i for i, c in enumerate(pool["cluster"]) if c == cluster["label"]}
        assert cluster["typical"] == distances[min(distances)]
        assert data["names"][str(cluster["label"])].split(", ")[0] == TREES[cluster["label"]]


def test_every_row_says_what_explain_says(page: str, pool: Dataset, selected: Dataset) -> None:
    data = data_of(page)
    assert len(data["rows"]) == 300
    for row in data["rows"][::50]:
        found = explain(pool, selected, row["id"])
        assert (row["why"], row["rank"], row["crank"]) == (found.why, found.score_rank, found.cluster_rank)
        assert data["sizes"][str(row["cluster"])] == found.cluster_size
        assert [near[0] for near in row["near"]] == [n.row for n in found.neighbours]
        assert found.nearest_selected is not None and row["kept"][0] == found.nearest_selected.row
        fields = dict(row["fields"])
        own = pool[pool["source_index"][:].index(row["id"])]
        assert fields["text"] == own["text"]
        assert fields["messages"] == [[turn["role"], turn["content"]] for turn in own["messages"]]


def test_a_long_row_is_cut_within_its_fields_and_turns() -> None:
    turns = [("user", "a" * 40), ("assistant", "b" * 400), ("user", "c" * 400)]
    fields = _shortened([("kind", "short"), ("text", "d" * 400), ("chat", turns)], 305)
    assert fields[0] == ("kind", "short")
    assert fields[1] == ("text", "d" * 149 + "…")
    assert fields[2] == ("chat", [("user", "a" * 40), ("assistant", "b" * 109 + "…"), ("…", "")])


def test_equal_input_gives_equal_bytes(page: str, pool: Dataset, selected: Dataset) -> None:
    assert SelectionReport.from_selection(pool, selected).to_html(pool, selected, head=HEAD) == page


@pytest.mark.slow
def test_a_large_pool_gives_a_small_page_that_says_so() -> None:
    large = make_pool(30_000, 100, text=["word " * 2_000] * 30_000)
    chosen = select_car(large.remove_columns("embedding"), 5_000, 1)
    page = SelectionReport.from_selection(large, chosen).to_html(large, chosen)
    rows = data_of(page)["rows"]
    assert PAGE_ROWS <= len(rows) <= PAGE_ROWS + 400
    assert len(page) < 6_000_000
    assert f"This page holds a sample of {len(rows):,} of the 30,000 scored rows." in page


def test_without_embeddings_the_page_has_no_map(pool: Dataset, selected: Dataset) -> None:
    plain = pool.remove_columns("embedding")
    page = SelectionReport.from_selection(plain, selected).to_html(plain, selected)
    assert 'id="map"' not in page
    assert "There is no map" in page
    assert len(data_of(page)["rows"]) == 300


@pytest.mark.parametrize(
    "changes",
    [
        {"iqs_score": [1.0] * 300},
        {"embedding": [None] * 299 + [[1.0, 2.0]]},
        {"embedding": [None] * 300},
        {"cluster": [None] * 299 + [3]},
        {"iqs_score": [None] * 298 + [1.0, 2.0]},
    ],
    ids=["one score", "one embedding", "no embeddings", "one clustered", "two scored"],
)
def test_odd_pools_have_a_page_too(changes: dict[str, Any]) -> None:
    odd = make_pool(**changes)
    chosen = select_car(odd, 2, 1, allow_worse=True)
    assert data_of(SelectionReport.from_selection(odd, chosen).to_html(odd, chosen))["rows"]


# hostile rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_json_in_a_script_cannot_end_it(text: str) -> None:
    written = page_environment().from_string("{{ data | tojson }}").render(data={"text": text})
    assert not set(written) & set("<>&'\u2028\u2029")
    assert json.loads(written) == {"text": text}


def test_hostile_rows_add_no_tag(page: str) -> None:
    names = [tag for tag, _ in Reader(page).tags]
    assert not {"iframe", "svg"} & set(names)
    assert "javascript:" not in "".join(str(attributes) for _, attributes in Reader(page).tags)
    assert "{{" not in page.split('<script id="data"')[0]


# in a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start a headless Chromium: the machine's own (`apt-get install chromium`), driven by playwright."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[test]'")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium, or CHROMIUM=path")
    with driver.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, page: str, tmp_path: Path) -> Iterator[Any]:
    """Open the page; what it complains about, or asks the network for, fails the test."""
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    tab = browser.new_page(viewport={"width": 1000, "height": 900})
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: None if request.url[:5] in ("file:", "data:") else complaints.append(request.url))
    tab.goto((tmp_path / "report.html").as_uri())
    yield tab
    assert tab.title() == "Selection report"  # which the hostile rows try to change
    tab.close()
    assert complaints == []


def test_the_table_filters_and_sorts(opened: Any) -> None:
    assert opened.locator("#found").inner_text() == "300 of 300 rows on this page"
    assert opened.locator("#rows tr.row").count() == 50
    opened.locator("#more").click()
    assert opened.locator("#rows tr.row").count() == 100
    opened.locator("#search").fill("POEMS row")
    assert opened.locator("#found").inner_text() == "6 of 300 rows on this page"
    texts = opened.locator("#rows td.text").all_inner_texts()
    assert len(texts) == 6
    assert all("poems" in text for text in texts)
    opened.locator("#search").fill("")
    opened.locator("#which").select_option("kept")
    kept = opened.locator("#found").inner_text()
    assert re.match(r"(4\d|5\d) of 300", kept), kept
    by_score = opened.locator("#rows th").nth(1)
    for order in ("descending", "ascending"):  # by the keyboard, all rows that were found
        by_score.locator("button").press("Enter")
        assert by_score.get_attribute("aria-sort") == order
        scores = [float(text) for text in opened.locator("#rows td:nth-child(2)").all_inner_texts()]
        assert scores == sorted(scores, reverse=order == "descending")
    shares = opened.locator("#audit th").nth(5)
    shares.locator("button").click()
    assert shares.get_attribute("aria-sort") == "descending"
    told = [float(text.removesuffix(" %")) for text in opened.locator("#audit td:nth-child(6)").all_inner_texts()]
    assert told == sorted(told, reverse=True)


def test_the_search_finds_rows_clusters_and_words_behind_the_first_ones(browser: Any, tmp_path: Path) -> None:
    texts = [f"text {i} " + "and so on " * 30 + ("finally" if i % 100 == 7 else "") for i in range(300)]
    pool = make_pool(text=texts)
    selected = select_car(pool.remove_columns("embedding"), 40, 1)
    content = SelectionReport.from_selection(pool, selected).to_html(pool, selected)
    (tmp_path / "report.html").write_text(content, encoding="utf-8")
    tab = browser.new_page()
    tab.goto((tmp_path / "report.html").as_uri())

    def found(words: str) -> list[str]:
        tab.locator("#search").fill(words)
        return tab.locator("#rows td:first-child").all_inner_texts()

    assert found("finally") == ["7", "107", "207"]
    assert found("row 17") == ["17"]
    members = [str(i) for i, cluster in enumerate(pool["cluster"][:]) if cluster == 3]
    assert found("cluster 3") == members
    assert found(f"cluster 3 row {members[1]}") == [members[1]]
    assert found("cluster 99") == []
    tab.locator("#search").fill("row 107")
    assert f"of {pool['cluster'][:].count(pool['cluster'][107])}" in tab.locator("#rows td:nth-child(5)").inner_text()
    assert "finally" not in tab.locator("#rows td.text").inner_text()
    tab.locator("#rows summary").press("Enter")  # the text opens in place
    tab.locator("#rows .full").wait_for()
    assert "finally" in tab.locator("#rows td.text").inner_text()
    assert not tab.locator("#why").is_visible()
    tab.locator("#rows tr.row button").press(" ")
    assert "finally" in tab.locator("#why").inner_text()
    tab.keyboard.press("Escape")
    assert not tab.locator("#why").is_visible()
    assert tab.evaluate("document.activeElement.textContent") == "107"  # where the reader was
    tab.close()


def spot_of(opened: Any, row: dict[str, Any]) -> tuple[float, float]:
    """Return where the script has drawn a row, in pixels of the window."""
    unit = opened.evaluate(
        "(id) => { const s = spots.find((spot) => spot.row.id === id); return [s.x, s.y]; }", row["id"]
    )
    opened.locator("#map").scroll_into_view_if_needed()
    box = opened.locator("#map").bounding_box()
    return box["x"] + unit[0], box["y"] + unit[1]


def test_the_map_shows_the_row_under_the_pointer_and_a_click_explains_it(opened: Any, page: str) -> None:
    rows = data_of(page)["rows"]
    told = next(row for row in rows if row["by"])
    opened.mouse.move(*spot_of(opened, told))
    hover = opened.locator("#hover")
    assert hover.is_visible()
    number = re.match(r"row number \d+ about", dict(told["fields"])["text"]).group()
    assert number in hover.inner_text()
    assert f"score {told['score']:.3f}, kept by {told['by']}" in hover.inner_text()
    assert f"Cluster {told['cluster']} {TREES[told['cluster']]}" in hover.inner_text()
    opened.mouse.click(*spot_of(opened, told))
    story = opened.locator("#why").inner_text()
    assert number in story and told["why"][1:] in story
    assert opened.locator("#why .turn").all_inner_texts()[1] == "assistant\nx"
    opened.locator("#why").get_by_text("Close").click()
    opened.mouse.move(1, 1)
    assert not hover.is_visible()


def test_the_map_is_reached_by_the_keyboard(opened: Any) -> None:
    opened.locator("#map").focus()
    for key in ("ArrowRight", "ArrowDown"):
        opened.keyboard.press(key)
    spoken = opened.locator("#spoken").text_content()
    assert re.match("Row .*, score ", spoken)
    opened.keyboard.press("Enter")
    assert opened.locator("#why h2").inner_text() in spoken.replace(", score", "")
    opened.keyboard.press("Tab")  # inside the story
    assert opened.evaluate("document.getElementById('why').contains(document.activeElement)")


def test_choices_redraw(opened: Any) -> None:
    picture = "document.getElementById('map').toDataURL()"
    seen = [opened.evaluate(picture)]
    for choice, value in (
        ("colour", "cluster"),
        ("single", "3"),
        ("single", ""),
        ("colour", "taken"),
        ("shown", "kept"),
    ):
        opened.locator(f"#{choice}").select_option(value)
        seen.append(opened.evaluate(picture))
    opened.locator("#labels").uncheck()
    seen.append(opened.evaluate(picture))
    assert len(set(seen)) == 6 and seen[1] == seen[3]
    first = opened.locator("#deciles").inner_text()
    opened.locator("#decile").select_option("9")
    assert opened.locator("#deciles").inner_text() != first
    opened.locator("#deciles tr.row td").nth(1).click()
    assert "Nearest in its cluster" in opened.locator("#why").inner_text()
    shown = opened.locator("#why h2").inner_text()
    opened.locator("#why dd button").first.click()  # the story of a neighbour
    assert opened.locator("#why h2").inner_text() != shown
    opened.keyboard.press("Escape")
    opened.locator("#cluster").select_option("1")
    assert opened.locator("#ends tr.row").count() == 6


def test_axe_finds_nothing_serious(opened: Any) -> None:
    """Look for what keys or a screen reader cannot reach, and for pale colours: the page in dark, a story in light."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs pip install '.[test]'").Axe()

    def serious() -> list[str]:
        found = axe.run(opened, options={"resultTypes": ["violations"]}).response["violations"]
        return [each["help"] for each in found if each["impact"] in ("serious", "critical")]

    opened.emulate_media(color_scheme="dark")
    assert serious() == []
    opened.emulate_media(color_scheme="light")
    opened.locator("#rows tr.row button").first.click()
    assert serious() == []
