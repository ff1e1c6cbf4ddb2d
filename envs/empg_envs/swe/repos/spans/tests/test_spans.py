import unittest

import spans


class SpansTest(unittest.TestCase):
    def test_is_span(self):
        self.assertTrue(spans.is_span((1, 2)))
        self.assertFalse(spans.is_span((2, 2)))

    def test_length(self):
        self.assertEqual(spans.length((2, 7)), 5)
        self.assertEqual(spans.length((7, 2)), 0)
        self.assertEqual(spans.length((3, 4)), 1)

    def test_overlaps(self):
        self.assertTrue(spans.overlaps((0, 5), (4, 9)))
        self.assertFalse(spans.overlaps((0, 4), (4, 9)))
        self.assertFalse(spans.overlaps((4, 9), (0, 4)))
        self.assertFalse(spans.overlaps((0, 1), (4, 9)))

    def test_meet(self):
        self.assertEqual(spans.meet((0, 5), (3, 9)), (3, 5))
        self.assertIsNone(spans.meet((0, 3), (3, 9)))

    def test_merge_joins(self):
        self.assertEqual(spans.merge([(5, 8), (1, 3), (3, 4)]), [(1, 4), (5, 8)])

    def test_merge_keeps_the_longer_end(self):
        self.assertEqual(spans.merge([(0, 9), (2, 4)]), [(0, 9)])

    def test_merge_drops_empty(self):
        self.assertEqual(spans.merge([(4, 4), (6, 5), (1, 2)]), [(1, 2)])

    def test_total(self):
        self.assertEqual(spans.total([(0, 3), (2, 5), (8, 9)]), 6)

    def test_gaps(self):
        self.assertEqual(spans.gaps([(2, 4), (6, 8)], (0, 10)), [(0, 2), (4, 6), (8, 10)])

    def test_gaps_none(self):
        self.assertEqual(spans.gaps([(0, 10)], (0, 10)), [])

    def test_gaps_outside(self):
        self.assertEqual(spans.gaps([(-5, 0), (10, 12)], (0, 10)), [(0, 10)])

    def test_subtract(self):
        self.assertEqual(spans.subtract([(0, 10)], (3, 5)), [(0, 3), (5, 10)])
        self.assertEqual(spans.subtract([(3, 5)], (3, 5)), [])

    def test_subtract_beside(self):
        self.assertEqual(spans.subtract([(0, 2), (8, 9)], (3, 5)), [(0, 2), (8, 9)])

    def test_find(self):
        rows = [(0, 3), (5, 6), (9, 12)]
        self.assertEqual(spans.find(rows, 5), (5, 6))
        self.assertEqual(spans.find(rows, 11), (9, 12))
        self.assertEqual(spans.find(rows, 0), (0, 3))

    def test_find_nothing(self):
        rows = [(0, 3), (5, 6), (9, 12)]
        self.assertIsNone(spans.find(rows, 3))
        self.assertIsNone(spans.find(rows, 12))
        self.assertIsNone(spans.find(rows, -1))


if __name__ == "__main__":
    unittest.main()
