"""A program with many faults, by its argument. It needs only the standard library, so it starts fast."""

import http.client
import json
import os
import resource
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request


def chat(messages, **options):
    request = urllib.request.Request(
        f"{os.environ['OPENAI_BASE_URL']}/chat/completions",
        data=json.dumps({"model": "policy", "messages": messages, **options}).encode(),
        headers={"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["message"]


def start(messages):
    """A call whose answer is not read."""
    url = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])
    connection = http.client.HTTPConnection(url.netloc)
    body, key = json.dumps({"messages": messages}), os.environ["OPENAI_API_KEY"]
    connection.request("POST", f"{url.path}/chat/completions", body, {"Authorization": f"Bearer {key}"})
    return connection


def ask(text, history=()):
    messages = [*history, {"role": "user", "content": text}]
    return [*messages, chat(messages)]


def main(kind):
    task = json.load(sys.stdin)
    assert kind == "large" or task == json.loads(os.environ["EMPG_TASK"])
    reward = {"reward": 1.0, "success": True, "metrics": {"number": task["number"]}}
    match kind:
        case "never":
            pass
        case "crash":
            ask("a")
            sys.exit("out of luck")
        case "silent":
            ask("a")
            time.sleep(600)
        case "no-reward":
            ask("a")
            print("done")
            return
        case "says":  # its second argument is its last line
            ask("a")
            print(sys.argv[2])
            return
        case "warns":  # the verdict, and then a word on the other channel
            ask("a")
            print(sys.argv[2], flush=True)
            print(sys.argv[3], file=sys.stderr)
            return
        case "large":  # a task that no variable holds, behind a proxy
            proxies = {os.environ["NO_PROXY"], os.environ["no_proxy"]}
            ask(f"{len(task['text'])} {'EMPG_TASK' in os.environ} {' '.join(proxies)}")
        case "grow":
            history = ask("a")
            history = ask("b", history)
            ask("c", history)
        case "steady":
            for number in range(20):
                ask(f"say {number}")
        case "rewrite":
            history = ask("a")
            history = ask("b", history)
            ask("c", [{"role": "user", "content": "summary"}])  # a history of its own
            ask("d", history)  # back to the first one
        case "parallel":
            threads = [threading.Thread(target=ask, args=(text,)) for text in "xyz"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        case "endless":
            history = []
            for _ in range(1000):
                history = ask("a", history)
        case "impatient":  # gives up two calls, the first when a file is there, and asks again
            messages = [{"role": "user", "content": "a"}]
            first = start(messages)
            while not os.path.exists(sys.argv[2]):
                time.sleep(0.01)
            first.close()
            start(messages).close()
            ask("b", [*messages, chat(messages)])
        case "impatient-slow":  # gives up its call when a file is there; slow before and behind the next
            messages = [{"role": "user", "content": "a"}]
            first = start(messages)
            while not os.path.exists(sys.argv[2]):
                time.sleep(0.01)
            first.close()
            time.sleep(0.7)
            chat(messages)
            time.sleep(0.9)
        case "impatient-pair":  # as before, with another call that waits meanwhile
            messages = [{"role": "user", "content": "a"}]
            first = start(messages)
            while not os.path.exists(sys.argv[2]):
                time.sleep(0.01)
            other = threading.Thread(target=ask, args=("b",))
            other.start()
            while not os.path.exists(sys.argv[3]):
                time.sleep(0.01)
            first.close()
            reward["metrics"] = {"number": float(chat(messages)["content"])}
            other.join()
        case "tells":  # its process id, and the address space that it may have
            for _ in range(3):
                ask(f"{os.getpid()} {resource.getrlimit(resource.RLIMIT_AS)[0]}")
        case "children":  # leaves two processes behind, one in a session of its own
            ask("a")
            children = [subprocess.Popen(["sleep", "600"], start_new_session=new) for new in (False, True)]
            with open(sys.argv[2], "a") as file:
                file.write(" ".join(str(child.pid) for child in children))
    print("some words before")
    print(json.dumps(reward))


if __name__ == "__main__":
    main(sys.argv[1])


def score(task, output):
    """A scorer: the program's words decide."""
    return {"reward": 0.5 if "some words" in output else 0.0, "success": task["number"] >= 0}
