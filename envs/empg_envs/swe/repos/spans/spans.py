"""Half-open spans of integers and sets of them."""


def is_span(span):
    start, end = span
    return start < end


def length(span):
    start, end = span
    return max(0, end - start)


def overlaps(one, two):
    return one[0] < two[1] and two[0] < one[1]


def meet(one, two):
    start = max(one[0], two[0])
    end = min(one[1], two[1])
    if start >= end:
        return None
    return (start, end)


def merge(spans):
    merged = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            last = merged.pop()
            merged.append((last[0], max(last[1], end)))
        else:
            merged.append((start, end))
    return merged


def total(spans):
    return sum(end - start for start, end in merge(spans))


def gaps(spans, within):
    found = []
    place = within[0]
    for start, end in merge(spans):
        if end <= within[0] or start >= within[1]:
            continue
        if start > place:
            found.append((place, start))
        place = max(place, end)
    if place < within[1]:
        found.append((place, within[1]))
    return found


def subtract(spans, hole):
    left = []
    for start, end in merge(spans):
        if start < hole[0]:
            left.append((start, min(end, hole[0])))
        if end > hole[1]:
            left.append((max(start, hole[1]), end))
    return left


def find(spans, point):
    merged = merge(spans)
    low = 0
    high = len(merged)
    while low < high:
        middle = (low + high) // 2
        start, end = merged[middle]
        if point < start:
            high = middle
        elif point >= end:
            low = middle + 1
        else:
            return merged[middle]
    return None
