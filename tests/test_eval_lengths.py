"""`empg-jax eval http://...` and little room there: `max_tokens` or the conversation does not fit."""

import json

import pytest

from tests.test_eval_endpoint import ASKED, SETTINGS, by_seed, call, connect, faking, said

# As vLLM, OpenAI and SGLang refuse what is too long.
WORDS = [
    {"message": "'max_tokens' is too large: 4. This model's maximum context length is 2 tokens", "code": 400},
    {"message": "long", "code": "context_length_exceeded"},
    {"message": "The input (3 tokens) is longer than the model's context length (2 tokens)."},
]


def refuse(words):
    return 400, {"error": words}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("knows_keys", [True, False])
def test_a_server_that_refuses_more_tokens_than_fit_is_asked_for_those_that_fit(words, knows_keys):
    def reply(number, body):
        if not knows_keys and "return_token_ids" in body:
            return 400, "return_token_ids?"
        return refuse(words) if "max_tokens" in body else by_seed(number, body)

    with faking(reply) as fake:
        code, out, err = call("eval", fake.url, *ASKED, *SETTINGS)
    assert code == 0, err
    with faking(by_seed) as fake:
        roomy = json.loads(call("eval", fake.url, *ASKED, *SETTINGS)[1])
    assert {**json.loads(out), "source": fake.url} == roomy and roomy["eval_success"] > 0


def test_the_words_of_a_conversation_that_leaves_no_room_are_kept():
    for words in WORDS:
        with faking(lambda number, body, words=words: refuse(words)) as fake:
            answer = connect(fake).ask([], 0)
        assert (answer.text, answer.finish_reason) == ("", "length") and words["message"] in answer.unfit
        assert ["max_tokens" in body for body in fake.bodies] == [True, False]


def test_an_attempt_whose_first_prompt_does_not_fit_is_missing_and_told(tmp_path):
    first = []

    def reply(number, body):
        first.append(body["messages"])
        return refuse(WORDS[0]) if body["messages"] == first[0] else by_seed(number, body)

    with faking(reply) as fake:
        code, out, err = call("eval", fake.url, *ASKED, *SETTINGS, "rollout.slots=1", "--out", tmp_path)
    found = json.loads(out)
    assert code == 0 and found["eval_missing"] == 2, err
    assert "2 of 8 attempts have no result; the last failure: " in err
    records = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert len(records) == 6 and all(turn["response"] for each in records for turn in each["turns"])

    with faking(lambda number, body: refuse(WORDS[0])) as fake:
        code, out, err = call("eval", fake.url, *ASKED, *SETTINGS, "--attempts", 1)
    assert (code, out) == (1, "") and "could be attempted; the last failure: prompt_too_long: " in err
    assert "status 400: 'max_tokens' is too large: 4" in err


def test_a_conversation_that_outgrows_the_server_ends_its_episode(tmp_path):
    def reply(number, body):
        return refuse(WORDS[0]) if len(body["messages"]) > 1 else said("look")

    with faking(reply) as fake:
        code, out, err = call("eval", fake.url, *ASKED, *SETTINGS, "--out", tmp_path)
    assert code == 0 and json.loads(out)["eval_missing"] == 0, err
    for line in (tmp_path / "episodes.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert [turn["response"] for turn in record["turns"]] == ["look"]
        assert (record["reason"], record["success"]) == ("context_limit", False)
