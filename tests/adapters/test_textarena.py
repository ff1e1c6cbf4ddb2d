"""TextArena's games, with the real package."""

import random
import re

import pytest

from empg_envs import ENVS, make_env
from empg_envs.adapters.opponents import _is_legal as is_legal
from empg_envs.base import EnvFault
from tests.adapters.needs import need

need("textarena")


def play(env, moves, index=0):
    replies = [env.reset(split="train", index=index)]
    for move in moves:
        replies.append(env.step(move))
        if replies[-1][2] or replies[-1][3]:
            break
    return replies


def available(observation):
    return re.findall(r"'(\[\d\])'", observation.rpartition("Available Moves")[2])


def finish(env, index):
    """Plays the first move that is offered to the end."""
    observation, info = env.reset(split="train", index=index)
    while True:
        observation, reward, terminated, truncated, info = env.step(available(observation)[0])
        assert not truncated
        if terminated:
            return reward, info


def test_the_policy_begins_in_every_other_game():
    env = make_env("textarena")
    first, second = env.reset(split="train", index=0)[0], env.reset(split="train", index=1)[0]
    assert first.startswith("You are Player 0") and len(available(first)) == 9
    assert second.startswith("You are Player 1") and "[Player 0] [" in second and len(available(second)) == 8


def test_observations_hold_what_is_new():
    env = make_env("textarena")
    (opening, _), (observation, reward, *_) = play(env, ["[4]"])
    assert opening not in observation and "Tic Tac Toe" not in observation and reward == 0.0
    assert observation.count("[Player 1]") == 1 and "[Player 0] [4]" not in observation
    assert len(available(observation)) == 7


def test_rewards_and_outcomes_are_the_games():
    env = make_env("textarena")
    found = {}
    for index in range(40):
        reward, info = finish(env, index)
        found.setdefault(info["outcome"], set()).add((reward, info["won"]))
    assert found["won"] == {(1.0, True)} and found["lost"] == {(-1.0, False)}
    assert found.get("draw", {(0.0, False)}) == {(0.0, False)}


def test_illegal_moves_end_by_the_rules_of_the_game():
    env = make_env("textarena")
    _, once, twice = play(env, ["nonsense", "[99]", "[0]"])
    assert once[1:4] == (0.0, False, False) and "attempted an invalid move" in once[0]
    assert twice[1:4] == (-1.0, True, False)
    assert twice[4]["outcome"] == "invalid_move" and "Must be between" in twice[4]["detail"]


def test_a_fixed_opponent_and_one_of_the_users():
    first = make_env("textarena", opponent="first")
    _, reply = play(first, ["[4]"])
    assert "[Player 1] [0]" in reply[0]
    mine = make_env("textarena", opponent="tests.adapters.games:play_last")
    _, reply = play(mine, ["[4]"])
    assert "[Player 1] [8]" in reply[0]


def test_the_random_opponent_plays_all_legal_moves_and_the_same_again():
    env = make_env("textarena")
    replies = [
        re.search(r"\[Player 1\] (\[\d\])", play(env, ["[4]"], 2 * index)[1][0])[1] for index in range(60)
    ]
    assert set(replies) == {f"[{cell}]" for cell in range(9) if cell != 4}
    again = [
        re.search(r"\[Player 1\] (\[\d\])", play(env, ["[4]"], 2 * index)[1][0])[1] for index in range(60)
    ]
    assert replies == again


def test_a_game_leaves_the_process_its_random_numbers():
    random.seed(3)
    expected = random.random(), random.random()
    random.seed(3)
    env = make_env("textarena", id="PigDice-v0")
    play(env, ["[roll]"] * 3)
    assert (random.random(), random.random()) == expected


def test_a_game_of_one():
    env = make_env("textarena", id="GuessTheNumber-v0")
    observation, _ = env.reset(split="train", index=0)
    low, high = 1, 20
    while True:
        guess = (low + high) // 2
        observation, reward, terminated, _, info = env.step(
            str(guess)
        )  # the game wants brackets, and gets them
        if terminated:
            break
        low, high = (guess + 1, high) if "higher" in observation else (low, guess - 1)
    assert reward == 1.0 and info["won"] and info["outcome"] == "won"


def test_a_message_in_the_place_of_a_reward():
    """Of a few games the penalty for an illegal move is the message."""
    env = make_env("textarena", id="Countdown-v0")
    *_, end = play(env, ["nonsense"] * 5)
    assert end[1:3] == (-1.0, True) and end[4]["outcome"] == "invalid_move" and "format" in end[4]["detail"]


def test_an_opponent_without_a_move_is_a_fault_with_a_name():
    env = make_env("textarena", opponent="tests.adapters.games:give_up")
    with pytest.raises(EnvFault, match="TicTacToe-v0: no move") as caught:
        play(env, ["[4]"])
    assert caught.value.reason == "opponent_stuck"


@pytest.mark.parametrize("opponent", ["random", "first"])
@pytest.mark.parametrize("game", ["Nim-v0", "Battleship-v0", "ConnectFour-v0", "Breakthrough-v0-tiny"])
def test_games_that_show_only_examples_of_moves_are_refused(game, opponent):
    """Legal moves are shown in the first position only, or are a few of them."""
    with pytest.raises(ValueError, match=f"{game}, opponent={opponent}: .*shows no legal move.*=package"):
        make_env("textarena", id=game, opponent=opponent)


@pytest.mark.parametrize(
    "game", ["TicTacToe-v0", "KuhnPoker-v0", "IteratedRockPaperScissors-v0", "SimpleTak-v0"]
)
def test_games_of_legal_moves_go_to_their_end(game):
    env = make_env("textarena", id=game)
    for index in range(10):
        shown, _ = env.reset(split="train", index=index)
        is_over = False
        while not is_over:
            moves = re.findall(r"\[[^\[\]\n]+\]", shown)
            move = next(move for move in reversed(moves) if is_legal(env._game, move))
            observation, _, is_over, truncated, info = env.step(move)
            assert not truncated
            shown += observation
        assert info["outcome"] in ("won", "lost", "draw")


@pytest.mark.parametrize("game", ["TicTacToe-v0", "FrozenLake-v0", "ConnectFour-v0"])
def test_endless_actions_lose_and_are_no_faults(game):
    env = make_env("textarena", id=game, opponent="tests.adapters.games:play_last")
    end = play(env, ["[" + "9" * 5000 + "]", "[" + "9" * 5000] * 60)[-1]
    assert end[2] and end[4]["outcome"] == "invalid_move"


def test_word_lists_are_never_fetched(monkeypatch):
    nltk = pytest.importorskip("nltk")
    fetched = []
    monkeypatch.setattr(nltk, "download", lambda *names, **_: fetched.append(names))
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ValueError, match=r"its word list is not here: python -m nltk\.downloader words"):
        make_env("textarena", id="Hangman-v0")
    assert not fetched


def test_the_whole_answer_is_the_move():
    assert ENVS["textarena"].parser()("<think>[0]</think> I take\n[4]", {}).action == "I take\n[4]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": "TicTacTo-v0"}, "textarena has no game 'TicTacTo-v0'; did you mean 'TicTacToe-v0'"),
        (
            {"opponent": "rando"},
            "unknown opponent 'rando'; did you mean 'random'.*choose random, first, package",
        ),
        (
            {"opponent": "tests.adapters.games:nobody"},
            "opponent=tests.adapters.games:nobody: .*expected package",
        ),
        ({"id": "ThreePlayerTicTacToe-v0"}, "is no game of 1 or 2 players"),
        ({"players": 1}, "TicTacToe-v0 is no game of 1 players"),
        ({"id": "Chopsticks-v0"}, "Chopsticks-v0, opponent=random: the game shows no legal move in brackets"),
        ({"kwargs": {"size": 4}}, "textarena cannot make TicTacToe-v0: TypeError: .*size"),
    ],
)
def test_what_cannot_be_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        make_env("textarena", **options)
