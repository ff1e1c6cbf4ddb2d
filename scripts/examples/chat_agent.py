"""An agent of your own, any program that calls the OpenAI wire: find a digit. In this folder, say:

empg-jax train quickstart env.name=harness env.options.command="python chat_agent.py" sft.updates=0
"""

import json
import sys

from openai import OpenAI

TURNS = 3


def main():
    task = json.load(sys.stdin)  # also in EMPG_TASK; env.options.tasks=FILE.jsonl gives tasks of your own
    secret, client = (
        str(task["number"] % 10),
        OpenAI(),
    )  # OPENAI_BASE_URL and OPENAI_API_KEY lead to the policy
    messages = [{"role": "user", "content": "0-9?"}]
    for turn in range(TURNS):
        reply = client.chat.completions.create(model="policy", messages=messages).choices[0].message
        guess = (reply.content or "").strip()[:1]
        if guess == secret:
            print(json.dumps({"reward": 1 - turn / 10, "success": True}))
            return
        hint = "up" if guess < secret else "down"
        messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": hint}]
    # The last line of the output tells the reward; "metrics" may stand beside it.
    print(json.dumps({"reward": 0.1 if guess.isdigit() else 0, "success": False}))


main()
