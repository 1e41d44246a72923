"""The inspector in a real browser: every promise, on a planned model and on documents by hand."""

from __future__ import annotations

import json
import re

import pytest

from graphopt.inspect.page import render
from tests.inspect.browser import (
    PHONE,
    chromium,
    document,
    layers,
    node,
    open_page,
    planned_net,
    written,
)

pytest.importorskip("playwright")
from playwright.sync_api import expect

pytestmark = pytest.mark.skipif(chromium() is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def planned():
    return planned_net()[1]


@pytest.fixture(scope="module")
def main_page(planned, tmp_path_factory):
    return written(tmp_path_factory.mktemp("main"), planned)


@pytest.fixture
def main(chrome, main_page):
    opened = open_page(chrome, main_page)
    yield opened
    opened.clean()
    opened.page.context.close()


def boxes(page, side="after"):
    return page.locator(f"#{side} .box")


def frame_fill(page, name, side="after"):
    script = "e => getComputedStyle(e.querySelector('.frame')).fill"
    return page.locator(f'#{side} .leaf[data-node="{name}"]').evaluate(script)


def recomputed(data):
    last = data["snapshots"][-1]
    return [data["nodes"][int(i)]["name"] for i in last["again"]]


def test_the_summary_comes_first(main, planned):
    text = main.page.inner_text("#summary")
    memory = planned["summary"]["figures"][0]
    assert main.page.locator("#graph").is_hidden()
    assert "memory = 70%" in text
    assert memory["after"] <= memory["limit"] < memory["before"]
    for word in ("canonicalize", "rematerialize", "proven bound", "gap", "blocks.3.up"):
        assert word in text
    assert main.page.title() == "Net – graphopt"


def test_scopes_open_and_close_and_stay_aligned(main):
    page = main.graph()
    block = page.locator('#after .group[data-scope="blocks.1"]')
    before = boxes(page).count()
    block.click()
    page.wait_for_selector('#after .room[data-scope="blocks.1"]')
    assert boxes(page).count() > before
    for side in ("before", "after"):
        assert page.locator(f'#{side} .group[data-scope="blocks.1.up"]').count() == 1
    page.locator('#after .room[data-scope="blocks.1"] .bar').click()
    page.wait_for_selector('#after .group[data-scope="blocks.1"]')
    assert boxes(page).count() == before
    places = """side => [...document.querySelectorAll(`#${side} [data-item]`)]
        .map(e => [e.dataset.item, e.getAttribute("transform")])"""
    assert page.evaluate(places, "before") == page.evaluate(places, "after")
    page.keyboard.press("e")
    page.wait_for_selector("#after .room >> nth=4", state="attached")
    page.keyboard.press("f")
    page.wait_for_selector('#after .room[data-scope="blocks.1.up"]', state="attached")
    page.keyboard.press("c")
    page.wait_for_selector('#after .group[data-scope="blocks"]')


def test_layout_is_made_in_a_worker(main):
    page = main.graph()
    assert page.evaluate("document.documentElement.dataset.layout") == "worker"


def test_without_workers_the_layout_is_made_on_the_page(chrome, main_page):
    for script in ("delete window.Worker", "window.Worker = class { constructor() { throw 1 } }"):
        opened = open_page(chrome, main_page, script=script)
        page = opened.graph()
        assert page.evaluate("document.documentElement.dataset.layout") == "page"
        assert boxes(page).count() > 3
        opened.clean()
        page.context.close()


def test_parameters_and_gradients_are_chips(main):
    page = main.page
    page.evaluate("location.hash = 'node=addmm'")
    page.wait_for_selector("#after .selected")
    for name, path in (("addmm", "blocks.0.up.bias"), ("t", "blocks.0.up.weight")):
        leaf = page.locator(f'#after .leaf[data-node="{name}"]')
        assert leaf.locator(f'.chip[data-state="{path}"]').count() == 1
        assert leaf.locator(".chip-text").all_text_contents() == [path.rpartition(".")[2]]
    gradient = page.locator('#after .chip[data-node="gradient blocks.0.up.weight"]')
    assert gradient.locator(".chip-text").text_content() == "∂weight"


def test_the_slider_goes_through_the_passes(main, planned):
    page = main.graph()
    last = len(planned["snapshots"]) - 1
    slider = page.locator("#passes")
    assert slider.get_attribute("max") == str(last)
    assert slider.input_value() == str(last)
    after = page.inner_text("#timeline-after .caption")
    slider.focus()
    page.keyboard.press("Home")
    assert page.inner_text("#pass-label") == "capture"
    assert page.inner_text("#after-title") == "as captured"
    assert page.inner_text("#timeline-after .caption") != after
    peak = page.inner_text("#timeline-before .caption").removeprefix("before")
    assert page.inner_text("#timeline-after .caption").endswith(peak)
    page.locator("body").click(position={"x": 5, "y": 5})
    for _ in range(last):
        page.keyboard.press("]")
    assert slider.input_value() == str(last)
    assert page.inner_text("#timeline-after .caption") == after


def test_what_runs_again_says_so(main, planned):
    (name, *_) = recomputed(planned)
    page = main.page
    page.evaluate("name => { location.hash = `node=${encodeURIComponent(name)}` }", name)
    page.wait_for_selector("#after .selected.changed")
    assert page.locator("#before .selected.changed").count() == 0
    assert "runs 2 times in a step" in page.inner_text("#panel")
    assert "×2" in page.locator(f'#after .leaf[data-node="{name}"]').text_content()
    assert page.locator("#timeline-before .cursor").count() == 1
    assert page.locator("#timeline-after .cursor").count() == 2


def test_overlays_with_legends(show):
    nodes = [node("a", bytes=100), node("b", "a", bytes=400), node("c", "b", bytes=0)]
    values = {"a": -2.0, "b": 0.0, "c": 2.0}
    signed = {"name": "relevance", "title": "relevance", "kind": "diverging", "values": values}
    choice = {"name": "kept", "title": "kept", "kind": "categorical", "legend": {"kept": "as is"}}
    choice["values"] = {"a": "kept", "b": "replaced"}
    page = show(document(nodes, overlays=[signed, choice])).graph()
    options = page.locator("#overlay option").all_inner_texts()
    assert options == ["phase", "bytes", "relevance", "kept"]
    page.select_option("#overlay", "relevance")
    low, middle, high = (frame_fill(page, name) for name in "abc")
    assert (low, middle, high) == ("rgb(26, 79, 139)", "rgb(245, 245, 243)", "rgb(163, 74, 0)")
    assert page.inner_text("#legend").split() == ["-2", "2"]
    page.select_option("#overlay", "bytes")
    assert frame_fill(page, "b") == "rgb(22, 50, 92)"  # the largest has the darkest
    assert frame_fill(page, "a") not in (frame_fill(page, "b"), frame_fill(page, "c"))
    assert page.inner_text("#legend").split() == ["0", "B", "400", "B"]
    page.select_option("#overlay", "kept")
    assert frame_fill(page, "a") != frame_fill(page, "b")
    assert page.locator("#legend .value").all_inner_texts() == ["kept", "replaced"]
    assert page.locator("#legend .value").first.get_attribute("title") == "as is"
    assert "kept" in page.locator('#after .leaf[data-node="a"]').text_content()
    page.keyboard.press("o")
    assert page.locator("#overlay").input_value() == "phase"


def test_the_timeline_is_tied_to_the_graph_both_ways(main, planned):
    page = main.graph()
    chart = page.locator("#timeline-after svg")
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 60)
    step = re.search(r"step (\d+) of", page.inner_text("#timeline-after .caption"))
    line = planned["timelines"][planned["snapshots"][-1]["timeline"]]
    name = planned["nodes"][line["steps"][int(step[1]) - 1]]["name"]
    assert page.inner_text("#timeline-after .caption").startswith(name)
    assert page.locator("#after .hot").count() == 1
    assert page.locator("#timeline-before .cursor").count() >= 1
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 60)
    page.wait_for_selector("#after .selected")
    assert page.inner_text("#panel h2") == name
    page.keyboard.press("Escape")
    page.mouse.move(5, 5)
    page.keyboard.press("f")
    assert page.locator("#timeline-after .cursor").count() == 0
    page.locator('#after .group[data-scope="blocks.2"]').hover()
    assert page.locator("#timeline-after .cursor").count() >= 1
    assert page.locator("#timeline .budget").count() == 2
    assert page.locator("#timeline .boundary").count() == 2


def test_the_timeline_by_keys(main):
    page = main.graph()
    page.locator("#timeline-after svg").focus()
    page.keyboard.press("Home")
    assert "step 1 of" in page.inner_text("#timeline-after .caption")
    page.keyboard.press("ArrowRight")
    assert "step 2 of" in page.inner_text("#timeline-after .caption")
    page.keyboard.press("Enter")
    page.wait_for_selector("#after .selected")


def test_the_drawn_bytes_are_those_of_the_document(show):
    nodes = [node("a"), node("b", "a"), node("c", "b", phase="backward")]
    line = {
        "title": "capture",
        "categories": ["saved", "forward", "recomputed", "backward", "workspace"],
        "steps": [0, 1, 2],
        "boundary": 2,
        "spans": [[0, 0, 2, 100, 0], [1, 1, 1, 50, 1]],
        "workspace": [0, 7, 0],
        "peak": 157,
        "peak_step": 1,
        "budget": 120,
    }
    page = show(document(nodes, timelines=[line])).graph()
    chart = page.locator("#timeline-after svg")
    chart.focus()
    told = []
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
        told.append(re.findall(r"(\w+) ([\d.]+) B", page.inner_text("#timeline-after .caption")))
    assert told == [
        [("a", "100"), ("saved", "100")],
        [("b", "157"), ("saved", "100"), ("forward", "50"), ("workspace", "7")],
        [("c", "100"), ("saved", "100")],
    ]
    assert "budget 120 B" in chart.text_content()


def test_search_by_name_op_and_scope(main, planned):
    page = main.graph()
    for words, wanted in (
        ("addmm_2", lambda n: "addmm_2" in n["name"]),
        ("aten.gelu", lambda n: "aten.gelu" in n.get("target", "")),
        ("blocks.2 gelu", lambda n: "blocks.2" in n.get("scope", "") and "gelu" in n["name"]),
    ):
        page.keyboard.press("f")
        page.keyboard.press("/")
        page.keyboard.type(words)
        found = int(page.inner_text("#results .count").split()[0])
        assert found >= sum(map(wanted, planned["nodes"])) > 0
        assert page.locator("#after .found").count() > 0
        page.keyboard.press("ArrowDown")
        name = page.locator('#results [aria-selected="true"]').get_attribute("data-to")
        page.keyboard.press("Enter")
        expect(page.locator("#panel h2")).to_have_text(name)
        page.wait_for_selector(f'#after .selected[data-node="{name}"]')
        assert wanted(next(n for n in planned["nodes"] if n["name"] == name))
    page.keyboard.press("/")
    page.keyboard.type("no such thing")
    assert page.inner_text("#results .count") == "nothing found"


def test_a_link_opens_a_node(chrome, main_page, planned):
    opened = open_page(chrome, main_page, address="node=gelu_2&pass=0&overlay=bytes")
    page = opened.page
    page.wait_for_selector('#after .selected[data-node="gelu_2"]')
    box = page.locator('#after .leaf[data-node="gelu_2"]').bounding_box()
    pane = page.locator("#after").bounding_box()
    assert pane["x"] < box["x"] < pane["x"] + pane["width"]
    assert pane["y"] < box["y"] < pane["y"] + pane["height"]
    assert page.locator("#passes").input_value() == "0"
    assert page.locator("#overlay").input_value() == "bytes"
    page.locator("#panel [data-to]").first.click()
    expect(page.locator("#panel h2")).not_to_have_text("gelu_2")
    assert "node=" in page.url
    assert "gelu_2" not in page.url
    page.evaluate("location.hash = 'node=addmm'")
    page.wait_for_selector('#after .selected[data-node="addmm"]')
    opened.clean()
    page.context.close()


def test_the_panel_has_facts_source_and_neighbours(main, planned):
    page = main.page
    page.evaluate("location.hash = 'node=gelu_1'")
    page.wait_for_selector("#after .selected")
    found = next(n for n in planned["nodes"] if n["name"] == "gelu_1")
    text = page.inner_text("#panel")
    for part in ("blocks.1", "float32", "[64, 64]", "16.4 kB", "aten.gelu"):
        assert part in text
    assert "gelu(self.up(x))" in text
    assert "browser.py" in text
    shown = page.locator("#panel section", has_text="reads").locator("[data-to]").first
    assert shown.get_attribute("data-to") == found["inputs"][0]
    shown.click()
    expect(page.locator("#panel h2")).to_have_text(found["inputs"][0])


def test_keys_walk_along_edges(main):
    page = main.page
    page.evaluate("location.hash = 'node=gelu_1'")
    page.wait_for_selector('#after .selected[data-node="gelu_1"]')
    page.keyboard.press("Enter")
    page.wait_for_selector('#after .group.selected[data-scope="blocks.1"]')
    page.keyboard.press("Enter")
    page.wait_for_selector('#after .selected[data-node="gelu_1"]')
    heading = page.locator("#panel h2")
    page.keyboard.press("ArrowUp")
    expect(heading).not_to_have_text("gelu_1")
    above = heading.inner_text()
    assert above.startswith(("view", "addmm"))
    page.keyboard.press("ArrowRight")
    expect(heading).not_to_have_text(above)
    page.keyboard.press("Escape")
    assert heading.inner_text() == "Nothing selected"
    page.keyboard.press("s")
    assert page.locator("#summary").is_visible()


def test_light_and_dark(chrome, main_page):
    def back(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    colours = {}
    for scheme in ("light", "dark"):
        opened = open_page(chrome, main_page, color_scheme=scheme)
        colours[scheme] = back(opened.page)
        opened.page.click("#theme")
        colours[f"other than {scheme}"] = back(opened.page)
        opened.page.context.close()
    assert colours["light"] == colours["other than dark"] != colours["dark"]
    assert colours["dark"] == colours["other than light"]


def test_a_phone_shows_one_side_at_a_time(chrome, main_page):
    opened = open_page(chrome, main_page, viewport=PHONE)
    page = opened.graph()
    assert page.locator("#before").is_hidden()
    page.click("#side")
    page.wait_for_selector("#before .box")
    assert page.locator("#after").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.keyboard.press("s")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    opened.clean()
    page.context.close()


HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'


def test_whatever_is_shown_is_text(show):
    nodes = [
        node("<script>", source=0, scope="<b>.x", literals={"0": HOSTILE}),
        node(HOSTILE, "<script>", target=HOSTILE, state=[HOSTILE], type=HOSTILE),
        node("{{script}} \u2028 \ud800 __proto__", HOSTILE),
        node("__proto__", HOSTILE),
    ]
    notes = {"name": "o", "title": HOSTILE, "kind": "categorical", "notes": {"<script>": HOSTILE}}
    notes |= {"values": {"<script>": HOSTILE}, "legend": {HOSTILE: HOSTILE}}
    data = document(nodes, overlays=[notes], title=HOSTILE, sources=[f"{HOSTILE}:3: {HOSTILE}"])
    data["summary"]["warnings"] = [HOSTILE]
    data["summary"]["budget"] = {HOSTILE: HOSTILE}
    opened = show(data)
    page = opened.page
    assert page.inner_text("#summary h1") == HOSTILE
    opened.graph()
    page.select_option("#overlay", "o")
    for each in nodes:
        page.evaluate(
            "n => { location.hash = `node=${encodeURIComponent(n)}` }",
            each["name"].replace("\ud800", "\ufffd"),
        )
        page.keyboard.press("/")
        page.keyboard.type("script")
        page.keyboard.press("Escape")
    page.evaluate("location.hash = 'node=%3Cscript%3E'")
    page.wait_for_selector('#after .selected[data-node="<script>"]')
    assert page.inner_text("#panel h2") == "<script>"
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3


def test_the_policy_forbids_network_and_foreign_scripts(main):
    page = main.page
    tried = page.evaluate(
        """async () => {
          const script = document.createElement("script");
          script.textContent = "window.foreign = 1";
          document.head.append(script);
          const answer = await fetch("https://example.org/x").then(() => "sent", () => "refused");
          return [window.foreign ?? null, answer];
        }"""
    )
    assert tried == [None, "refused"]
    assert all("Content Security Policy" in text or "violates" in text for text in main.complaints)
    assert main.complaints
    main.complaints.clear()
    main.requests.clear()


def test_an_empty_graph(show):
    opened = show(document([]))
    page = opened.page
    page.keyboard.press("g")
    page.wait_for_selector("#empty:visible")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("/")
    page.keyboard.type("x")
    assert page.inner_text("#results .count") == "nothing found"


def test_another_schema_version_is_refused_by_the_page(chrome, tmp_path):
    for change, words in (
        ({"schema_version": 99}, "schema version 99; this page reads 2"),
        ({"format": "other"}, "no graphopt inspection"),
    ):
        file = tmp_path / "page.html"
        file.write_text(render({**document([node("a")]), **change}), encoding="utf-8")
        opened = open_page(chrome, file)
        assert words in opened.page.inner_text("#failure")
        assert opened.page.locator("#summary").is_hidden()
        opened.clean()
        opened.page.context.close()


def test_ten_thousand_nodes_in_modules(show):
    opened = show(layers(10_000))
    page = opened.graph()
    assert boxes(page).count() < 200
    page.evaluate("location.hash = 'node=f4321'")
    page.wait_for_selector('#after .selected[data-node="f4321"]')


@pytest.mark.slow
def test_ten_thousand_nodes_open_at_once(show):
    page = show(layers(10_000)).graph()
    page.keyboard.press("e")
    while page.evaluate("inspector.graph.items.size") < 10_000:
        page.wait_for_timeout(100)
    assert boxes(page).count() < 2_000


def test_ten_thousand_nodes_without_modules(show):
    nodes = [node("n0"), *(node(f"n{i}", f"n{i - 1}") for i in range(1, 10_000))]
    page = show(document(nodes)).graph()
    assert boxes(page).count() < 200
    page.evaluate("location.hash = 'node=n9999'")
    page.wait_for_selector('#after .selected[data-node="n9999"]')


def test_a_deep_and_a_cyclic_scope_tree(show):
    deep = ".".join("abcdefghij" * 12)
    nodes = [
        node("a", scope="shared"),
        node("b", "a", scope="other"),
        node("c", "b", scope="shared"),  # a module that is called twice: its box is in a cycle
        node("d", "c", scope=deep),
        node("e", "d", scope="a.b"),
    ]
    page = show(document(nodes)).graph()
    page.evaluate("location.hash = 'node=d'")
    page.wait_for_selector('#after .selected[data-node="d"]')


def test_the_json_in_the_page_is_the_document(main, planned):
    found = json.loads(main.page.locator("#inspection").text_content())
    assert found == json.loads(json.dumps(planned))
