"""``empg-jax view``: from the files of a run to what a reader sees, in a browser without a window."""

import gzip
import json
import re
import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from browser import chromium, find_chromium
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.run.rollouts import rollouts_path, write_rollouts
from tests import runs

WORST = "see <img src=x onerror=alert(1)> & </script><script>alert(2)</script> \x1b[31mred\x07 \u202eevil"


@pytest.fixture(scope="module")
def browser():
    if find_chromium() is None:
        pytest.skip("needs Chromium, which is not installed")
    with chromium() as page:
        yield page


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three updates, with numbers of tokens."""
    with runs.share_compilations(tmp_path_factory.getbasetemp() / "compiled"):
        yield runs.train(tmp_path_factory.mktemp("view") / "run", "log.rollouts_tokens=true")


def view(*arguments):
    result = CliRunner().invoke(app, ["view", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def turn(k, **changes):
    credit = {
        "factor": 1.5,
        "bonus": 0.25,
        "advantage_base": 1.0,
        "advantage": 1.5,
        "entropy": 0.5,
        "logprob": -0.1,
    }
    values = {"observation": f"room {k}", "response": f"go {k}", "reward": 0.0, "valid": True, "tokens": 3}
    return values | {"finish_reason": "stop", "version": 0} | credit | changes


def episode(update, group, member, *, success=False, turns=None, **changes):
    values = {"update": update, "group_id": group, "member": member, "task": group, "split": "train"}
    values |= {"reason": "won" if success else "turn_limit", "return": float(success), "success": success}
    return values | {"turns": turns or [turn(0), turn(1)]} | changes


def make_run(folder, files, metrics=True):
    """A run folder with these episodes by update."""
    folder.mkdir()
    (folder / "config.yaml").write_text("algorithm: {name: grpo, modulation: empg}\n")
    for update, records in files.items():
        write_rollouts(folder, update, records)
    if metrics:
        lines = [{"update": n, "success_rate": n / 10, "entropy": 1.0} for n in range(1, 6)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def made_up(folder):
    files = {
        update: [
            episode(
                update,
                group,
                member,
                success=member == 1,
                turns=[turn(k, response=f"go {group}") for k in range(3)],
            )
            for group in (2 * update, 2 * update + 1)
            for member in range(3)
        ]
        for update in (1, 5)
    }
    return make_run(folder, files)


def show(browser, run, *options):
    """Writes the page of a run and opens it."""
    result = view(run, *options)
    assert result.exit_code == 0, result.stderr
    browser.problems.clear()
    browser.run("sessionStorage.clear()") if browser.run("location.protocol") == "http:" else None
    browser.call("Page.navigate", url="about:blank")
    browser.open("file://" + result.stdout.strip())
    return result.stderr


def count(browser):
    return int(browser.text("#count").split(" of ")[0].replace(",", ""))


def set_field(browser, name, value):
    before = browser.run("performance.getEntriesByName('filter').length")
    browser.run(
        f"(() => {{ const f = document.getElementById('{name}'); f.value = {json.dumps(value)};"
        "f.dispatchEvent(new Event('input', { bubbles: true })) })()"
    )
    browser.wait(f"performance.getEntriesByName('filter').length > {before}")


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


# ---------------------------------------------------------------------------------------------- bad input


def test_texts_are_shown_as_text(browser, tmp_path):
    worst = [turn(0, observation=WORST, response=WORST), turn(1, response="x" * 100_000)]
    files = {1: [episode(1, 0, 0, turns=worst, reason="<b>won</b>", metrics={"<i>": 1})]}
    run = make_run(tmp_path / "@SCRIPT@ <script>alert(3)<!--", files)
    show(browser, run)
    browser.wait("document.querySelectorAll('.turn').length === 2")
    text = browser.text(".observation")
    assert "<img src=x onerror=alert(1)> & </script><script>alert(2)</script>" in text
    assert "\u241b[31mred\u2407 \u27e8U+202E\u27e9evil" in text
    assert (
        browser.run("document.querySelectorAll('main img, main script, main b, main i[title]').length") == 0
    )
    assert "<script>alert(3)<!--" in browser.text("h1") and "<b>won</b>" in browser.text(".facts")
    # A long response is cut on the screen, and whole behind a button.
    assert len(browser.text("#turn-1 .response")) < 5_000
    browser.click("#turn-1 .response button")
    assert len(browser.text("#turn-1 .response")) == 100_000
    assert browser.problems == []


def test_a_file_that_was_cut_shows_what_is_left(browser, tmp_path):
    import random

    rng = random.Random(0)
    noise = [turn(0, response="".join(rng.choices("abcdefghij", k=3000))) for _ in range(40)]
    run = make_run(
        tmp_path / "run", {1: [episode(1, 0, 0)], 2: [episode(2, 1, k, turns=noise) for k in range(8)]}
    )
    path = rollouts_path(run, 2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (run / "rollouts" / "update-000003.jsonl").write_text(
        '{"update": 3, "turns": []}\n[1]\n{"turns": 3}\nnonsense\n'
    )
    told = show(browser, run)
    assert "note: update-000002.jsonl.gz is cut or damaged" in told and "3 lines are no episode" in told
    assert "update-000002.jsonl.gz is cut or damaged" in browser.text("#alert")
    assert 3 <= count(browser) < 9
    set_field(browser, "f-update", "3")
    browser.wait("document.getElementById('pane').innerText.includes('This record has no turns')")
    assert browser.problems == []


def test_a_run_without_episodes_shows_its_curves_and_says_why(browser, tmp_path):
    told = show(browser, make_run(tmp_path / "run", {}))
    assert "note: no episodes" in told and "log.rollouts_every=0" in told
    browser.wait("document.querySelectorAll('#curves svg').length === 2")
    assert "no episodes" in browser.text("#alert")
    browser.click("#tab-episode")
    browser.wait("document.getElementById('pane').innerText.includes('There are no episodes')")
    show(browser, make_run(tmp_path / "empty", {}, metrics=False))
    browser.wait("document.getElementById('pane').innerText.includes('No metrics were recorded')")
    assert browser.problems == []


def test_a_run_of_an_older_version_lacks_fields(browser, tmp_path):
    old = [
        {"update": 1, "turns": [{"observation": "a room", "response": "go", "reward": 1.0}, {}]},
        {"turns": [3, {}]},
    ]
    strange = {
        "update": "x",
        "group_id": None,
        "return": "much",
        "success": "yes",
        "turns": [{"response": 7}],
        "metrics": 3,
    }
    run = make_run(tmp_path / "run", {1: [*old, strange]}, metrics=False)
    (run / "config.yaml").unlink()
    (run / "summary.json").write_text("{")
    (run / "metrics.jsonl").write_text(
        '{"update": 1, "success_rate": 0.5, "odd": "text", "worse": null}\nbroken\n'
    )
    told = show(browser, run)
    assert "no config.yaml" in told and "summary.json cannot be read" in told
    assert count(browser) == 3
    for _ in range(3):
        browser.wait("document.querySelector('.turn')")
        assert "undefined" not in browser.text("body") and "NaN" not in browser.text("body")
        browser.key("j")
    browser.click("#tab-group")
    browser.wait("document.querySelector('table.group')")
    browser.click("#tab-curves")
    browser.wait("document.querySelector('#curves')")
    assert browser.problems == []


def test_a_page_that_was_cut_says_so(browser, tmp_path):
    run = made_up(tmp_path / "run")
    page = tmp_path / "page.html"
    assert view(run, "--out", page).exit_code == 0
    text = page.read_text()
    page.write_text(text[: text.index('<script type="text/plain" id="data-search')])
    browser.open(page.as_uri())
    browser.wait("document.getElementById('pane').innerText.includes('the page was cut')")
    page.write_text(re.sub('(id="data-head">)....', r"\1AAAA", text))
    browser.open(page.as_uri())
    browser.wait("document.getElementById('alert').innerText.includes('This page cannot be opened')")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda path: None, [], "is not a folder: name the folder of a run"),
        (lambda path: path.mkdir(), [], "holds no run: expected config.yaml, metrics.jsonl or"),
        (made_up, ["--out", "/no/such/folder/x.html"], "there is no folder /no/such/folder"),
        (made_up, ["--serve", "--out", "x.html"], "--serve writes no file"),
        (made_up, ["--what-if", "grpo_eam"], "did you mean grpo_aem?"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_message(tmp_path, make, options, message):
    make(tmp_path / "run")
    result = view(tmp_path / "run", *options)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_what_if_is_missing_where_a_file_cannot_be_computed(tmp_path):
    config = runs.configure(tmp_path / "none")
    run = make_run(tmp_path / "run", {1: [episode(1, 0, 0, turns=[{"response": "no numbers"}])]})
    (run / "config.yaml").write_text(config.to_yaml())
    result = view(run, "--what-if", "grpo")
    assert result.exit_code == 0
    assert (
        "note: what-if is missing for update-000001.jsonl.gz" in result.stderr
        and "reward: missing" in result.stderr
    )


# ------------------------------------------------------------------------------------------------- served


@pytest.fixture
def served(tmp_path):
    run = made_up(tmp_path / "run")
    process = runs.start(["view", run, "--serve"])
    try:
        yield (
            run,
            process,
            re.fullmatch(r"serving run at (http://127\.0\.0\.1:\d+/)\n", process.stdout.readline())[1],
        )
    finally:
        process.kill()
        process.communicate()


def test_a_served_page_follows_the_run(browser, served):
    run, process, url = served
    browser.problems.clear()
    browser.open(url)
    browser.wait("document.querySelectorAll('.turn').length === 3")
    assert count(browser) == 12
    browser.key("j")
    browser.wait("location.hash === '#1.2.1'")
    write_rollouts(run, 6, [episode(6, 50, 0)])
    browser.wait("document.getElementById('count').innerText.startsWith('13 of')")
    assert browser.run("location.hash") == "#1.2.1"  # the reader stays where he was
    (run / "rollouts" / "update-000007.jsonl.gz").write_bytes(b"no gzip")
    browser.wait(
        "document.getElementById('alert').innerText.includes('update-000007.jsonl.gz is cut or damaged')"
    )
    assert browser.problems == []
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    browser.wait("document.getElementById('live').innerText.includes('not connected')")


def test_only_this_machine_by_its_own_name_is_answered(served):
    _, _, url = served
    strange = urllib.request.Request(url, headers={"Host": "evil.example:80"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(strange, timeout=30)
    for name in ("data/../../config.yaml", "data/update-000099.0", "x"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url + name, timeout=30)
