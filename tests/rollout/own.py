"""An environment of one's own, and prompt builders and parsers beside it, some with a fault."""

from empg_envs.base import EnvSpec, ParsedAction, PlainParser, PlainPrompts
from tests.fakes import CountingEnv

FUNCTION = {"name": "look", "description": "look around", "parameters": {"type": "object", "properties": {}}}

TOOLS = {"tools": [{"type": "function", "function": FUNCTION}], "nameless": [{"type": "function"}]}


class OwnEnv(CountingEnv):
    """A few steps long; an option says what stands in the observations, or beside them in ``info``."""

    def __init__(self, kind: str = "", length: int = 2):
        super().__init__(length=length)
        self.kind = kind

    def reset(self, seed=None, *, split=None, index=None):
        observation, info = super().reset(seed, split=split, index=index)
        if self.kind == "hint" and index == 0:
            info = {**info, "hint": ""}
        if self.kind in TOOLS:
            info = {**info, "tools": TOOLS[self.kind]}
        return observation, self._with_state(info)

    def step(self, action):
        *answer, info = super().step(action)
        return *answer, self._with_state(info)

    def _with_state(self, info):
        return {**info, "state": str(self.count)} if self.kind == "still" else info

    def _observe(self, action):
        if self.kind == "still":
            return "Nothing happens."
        return f"a page{' with <|end|> in it' if self.kind == 'control' else ''}, step {self.count}"


class Silent(PlainPrompts):
    def follow(self, observation, info):
        return None


class Loose(PlainPrompts):
    def start(self, observation, info):
        return [{"role": "user", "content": observation}, {"role": "user"}]


class Picky(PlainPrompts):
    """Prompts of which one method reads a key of info that only the first observation of task 0 has."""

    def __init__(self, method="start"):
        self.method = method

    def start(self, observation, info):
        return [{"role": "user", "content": self._read("start", info) + observation}]

    def follow(self, observation, info):
        return self._read("follow", info) + observation

    def window(self, history, observation, info, num_turns):
        return [{"role": "user", "content": self._read("window", info) + observation}]

    def _read(self, method, info):
        return info["hint"] if method == self.method else ""


def make_raising():
    """A parser that raises at the response ``bad``."""

    def parse(text, info):
        if text == "bad":
            raise KeyError("oops")
        return ParsedAction(text, True)

    return parse


def make_texting():
    return lambda text, info: text


PLAIN = EnvSpec("own", OwnEnv, PlainPrompts, PlainParser)
SILENT = EnvSpec("own", OwnEnv, Silent, PlainParser)
PICKY = EnvSpec("own", OwnEnv, Picky, PlainParser)
LOOSE = EnvSpec("own", OwnEnv, Loose, PlainParser)
RAISING = EnvSpec("own", OwnEnv, PlainPrompts, make_raising)
TEXTING = EnvSpec("own", OwnEnv, PlainPrompts, make_texting)
