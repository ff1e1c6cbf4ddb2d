import unittest

import units


class DurationTest(unittest.TestCase):
    def test_parse(self):
        self.assertEqual(units.parse_duration("1h 30m"), 5400)
        self.assertEqual(units.parse_duration("2d3s"), 172803)
        self.assertEqual(units.parse_duration("45"), 45)
        self.assertEqual(units.parse_duration(""), 0)

    def test_parse_refuses(self):
        with self.assertRaises(ValueError):
            units.parse_duration("3x")
        with self.assertRaises(ValueError):
            units.parse_duration("h")

    def test_show(self):
        self.assertEqual(units.show_duration(3661), "1h 1m 1s")
        self.assertEqual(units.show_duration(0), "0s")
        self.assertEqual(units.show_duration(86400), "1d")

    def test_show_negative(self):
        self.assertEqual(units.show_duration(-60), "-1m")

    def test_clock(self):
        self.assertEqual(units.clock(59), "0:59")
        self.assertEqual(units.clock(61), "1:01")
        self.assertEqual(units.clock(3725), "1:02:05")


class QuantityTest(unittest.TestCase):
    def test_convert(self):
        self.assertEqual(units.convert(2, "m", "cm"), 200)
        self.assertEqual(units.convert(5, "mm", "cm"), 0.5)

    def test_convert_other_table(self):
        self.assertEqual(units.convert(2, "h", "m", units.SECONDS), 120)

    def test_convert_unknown(self):
        with self.assertRaises(KeyError):
            units.convert(1, "m", "parsec")
        with self.assertRaises(KeyError):
            units.convert(1, "parsec", "m")

    def test_best_unit(self):
        self.assertEqual(units.best_unit(1500, "m"), (1.5, "km"))
        self.assertEqual(units.best_unit(5, "mm"), (5, "mm"))
        self.assertEqual(units.best_unit(1000, "mm"), (1, "m"))

    def test_temperature(self):
        self.assertEqual(units.to_fahrenheit(100), 212)
        self.assertEqual(units.to_celsius(212), 100)
        self.assertEqual(units.to_celsius(32), 0)

    def test_bytes(self):
        self.assertEqual(units.bytes_text(1023), "1023 B")
        self.assertEqual(units.bytes_text(1024), "1.0 KiB")
        self.assertEqual(units.bytes_text(3 * 1024 * 1024), "3.0 MiB")

    def test_bytes_huge(self):
        self.assertEqual(units.bytes_text(5000 * 1024**3), "5000.0 GiB")


class CalendarTest(unittest.TestCase):
    def test_leap(self):
        self.assertTrue(units.is_leap(2024))
        self.assertTrue(units.is_leap(2000))
        self.assertFalse(units.is_leap(1900))
        self.assertFalse(units.is_leap(2023))

    def test_days_in_month(self):
        self.assertEqual(units.days_in_month(2024, 2), 29)
        self.assertEqual(units.days_in_month(2023, 2), 28)
        self.assertEqual(units.days_in_month(2023, 4), 30)
        self.assertEqual(units.days_in_month(2023, 12), 31)
        self.assertEqual(units.days_in_month(2023, 1), 31)

    def test_bad_month(self):
        for month in (0, 13):
            with self.assertRaises(ValueError):
                units.days_in_month(2023, month)

    def test_day_of_year(self):
        self.assertEqual(units.day_of_year(2024, 1, 1), 1)
        self.assertEqual(units.day_of_year(2024, 3, 1), 61)


if __name__ == "__main__":
    unittest.main()
