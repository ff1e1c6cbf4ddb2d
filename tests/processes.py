"""What a test asks of processes that are not its own."""


def is_running(pid):
    """False for processes that are gone or zombies."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
