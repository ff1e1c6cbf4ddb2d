import unittest

import grid

MAP = grid.read("S..#\n.#..\n...G\n")


class GridTest(unittest.TestCase):
    def test_read(self):
        self.assertEqual(grid.size(MAP), (3, 4))

    def test_read_refuses_ragged(self):
        with self.assertRaises(ValueError):
            grid.read("ab\nc\n")

    def test_read_refuses_empty(self):
        with self.assertRaises(ValueError):
            grid.read("\n")

    def test_inside(self):
        self.assertTrue(grid.inside(MAP, (0, 0)))
        self.assertTrue(grid.inside(MAP, (2, 3)))
        self.assertFalse(grid.inside(MAP, (3, 0)))
        self.assertFalse(grid.inside(MAP, (0, 4)))
        self.assertFalse(grid.inside(MAP, (-1, 0)))
        self.assertFalse(grid.inside(MAP, (0, -1)))

    def test_is_free(self):
        self.assertFalse(grid.is_free(MAP, (1, 1)))
        self.assertTrue(grid.is_free(MAP, (1, 2)))
        self.assertFalse(grid.is_free(MAP, (9, 9)))

    def test_neighbours(self):
        self.assertEqual(grid.neighbours(MAP, (0, 0)), [(0, 1), (1, 0)])
        self.assertEqual(grid.neighbours(MAP, (1, 3)), [(2, 3), (1, 2)])

    def test_locate(self):
        self.assertEqual(grid.locate(MAP, "G"), (2, 3))
        self.assertEqual(grid.locate(MAP, "S"), (0, 0))
        self.assertIsNone(grid.locate(MAP, "X"))

    def test_distances(self):
        steps = grid.distances(MAP, (0, 0))
        self.assertEqual(steps[(2, 3)], 5)
        self.assertEqual(len(steps), 10)

    def test_distances_from_a_wall(self):
        self.assertEqual(grid.distances(MAP, (1, 1)), {})

    def test_path(self):
        way = grid.path(MAP, (0, 0), (2, 3))
        self.assertEqual(len(way), 6)
        self.assertEqual(way[0], (0, 0))
        self.assertEqual(way[-1], (2, 3))

    def test_no_path(self):
        self.assertIsNone(grid.path(grid.read("a#b\n"), (0, 0), (0, 2)))

    def test_regions(self):
        self.assertEqual(grid.regions(grid.read("..#.\n..##\n##..\n")), [4, 2, 1])

    def test_turn(self):
        self.assertEqual(grid.turn(["ab", "cd", "ef"]), ["eca", "fdb"])

    def test_border(self):
        self.assertEqual(grid.border(MAP), 10)
        self.assertEqual(grid.border(["abc"]), 3)
        self.assertEqual(grid.border(["a", "b"]), 2)


if __name__ == "__main__":
    unittest.main()
