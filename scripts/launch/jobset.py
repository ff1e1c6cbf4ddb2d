"""Start a run on the nodes of a Kubernetes cluster with JobSet, from jobset.yaml.

    python scripts/launch/jobset.py [--print] NAME IMAGE HOSTS RUN_DIR CONFIG [key=value ...]

The pods need no rights in the cluster: each is told its seat. RUN_DIR is below /runs, which all pods share.
"""

import argparse
import subprocess
from pathlib import Path

import yaml

PORT = 8476


def make_jobset(name, image, hosts, run):
    """Fill in the file: ``run`` is the folder, the configuration and its overrides."""
    jobset = yaml.safe_load(Path(__file__).with_name("jobset.yaml").read_text(encoding="utf-8"))
    jobset["metadata"]["name"] = name
    (job,) = jobset["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    pods["parallelism"] = pods["completions"] = hosts
    (container,) = pods["template"]["spec"]["containers"]
    container["image"] = image
    container["args"] = [
        *run,
        f"hosts.coordinator={name}-{job['name']}-0-0.{name}:{PORT}",
        f"hosts.num={hosts}",
        "hosts.index=$(JOB_COMPLETION_INDEX)",
    ]
    return jobset


def main():
    """Print the filled-in file, or hand it to kubectl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the YAML in place of applying it")
    parser.add_argument("name")
    parser.add_argument("image")
    parser.add_argument("hosts", type=int)
    parser.add_argument("run", nargs="+", help="RUN_DIR CONFIG [key=value ...]")
    args = parser.parse_args()
    text = yaml.safe_dump(make_jobset(args.name, args.image, args.hosts, args.run), sort_keys=False)
    if args.print:
        print(text, end="")
    else:
        subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, check=True)


if __name__ == "__main__":
    main()
