"""The inspector in a real browser, on documents and names that are out of the ordinary."""

from __future__ import annotations

import re

import pytest

from tests.inspect.browser import chromium, document, node

pytest.importorskip("playwright")

pytestmark = pytest.mark.skipif(chromium() is None, reason="needs Chromium")


def states(*snapshots):
    """Snapshots of these ``(label, added, changed)``, all with the same timeline."""
    fixed = {"recorded": True, "timeline": 0, "removed": []}
    return [{"label": n, "added": a, "changed": c, **fixed} for n, a, c in snapshots]


def contrast(page, selector):
    """WCAG's contrast of a text with the card that it stands on, or its own background."""
    colours = page.eval_on_selector(
        selector,
        """e => {
            const own = getComputedStyle(e);
            const card = getComputedStyle(document.querySelector("header"));
            const back = own.backgroundColor === "rgba(0, 0, 0, 0)" ? card : own;
            return [own.color, back.backgroundColor];
        }""",
    )
    lights = []
    for colour in colours:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_names_that_every_object_has(show):
    nodes = [
        node("constructor", scope="constructor.toString", state=["valueOf"]),
        node("__proto__", "constructor", scope="__proto__.hasOwnProperty"),
    ]
    state = {"valueOf": {"shape": [4], "dtype": "float32", "trainable": True, "constant": False}}
    resized = states(("capture", [0, 1], {}), ("prune", [], {}))
    resized[1]["state"] = {}
    opened = show(document(nodes, state=state, snapshots=resized))
    page = opened.graph()
    for name in ("constructor", "__proto__"):
        page.evaluate("name => { location.hash = `node=${name}` }", name)
        page.wait_for_selector(f'#after .selected[data-node="{name}"]')
        assert page.inner_text("#panel h2") == name
    page.evaluate("location.hash = 'node=constructor'")
    page.wait_for_selector('#after .selected[data-node="constructor"]')
    assert "valueOf float32[4]" in page.inner_text("#panel")
    for text in (page.text_content("#after"), page.inner_text("#panel")):
        assert "native code" not in text
        assert "[object" not in text


def test_fields_that_a_pass_takes_away(show):
    nodes = [node("a", literals={"1": "2"}, shapes=[[4]], dtypes=["float32"], scope="block")]
    gone = {"literals": None, "shapes": None, "dtypes": None, "scope": None}
    steps = states(("capture", [0], {}), ("simplify", [], {"0": gone}))
    page = show(document(nodes, snapshots=steps), address="node=a").graph()
    rows = page.locator("#panel .facts tr").all_inner_texts()
    told = {text.split("\t")[0]: text.split("\t")[1] for text in rows}
    assert told["arguments"] == "1: 2 –"
    assert told["shape"] == "[4] –"
    assert told["dtype"] == "float32 –"
    assert told["module"] == "block –"


def test_what_a_pass_adds_stands_with_what_it_reads(show):
    nodes = [
        node("x", op="input"),
        node("own", "x"),
        node("made", "own", scope="block.relu"),
        node("packed", "made"),
        node("unpacked", "packed", phase="backward"),
    ]
    steps = states(("capture", [0, 1, 2], {}), ("share", [3, 4], {}))
    page = show(document(nodes, snapshots=steps)).graph()
    page.keyboard.press("c")
    page.wait_for_selector("#after .group")
    leaves = page.locator("#after .leaf").evaluate_all("all => all.map(e => e.dataset.node)")
    assert sorted(leaves) == ["own", "x"]  # what the model does by itself stays where it was
    assert "3 nodes" in page.text_content("#after .group")
    assert "1 node" in page.text_content("#before .group")


def test_the_slider_takes_arrows_and_leaves_letters(show):
    nodes = [node("a"), node("b", "a")]
    steps = states(("capture", [0, 1], {}), ("one", [], {}), ("two", [], {}))
    page = show(document(nodes, snapshots=steps)).graph()
    page.locator("#passes").focus()
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#pass-label") == "one"
    assert page.inner_text("#panel h2") == "Nothing selected"
    page.keyboard.press("[")
    assert page.inner_text("#pass-label") == "capture"
    page.keyboard.press("s")
    assert page.locator("#summary").is_visible()


def test_the_timeline_is_named_after_the_pass_that_is_shown(show):
    steps = states(("capture", [0, 1], {}), ("one", [], {}), ("two", [], {}))
    page = show(document([node("a"), node("b", "a")], snapshots=steps)).graph()
    told = []
    for _ in range(3):
        told.append(page.inner_text("#timeline-after .caption b"))
        page.keyboard.press("[")
    assert told == ["after two", "after one", "as captured"]
    assert page.inner_text("#timeline-before .caption b") == "before"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_pressed_or_new_can_be_read(show, scheme):
    steps = states(("capture", [0], {}), ("one", [1], {"0": {"bytes": 8}}))
    data = document([node("a"), node("b", "a")], snapshots=steps)
    page = show(data, address="node=a", color_scheme=scheme).graph()
    for selector in ("#to-graph", "#panel ins", "#panel .fate"):
        assert contrast(page, selector) >= 4.5, selector


def test_deep_modules_do_not_grow_dark(show):
    scope = ".".join(f"m{i}" for i in range(12))
    parts = scope.split(".")
    nodes = [node(f"n{i}", scope=".".join(parts[: i + 1])) for i in range(12)]
    page = show(document(nodes)).graph()
    page.keyboard.press("e")
    page.wait_for_selector("#after .room >> nth=9", state="attached")
    fills = page.locator("#after .wall").evaluate_all(
        "all => all.map(e => getComputedStyle(e).fill)"
    )
    assert len(set(fills)) == 2
    assert not any(fill.startswith("rgba") for fill in fills)
