"""Curves: drawn from whatever was recorded."""

import json

import numpy as np
import pytest

from empg_jax.report.curves import column, held_out_points, plot_curves, smooth


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


def test_the_evaluations_before_and_after_are_points_of_the_curve(tmp_path):
    records = [{"update": 1}, {"update": 2, "eval_success": 0.4}, {"update": 3}]
    assert held_out_points(tmp_path, records) == {2: 0.4}
    summary = {"eval_success_before": 0.2, "eval_success_after": 0.6, "updates": 3}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert list(held_out_points(tmp_path, records).items()) == [(0, 0.2), (2, 0.4), (3, 0.6)]


def test_ticks_are_whole_updates(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: drawn.append(self) or file.write(b"image"))
    _write(tmp_path, [{"update": n, "success_rate": 0.5, "loss": 0.1 * n} for n in (1, 2, 3)])
    plot_curves(tmp_path)
    for axes in drawn[0].axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert all(float(tick).is_integer() for tick in ticks), axes.get_title(loc="left")
