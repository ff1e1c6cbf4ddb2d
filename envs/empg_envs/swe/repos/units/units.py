"""Durations and quantities with units."""

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LENGTHS = {"mm": 1, "cm": 10, "m": 1000, "km": 1000000}


def parse_duration(text):
    total = 0
    number = ""
    for char in text.strip():
        if char.isdigit():
            number += char
        elif char in SECONDS and number:
            total += int(number) * SECONDS[char]
            number = ""
        elif char != " ":
            raise ValueError("bad duration")
    if number:
        total += int(number)
    return total


def show_duration(seconds):
    if seconds < 0:
        return "-" + show_duration(-seconds)
    parts = []
    for name in ("d", "h", "m", "s"):
        count, seconds = divmod(seconds, SECONDS[name])
        if count > 0:
            parts.append(f"{count}{name}")
    return " ".join(parts) or "0s"


def clock(seconds):
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def convert(value, source, target, table=None):
    table = LENGTHS if table is None else table
    if source not in table or target not in table:
        raise KeyError("unknown unit")
    return value * table[source] / table[target]


def best_unit(value, unit, table=None):
    table = LENGTHS if table is None else table
    base = value * table[unit]
    best = min(table, key=table.get)
    for name, factor in table.items():
        if base >= factor and factor > table[best]:
            best = name
    return base / table[best], best


def to_fahrenheit(celsius):
    return celsius * 9 / 5 + 32


def to_celsius(fahrenheit):
    return (fahrenheit - 32) * 5 / 9


def bytes_text(count):
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for name in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024 or name == "GiB":
            break
    return f"{size:.1f} {name}"


def is_leap(year):
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def days_in_month(year, month):
    if not 1 <= month <= 12:
        raise ValueError("bad month")
    if month == 2:
        return 29 if is_leap(year) else 28
    return 30 if month in (4, 6, 9, 11) else 31


def day_of_year(year, month, day):
    return sum(days_in_month(year, past) for past in range(1, month)) + day
