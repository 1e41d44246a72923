"""`graphopt explain`: photos, texts, tables, JSON, the page in a real browser, bad input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from graphopt.cli import main

MODELS = """
import torch
from torch import nn


class Words:
    words = ["[PAD]", "good", "bad", "film", "<script>alert(1)</script>"]

    def __call__(self, text):
        ids = [self.words.index(word) for word in text.split()]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def convert_ids_to_tokens(self, index):
        return self.words[index]


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 2)
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.tensor([[0, 0], [2, 0], [0, 3], [1, 1], [0, 0.5]]))
            self.head.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        self.tokenizer = Words()

    def forward(self, input_ids, attention_mask):
        return self.head((self.embedding(input_ids) * attention_mask[..., None]).sum(1))


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        left, right = x[..., :8].sum((1, 2, 3)), x[..., 8:].sum((1, 2, 3))
        return torch.stack([left, right], 1) * self.scale


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x)


class Exotic(nn.Module):
    def forward(self, x):
        return torch.special.i0(x)


def reader():
    return Reader(), (torch.tensor([[1, 3]]), torch.tensor([[1, 1]]))


def half():
    return Half(), (torch.rand(1, 3, 16, 16),)


def features():
    torch.manual_seed(0)
    return Features(), (torch.randn(3, 4),)


def exotic():
    return Exotic(), (torch.randn(2, 4),)


def nan():
    return Features(), (torch.full((2, 4), float("nan")),)


def no_tokenizer():
    model = Reader()
    model.tokenizer = None
    return model, (torch.tensor([[1, 3]]), torch.tensor([[1, 1]]))
"""

TOML = """
name = "mine"

[[entry]]
family = ["linear"]
rule = "epsilon"
eps = 0.5

[[entry]]
rule = "gradient"
"""


class Run:
    """Runs the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = main(["explain", *arguments])
        out, err = self.capsys.readouterr()
        return code, out, err

    def json(self, *arguments: str) -> dict[str, Any]:
        code, out, err = self(*arguments, "--json", "-q")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "mine.toml").write_text(TOML)
    (tmp_path / "wrong.toml").write_text('[[entry]]\nrule = "epsilom"\n')
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "labels.txt").write_text("left <b>\nright\n")
    # Left half black, right half white, twice as wide as high: the middle is cut out.
    photo = np.zeros((20, 40, 3), np.uint8)
    photo[:, 20:] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return Run(capsys)


def test_a_photo_is_cut_scaled_and_normalised(run: Run) -> None:
    # By default black is -1 and white is 1, and relevance is each pixel's contribution.
    data = run.json("models.py:half", "-i", "photo.png", "-t", "1")
    (sample,) = data["samples"]
    assert sample["explained"] == pytest.approx(2 * 3 * 16 * 8, rel=0.05)  # edges are blurred
    places = [entry["at"] for entry in sample["inputs"]["x"]["top"]]
    assert all(column >= 8 for _, column in places)
    other = run.json("models.py:half", "-i", "photo.png", "-t", "0", "--mean", "0", "--std", "1")
    assert other["samples"][0]["explained"] == pytest.approx(0, abs=40)
    scaled = run.json("models.py:half", "-i", "photo.png", "-t", "1", "--std", ".25,.25,.25")
    assert scaled["samples"][0]["explained"] == pytest.approx(2 * sample["explained"], rel=1e-5)


def test_a_text_is_read_by_the_models_tokenizer(run: Run) -> None:
    data = run.json("models.py:reader", "--text", "good film bad good", "-t", "0")
    (sample,) = data["samples"]
    found = sample["inputs"]["input_ids"]
    assert found["tokens"] == ["good", "film", "bad", "good"]
    assert found["values"] == pytest.approx([2, 0, -3, 2])  # by hand: e . (1, -1)
    assert sample["explained"] == pytest.approx(1)
    assert sample["ledger"]["inputs"] == pytest.approx(1)
    assert data["settings"]["composite"] == "cp-lrp"


def test_a_tokenizer_is_read_from_a_folder(run: Run, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "good": 1, "bad": 2, "film": 3}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    data = run.json(
        *("models.py:no_tokenizer", "--text", "bad film", "--tokenizer", "tokenizer.json")
    )
    found = data["samples"][0]["inputs"]["input_ids"]
    assert found["tokens"] == ["bad", "film"]
    assert data["samples"][0]["target"]["index"] == 1


def test_json_holds_what_the_function_gives(run: Run) -> None:
    import graphopt

    data = run.json("models.py:features", "-c", "epsilon", "-t", "2,0,1")
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(4, 3), torch.randn(3, 4)
    explained = graphopt.explain(linear, (x,), composite="epsilon", target=[2, 0, 1])
    _, relevance, ledger = explained(x)
    for i, sample in enumerate(data["samples"]):
        assert sample["target"]["index"] == [2, 0, 1][i]
        assert sample["explained"] == pytest.approx(float(linear(x)[i, [2, 0, 1][i]]))
        assert sample["ledger"] == pytest.approx(
            {k: float(v[i]) for k, v in ledger.items() if k != "output"}, abs=1e-6
        )
        total = float(next(iter(relevance.values()))[i].double().sum())
        assert sample["inputs"]["x"]["relevance"] == pytest.approx(total, abs=1e-6)
        assert sample["residual"] < 1e-5
    assert data["others"] == []
    assert data["largest_residual"] < 1e-6
    assert [each["op"] for each in data["operations"]] == ["linear"]


def test_parameters_and_nodes_are_attributed_on_request(run: Run) -> None:
    data = run.json("models.py:reader", "-a", "head.weight", "-a", "linear")
    others = {each["name"]: each for each in data["others"]}
    assert {name: each["shape"] for name, each in others.items()} == {
        "head.weight": [2, 2],
        "linear": [1, 2],
    }
    # All of the score arrives at the last layer's result.
    assert others["linear"]["relevance"] == pytest.approx(data["samples"][0]["explained"])


def test_a_composite_is_read_from_a_file_and_printed_as_one(run: Run, tmp_path: Path) -> None:
    data = run.json("models.py:features", "-c", "mine.toml")
    assert data["settings"]["composite"] == "mine"
    assert data["rules"] == [{"family": "linear", "rule": "epsilon(eps=0.5)", "operations": 1}]
    code, listed, _ = run("--list-composites")
    assert code == 0
    assert "cp-lrp" in listed.split()
    code, text, _ = run("--print-composite", "epsilon-plus-flat")
    assert code == 0
    (tmp_path / "printed.toml").write_text(text)
    printed = run.json("models.py:features", "-c", "printed.toml")
    named = run.json("models.py:features", "-c", "epsilon-plus-flat")
    assert printed == named


def test_tables_go_to_stdout_and_progress_to_stderr(run: Run) -> None:
    code, out, err = run("models.py:reader", "--text", "good bad", "--labels", "labels.txt")
    assert code == 0
    for word in ("ledger", "inputs", "residual", "good", "family", "linear", "right (class 1)"):
        assert word in out
    assert "building" in err
    code, _, err = run("models.py:reader", "-q")
    assert (code, err) == (0, "")


def test_pictures_are_written(run: Run, tmp_path: Path) -> None:
    code, _, err = run("models.py:half", "-i", "photo.png", "--png", "map.png", "-q")
    assert code == 0, err
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.size == (2 * 224 + 4, 224)
        white = np.asarray(picture)[100, :224].astype(int)
    assert white[10].tolist() == [0, 0, 0]
    assert white[200].tolist() == [255, 255, 255]
    code, _, err = run("models.py:reader", "--png", "strip.png", "-q")
    assert code == 0, err
    with Image.open(tmp_path / "strip.png") as picture:
        assert picture.width > 300


BAD: dict[str, tuple[int, str, list[str]]] = {
    "misspelt composite": (2, "did you mean 'cp-lrp'", ["models.py:features", "-c", "cp-lpr"]),
    "misspelt, printed": (2, "'attnlrp'", ["--print-composite", "atnlrp"]),
    "no such file": (1, "can't be read", ["models.py:features", "-c", "gone.toml"]),
    "wrong file": (2, "epsilon", ["models.py:features", "-c", "wrong.toml"]),
    "target text": (2, "class index", ["models.py:features", "-t", "cat"]),
    "target out of range": (2, "3 classes", ["models.py:features", "-t", "7"]),
    "targets too few": (2, "3", ["models.py:features", "-t", "1,2"]),
    "no attribute": (2, "linear.weight", ["models.py:features", "-a", "linear.weigth"]),
    "photo and text": (2, "exclude", ["models.py:half", "-i", "photo.png", "--text", "a"]),
    "no photo": (1, "no file", ["models.py:half", "-i", "gone.png"]),
    "not a photo": (1, "image", ["models.py:half", "-i", "text.jpg"]),
    "a model without images": (2, "image", ["models.py:features", "-i", "photo.png"]),
    "a model without tokens": (2, "token ids", ["models.py:features", "--text", "a"]),
    "mean": (2, "--mean", ["models.py:half", "-i", "photo.png", "--mean", "x"]),
    "two channels": (2, "3 channels", ["models.py:half", "-i", "photo.png", "--mean", "0,1"]),
    "zero std": (2, "positive", ["models.py:half", "-i", "photo.png", "--std", "0"]),
    "no tokenizer": (2, "--tokenizer", ["models.py:no_tokenizer", "--text", "good"]),
    "wrong tokenizer": (
        1,
        "no tokenizer",
        ["models.py:no_tokenizer", "--text", "good", "--tokenizer", "labels.txt"],
    ),
    "unknown operator": (1, "'i0'", ["models.py:exotic"]),
    "NaN": (1, "NaN", ["models.py:nan"]),
    "nothing to draw": (2, "--html", ["models.py:features", "--png", "x.png"]),
    "no such folder": (1, "doesn't exist", ["models.py:features", "--html", "no/such.html"]),
    "no labels": (1, "can't be read", ["models.py:features", "--labels", "gone.txt"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_its_code(case: str, run: Run, tmp_path: Path) -> None:
    code, says, arguments = BAD[case]
    before = sorted(p.name for p in tmp_path.iterdir())
    got, out, err = run(*arguments)
    assert got == code, err
    assert says in err
    assert "Traceback" not in err
    assert "internal error" not in err
    assert out == ""
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == before


@pytest.fixture(scope="module")
def browser() -> Any:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(
                executable_path=shutil.which("chromium") or None, args=["--no-sandbox"]
            )
        except sync_api.Error as error:
            pytest.skip(f"no browser: {error}")
        yield found
        found.close()


_CONTRAST = """() => {
  const light = c => { const v = c.map(x => { x /= 255;
    return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const rgba = text => text.match(/[0-9.]+/g).map(Number);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = rgba(getComputedStyle(e).backgroundColor);
    if (c.length == 3 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
  let worst = 99;
  for (const e of document.querySelectorAll("h1,h2,h3,td,th,dt,dd,.token,p.soft,figcaption,span")) {
    const pair = [light(rgba(getComputedStyle(e).color).slice(0, 3)), light(behind(e))];
    worst = Math.min(worst, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05));
  }
  return worst;
}"""


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("reader", ("--text", "good <script>alert(1)</script> bad", "-a", "parameters")),
        ("half", ("-i", "photo.png", "--labels", "labels.txt")),
        ("features", ()),
    ],
)
def test_the_page_is_whole_in_a_browser(
    model: str, arguments: tuple[str, ...], run: Run, tmp_path: Path, browser: Any
) -> None:
    code, _, err = run(f"models.py:{model}", *arguments, "--html", "page.html", "-q")
    assert code == 0, err
    for scheme, width, height in (("light", 1440, 900), ("dark", 390, 844)):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        page = context.new_page()
        told: list[str] = []
        page.on("console", lambda message, told=told: told.append(message.text))
        page.on("dialog", lambda dialog, told=told: told.append(dialog.message))
        page.on("request", lambda request, told=told: told.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        assert [url for url in told if not url.startswith(("file:", "data:"))] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(_CONTRAST) >= 4.5
        shown = page.inner_text("main")
        assert "Where the score comes from" in shown
        assert re.search(r"Residual \d", shown)
        assert not page.locator("details table").is_visible()
        page.locator("summary").click()
        assert page.locator("details table").is_visible()
        sizes = page.evaluate("[...document.images].map(i => i.naturalWidth)")
        assert sizes == ([224] * 3 if model == "half" else [])
        if model == "reader":
            tokens = page.locator(".token").all_inner_texts()
            assert tokens == ["good", "<script>alert(1)</script>", "bad"]
        if model == "half":
            assert "left <b>" in shown
        context.close()
