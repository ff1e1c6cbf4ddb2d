import unittest

import words


class LayoutTest(unittest.TestCase):
    def test_wrap(self):
        self.assertEqual(words.wrap("one two three", 7), ["one two", "three"])
        self.assertEqual(words.wrap("", 5), [])
        self.assertEqual(words.wrap("toolong a", 3), ["toolong", "a"])

    def test_wrap_width_one(self):
        self.assertEqual(words.wrap("a b", 1), ["a", "b"])

    def test_wrap_refuses(self):
        with self.assertRaises(ValueError):
            words.wrap("a", 0)

    def test_justify(self):
        self.assertEqual(words.justify(["a", "b", "c"], 6), "a  b c")
        self.assertEqual(words.justify(["ab", "cd"], 6), "ab  cd")

    def test_justify_one(self):
        self.assertEqual(words.justify(["ab"], 4), "ab  ")

    def test_shorten(self):
        self.assertEqual(words.shorten("hello world", 8), "hello...")
        self.assertEqual(words.shorten("hello", 5), "hello")
        self.assertEqual(words.shorten("hello", 2), "..")
        self.assertEqual(words.shorten("hello", 4), "h...")

    def test_slug(self):
        self.assertEqual(words.slug("Hello, World!"), "hello-world")
        self.assertEqual(words.slug("a--b"), "a-b")
        self.assertEqual(words.slug("!"), "")


class MatchTest(unittest.TestCase):
    def test_plain(self):
        self.assertTrue(words.matches("abc", "abc"))
        self.assertFalse(words.matches("abc", "abd"))
        self.assertFalse(words.matches("abc", "ab"))
        self.assertFalse(words.matches("ab", "abc"))

    def test_any(self):
        self.assertTrue(words.matches("a?c", "abc"))
        self.assertFalse(words.matches("a?", "a"))

    def test_star(self):
        self.assertTrue(words.matches("a*c", "abbc"))
        self.assertTrue(words.matches("*", ""))
        self.assertFalse(words.matches("a*c", "abb"))

    def test_distance(self):
        self.assertEqual(words.distance("kitten", "sitting"), 3)
        self.assertEqual(words.distance("", "abc"), 3)
        self.assertEqual(words.distance("same", "same"), 0)
        self.assertEqual(words.distance("abc", "ac"), 1)

    def test_nearest(self):
        self.assertEqual(words.nearest("helo", ["hello", "help", "world"]), "hello")
        self.assertIsNone(words.nearest("xyzzy", ["hello"]))

    def test_nearest_at_the_limit(self):
        self.assertEqual(words.nearest("abcd", ["abxy"]), "abxy")


class CountTest(unittest.TestCase):
    def test_count(self):
        self.assertEqual(words.count("A b, a. !"), {"a": 2, "b": 1})

    def test_top(self):
        self.assertEqual(words.top("b b a a c", 2), ["a", "b"])
        self.assertEqual(words.top("c c a", 1), ["c"])


if __name__ == "__main__":
    unittest.main()
