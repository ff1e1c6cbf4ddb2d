"""A stand-in for a server of the Model Context Protocol, over stdin and stdout: a store with one secret word.

``python mcp_server.py [trouble]``, where trouble is a way in which it fails.
"""

import json
import subprocess
import sys
import time

TROUBLE = sys.argv[1] if len(sys.argv) > 1 else ""
TOOLS = {
    "find": {"type": "object", "properties": {"drawer": {"type": "integer"}}, "required": ["drawer"]},
    "prepare": {"type": "object"},
    "judge": {"type": "object"},
}
state = {}


def run(name, a):
    if name == TROUBLE:
        time.sleep(60)
    if name == "prepare":
        state.update(word=a["word"], drawer=a["drawer"])
        return "ready"
    if name == "judge":
        return (
            "none" if TROUBLE == "no_reward" else json.dumps({"reward": float(a["answer"] == state["word"])})
        )
    if TROUBLE == "hang":
        time.sleep(60)
    if TROUBLE == "helper":  # it leaves the session, but not the pipe
        return str(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
    if TROUBLE == "crash":
        sys.exit("broken drawer")
    return f"the word is {state['word']}" if a["drawer"] == state["drawer"] else "empty"


def answer(method, params):
    if method == "initialize":
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": {}}
    if method == "tools/list":  # in two pages
        page = list(TOOLS)[1:] if params.get("cursor") else list(TOOLS)[:1]
        listed = [{"name": name, "description": f"{name} it", "inputSchema": TOOLS[name]} for name in page]
        return {"tools": listed, **({} if params.get("cursor") else {"nextCursor": "2"})}
    try:
        text, is_error = run(params["name"], params["arguments"]), False
    except KeyError as error:
        text, is_error = f"missing {error}", True
    return {"content": [{"type": "text", "text": text}], "isError": is_error}


print("a print that is no message")
for line in sys.stdin:
    message = json.loads(line)
    if "id" in message and "method" in message:
        print(json.dumps({"jsonrpc": "2.0", "method": "notifications/message", "params": {}}))
        print(json.dumps({"jsonrpc": "2.0", "id": "p", "method": "ping"}), flush=True)
        params = message.get("params") or {}
        drawer = params.get("arguments", {}).get("drawer")
        if drawer == "odd":
            reply = {"error": {"code": -32602, "message": "drawer: expected a number"}}
        elif drawer == "stuck" or f"{params.get('name')}-fails" == TROUBLE:
            reply = {"error": {"code": -32603, "message": "the drawer is stuck"}}
        elif TROUBLE == "refuse" and message["method"] == "tools/list":
            reply = {"error": {"code": -32000, "message": "no tools today"}}
        else:
            reply = {"result": answer(message["method"], message.get("params") or {})}
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **reply}), flush=True)
