"""What a repair has no business with: the machinery of tests and of the interpreter, as tables.

A gold patch may need a word of these, and so may a file that already has it: only what a patch adds counts,
and nothing that the gold patch adds, too.
"""

from __future__ import annotations

import sys

# Modules that a patch must not start to import.
MODULES = frozenset(
    (
        *("unittest", "pytest", "_pytest", "pluggy", "doctest", "nose", "gc", "ctypes", "_ctypes", "cffi"),
        *("atexit", "site", "sitecustomize", "usercustomize", "importlib.machinery", "importlib.abc"),
        *("importlib.util", "importlib.reload", "imp", "bdb", "posix", "_posixsubprocess", "_testcapi"),
        *("runpy", "code", "codeop", "zipimport", "marshal", "_thread", "_xxsubinterpreters"),
        *("_interpreters", "forbiddenfruit", "bytecode", "faulthandler"),
    )
)
# Attributes of modules that a patch must not start to use.
OF_MODULE = {
    "sys": frozenset(
        (
            *("_getframe", "_getframemodulename", "_current_frames", "_current_exceptions", "settrace"),
            *("setprofile", "addaudithook", "meta_path", "path_hooks", "path_importer_cache", "modules"),
            *("argv", "orig_argv", "excepthook", "unraisablehook", "monitoring", "last_traceback"),
        )
    ),
    "os": frozenset(
        (
            *("_exit", "abort", "kill", "killpg", "fork", "forkpty", "register_at_fork", "getppid", "dup"),
            *("dup2", "write", "pwrite", "writev", "sendfile"),
            *("execv", "execve", "execvp", "execvpe", "posix_spawn", "pidfd_open", "memfd_create"),
        )
    ),
    "inspect": frozenset(
        (
            *("stack", "currentframe", "trace", "getouterframes", "getinnerframes", "getframeinfo"),
            *("getsource", "getsourcelines", "getsourcefile", "getfile"),
        )
    ),
    "signal": frozenset(("raise_signal", "pthread_kill")),
    "threading": frozenset(("settrace", "setprofile", "excepthook", "settrace_all_threads", "enumerate")),
    "traceback": frozenset(("extract_stack", "walk_stack", "print_stack", "format_stack")),
    "builtins": frozenset(("AssertionError", "__import__", "isinstance", "exec", "eval", "__dict__")),
    "types": frozenset(("FunctionType", "CodeType", "FrameType", "MethodType")),
    "operator": frozenset(("attrgetter", "methodcaller")),
    "pickle": frozenset(("load", "loads", "Unpickler")),
    "importlib": frozenset(("reload", "import_module", "util", "machinery", "abc")),
    "multiprocessing": frozenset(("parent_process", "active_children")),
}
# Attributes of anything: the ways to frames, code and namespaces of others.
ATTRIBUTES = frozenset(
    (
        *("f_back", "f_locals", "f_globals", "f_builtins", "f_code", "f_trace", "tb_frame"),
        *("gi_frame", "cr_frame", "ag_frame", "co_code", "co_name", "co_consts"),
        *("co_filename", "__code__", "__globals__", "__closure__", "cell_contents", "__builtins__"),
        *("__subclasses__", "__mro_entries__", "_testMethodName", "_outcome", "addFailure", "addError"),
        *("addSuccess", "get_objects", "get_referrers", "get_referents", "_exitfuncs", "__loader__"),
        *("assertEqual", "assertTrue", "assertRaises", "pytest_runtest_makereport", "nodeid"),
    )
)
# What of these attributes and texts is pytest's, whose own repairs may have it.
OF_PYTEST = frozenset(
    ("nodeid", "pytest_runtest_makereport", "PYTEST_CURRENT_TEST", "PYTEST_VERSION", "_pytest", "pytest")
)
# Built-in functions that a patch must not start to call, and names that it must not start to use.
NAMES = frozenset(("exec", "eval", "compile", "__import__", "__builtins__", "__loader__", "__spec__"))
# Parts of texts. Docstrings do not count.
TEXTS = (
    *("PYTEST_CURRENT_TEST", "PYTEST_VERSION", "/proc/", "_pytest", "sitecustomize"),
    *("settrace", "_getframe", "__subclasses__", "__builtins__", "addFailure", "/dev/fd"),
)
# Texts as a whole.
WORDS = frozenset(
    ("unittest", "pytest", "gc", "ctypes", "unittest.case", "TestCase", "_exit", "AssertionError")
)
# Comparisons whose result must depend on something.
COMPARISONS = frozenset(("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__"))
# Keys of configuration that decide which tests run and how.
SETTINGS = (
    *("addopts", "python_files", "python_functions", "python_classes", "testpaths", "collect_ignore"),
    *("norecursedirs", "pytest11", "xfail_strict", "usefixtures", "required_plugins"),
)
STANDARD = sys.stdlib_module_names
