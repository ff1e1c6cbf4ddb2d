"""Jobs that need other jobs, and people who take turns."""


class CycleError(ValueError):
    pass


def order(needs):
    waiting = {job: set(before) for job, before in needs.items()}
    for before in needs.values():
        for job in before:
            waiting.setdefault(job, set())
    done = []
    while waiting:
        ready = sorted(job for job, before in waiting.items() if not before)
        if not ready:
            raise CycleError("jobs wait for each other")
        done += ready
        for job in ready:
            del waiting[job]
        for before in waiting.values():
            before.difference_update(ready)
    return done


def finish_times(needs, hours):
    times = {}
    for job in order(needs):
        start = max((times[before] for before in needs.get(job, ())), default=0)
        times[job] = start + hours[job]
    return times


def critical(needs, hours):
    times = finish_times(needs, hours)
    if not times:
        return []
    job = max(sorted(times), key=times.get)
    chain = [job]
    while needs.get(job):
        job = max(sorted(needs[job]), key=times.get)
        chain.append(job)
    return chain[::-1]


def assign(people, days, off=None):
    off = off or {}
    plan = []
    turn = 0
    for day in range(days):
        for skip in range(len(people)):
            person = people[(turn + skip) % len(people)]
            if day not in off.get(person, ()):
                plan.append(person)
                turn = (turn + skip + 1) % len(people)
                break
        else:
            plan.append(None)
    return plan


def shares(plan):
    counts = {}
    for person in plan:
        if person is not None:
            counts[person] = counts.get(person, 0) + 1
    return counts


def is_fair(plan, slack=1):
    counts = shares(plan).values()
    if not counts:
        return True
    return max(counts) - min(counts) <= slack


def longest_run(plan):
    best = 0
    run = 0
    last = None
    for person in plan:
        run = run + 1 if person == last else 1
        last = person
        best = max(best, run)
    return best


def swap(plan, one, two):
    if not (0 <= one < len(plan) and 0 <= two < len(plan)):
        raise IndexError("no such day")
    plan = list(plan)
    plan[one], plan[two] = plan[two], plan[one]
    return plan
