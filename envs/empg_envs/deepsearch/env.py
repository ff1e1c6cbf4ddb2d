"""Deep Search as a `TextEnv`: a question, a search engine, and an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.deepsearch import expert, scoring
from empg_envs.deepsearch.pages import cut_piece, first_words, read_key, write_key
from empg_envs.deepsearch.passages import Passage, check_topk
from empg_envs.deepsearch.sources import EmbeddedSource, Source, Task, open_files
from empg_envs.deepsearch.tables import LEVELS, Level
from empg_envs.deepsearch.tags import ANSWER, BROWSE, OPEN, Call, choose_tools, read_call
from empg_envs.deepsearch.texts import TEXTS, Shown, Texts
from empg_envs.draw import Draw
from empg_envs.names import look_up

FILE_MAX_TURNS = 4  # responses, as verl-agent counts; Search-R1 has four searches and then an answer
MAX_QUERY_CHARS = 2000  # longer queries are cut
BROWSED_SNIPPET_WORDS = 30  # of a search result, where pages can be browsed
PIECE_WORDS = 300


class DeepSearchEnv:
    """Questions that are answered with the help of a search engine.

    An action is a response or a parser's extract of it. Its first complete ``<search>``, ``<open>``,
    ``<browse>`` or ``<answer>`` block of a tool on offer is carried out; of several answers the last one
    counts. All other text is ignored. An answer ends the episode with reward 1.0 if it matches a golden
    answer exactly after normalization, else 0.0. A failure of the search engine raises an exception, so that
    such an episode is lost but not scored.

    ``info`` contains ``task`` (the question), ``group`` (its data set, or its number of hops), ``won``,
    ``tools`` (the available ones) and ``metrics`` (``exact_match``, ``sub_match``, ``f1``, ``answered``,
    ``searches``, ``opens``, and ``browses`` where pages can be browsed). In embedded worlds it also contains
    ``admissible``: tool calls about names that the agent has seen. At the start it contains ``known_answer``,
    for the trainer alone: the words before a golden answer in a response, and the first golden answer.
    """

    def __init__(
        self,
        level: str = "tiny",
        style: str | None = None,
        *,
        questions: str | Sequence[str] | Mapping[str, Any] | None = None,
        corpus: str | None = None,
        retriever: str | None = None,
        retriever_options: Mapping[str, Any] | None = None,
        topk: int = 3,
        max_turns: int | None = None,
        tool_budget: int | None = None,
        snippet_words: int | None = None,
        passage_words: int | None = None,
        tools: Sequence[str] | None = None,
        piece_words: int | None = None,
        replayable: bool = True,
    ) -> None:
        """Set up the questions, the search engine and the limits.

        Args:
          level: level of the embedded worlds (``tiny``, ``easy``, ``medium``, ``hard``).
          style: ``terse`` (few words, for small models; the default of embedded worlds) or ``search_r1``.
          questions: FlashRAG-format file or files, or a mapping from panels to files; see
            `empg_envs.deepsearch.questions.make_panels`. Files may be data sets of the hub; see
            `empg_envs.rows`. None selects the embedded worlds.
          corpus: wiki-18-format file with the passages, or a data set of the hub.
          retriever: ``bm25s`` (default for a corpus), ``builtin``, ``tantivy``, or ``remote``.
          retriever_options: keyword arguments of the retriever. With ``index_dir``, ``bm25s`` and ``tantivy``
            keep their index in that folder, where all workers share it; see `empg_envs.deepsearch.ondisk`.
          topk: number of passages that a search shows.
          max_turns: number of steps after which an episode is truncated. The default is the level's limit, or
            4 for files.
          tool_budget: number of searches and opened passages per question; None allows as many as turns.
          snippet_words: number of words of each passage that a search shows, with the passage's id;
            ``<open>`` shows the whole passage. None shows whole passages and removes ``<open>``; where pages
            can be browsed it is 30.
          passage_words: number of words after which every passage is cut; None sets no limit.
          tools: ``[search]``, ``[search, open]`` or ``[search, browse]``; None follows from
            ``snippet_words``. ``<browse>`` shows the page of a search result by its title: all passages of
            that title in the order of the corpus, in pieces. ``<browse>title #2</browse>`` is the second one.
          piece_words: number of words of a browsed piece; None is 300.
          replayable: whether the search engine answers the same query alike; false for a live one, whose
            episodes are then lost with their worker.

        Raises:
          ValueError: a name is unknown, a limit is below 1, or options exclude each other.
          DataError: a file is malformed.
        """
        limits = {
            "max_turns": max_turns,
            "snippet_words": snippet_words,
            "passage_words": passage_words,
            "tool_budget": tool_budget,
            "piece_words": piece_words,
        }
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise ValueError(f"deepsearch {name} must be at least 1, not {limit}")
        style = style or ("terse" if questions is None else "search_r1")
        self._tools = choose_tools(tools, snippet_words, piece_words)
        if BROWSE in self._tools:
            snippet_words = snippet_words or BROWSED_SNIPPET_WORDS
        files = (questions, corpus, retriever, retriever_options)
        self._source = _open_source(level, style, *files, with_pages=BROWSE in self._tools)
        self._texts: Texts = TEXTS[style]()
        self.replayable = replayable
        self._topk = check_topk(topk)
        usual_turns = find_level(level).max_turns if questions is None else FILE_MAX_TURNS
        self._max_turns = usual_turns if max_turns is None else max_turns
        self._budget = tool_budget
        self._snippet_words, self._passage_words = snippet_words, passage_words
        self._reader = next((tool for tool in (OPEN, BROWSE) if tool in self._tools), None)
        self._piece_words = piece_words or PIECE_WORDS
        self._draw = Draw("deepsearch", "reset", 0)
        self._task: Task | None = None
        self._answer: str | None = None
        self._begin()

    @property
    def max_turns(self) -> int:
        """Number of steps after which an episode is truncated."""
        return self._max_turns

    def list_splits(self) -> list[str]:
        """Return the panels; those of embedded worlds are ``train``, ``valid``, ``test``, ``test_ood``."""
        return self._source.list_splits()

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel."""
        return self._source.num_tasks(split)

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return the question in FlashRAG's format, its group, and the corpus of an embedded world."""
        task = self._source.load(split, index)
        described = {
            **task.question.to_row(),
            "task": task.question.text,
            "split": split,
            "index": index,
            "group": task.question.group,
            "content_hash": task.content_hash,
        }
        if task.passages:
            described["passages"] = [passage.to_row() for passage in task.passages]
        return described

    def panel_hash(self, split: str) -> str:
        """Return the hash of the ordered content hashes of a panel."""
        return self._source.panel_hash(split)

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode.

        Args:
          seed: seeds the random choice of an index, for resets without ``index``.
          split: the panel; the default is the first one.
          index: index of the task in its panel.

        Raises:
          ValueError: the split is unknown.
          IndexError: the index is outside of the panel.
        """
        if seed is not None:
            self._draw = Draw("deepsearch", "reset", seed)
        split = self.list_splits()[0] if split is None else split
        if index is None:
            index = self._draw.below(self.num_tasks(split))
        self._task = self._source.load(split, index)
        self._begin()
        question = self._task.question
        pair = [f"<{ANSWER}>", *question.golden_answers[:1]]
        known = {"known_answer": pair} if len(pair) == 2 else {}
        return self._texts.opening(question.text), self._info() | known

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carry out one response; a response without a call costs the turn and gets a hint.

        Raises:
          RuntimeError: before the first reset, or after the end of the episode.
          RetrieverError: the search engine failed.
        """
        task = self._playing("step")
        call = read_call(action, self._tools)
        if call is not None and call.tool == ANSWER:
            self._answer = call.content
            observation = "answered ."
        else:
            observation = self._use_tool(task, call)
        self._turn += 1
        terminated = self._answer is not None
        truncated = not terminated and self._turn >= self._max_turns
        self._is_done = terminated or truncated
        info = self._info()
        return observation, float(info["won"]), terminated, truncated, info

    def expert_action(self) -> str:
        """Return the expert's next action; it uses only the texts that were shown so far.

        Raises:
          RuntimeError: before the first reset, after the end of the episode, or for questions from files,
            whose chains of links are unknown.
        """
        task = self._playing("expert_action")
        if task.puzzle is None:
            raise RuntimeError("only embedded deepsearch questions have an expert; set sft.updates=0")
        return str(expert.choose_call(task, self._shown, self._texts, self._read_on))

    def close(self) -> None:
        """End the episode. The corpus stays loaded, because other environments of the process share it."""
        self._task = None

    def _begin(self) -> None:
        self._turn = self._searches = self._opens = self._browses = 0
        self._answer = None
        self._seen: dict[str, Passage] = {}  # passages in search results, by id
        self._shown: dict[str, str] = {}  # the shown part of their texts
        self._is_done = False

    def _playing(self, caller: str) -> Task:
        if self._task is None:
            raise RuntimeError(f"{caller}() without an episode: call reset() first")
        if self._is_done:
            raise RuntimeError(f"{caller}() after the episode ended: call reset() first")
        return self._task

    def _use_tool(self, task: Task, call: Call | None) -> str:
        question = task.question.text
        if call is None:
            return self._texts.notice(question, "invalid")
        if self._budget is not None and self._searches + self._opens + self._browses >= self._budget:
            return self._texts.notice(question, "budget")
        if call.tool == OPEN:
            self._opens += 1
            return self._open(question, call.content)
        if call.tool == BROWSE:
            self._browses += 1
            return self._browse(task, call.content)
        self._searches += 1
        (hits,) = task.retriever.search([call.content[:MAX_QUERY_CHARS]], self._topk)
        found: list[Shown] = []
        for passage, _ in hits:
            text = first_words(passage.text, self._passage_words)
            snippet = first_words(text, self._snippet_words)
            self._seen[passage.id] = passage
            # Keep the longer text: a search must not hide the parts of an already opened passage.
            if len(snippet) > len(self._shown.get(passage.id, "")):
                self._shown[passage.id] = snippet
            found.append((passage, snippet))
        return self._texts.results(question, found, self._reader)

    def _open(self, question: str, key: str) -> str:
        # Only search results can be opened, so that guessed ids reveal nothing.
        if key not in self._seen:
            return self._texts.notice(question, "unknown_id")
        passage = self._seen[key]
        text = first_words(passage.text, self._passage_words)
        self._shown[key] = text
        return self._texts.page(question, Passage(passage.id, passage.title, text))

    def _browse(self, task: Task, content: str) -> str:
        titles = {passage.title for passage in self._seen.values()}
        # A title may itself end with a number behind the mark.
        title, number = (content, 1) if content in titles else read_key(content)
        if title not in titles:
            return self._texts.notice(task.question.text, "unknown_title")
        page = self._page(task, title)
        piece = cut_piece(page, number, self._piece_words)
        if piece is None:
            return self._texts.notice(task.question.text, "no_piece")
        self._note_browsed(title, page, number, piece.end)
        return self._texts.piece(task.question.text, title, number, piece)

    def _page(self, task: Task, title: str) -> str:
        assert task.pages is not None
        passages = task.pages.read_page(title)
        return "\n".join(first_words(passage.text, self._passage_words) for passage in passages)

    def _note_browsed(self, title: str, page: str, number: int, end: int) -> None:
        """Note what the expert may use: the page as far as it was read without a gap."""
        for key, passage in self._seen.items():
            if passage.title == title and self._num_read(key) >= number - 1:
                self._shown[key] = max(self._shown[key], page[:end], key=len)

    def _num_read(self, key: str) -> int:
        """Return how many whole pieces of a passage's page are shown, counted from its beginning."""
        return len(self._shown[key].split()) // self._piece_words

    def _read_on(self, passage: Passage) -> Call:
        if self._reader == BROWSE:
            words = len(first_words(passage.text, self._passage_words).split())
            total = max(-(-words // self._piece_words), 1)
            return Call(BROWSE, write_key(passage.title, min(self._num_read(passage.id) + 1, total)))
        return Call(OPEN, passage.id)

    def _info(self) -> dict[str, Any]:
        assert self._task is not None
        question, answer = self._task.question, self._answer or ""
        exact = scoring.exact_match(answer, question.golden_answers)
        metrics = {
            "exact_match": exact,
            "sub_match": scoring.sub_match(answer, question.golden_answers),
            "f1": scoring.token_f1(answer, question.golden_answers),
            "answered": float(self._answer is not None),
            "searches": float(self._searches),
            "opens": float(self._opens),
        }
        if BROWSE in self._tools:
            metrics["browses"] = float(self._browses)
        info: dict[str, Any] = {
            "task": question.text,
            "group": question.group,
            "won": exact == 1.0,
            "tools": list(self._tools),
            "metrics": metrics,
        }
        if self._task.puzzle is not None:
            calls = expert.list_calls(self._task, self._shown, self._read_on if self._reader else None)
            info["admissible"] = sorted(map(str, calls))
        return info


def find_level(name: str) -> Level:
    """Return the preset of that name; an unknown name raises a `ValueError` with the nearest one."""
    return look_up("deepsearch level", name, LEVELS)


def _open_source(
    level: str,
    style: str,
    questions: str | Sequence[str] | Mapping[str, Any] | None,
    corpus: str | None,
    retriever: str | None,
    retriever_options: Mapping[str, Any] | None,
    *,
    with_pages: bool,
) -> Source:
    if style not in TEXTS:
        raise ValueError(f"unknown deepsearch style {style!r}; the styles are {', '.join(TEXTS)}")
    if questions is not None:
        return open_files(questions, corpus, retriever, retriever_options, with_pages=with_pages)
    if corpus is not None or retriever is not None or retriever_options is not None:
        raise ValueError(
            "deepsearch corpus, retriever and retriever_options go with questions; "
            "an embedded question brings its own corpus and index"
        )
    return EmbeddedSource(find_level(level), style)
