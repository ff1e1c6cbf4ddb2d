"""Text grids: reading, neighbours, shortest ways, regions."""

from collections import deque

WALL = "#"


def read(text):
    rows = [row for row in text.splitlines() if row]
    if not rows:
        raise ValueError("empty grid")
    if any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("ragged grid")
    return rows


def size(grid):
    return len(grid), len(grid[0])


def inside(grid, place):
    rows, columns = size(grid)
    row, column = place
    return 0 <= row < rows and 0 <= column < columns


def is_free(grid, place):
    return inside(grid, place) and grid[place[0]][place[1]] != WALL


def neighbours(grid, place):
    row, column = place
    around = [(row - 1, column), (row, column + 1), (row + 1, column), (row, column - 1)]
    return [other for other in around if is_free(grid, other)]


def locate(grid, mark):
    for row, line in enumerate(grid):
        column = line.find(mark)
        if column >= 0:
            return row, column
    return None


def distances(grid, start):
    if not is_free(grid, start):
        return {}
    found = {start: 0}
    queue = deque([start])
    while queue:
        place = queue.popleft()
        for other in neighbours(grid, place):
            if other not in found:
                found[other] = found[place] + 1
                queue.append(other)
    return found


def path(grid, start, goal):
    steps = distances(grid, goal)
    if start not in steps:
        return None
    way = [start]
    while way[-1] != goal:
        here = steps[way[-1]]
        way.append(next(o for o in neighbours(grid, way[-1]) if steps[o] == here - 1))
    return way


def regions(grid):
    seen = set()
    sizes = []
    rows, columns = size(grid)
    for row in range(rows):
        for column in range(columns):
            if is_free(grid, (row, column)) and (row, column) not in seen:
                region = distances(grid, (row, column))
                seen.update(region)
                sizes.append(len(region))
    return sorted(sizes, reverse=True)


def turn(grid):
    rows, columns = size(grid)
    return ["".join(grid[rows - 1 - row][column] for row in range(rows)) for column in range(columns)]


def border(grid):
    rows, columns = size(grid)
    if rows == 1 or columns == 1:
        return rows * columns
    return 2 * (rows + columns) - 4
