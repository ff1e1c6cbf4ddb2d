"""The judge's layers against code that is written to be rewarded instead of to be right.

A policy that is trained on rewards will find any way to earn them, and the code that it writes runs in the
process of the tests. No single layer holds against that; each of these costs little, and they fail in
different ways:

- `reading`: what the patch adds that reaches for the machinery of tests or of the interpreter.
- `canaries`: tests that must fail, among them twins of the real tests with a wrong expectation; a draw
  decides which of a pair has the name that the agent knows.
- `second`: a tree with another bug, which tests with known names must still find.
- `sessions`: what the test process claims must agree with how it ended, by the kernel's word.
- the cage: trees, tests and runner are read-only while tests run, a parent that the package's process cannot
  reach reports, and nothing passes from one session to another (`empg_envs.swe.guest.warden`).
- `empg_envs.swe.guest.seals`: functions of the test machinery that were replaced.

Over images (`empg_envs.swe.images`) a session is a test command in a read-only container of its own, of which
there is a log (`logs`) that a witness in the process ends with a secret (`empg_envs.swe.guest.witness`); all
else is the same code. What a layer notices makes the outcome ``suspect``, with a reward of 0.

**What remains.** A test in Python can only be as honest as its process. Not caught: answers that are hard
coded for the inputs of visible tests; code that compares the code or the text of the calling test with what
it remembers, without any of the constructs that `reading` knows (they can be spelled in endless ways); code
that recognizes a tree by the text of its own files. Against these help tests that the agent has not seen, and
reading what the policy writes: ``suspect`` in the metrics going up is the sign to look.
"""
