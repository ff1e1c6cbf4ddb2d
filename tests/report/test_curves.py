"""Curves: drawn from whatever was recorded."""

import json

import numpy as np
import pytest

from empg_jax.report.curves import column, plot_curves, smooth


def _write(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_full_run_becomes_a_png(tmp_path):
    names = ("success_rate", "entropy", "episode_turns", "episode_return", "loss")
    modulation = {"modulation_mean": 1.0, "modulation_min": 0.6, "modulation_max": 1.5}
    records = [{"update": n, "time": n} | dict.fromkeys(names, n / 50) | modulation for n in range(50)]
    records[0]["eval_success"], records[-1]["eval_success"] = 0.2, 0.8
    _write(tmp_path, records)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "curves.png" and path.read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


@pytest.mark.parametrize(
    "records",
    [[], [{"update": 0, "loss": None}], [{"update": 0, "eval_success": 0.3}], [{"update": 3, "loss": 1.0}]],
    ids=["nothing", "only nulls", "only evaluation", "one update"],
)
def test_missing_columns_leave_their_panels_empty(tmp_path, records):
    _write(tmp_path, records)
    assert plot_curves(tmp_path).stat().st_size > 10_000


def test_columns_skip_what_was_not_recorded():
    updates, values = column([{"update": 0, "loss": 1}, {"update": 1}, {"update": 2, "loss": None}], "loss")
    np.testing.assert_array_equal(updates, [0, 2])
    np.testing.assert_array_equal(values, [1.0, np.nan])


def test_smoothing_divides_by_what_it_summed():
    # Windows of 3: (1+2)/2, (1+2)/2 around the gap, (2+6)/2, (6+4)/2 ...
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, np.nan, 6.0, 4.0]), 3), [1.5, 1.5, 4.0, 5.0, 5.0])
    np.testing.assert_allclose(smooth(np.array([3.0, np.nan]), 1), [3.0, np.nan])


def test_a_folder_without_metrics_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        plot_curves(tmp_path)
