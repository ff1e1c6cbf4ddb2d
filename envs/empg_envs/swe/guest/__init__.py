"""The programs inside a sandbox: its first process and the test runner. They need only the standard library."""
