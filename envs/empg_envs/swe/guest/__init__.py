"""The programs inside a sandbox (first process, test runner), which need only the standard library."""
