"""Words in lines: wrapping, matching, distance, ranking."""


def wrap(text, width):
    if width < 1:
        raise ValueError("width must be positive")
    lines = []
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    if line:
        lines.append(line)
    return lines


def justify(words, width):
    if len(words) == 1:
        return words[0].ljust(width)
    room = width - sum(len(word) for word in words)
    each, more = divmod(room, len(words) - 1)
    line = words[0]
    for number, word in enumerate(words[1:]):
        line += " " * (each + (1 if number < more else 0)) + word
    return line


def shorten(text, width, end="..."):
    if len(text) <= width:
        return text
    if width <= len(end):
        return end[:width]
    return text[: width - len(end)].rstrip() + end


def slug(text):
    parts = []
    word = ""
    for char in text.lower():
        if char.isalnum():
            word += char
        elif word:
            parts.append(word)
            word = ""
    if word:
        parts.append(word)
    return "-".join(parts)


def matches(pattern, text):
    if not pattern:
        return not text
    if pattern[0] == "*":
        return matches(pattern[1:], text) or (bool(text) and matches(pattern, text[1:]))
    if text and pattern[0] in ("?", text[0]):
        return matches(pattern[1:], text[1:])
    return False


def distance(one, two):
    row = list(range(len(two) + 1))
    for number, char in enumerate(one, start=1):
        last = row
        row = [number]
        for column, other in enumerate(two, start=1):
            change = last[column - 1] + (char != other)
            row.append(min(change, last[column] + 1, row[-1] + 1))
    return row[-1]


def nearest(word, known, limit=2):
    best = None
    for other in sorted(known):
        steps = distance(word, other)
        if steps <= limit and (best is None or steps < best[0]):
            best = (steps, other)
    return best[1] if best else None


def count(text):
    counts = {}
    for word in text.lower().split():
        word = word.strip(".,!?")
        if word:
            counts[word] = counts.get(word, 0) + 1
    return counts


def top(text, number):
    counts = count(text)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return ordered[:number]
