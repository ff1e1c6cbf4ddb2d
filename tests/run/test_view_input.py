"""``empg-jax view`` with damaged, old and hostile runs, and served while a run goes on."""

import base64
import gzip
import random
import re
import signal
import urllib.error
import urllib.request

import pytest

from empg_jax.run.rollouts import rollouts_path, write_rollouts
from tests import runs
from tests.pages import count, episode, made_up, make_run, set_field, show, turn, view

WORST = "see <img src=x onerror=alert(1)> & </script><script>alert(2)</script> \x1b[31mred\x07 \u202eevil"


def test_texts_are_shown_as_text(browser, tmp_path):
    worst = [turn(0, observation=WORST, response=WORST), turn(1, response="x" * 100_000)]
    files = {1: [episode(1, 0, 0, turns=worst, reason="<b>won</b>", detail="a <canary>", metrics={"<i>": 1})]}
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
    assert "<b>won</b>: a <canary>" in browser.text("main")
    # A long response is cut on the screen, and whole behind a button.
    assert len(browser.text("#turn-1 .response")) < 5_000
    browser.click("#turn-1 .response button")
    assert len(browser.text("#turn-1 .response")) == 100_000
    assert browser.problems == []


def test_a_file_that_was_cut_shows_what_is_left(browser, tmp_path):
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


def test_what_if_needs_entropies_for_a_modulation_only(tmp_path):
    unknown = [turn(0, entropy=None, logprob=None)]
    run = make_run(tmp_path / "run", {1: [episode(1, 0, member, turns=unknown) for member in range(2)]})
    (run / "config.yaml").write_text(runs.configure(tmp_path / "none").to_yaml())
    assert "note" not in view(run, "--what-if", "grpo").stderr
    assert "turns[0].entropy: missing" in view(run, "--what-if", "grpo_aem").stderr


def test_what_if_tells_once_what_an_algorithm_assumes(tmp_path):
    run = make_run(tmp_path / "run", {n: [episode(n, n, member) for member in range(2)] for n in (1, 2)})
    (run / "config.yaml").write_text(runs.configure(tmp_path / "none").to_yaml())
    notes = [line for line in view(run, "--what-if", "ppo").stderr.splitlines() if "note" in line]
    assert notes == ["note: ppo: the critic's values are taken as 0: a record does not hold them"]
    head = re.search('id="data-head">([^<]*)', (run / "view.html").read_text())[1]
    assert "ppo: the critic's values" in gzip.decompress(base64.b64decode(head)).decode()


@pytest.mark.slow
def test_what_if_takes_an_algorithm_of_ones_own(tmp_path):
    name = "tests.test_algorithm_runs:OWN"
    won, lost = [turn(0, reward=1.0)], [turn(0)]
    episodes = [episode(1, 0, 0, success=True, turns=won), episode(1, 0, 1, turns=lost)]
    run = make_run(tmp_path / "run", {1: episodes})
    (run / "config.yaml").write_text(runs.configure(tmp_path / "none").to_yaml())
    result = view(run, "--what-if", f"grpo,{name}")
    assert result.exit_code == 0 and "note" not in result.stderr, result.stderr
    head = re.search('id="data-head">([^<]*)', (run / "view.html").read_text())[1]
    assert f'"{name}"' in gzip.decompress(base64.b64decode(head)).decode()
    refused = view(run, "--what-if", "tests.test_algorithm_runs:MISSING")
    assert refused.exit_code == 2 and "has no attribute 'MISSING'" in refused.stderr


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
