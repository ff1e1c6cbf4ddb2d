"""What programs and scorers say of an episode: read in full, or refused by name."""

import pytest

from empg_envs.verdicts import read_verdict


@pytest.mark.parametrize(
    ("found", "reward", "success", "metrics"),
    [
        (2, 2.0, True, {}),
        (-0.5, -0.5, False, {}),
        ({"reward": 0}, 0.0, False, {}),
        ({"reward": 1, "success": None, "metrics": None}, 1.0, True, {}),
        ({"reward": 0, "success": True, "metrics": {"a": 1}}, 0.0, True, {"a": 1.0}),
        ({"reward": 1, "success": False, "metrics": {"a": True}}, 1.0, False, {"a": 1.0}),
    ],
)
def test_a_verdict_is_read(found, reward, success, metrics):
    assert read_verdict(found) == {"reward": reward, "success": success, "metrics": metrics}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        *((found, "no finite reward") for found in (None, "1", True, [1], {}, {"reward": True})),
        *(({"reward": value}, "no finite reward") for value in (float("nan"), float("inf"), 10**400)),
        *(({"reward": 1, "success": value}, "no true or false as success") for value in ("false", [], 2)),
        *(({"reward": 1, "metrics": value}, "no object as metrics") for value in ([1], 1, "")),
        *(
            ({"reward": 1, "metrics": {"a": 1, "b": value}}, "no finite number as metrics.b")
            for value in ("fine", float("nan"), 10**400, None, {})
        ),
    ],
)
def test_a_verdict_of_other_types_is_refused(found, says):
    with pytest.raises(ValueError, match=f"^{says}$"):
        read_verdict(found)
