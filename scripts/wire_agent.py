"""The smallest agent, which starts fast: one call over the OpenAI wire; printable characters pay."""

import json
import os
import sys
import urllib.request

json.load(sys.stdin)  # the task
request = urllib.request.Request(
    f"{os.environ['OPENAI_BASE_URL']}/chat/completions",
    data=json.dumps({"model": "policy", "messages": [{"role": "user", "content": "A"}]}).encode(),
    headers={"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
)
with urllib.request.urlopen(request, timeout=60) as answer:
    text = json.load(answer)["choices"][0]["message"]["content"] or ""
reward = sum(" " <= character <= "~" for character in text) / 4
print(json.dumps({"reward": reward, "success": reward == 1}))
