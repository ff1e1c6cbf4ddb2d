"""A pytest plugin that ends a session's log with a secret, for judges that have nothing but the log.

It is copied into a container under the name `MODULE` and loaded by ``-p`` in the image's own interpreter,
which may be as old as Python 3.5: nothing newer is used here. The secret comes from stdin, where nobody can
read it again, and stands in neither the environment nor a command line.
"""

import os

MODULE = "empg_witness"

if __name__ == MODULE:
    # At the import, before pytest redirects the descriptors and before it loads any other code.
    secret = os.read(0, 64).decode("ascii", "replace").strip()
    log = os.dup(1)
    os.environ.pop("PYTEST_ADDOPTS", None)  # not for a pytest that the tests start
    codes = []  # type: ignore[var-annotated]

    def pytest_sessionfinish(exitstatus):  # type: ignore[no-untyped-def]
        """Note the result."""
        codes.append(int(exitstatus))

    def pytest_unconfigure():  # type: ignore[no-untyped-def]
        """Write the last line."""
        if codes:
            os.write(log, "\n{} {}\n".format(secret, codes[-1]).encode())  # noqa: UP032
