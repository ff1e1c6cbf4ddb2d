"""``empg-jax view``: from the files of a run to what a reader sees, in a browser without a window."""

import gzip
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.run.rollouts import rollouts_path
from tests import runs
from tests.pages import count, made_up, set_field, show


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three updates, with numbers of tokens."""
    return runs.train(tmp_path_factory.mktemp("view") / "run", "log.rollouts_tokens=true")


# ------------------------------------------------------------------------------------- a run that trained


def test_a_run_ends_with_its_page(browser, trained):
    browser.problems.clear()
    browser.open((trained / "view.html").as_uri())
    browser.wait("document.querySelector('.turn')")
    assert count(browser) == 2 * 4 + 8  # the first and the last update's episodes, and held-out ones
    assert "grpo · empg" in browser.text("header")
    # Every token of the first response, in its color, with its numbers.
    record = json.loads(gzip.decompress(rollouts_path(trained, 1).read_bytes()).split(b"\n")[0])["turns"][0]
    spans = browser.run(
        "[...document.querySelectorAll('#turn-0 .response span')].map((e) => [e.textContent, e.title])"
    )
    assert len(spans) == record["tokens"]
    assert "".join(text for text, _ in spans).split() == record["response"].split()
    shown = [float(re.search(r"entropy ([\d.]+)", title)[1]) for _, title in spans]
    assert shown == pytest.approx(record["token_entropies"], rel=0.01)
    bars = browser.run("document.querySelector('.bars').getAttribute('aria-label')")
    assert f"g {record['factor']:.3g}" in bars and "made" in bars
    set_field(browser, "f-split", "test")
    assert count(browser) == 8
    assert browser.problems == [] and browser.text("#alert") == ""


def test_what_if_shows_what_credit_computes(browser, trained, tmp_path):
    told = show(browser, trained, "--what-if", "grpo,grpo_aem", "--out", tmp_path)
    assert "note" not in told
    browser.wait("document.querySelector('.turn')")
    browser.run(
        "(() => { const w = document.getElementById('what-if'); w.value = 'grpo_aem';"
        "w.dispatchEvent(new Event('change')) })()"
    )
    browser.wait("document.body.innerText.includes('what grpo_aem would give')")
    words = ["credit", "quickstart", str(rollouts_path(trained, 1)), *runs.TINY, "algorithm.name=grpo_aem"]
    recomputed = json.loads(CliRunner().invoke(app, words).stdout.splitlines()[0])["turns"]
    shown = browser.run("[...document.querySelectorAll('.bars')].map((e) => e.getAttribute('aria-label'))")
    for each, text in zip(recomputed, shown, strict=True):
        assert f"\u03b1 {each['factor']:.3g}" in text
    assert (tmp_path / "run.html").is_file() and browser.problems == []


# ------------------------------------------------------------------------------------ filters, keys, looks


def test_filters_search_and_order(browser, tmp_path):
    show(browser, made_up(tmp_path / "run"))
    assert count(browser) == 12
    for name, value, passed in (
        ("f-update", "1", 6),
        ("f-update", "1, 4-9", 12),
        ("f-group", "3", 3),
        ("f-task", "10-11", 6),
        ("f-success", "1", 4),
        ("f-reason", "turn_limit", 8),
        ("f-low", "0.5", 4),
        ("f-high", "0.5", 8),
        ("search", "GO 11", 3),
        ("search", "no such words", 0),
    ):
        set_field(browser, name, value)
        assert count(browser) == passed, (name, value)
        set_field(browser, name, "")
    set_field(browser, "f-update", "first")
    assert "not understood: first" in browser.text("#count")
    set_field(browser, "f-update", "")
    set_field(browser, "order", "return, high first")
    assert browser.run("document.querySelector('.option').innerText.includes('solved')")
    assert browser.problems == []


def test_keys_lead_through_episodes_turns_and_views(browser, tmp_path):
    show(browser, made_up(tmp_path / "run"))
    browser.wait("document.querySelectorAll('.turn').length === 3")
    browser.key("j")
    browser.wait("location.hash === '#1.2.1' && document.querySelector('h2').innerText.includes('attempt 1')")
    browser.key("ArrowDown")
    browser.wait("location.hash === '#1.2.2'")
    browser.key("k")
    browser.wait("location.hash === '#1.2.1'")
    browser.wait("document.querySelector('h2').innerText.includes('attempt 1')")
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    assert browser.run("document.querySelector('.turn.here').id") == "turn-1"
    browser.key("g")
    browser.wait("document.querySelectorAll('table.group thead th').length === 4")
    browser.key("/")
    browser.type("go 10")
    browser.wait("document.getElementById('count').innerText.startsWith('3 of')")
    browser.key("j", text="j")  # typed, not obeyed
    assert browser.run("document.getElementById('search').value") == "go 10j"
    browser.key("Escape")
    assert browser.run("document.activeElement.id") != "search"
    assert browser.problems == []


def test_a_group_side_by_side_and_its_columns_lead_to_episodes(browser, tmp_path):
    show(browser, made_up(tmp_path / "run"))
    browser.click("#tab-group")
    browser.wait("document.querySelectorAll('table.group tbody tr').length === 3")
    assert "+1 → +1.5" in browser.text("table.group")
    browser.click("table.group thead th:nth-child(4) button")
    browser.wait("document.querySelector('h2').innerText.includes('attempt 2')")
    assert browser.run("document.getElementById('tab-episode').getAttribute('aria-selected')") == "true"


def test_points_of_curves_lead_to_the_episodes_of_their_update(browser, tmp_path):
    show(browser, made_up(tmp_path / "run"))
    browser.click("#tab-curves")
    browser.wait("document.querySelectorAll('#curves svg').length === 2")
    place = browser.run(
        "(() => { const b = document.querySelectorAll('#curves svg circle')[4].getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2] })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call(
            "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
        )
    browser.wait("location.hash === '#5.10.0'")
    assert count(browser) == 6 and browser.run("document.getElementById('f-update').value") == "5"
    browser.click("#tab-curves")
    browser.wait("document.querySelector('#curves svg')")
    browser.run("document.querySelector('#curves svg').focus()")
    browser.key("ArrowLeft")  # update 4 has no file; 5 is nearer than 1
    browser.key("Enter")
    browser.wait("document.getElementById('count').innerText.includes('update 4 was not written, 5 is')")
    assert browser.problems == []


CHECKS = [Path(__file__).with_name(f"view_{name}.js") for name in ("contrast", "nameless")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read(browser, tmp_path, scheme):
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    show(browser, made_up(tmp_path / "run"))
    browser.wait("document.querySelector('.turn')")
    dark = (
        sum(map(int, re.findall(r"\d+", browser.run("getComputedStyle(document.body).backgroundColor"))))
        < 200
    )
    assert dark == (scheme == "dark")
    for tab in ("episode", "group", "curves"):
        browser.click(f"#tab-{tab}")
        browser.wait(f"document.getElementById('pane').getAttribute('aria-labelledby') === 'tab-{tab}'")
        browser.wait("document.querySelector('.turn, table.group, #curves')")
        for check in CHECKS:
            assert browser.run(check.read_text()) == []
    browser.key("d")  # automatic, light, dark
    assert browser.run("document.documentElement.dataset.theme") == "light"
    browser.key("d")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    browser.key("d")
