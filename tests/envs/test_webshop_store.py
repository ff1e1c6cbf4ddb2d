"""Official files: found, read as a stream, built once, shared; bad rows named and counted."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_envs.webshop import official, stream
from empg_envs.webshop.__main__ import main
from empg_envs.webshop.env import WebShopEnv
from empg_envs.webshop.files import DATA_VARIABLE, MissingData, find_files
from empg_envs.webshop.goals import shuffled
from empg_envs.webshop.store import Store
from tests.shared import find_shared

REPOSITORY = Path(__file__).resolve().parents[2]


def make_row(number: int, **changes: object) -> dict:
    row = {
        "asin": f"B{number:04d}",
        "name": f"Lamp {number}",
        "full_description": "",
        "small_description": [],
        "pricing": f"${number}.5 ${number + 3}",
        "product_category": "Home",
        "category": "garden",
        "query": "lamps",
        "customization_options": {"color": [{"value": "red"}, {"value": "blue"}]},
        "images": ["not read"],
    }
    return row | changes


def write_files(folder: Path, rows: list, size: str = "_1000") -> Path:
    folder.mkdir(exist_ok=True)
    attributes = {
        f"B{n:04d}": {"attributes": ["oak"], "instruction": "Find lamps", "instruction_attributes": ["oak"]}
        for n in range(0, 3000, 2)
    }
    (folder / f"items_shuffle{size}.json").write_text(json.dumps(rows))
    with gzip.open(folder / f"items_ins_v2{size}.json.gz", "wt") as file:
        json.dump(attributes, file)
    human = {
        "B0001": [{"instruction": "a lamp.", "instruction_attributes": ["oak"], "instruction_options": []}]
    }
    (folder / "items_human_ins.json").write_text(json.dumps(human))
    return folder


def load(folder: Path, goals: str = "synthetic") -> Store:
    return official.load(find_files(str(folder), "small", goals), str(folder / "cache"))


def test_bad_rows_are_named_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nameless = make_row(2)
    del nameless["name"]
    bad = [nameless, 7, make_row(4, asin="much too long"), make_row(6, pricing="?")]
    rows = [make_row(0), *bad, make_row(1), make_row(0, name="a second one of that id")]
    store = load(write_files(tmp_path / "data", rows))
    assert (store.meta["products"], store.meta["goals"], store.meta["skipped"]) == (2, 2, 4)
    assert "row 1 ('B0002'): field 'name'" in store.meta["skipped_rows"][0]
    assert "row 2 (None)" in store.meta["skipped_rows"][1]
    assert "4 rows of" in caplog.text and "B0002" in caplog.text
    assert store.product("B0000").title == "Lamp 0"
    env = WebShopEnv(
        level="official", data=str(tmp_path / "data"), cache_dir=str(tmp_path / "data" / "cache")
    )
    assert env.describe()["skipped"] == 4 and "B0002" in env.describe()["skipped_rows"][0]


def test_entries_that_are_no_objects_are_named_and_skipped(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "data", [make_row(0), make_row(1), make_row(2)])
    (folder / "items_ins_v2_1000.json.gz").unlink()
    entry = {"attributes": ["oak"], "instruction": "Find lamps", "instruction_attributes": ["oak"]}
    (folder / "items_ins_v2_1000.json").write_text(json.dumps({"B0000": entry, "B0002": 7}))
    human = [{"instruction": "a lamp.", "instruction_attributes": ["oak"], "instruction_options": []}]
    (folder / "items_human_ins.json").write_text(json.dumps({"B0000": human, "B0001": 7}))
    (said,) = load(folder).meta["skipped_rows"]
    assert said == "row 2 ('B0002'): the entry in the attribute file must be an object, not 7"
    said = load(folder, "human").meta["skipped_rows"][-1]
    assert said == "instruction of 'B0001': human instructions must be a list of objects, not 7"


def test_half_a_character_is_a_character_like_any_other(tmp_path: Path) -> None:
    """JSON can say it, as an escape; UTF-8, and so SQLite, cannot."""
    half = "\ud83d"
    color = {"color": [{"value": f"red{half}"}]}
    rows = [make_row(0), make_row(2, name=f"odd{half} lamp {half}", customization_options=color)]
    store = load(write_files(tmp_path, [*rows, make_row(4, asin=half)]))
    assert (store.meta["products"], store.meta["skipped"]) == (2, 1)
    assert set(store.search("lamp")) == {"B0000", "B0002"} and store.search(f"odd{half}") == ("B0002",)
    assert store.product("B0002").title == f"odd{half} lamp {half}"
    env = WebShopEnv(level="official", data=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    goals = [env.get_task("test", n) for n in range(3)]
    (odd,) = (n for n, goal in enumerate(goals) if goal["asin"] == "B0002")
    env.reset(split="test", index=odd)
    for action in ("search[odd lamp]", "click[b0002]", f"click[red{half}]", "click[buy now]"):
        _, reward, done, _, info = env.step(action)
    assert done and reward == info["metrics"]["task_score"] == 1.0


def test_prices_do_not_depend_on_rows_that_do_not_count(tmp_path: Path) -> None:
    clean = load(write_files(tmp_path / "clean", [make_row(n) for n in range(6)]))
    rows = [make_row(0), make_row(0), make_row(2, name=None), *(make_row(n) for n in range(1, 6))]
    assert clean.price("B0005") == load(write_files(tmp_path / "noisy", rows)).price("B0005")


def test_human_goals(tmp_path: Path) -> None:
    store = load(write_files(tmp_path, [make_row(n) for n in range(4)]), "human")
    assert store.num_goals == 1
    goal = store.goal(0)
    assert (goal.asin, goal.weight) == ("B0001", 1.0) and goal.instruction.startswith("a lamp, and price")
    with pytest.raises(ValueError, match=r"give no goal.*belong together"):
        load(write_files(tmp_path / "none", [make_row(9)]), "human")


def test_the_catalog_is_built_once_and_appears_whole(tmp_path: Path) -> None:
    folder = write_files(tmp_path, [make_row(n) for n in range(4)])
    assert load(folder) is load(folder)  # one object for all environments of a process
    (built,) = (folder / "cache").glob("*.sqlite")
    first = built.stat().st_mtime_ns
    script = (
        "import sys; from empg_envs.webshop.env import WebShopEnv\n"
        "print(WebShopEnv(level='official', data=sys.argv[1], cache_dir=sys.argv[2]).num_tasks('test'))"
    )
    fresh = str(folder / "other")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder), fresh], stdout=subprocess.PIPE, cwd=REPOSITORY
        )
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == [b"4", b"4"]
    assert built.stat().st_mtime_ns == first
    kept = sorted(path.suffix for path in Path(fresh).iterdir())
    assert kept == [".lock", ".lock", ".order-233", ".sqlite"]
    write_files(folder, [make_row(n) for n in range(6)])  # other files, another catalog
    assert load(folder).meta["products"] == 6


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    folder = write_files(tmp_path, [make_row(0)])
    (folder / "items_shuffle_1000.json").write_text('[{"asin": "B0"')
    with pytest.raises(ValueError, match=r"items_shuffle_1000\.json is not valid JSON"):
        load(folder)
    assert [path.suffix for path in (folder / "cache").iterdir()] == [".lock"]
    (folder / "items_shuffle_1000.json").write_text('{"asin": 1}')
    with pytest.raises(ValueError, match="must hold a JSON array"):
        load(folder)


def test_missing_data_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(MissingData, match=r"no WebShop data folder was named.*setup\.sh.*WEBSHOP_DATA"):
        WebShopEnv(level="official")
    with pytest.raises(MissingData, match="does not exist"):
        WebShopEnv(level="official", data=str(tmp_path / "nowhere"))
    with pytest.raises(MissingData, match=r"has no items_shuffle_1000\.json"):
        WebShopEnv(level="official", data=str(tmp_path))
    env = WebShopEnv(level="official", data=str(tmp_path), fallback=True)
    assert env.describe()["level"] == "standard" and env.num_tasks("test") > 200
    with pytest.raises(ValueError, match="size must be one of small, full"):
        find_files(str(tmp_path), "medium", "human")
    folder = write_files(tmp_path, [make_row(n) for n in range(4)])
    monkeypatch.setenv(DATA_VARIABLE, str(folder))
    assert find_files(None, "small", "synthetic").products == folder / "items_shuffle_1000.json"


def test_large_files_are_built_by_the_command_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(official, "LARGE_BYTES", 100)
    folder = write_files(tmp_path, [make_row(n) for n in range(4)], size="")
    options = {"level": "official", "size": "full", "data": str(folder), "cache_dir": str(folder / "cache")}
    env = WebShopEnv(**options)
    with pytest.raises(MissingData, match=r"python -m empg_envs\.webshop .*--size full --goals synthetic"):
        env.list_splits()
    assert main([str(folder), "--size", "full", "--cache-dir", str(folder / "cache")]) == 0
    assert json.loads(capsys.readouterr().out)["products"] == 4
    assert env.list_splits() == ["test"]
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_panels_and_the_legacy_switch(tmp_path: Path) -> None:
    folder = write_files(tmp_path, [make_row(n) for n in range(1200)])
    options = {"level": "official", "data": str(folder), "cache_dir": str(folder / "cache")}
    env = WebShopEnv(**options)
    total = 1200  # 600 products with an instruction, two colors each
    assert env.list_splits() == ["train", "test"]
    assert (env.num_tasks("test"), env.num_tasks("train")) == (500, total - 500)
    store, order = env.shop.store, shuffled(total)
    assert env.get_task("test", 3)["content_hash"] == store.goal(order[3]).content_hash()
    assert env.get_task("train", 0)["content_hash"] == store.goal(order[500]).content_hash()
    legacy = [WebShopEnv(**options, legacy_panel=True, worker_seed=seed) for seed in (233, 1)]
    tests = [{e.get_task("test", n)["content_hash"] for n in range(500)} for e in (env, *legacy)]
    assert tests[0] == tests[1] != tests[2]
    assert legacy[1].describe()["shuffle_seed"] == 1
    observation, info = env.reset(split="test", index=0)
    assert observation.startswith("WebShop [SEP] Instruction:") and info["tagger"] == env.shop.tagger.name


def test_repeated_option_values_bring_no_test_goal_into_training(tmp_path: Path) -> None:
    sizes = {"size": [{"value": value} for value in ("Small", "small ", "large")]}
    rows = [make_row(n, pricing="$5", customization_options=sizes) for n in range(0, 800, 2)]
    folder, cache = write_files(tmp_path / "data", rows), tmp_path / "cache"
    env = WebShopEnv(level="official", data=str(folder), cache_dir=str(cache))
    hashes = {
        split: [env.shop.store.goal(n).content_hash() for n in env.shop.panels[split]]
        for split in ("train", "test")
    }
    assert not set(hashes["train"]) & set(hashes["test"])
    assert env.shop.store.num_goals == 1200 and list(env.shop.panels["test"]) == shuffled(1200)[:500]
    left_out = [n for n in shuffled(1200)[500:] if env.shop.store.goal(n).content_hash() in hashes["test"]]
    assert left_out and len(hashes["train"]) == 700 - len(left_out)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(values=st.lists(json_values, max_size=5), chunk=st.integers(1, 9), indent=st.sampled_from([None, 1]))
def test_streaming_gives_what_json_gives(
    values: list, chunk: int, indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("json") / "file.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_CHUNK", chunk)
        path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
        assert list(stream.stream_json(path, list)) == list(enumerate(values))
        table = {str(number): value for number, value in enumerate(values)}
        path.write_text(json.dumps(table, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert dict(stream.stream_json(path, dict)) == table


def test_the_order_of_goals_is_kept_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = (
        write_files(tmp_path / "data", [make_row(n) for n in range(0, 1200, 2)]),
        tmp_path / "cache",
    )
    options = {"level": "official", "data": str(folder), "cache_dir": str(cache)}
    tasks = [WebShopEnv(**options).get_task("train", index)["content_hash"] for index in range(3)]
    kept = next(cache.glob("*.order-233"))
    monkeypatch.setattr(official, "shuffled", None)  # a later worker only opens what is there
    assert [WebShopEnv(**options).get_task("train", index)["content_hash"] for index in range(3)] == tasks
    kept.unlink()
    monkeypatch.setattr(official, "shuffled", shuffled)

    def refuse(path: Path, build: object) -> Path:
        raise OSError("read-only")

    monkeypatch.setattr(official, "build_once", refuse)  # the catalog is there, but nothing can be written
    assert [WebShopEnv(**options).get_task("train", index)["content_hash"] for index in range(3)] == tasks
    assert not kept.exists()


@pytest.mark.parametrize("text", ["", "[", "[1", "[1,", "[1 2]", "[1,]", '{"a" 1}', '{"a":}', "[nul]"])
def test_broken_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json"):
        list(stream.stream_json(path, dict if text.startswith("{") else list))


@pytest.mark.shared_data
def test_prices_and_goals_are_the_originals(tmp_path: Path) -> None:
    """The original built 6,910 goals; half of the instructions are here, and their goals keep their order."""
    folder = find_shared("webshop")
    store = official.load(find_files(str(folder), "small", "synthetic"), str(tmp_path))
    prices = json.loads((folder / "product_prices_seed42.json").read_text())
    assert {asin: store.price(asin) for asin in prices} == prices
    with gzip.open(folder / "goals_dev.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    mine = {(goal.asin, goal.options): n for n in range(store.num_goals) for goal in [store.goal(n)]}
    assert len(mine) == len(rows) == store.num_goals == 2742
    order, places = shuffled(6910), []
    for row in rows:
        number = mine[row["asin"], tuple(row["goal_options"].items())]
        goal = store.goal(number)
        assert goal.attributes == tuple(row["attributes"])
        # Limits come from one stream for all goals, so here they are other numbers in the same sentence.
        assert goal.instruction.split(", and price")[0] == row["instruction_text"].split(", and price")[0]
        places.append((order[row["goal_idx"]], number))
    assert [number for _, number in sorted(places)] == list(range(2742))
