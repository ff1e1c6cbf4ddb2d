"""The spread of factors over turns, from made-up episodes of runs."""

import pytest
import study_factors

from empg_jax.run.rollouts import write_rollouts


def episode(group, member, entropies, factors, **fields):
    turns = [
        {"reward": 0.0, "valid": True, "tokens": 2, "entropy": entropy, "factor": factor}
        | {"token_entropies": [entropy - 0.5, entropy + 0.5]}
        for entropy, factor in zip(entropies, factors, strict=True)
    ]
    return {"group_id": group, "member": member, "turns": turns} | fields


@pytest.fixture
def run(tmp_path):
    """A run of two updates; in the second one a group is in the dead zone."""
    write_rollouts(tmp_path, 1, [episode(0, 0, [1.0, 2.0], [1.2, 0.8]), episode(0, 1, [3.0], [0.4])])
    write_rollouts(tmp_path, 2, [episode(0, 0, [1.0], [1.0]), episode(1, 0, [5.0], [1.6])])
    return tmp_path


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line]


def test_spread_and_shares_of_a_run(run, capsys):
    assert study_factors.main([str(run)]) == 0
    found = rows(capsys.readouterr().out)
    assert found[3][1:] == ["5", "factor", "1.000", "0.400", "0.400", "0.560", "1.000", "1.440", "1.600"]
    assert found[2][3:] == ["2.400", "1.497", "1.000", "1.000", "2.000", "4.200", "5.000"]
    # 1.2 and 1.6 are above 1; the lone turn of group 0 is dead in update 2, but not in update 1.
    assert found[-1][1:3] == ["0.400", "0.200"]
    assert found[-1][5:] == ["0.250", "2.240"]


def test_runs_of_one_name_stand_beside_each_other(tmp_path, capsys):
    folders = [tmp_path / part / "empg" for part in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
        write_rollouts(folder, 1, [episode(0, 0, [1.0], [1.0])])
    assert study_factors.main(list(map(str, folders))) == 0
    text = capsys.readouterr().out
    assert all(str(folder) in text for folder in folders)


def test_some_updates_alone(run, capsys):
    assert study_factors.main([str(run), "--updates", "1"]) == 0
    found = rows(capsys.readouterr().out)
    assert found[3][1] == "3" and found[-1][3] == "-1.00"


def test_what_is_not_there_is_told(run, tmp_path, capsys):
    assert study_factors.main([str(run), "--updates", "7"]) != 0
    assert "no episodes of update 7; there are 1, 2" in capsys.readouterr().err
    assert study_factors.main([str(tmp_path / "other")]) != 0
    assert "log.rollouts_every=1" in capsys.readouterr().err
