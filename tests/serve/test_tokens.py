"""Token ids in and out, conversations that keep their KV, and requests alone and in company."""

import concurrent.futures
import threading

import numpy as np

from empg_jax.text import load_tokenizer
from tests.serve.servers import PADDING, wait_until


def generate(http, tokens, **sampling):
    answer = http.post(
        "/inference/v1/generate",
        json={"model": "talker", "token_ids": tokens, "sampling_params": {"logprobs": 1, **sampling}},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def prefilled(http):
    return http.get("/health").json()["prefilled_tokens"]


def test_generate_answers_as_verifiers_reads_it(http):
    # What renderers' client sends beside the token ids, and what it checks of the answer.
    body = generate(
        http, [12, 15, 1, 3], temperature=1.0, max_tokens=5, seed=3, stop_token_ids=[1], n=1,
        skip_special_tokens=False, top_p=1.0, top_k=-1,
    )  # fmt: skip
    (choice,) = body["choices"]
    assert isinstance(body["request_id"], str)
    items = choice["logprobs"]["content"]
    assert [item["token"] for item in items] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert [item["logprob"] for item in items] == choice["empg"]["logprobs"]
    assert len(choice["empg"]["entropies"]) == len(choice["empg"]["versions"]) == len(items)
    assert choice["finish_reason"] in ("stop", "length")


def test_tokens_of_the_model_that_the_tokenizer_lacks_are_taken_back(http, talker):
    size = load_tokenizer(talker).vocab_size
    padding = [size, size + PADDING - 1]
    generate(http, [12, *padding], max_tokens=2, stop_token_ids=padding, top_k=size + PADDING)
    answer = http.post("/v1/completions", json={"prompt": [12, *padding], "max_tokens": 2})
    assert answer.status_code == 200
    refused = http.post("/v1/completions", json={"prompt": [size + PADDING]})
    assert refused.status_code == 400 and f"[0, {size + PADDING})" in refused.json()["error"]["message"]


def test_filters_are_those_of_the_request_with_log_probs_of_both_distributions(http):
    how = {"seed": 3, "max_tokens": 12, "temperature": 2.0}
    free, one, some = (
        generate(http, [12, 15], **how, **options)["choices"][0]
        for options in ({}, {"top_k": 1}, {"top_p": 0.8, "top_k": 9, "min_p": 0.01})
    )
    (greedy,) = generate(http, [12, 15], **{**how, "temperature": 0.0})["choices"]
    assert one["token_ids"] == greedy["token_ids"] != free["token_ids"]
    np.testing.assert_allclose(one["empg"]["sampling_logprobs"], 0.0, atol=1e-6)
    assert free["empg"]["sampling_logprobs"] == free["empg"]["logprobs"]
    drawn, full = (np.asarray(some["empg"][name]) for name in ("sampling_logprobs", "logprobs"))
    assert np.all(drawn > full) and np.all(np.exp(full - drawn) < 1.0)
    assert [item["logprob"] for item in some["logprobs"]["content"]] == drawn.tolist()
    # The first token's distribution is that of the free response, of which the filter keeps a part.
    np.testing.assert_allclose(some["empg"]["entropies"][0], free["empg"]["entropies"][0], atol=1e-5)


def test_a_stop_token_of_the_request_ends_the_response(http):
    (free,) = generate(http, [12, 15], seed=3, max_tokens=20, temperature=3.0)["choices"]
    stop = free["token_ids"][4]
    length = free["token_ids"].index(stop) + 1
    (cut,) = generate(http, [12, 15], seed=3, max_tokens=20, temperature=3.0, stop_token_ids=[stop])[
        "choices"
    ]
    assert cut["token_ids"] == free["token_ids"][:length] and cut["finish_reason"] == "stop"
    assert len(cut["empg"]["entropies"]) == length


def test_a_conversation_that_goes_on_prefills_only_what_is_new(http):
    prompt, cached = [12, 13, 14, 15, 16, 17, 18, 19, 1, 3], []
    for turn in range(4):
        before = prefilled(http)
        (choice,) = generate(http, prompt, seed=turn, max_tokens=6)["choices"]
        cached.append(prefilled(http) - before)
        # A new message of three tokens behind the response.
        prompt = [*prompt, *choice["token_ids"], 2, 20 + turn, 3]
    # All but the newest token of a prompt, which decoding reads; afterwards the response's last one, and the
    # new message's first two.
    # The first prompt may begin as one that another test left in its slot.
    assert cached[0] <= 9 and cached[1:] == [3, 3, 3]


def test_a_chat_that_goes_on_reuses_its_conversation(client):
    messages = [{"role": "user", "content": "red one two three four five six seven eight nine"}]
    cached, total = [], 0
    for turn in range(3):
        answer = client.chat.completions.create(
            model="talker", messages=messages, seed=turn, max_tokens=5, temperature=2.0
        )
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "blue"},
        ]
        assert cached[-1] == total or turn == 0
        total = answer.usage.total_tokens


def test_requests_that_begin_alike_share_their_beginning(client, http):
    """As agents of one environment do: the same instructions, other tasks; told as any server tells it."""
    words = "red one two three four five six seven eight nine " * 3
    before, cached = prefilled(http), []
    for word in ("red", "blue", "green"):
        messages = [{"role": "user", "content": words + word}]
        answer = client.chat.completions.create(model="talker", messages=messages, seed=1, max_tokens=3)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert min(cached[1:]) >= 30
    assert prefilled(http) - before <= answer.usage.prompt_tokens + 20


def test_kept_conversations_give_way_to_new_ones_oldest_first(http):
    for number in range(20):  # a new one that begins as one of another test did would count as its return
        generate(http, [5 + number, 8, 8, 8, 8, 8], max_tokens=2)
    conversations = [[10 + number, 11, 12, 13, 14, 15] for number in range(5)]
    answers = [
        generate(http, tokens, seed=1, max_tokens=4, temperature=2.0)["choices"][0]["token_ids"]
        for tokens in conversations
    ]
    health = http.get("/health").json()
    assert (health["slots"], health["kept"], health["busy"], health["waiting"]) == (4, 4, 0, 0)
    before = prefilled(http)
    newest = [*conversations[4], *answers[4], 2, 20, 3]
    generate(http, newest, seed=1, max_tokens=4)
    assert prefilled(http) - before == 3
    before = prefilled(http)
    oldest = [*conversations[0], *answers[0], 2, 20, 3]
    generate(http, oldest, seed=1, max_tokens=4)
    assert prefilled(http) - before == len(oldest) - 1  # its slot was taken


def test_a_request_alone_equals_the_same_request_in_a_full_batch(http):
    prompts = [[10 + number % 7, 15 + number, 1, 3] for number in range(12)]

    def ask(number):
        (choice,) = generate(
            http, prompts[number], seed=100 + number, max_tokens=30, temperature=1.5 + number % 3
        )["choices"]
        return choice

    alone = [ask(number) for number in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        together = list(threads.map(ask, range(12)))
    for one, other in zip(alone, together, strict=True):
        assert one["token_ids"] == other["token_ids"]
        for name in ("logprobs", "entropies"):
            np.testing.assert_allclose(one["empg"][name], other["empg"][name], atol=1e-4)


def test_requests_beyond_the_slots_wait_and_beyond_the_queue_are_refused(http):
    barrier = threading.Barrier(24)

    def ask(number):
        barrier.wait()
        return http.post(
            "/inference/v1/generate",
            json={"token_ids": [10, 15 + number % 8], "sampling_params": {"max_tokens": 100, "n": 2}},
        )

    with concurrent.futures.ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(ask, range(24)))
    codes = {answer.status_code for answer in answers}
    assert codes <= {200, 429} and 200 in codes
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["Retry-After"] == "1"
            assert "serve.max_waiting" in answer.json()["error"]["message"]
    wait_until(lambda: http.get("/health").json()["busy"] == 0)
    assert generate(http, [10], max_tokens=1)["choices"]
    # More responses at once than can ever wait.
    refused = http.post("/inference/v1/generate", json={"token_ids": [10], "sampling_params": {"n": 100}})
    assert refused.status_code == 400 and "at most 12 fit at once" in refused.json()["error"]["message"]
