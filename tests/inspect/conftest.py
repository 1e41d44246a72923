"""A browser, and pages in it, for the tests of the inspector."""

from __future__ import annotations

import pytest

from tests.inspect.browser import browser, open_page, written


@pytest.fixture(scope="module")
def chrome():
    with browser() as made:
        yield made


@pytest.fixture
def show(chrome, tmp_path):
    """Opens documents made by hand; their pages are checked and closed afterwards."""
    made = []

    def shown(data, **options):
        made.append(open_page(chrome, written(tmp_path, data), **options))
        return made[-1]

    yield shown
    for opened in made:
        opened.clean()
        opened.page.context.close()
