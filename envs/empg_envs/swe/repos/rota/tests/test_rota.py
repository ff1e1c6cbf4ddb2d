import unittest

import rota

NEEDS = {"roof": ["walls"], "walls": ["base"], "paint": ["walls"], "sign": []}
HOURS = {"roof": 3, "walls": 4, "base": 2, "paint": 1, "sign": 1}


class JobsTest(unittest.TestCase):
    def test_order(self):
        self.assertEqual(rota.order(NEEDS), ["base", "sign", "walls", "paint", "roof"])

    def test_order_of_nothing(self):
        self.assertEqual(rota.order({}), [])

    def test_cycle(self):
        with self.assertRaises(rota.CycleError):
            rota.order({"a": ["b"], "b": ["a"]})

    def test_needs_are_kept(self):
        needs = {"a": ["b"]}
        rota.order(needs)
        self.assertEqual(needs, {"a": ["b"]})

    def test_finish_times(self):
        times = rota.finish_times(NEEDS, HOURS)
        self.assertEqual(times["roof"], 9)
        self.assertEqual(times["paint"], 7)
        self.assertEqual(times["sign"], 1)

    def test_critical(self):
        self.assertEqual(rota.critical(NEEDS, HOURS), ["base", "walls", "roof"])
        self.assertEqual(rota.critical({}, {}), [])


class PlanTest(unittest.TestCase):
    def test_assign(self):
        self.assertEqual(rota.assign(["a", "b"], 4), ["a", "b", "a", "b"])

    def test_assign_skips(self):
        plan = rota.assign(["a", "b", "c"], 4, {"b": {1}})
        self.assertEqual(plan, ["a", "c", "a", "b"])

    def test_assign_nobody(self):
        self.assertEqual(rota.assign(["a"], 2, {"a": {0}}), [None, "a"])

    def test_shares(self):
        self.assertEqual(rota.shares(["a", None, "b", "a"]), {"a": 2, "b": 1})

    def test_is_fair(self):
        self.assertTrue(rota.is_fair(["a", "b", "a"]))
        self.assertFalse(rota.is_fair(["a", "b", "a", "a"]))
        self.assertTrue(rota.is_fair(["a", "b", "a", "a"], slack=2))
        self.assertTrue(rota.is_fair([]))

    def test_longest_run(self):
        self.assertEqual(rota.longest_run(["a", "b", "b", "b", "a"]), 3)
        self.assertEqual(rota.longest_run(["a"]), 1)
        self.assertEqual(rota.longest_run([]), 0)

    def test_swap(self):
        plan = ["a", "b", "c"]
        self.assertEqual(rota.swap(plan, 0, 2), ["c", "b", "a"])
        self.assertEqual(plan, ["a", "b", "c"])

    def test_swap_refuses(self):
        for one, two in ((0, 3), (3, 0), (-1, 0), (0, -1)):
            with self.assertRaises(IndexError):
                rota.swap(["a", "b", "c"], one, two)


if __name__ == "__main__":
    unittest.main()
