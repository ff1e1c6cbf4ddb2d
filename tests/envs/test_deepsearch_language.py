"""Deep Search's language: tags, the two parsers, scores, prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from empg_envs.deepsearch.prompt import make_parser, make_prompts
from empg_envs.deepsearch.scoring import exact_match, normalize_answer, sub_match, token_f1
from empg_envs.deepsearch.tags import Call, iter_blocks, read_call

NO_OPEN = {"tools": ["search", "answer"]}
ALL = {"tools": ["search", "open", "answer"]}


@pytest.mark.parametrize(
    ("response", "action"),
    [
        ("<think>hm</think><search> who is x </search>", "<search>who is x</search>"),
        ("<answer>Oslo</answer>", "<answer>Oslo</answer>"),
        ("<search>a</search> <answer>b</answer>", "<search>a</search>"),  # the first block decides
        ("<answer>b</answer> <search>a</search>", "<answer>b</answer>"),
        ("<answer>one</answer> no, <answer>two</answer>", "<answer>two</answer>"),  # the last answer counts
        ("<search>a</search><search>b</search>", "<search>a</search>"),
        ("<think><search>inside</search></think>", "<search>inside</search>"),
        ("<search>never closed <answer>x</answer>", "<answer>x</answer>"),
        ("<search>a\nb</search>", "<search>a\nb</search>"),
        ("</search>a<search>", ""),
        ("<search> \n</search>", ""),
        ("<SEARCH>a</SEARCH>", ""),  # Search-R1's tags are in lower case
        ("<open>3</open>", "<open>3</open>"),
        ("plain text", ""),
        ("", ""),
    ],
)
def test_the_first_block_decides(response: str, action: str) -> None:
    parsed = make_parser()(response, ALL)
    assert (parsed.action, parsed.is_valid) == (action, bool(action))


def test_a_tool_that_is_not_on_offer_is_text() -> None:
    assert make_parser()("<open>3</open><search>a</search>", NO_OPEN).action == "<search>a</search>"
    assert not make_parser()("<open>3</open>", NO_OPEN).is_valid


@pytest.mark.parametrize(
    ("response", "action", "is_valid"),
    [
        ("<search>a</search>", "<search>a</search>", True),
        ("<think>x</think> <Search> a </SEARCH> tail", "<search>a</search>", True),
        ("<search>a</search><answer>b</answer>", "<search>a</search>", False),  # both: flagged, carried out
        ("<search>a</search><search>b</search>", "<search>a</search>", False),
        ("<answer>a</answer><answer>b</answer>", "<answer>a</answer>", False),  # cut after the first close
        ("<search><answer>b</answer>", "<answer>b</answer>", False),
        ("nothing", "", False),
    ],
)
def test_one_block_rules(response: str, action: str, is_valid: bool) -> None:
    parsed = make_parser("verl_agent", style="search_r1")(response, NO_OPEN)
    assert (parsed.action, parsed.is_valid) == (action, is_valid)


@given(st.lists(st.sampled_from(["<search>", "</search>", "<answer>", "</answer>", "a", " "]), max_size=12))
def test_blocks_agree_with_a_regular_expression(parts: list[str]) -> None:
    import re

    text = "".join(parts)
    expected = [Call(m[1], m[2].strip()) for m in re.finditer(r"<(search|answer)>(.*?)</\1>", text, re.S)]
    assert list(iter_blocks(text, ("search", "answer"))) == expected


def test_many_unclosed_tags_are_no_trouble() -> None:
    assert read_call("<search><answer>" * 100_000) is None  # quadratic work would not end


def test_scores() -> None:
    assert normalize_answer("The  Eiffel-Tower, a tower!") == "eiffeltower tower"
    assert exact_match("the U.S.A.", ["USA", "America"]) == 1.0
    assert exact_match("in Oslo", ["Oslo"]) == 0.0 and sub_match("in Oslo", ["Oslo"]) == 1.0
    # Precision 1/2, recall 1/1.
    assert token_f1("in Oslo", ["Bergen", "Oslo"]) == pytest.approx(2 / 3)
    assert token_f1("yes indeed", ["yes"]) == 0.0 == token_f1("no", ["no way"])
    for score in (exact_match, sub_match, token_f1):
        assert score("", ["", "the"]) == 0.0 and score(" ", ["x"]) == 0.0 and score("x", []) == 0.0
        assert score(".", ["A"]) == score("the", ["A"]) == 0.0 and score("a", ["B", "A"]) == 1.0
    assert sub_match("anything", ["the"]) == 0.0  # a golden answer of articles is in nothing


@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=3))
def test_scores_are_ordered(answer: str, golden: list[str]) -> None:
    exact, sub, f1 = (score(answer, golden) for score in (exact_match, sub_match, token_f1))
    assert 0.0 <= exact <= 1.0 and 0.0 <= f1 <= 1.0
    if normalize_answer(answer):
        assert exact <= sub and exact <= f1 + 1e-9


def test_window_pairs_each_call_with_what_it_brought() -> None:
    prompts = make_prompts("search_r1")
    info = {"task": "Who?", **NO_OPEN}
    history = [("first results", "<search>b</search>"), ("second results", "<search>c</search>")]
    (message,) = prompts.window(history, "third results", info, 3)
    text = message["content"]
    assert "Question: Who?" in text and "3 steps" in text
    assert "Step 2:<search>b</search> second results\nStep 3:<search>c</search> third results" in text
    assert "first results" not in text and "<open>" not in text
    assert prompts.window([], "Who?", info, 0) == prompts.start("Who?", info)
    assert "third results" in prompts.window([], "third results", info, 3)[0]["content"]
    assert "<open>" in prompts.start("Who?", {"task": "Who?", **ALL})[0]["content"]


def test_unknown_styles_and_parsers_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown deepsearch prompt style 'x'.*terse, search_r1"):
        make_prompts("x")
    with pytest.raises(ValueError, match=r"unknown deepsearch parser 'x'.*search_r1, verl_agent"):
        make_parser("x")
