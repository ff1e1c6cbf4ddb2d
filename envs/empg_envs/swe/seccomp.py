"""The system-call filter of the sandbox, as a classic BPF program (seccomp(2)).

It denies calls that tests of repositories do not need. These calls would increase the attack surface of the
kernel, or allocate memory outside of all limits (System V shared memory, memory files). A denied call fails
with EPERM. ``clone3`` fails with ENOSYS, so that the C library falls back to ``clone``. Sockets have the
families of `FAMILIES` only: no network namespace covers the others (AF_VSOCK reaches the host of a virtual
machine). Calls by another architecture's table kill the process.
"""

from __future__ import annotations

import functools
import platform
import struct

from empg_envs.swe.sandbox import SandboxError

# name → number on x86_64, number on aarch64 (the kernel's own tables)
DENIED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "personality": (135, 92),
    "syslog": (103, 116),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
}
SOCKETS = {"socket": (41, 198), "socketpair": (53, 199)}
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}
CLONE3 = 435
X32_BIT = 0x40000000
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, audit architecture
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS, EAFNOSUPPORT = ERRNO | 1, ERRNO | 38, ERRNO | 97
LOAD, EQUAL, ABOVE, RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER_AT, ARCH_AT, FIRST_ARGUMENT_AT = 0, 4, 16  # offsets in struct seccomp_data (little endian)


@functools.cache
def program(machine: str = platform.machine()) -> bytes:
    """Return the filter in the format of ``bwrap --seccomp``.

    Raises:
      SandboxError: the system-call numbers of this architecture are unknown.
    """
    if machine not in MACHINES:
        raise SandboxError(f"no system-call filter for {machine}; known: {', '.join(MACHINES)}")
    column, architecture = MACHINES[machine]
    denied = sorted({numbers[column] for numbers in DENIED.values()})
    checks = [(number, EPERM) for number in denied] + [(CLONE3, ENOSYS)]
    code = [
        (LOAD, 0, 0, ARCH_AT),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
    ]
    if machine == "x86_64":
        code += [(ABOVE, 0, 1, X32_BIT), (RETURN, 0, 0, KILL)]
    of_family = [(LOAD, 0, 0, FIRST_ARGUMENT_AT)]
    for family in FAMILIES.values():
        of_family += [(EQUAL, 0, 1, family), (RETURN, 0, 0, ALLOW)]
    of_family.append((RETURN, 0, 0, EAFNOSUPPORT))
    for numbers in SOCKETS.values():
        code += [(EQUAL, 0, len(of_family), numbers[column]), *of_family]
    for number, verdict in checks:
        code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, verdict)]
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
