"""What the tests of a run share: one browser for each file of tests that looks at a page."""

import pytest
from browser import chromium, find_chromium


@pytest.fixture(scope="module")
def browser():
    if find_chromium() is None:
        pytest.skip("needs Chromium, which is not installed")
    with chromium() as page:
        yield page
