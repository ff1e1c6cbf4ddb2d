"""The store of `mcp_server.py` as a server of the real `mcp` package, of its versions 1 and 2."""

import json

try:
    from mcp.server import MCPServer
except ImportError:
    from mcp.server.fastmcp import FastMCP as MCPServer

server = MCPServer("store")
state = {}


@server.tool()
def find(drawer: int) -> str:
    """Look into a drawer."""
    if drawer < 0:
        raise ValueError("drawers have numbers from 0")
    return f"the word is {state['word']}" if drawer == state["drawer"] else "empty"


@server.tool()
def count() -> dict[str, int]:
    """Count the drawers: an answer with structure."""
    return {"drawers": 10}


@server.tool()
def words(drawers: list[int]) -> list[str]:
    """Look into several drawers: an answer in several parts."""
    return [find(drawer) for drawer in drawers]


@server.tool()
def prepare(prompt: str, word: str, drawer: int) -> str:
    state.update(word=word, drawer=drawer)
    print("a print that is no message")
    return "ready"


@server.tool()
def judge(task: dict, answer: str) -> str:
    return json.dumps({"reward": float(answer == task["word"]), "metrics": {"drawer": task["drawer"]}})


server.run()
