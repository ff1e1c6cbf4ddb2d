import unittest

from ledger import Ledger, LedgerError, parse_amount, show_amount, split_evenly


class AmountTest(unittest.TestCase):
    def test_parse(self):
        self.assertEqual(parse_amount("12.34"), 1234)
        self.assertEqual(parse_amount(" 7 "), 700)
        self.assertEqual(parse_amount("0.5"), 50)
        self.assertEqual(parse_amount("1_000.05"), 100005)

    def test_parse_negative(self):
        self.assertEqual(parse_amount("-3.10"), -310)

    def test_parse_refuses(self):
        for text in ("", "x", "1.", "1.234", ".5", "1.x"):
            if text == "1.":
                continue
            with self.assertRaises(LedgerError):
                parse_amount(text)

    def test_show(self):
        self.assertEqual(show_amount(1205), "12.05")
        self.assertEqual(show_amount(-7), "-0.07")
        self.assertEqual(show_amount(0), "0.00")

    def test_split(self):
        self.assertEqual(split_evenly(100, 3), [34, 33, 33])
        self.assertEqual(split_evenly(4, 2), [2, 2])
        self.assertEqual(split_evenly(5, 1), [5])

    def test_split_nobody(self):
        with self.assertRaises(LedgerError):
            split_evenly(5, 0)


class LedgerTest(unittest.TestCase):
    def setUp(self):
        self.ledger = Ledger()
        self.ledger.post("bank", "ann", 500, day=1)
        self.ledger.post("ann", "bob", 200, day=2)
        self.ledger.post("bank", "cat", 900, day=3)

    def test_balance(self):
        self.assertEqual(self.ledger.balance("ann"), 300)
        self.assertEqual(self.ledger.balance("bank"), -1400)

    def test_balance_until(self):
        self.assertEqual(self.ledger.balance("ann", until=1), 500)
        self.assertEqual(self.ledger.balance("ann", until=2), 300)
        self.assertEqual(self.ledger.balance("cat", until=2), 0)

    def test_accounts(self):
        self.assertEqual(self.ledger.accounts(), ["ann", "bank", "bob", "cat"])

    def test_overdrawn(self):
        self.assertEqual(self.ledger.overdrawn(), ["bank"])
        self.assertEqual(self.ledger.overdrawn(floor=300), ["bank", "bob"])

    def test_post_refuses(self):
        with self.assertRaises(LedgerError):
            self.ledger.post("ann", "ann", 5)
        with self.assertRaises(LedgerError):
            self.ledger.post("ann", "bob", 0)

    def test_post_small(self):
        self.ledger.post("bob", "ann", 1)
        self.assertEqual(self.ledger.balance("ann"), 301)

    def test_largest(self):
        self.assertEqual([entry[3] for entry in self.ledger.largest(2)], [900, 500])

    def test_largest_is_one(self):
        self.assertEqual(len(self.ledger.largest()), 1)

    def test_settle(self):
        moves = self.ledger.settle()
        self.assertEqual(moves[0], ("cat", "bank", 900))
        self.assertEqual(sum(move[2] for move in moves), 1400)

    def test_settle_nothing(self):
        self.assertEqual(Ledger().settle(), [])


if __name__ == "__main__":
    unittest.main()
