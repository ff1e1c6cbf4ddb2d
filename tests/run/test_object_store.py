"""Checkpoints in a bucket: a step counts when it is complete, whatever moment a process is killed at."""

import http.server
import json
import threading
import uuid

import jax
import numpy as np
import pytest

from empg_jax.config import load_config
from empg_jax.errors import CheckpointError, RefusedCheckpoint
from empg_jax.parallel.hosts import ALONE
from empg_jax.run.checkpoint import Checkpoints
from empg_jax.run.owner import check_owner, note_owner
from tests import buckets
from tests.run.test_checkpoint import SHAPES, SHARDINGS, make_state, write


@pytest.fixture(scope="module", autouse=True)
def _bucket():
    with buckets.served():
        yield


@pytest.fixture
def url():
    return f"gs://{buckets.NAME}/{uuid.uuid4().hex}/run"


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def open_folder(url, warnings):
    opened = []

    def open_folder(keep=3):
        opened.append(Checkpoints(url, keep=keep, warn=warnings.append))
        return opened[-1]

    yield open_folder
    for each in opened:
        each.close()


class Killed(BaseException):
    """Ends what a process would do, as SIGKILL does."""


def names(checkpoints):
    return sorted(path.name for path in checkpoints.directory.iterdir())


def die_in(monkeypatch, checkpoints, method):
    """From here on a method of the folder kills."""

    def die(*_):
        raise Killed

    monkeypatch.setattr(checkpoints._folders, method, die)


def test_steps_come_back_and_only_the_newest_are_kept(open_folder):
    checkpoints = open_folder(keep=2)
    write(checkpoints, 1, 2, 3)
    assert checkpoints.steps == [2, 3] and names(checkpoints) == ["2", "3"]
    found = open_folder().restore(SHARDINGS, SHAPES)
    assert found.step == 3 and found.progress == {"update": 3, "record": {"a": 0.1}}
    jax.tree.map(np.testing.assert_array_equal, found.state, make_state(3))
    assert checkpoints.read_progress(2)["update"] == 2
    with pytest.raises(RefusedCheckpoint, match=r"gs://bucket/.*/run has no checkpoint 1; it has: 2, 3"):
        checkpoints.check_step(1)


def test_a_write_that_was_cut_short_is_passed_over_and_deleted(open_folder):
    checkpoints = open_folder()
    write(checkpoints, 1, 2)
    (checkpoints.directory / "2" / "commit_success.txt").unlink()  # orbax writes it last
    again = open_folder()
    assert again.steps == [1] and again.restore(SHARDINGS, SHAPES).step == 1
    again.recover()
    assert names(again) == ["1"]


@pytest.mark.parametrize("kept_value, killed_in", [(1, "swap"), (9, "_delete")])
def test_a_step_that_is_written_again_is_there_at_every_moment(
    open_folder, monkeypatch, kept_value, killed_in
):
    checkpoints = open_folder()
    write(checkpoints, 1)
    checkpoints.save(1, make_state(9), {"update": 1, "record": {"a": 0.1}}, [])
    if killed_in == "swap":
        die_in(monkeypatch, checkpoints, "swap")
    else:  # in the middle of the old one's deletion

        def delete_half(path):
            (path / "commit_success.txt").unlink()
            raise Killed

        monkeypatch.setattr(checkpoints._folders, "_delete", delete_half)
    with pytest.raises(Killed):
        checkpoints.wait()
    assert names(checkpoints) == ["1", "1.1"]
    again = open_folder()
    assert again.steps == [1]
    again.recover()
    assert again.steps == [1] and int(again.restore(SHARDINGS, SHAPES).state.step) == kept_value
    assert len(names(again)) == 1


def test_what_is_set_aside_stays_but_does_not_count(open_folder):
    checkpoints = open_folder()
    write(checkpoints, 1, 2)
    assert checkpoints.set_aside(1) == [2]
    assert checkpoints.steps == [1]
    write(checkpoints, 2)  # the run comes to this step again
    checkpoints.recover()
    assert checkpoints.steps == [1, 2] and names(checkpoints) == ["1", "2", "2.1"]
    checkpoints.set_aside(1)
    assert checkpoints.steps == [1] and names(checkpoints) == ["1", "2.1"]


def test_the_reference_is_kept_apart(open_folder):
    checkpoints = open_folder()
    state = make_state(5)
    for params in (make_state(4).params, state.params):  # again, if the first was followed by a kill
        checkpoints.save_reference(params)
    write(checkpoints, 1)
    found = open_folder().load_reference(SHARDINGS.params, SHAPES.params)
    jax.tree.map(np.testing.assert_array_equal, found, state.params)
    assert checkpoints.steps == [1]


def test_a_folder_of_another_run_is_refused(open_folder, url):
    from empg_jax.run.object_store import check_object_store

    checkpoints = open_folder()
    check_object_store(url, ALONE, is_new=True)
    write(checkpoints, 4)
    check_object_store(url, ALONE, is_new=False)
    assert names(checkpoints) == ["4"]  # what was written to try is gone
    with pytest.raises(RefusedCheckpoint, match=r"holds checkpoints of another run \(\[4\]\)"):
        check_object_store(url, ALONE, is_new=True)


class Refuses(http.server.BaseHTTPRequestHandler):
    """A store that takes nobody without credentials."""

    def answer(self):
        body = json.dumps({"error": {"code": 401, "message": "Anonymous caller"}}).encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_):
        pass


def test_a_store_that_refuses_is_told(url, monkeypatch):
    from empg_jax.run.object_store import StoreFolders

    folders = StoreFolders(url)
    server = http.server.ThreadingHTTPServer(("localhost", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{server.server_port}")
    try:
        with pytest.raises(CheckpointError, match=rf"{url} cannot be read: .*Anonymous caller"):
            _ = folders.steps
    finally:
        server.shutdown()
        server.server_close()


def test_a_copied_run_is_refused_in_the_bucket_of_its_original(url, tmp_path):
    config, runs = load_config("quickstart", [f"checkpoint.dir={url}"]), [tmp_path / "one", tmp_path / "copy"]
    for run in runs:
        run.mkdir()
        (run / "config.yaml").write_text(config.to_yaml())
        check_owner(config, run, ALONE)  # nobody is noted, as in a folder of an older version
    note_owner(config, runs[0])
    check_owner(config, runs[0], ALONE)
    with pytest.raises(RefusedCheckpoint, match=f"checkpoint.dir={url} belongs to the run {runs[0]}, not to"):
        check_owner(config, runs[1], ALONE)
    runs[0].rename(tmp_path / "away")
    check_owner(config, runs[1], ALONE)
