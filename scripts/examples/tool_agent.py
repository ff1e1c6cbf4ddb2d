"""An agent with two tools, which its model calls in the OpenAI wire's format. In this folder, say:

empg-jax train quickstart env.name=harness env.options.command="python tool_agent.py" sft.updates=0
model.tokenizer=bytes model.chat_template=tools.jinja rollout.max_tokens=1024 train.micro_tokens=2048
(on one line; a real model by model.path=FOLDER brings a template that tells tools, and its own tokenizer)
"""

import json
import os

from openai import OpenAI

STOCK = {"apple": 3, "pear": 5}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {argument: {"type": "string"}}},
        },
    }
    for name, description, argument in (("count", "Count fruit", "kind"), ("answer", "Give the sum", "sum"))
]


def run(name, arguments):
    """Runs a tool; returns its result, and whether the task is done."""
    if name == "count":
        return str(STOCK.get(arguments.get("kind"), 0)), False
    return "", arguments.get("sum") == str(sum(STOCK.values()))


def main():
    task, client = json.loads(os.environ["EMPG_TASK"]), OpenAI()
    messages = [{"role": "user", "content": f"Task {task['number']}: how many fruit?"}]
    calls = 0
    for _ in range(3):
        reply = client.chat.completions.create(model="policy", messages=messages, tools=TOOLS)
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or ():
            calls += 1
            result, is_done = run(call.function.name, json.loads(call.function.arguments))
            if is_done:
                print(json.dumps({"reward": 1.0, "success": True}))
                return
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if not message.tool_calls:
            messages.append({"role": "user", "content": "Call a tool."})
    print(json.dumps({"reward": 0.1 * min(calls, 3), "success": False, "metrics": {"tool_calls": calls}}))


main()
