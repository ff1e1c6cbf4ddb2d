"""An agent that thinks for some time between its calls: python slow_agent.py SECONDS TURNS."""

import http.client
import json
import os
import sys
import time
from urllib.parse import urlsplit

seconds, turns = float(sys.argv[1]), int(sys.argv[2])
url = urlsplit(os.environ["OPENAI_BASE_URL"])
connection = http.client.HTTPConnection(url.netloc)
headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
for turn in range(turns):
    body = {"model": "policy", "messages": [{"role": "user", "content": f"turn {turn}: " + 40 * "word "}]}
    connection.request("POST", f"{url.path}/chat/completions", json.dumps(body), headers)
    json.load(connection.getresponse())
    time.sleep(seconds)
print(json.dumps({"reward": 1.0}))
