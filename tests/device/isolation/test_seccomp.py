"""The system call filter, run step by step as the kernel would."""

import re
from pathlib import Path

import pytest

from fedcompute.device.isolation import seccomp
from fedcompute.device.isolation.syscalls import NUMBERS


def verdict(program: list[seccomp.Instruction], architecture: int, number: int, *arguments: int) -> int:
    """What the kernel would do with a call: the value that a classic BPF program returns for it."""
    words = {0: number, 4: architecture}
    for index, argument in enumerate((*arguments, 0, 0, 0, 0, 0, 0)[:6]):
        words |= {16 + 8 * index: argument & 0xFFFFFFFF, 20 + 8 * index: argument >> 32}
    accumulator, at = 0, 0
    while True:
        code, true, false, operand = program[at]
        at += 1
        match code:
            case 0x20:
                accumulator = words[operand]
            case 0x54:
                accumulator &= operand
            case 0x06:
                return operand
            case 0x15 | 0x25 | 0x35:
                holds = {0x15: accumulator == operand, 0x25: accumulator > operand, 0x35: accumulator >= operand}
                at += true if holds[code] else false
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")


ALLOW, KILL = 0x7FFF0000, 0x80000000
# Never to be let through: processes, privileges, other processes, the whole machine, other files, hidden memory.
FORBIDDEN = """
    fork vfork ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_open pidfd_getfd
    pidfd_send_signal kcmp setns unshare mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount
    fspick mount_setattr keyctl add_key request_key bpf perf_event_open userfaultfd io_uring_setup io_uring_enter
    io_uring_register io_setup io_submit memfd_create memfd_secret kexec_load kexec_file_load init_module
    finit_module delete_module reboot swapon swapoff quotactl quotactl_fd acct settimeofday clock_settime
    clock_adjtime adjtimex sethostname setdomainname syslog personality modify_ldt iopl ioperm vhangup
    tkill rt_sigqueueinfo rt_tgsigqueueinfo accept accept4 listen sendmmsg recvmmsg setsockopt
    setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset setpgid setsid
    chmod fchmod fchmodat chown fchown fchownat lchown utime utimes futimesat utimensat truncate
    setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr getxattr lgetxattr link linkat symlink symlinkat
    mknod mknodat name_to_handle_at open_by_handle_at inotify_init inotify_init1 inotify_add_watch fanotify_init
    fanotify_mark flock umask shmget shmat semget msgget mq_open setpriority ioprio_set sched_setaffinity
    sched_setscheduler sched_setattr migrate_pages move_pages splice vmsplice tee seccomp landlock_create_ruleset
    landlock_restrict_self mlock mlockall remap_file_pages lookup_dcookie
"""
HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.fixture(params=seccomp.ARCHITECTURES)
def kernel_table(request):
    """A machine, and the numbers of its system calls as the kernel's header has them."""
    header = Path(HEADERS[request.param])
    if not header.exists():
        pytest.skip(f"{header} is not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", header.read_text(), re.MULTILINE)
    numbers = {name: int(number) for name, number in found}
    numbers.setdefault("newfstatat", numbers.get("fstatat", -1))
    return request.param, numbers


def test_the_tables_are_those_of_the_kernel(kernel_table):
    machine, numbers = kernel_table
    column, _ = seccomp.ARCHITECTURES[machine]
    assert {name: pair[column] for name, pair in NUMBERS.items()} == {name: numbers.get(name) for name in NUMBERS}


def test_the_filter_allows_only_calls_of_the_table(kernel_table):
    machine, numbers = kernel_table
    _, architecture = seccomp.ARCHITECTURES[machine]
    program = seccomp.build(machine, pid=7)
    # `-1` for every argument passes no check.
    allowed = {
        name for name, number in numbers.items() if verdict(program, architecture, number, *[2**64 - 1] * 6) == ALLOW
    }
    assert allowed <= NUMBERS.keys() | {"fstatat"}
    assert allowed.isdisjoint({*seccomp.CHECKED, *seccomp.REFUSED, "kill", "tgkill"})
    assert allowed.isdisjoint(FORBIDDEN.split())
    assert NUMBERS.keys().isdisjoint(FORBIDDEN.split())


ARGUMENTS = [
    ("clone", (0x3D0F00,), True),  # the C library's threads
    ("clone", (0x1200011,), False),  # its fork
    ("clone", (0x4111,), False),  # its vfork
    ("clone", (0x3D0F00 | 0x10000000,), False),  # a thread in a user namespace
    ("clone", (0x2F00,), False),
    ("kill", (7, 9), True),
    ("kill", (7 | 1 << 32, 9), True),  # the kernel reads 32 bits
    ("kill", (8, 9), False),
    ("kill", (0, 9), False),
    ("tgkill", (7, 8, 6), True),
    ("tgkill", (8, 8, 6), False),
    ("socketpair", (1, 1 | 0o2004000, 0), True),
    ("socketpair", (1, 2, 0), False),
    ("socketpair", (2, 1, 0), False),
    ("sendto", (3, 0, 0, 0, 0, 0), True),
    ("sendto", (3, 0, 0, 0, 1, 0), False),
    ("sendto", (3, 0, 0, 0, 1 << 32, 0), False),
    ("prlimit64", (0, 7), True),
    ("prlimit64", (8, 0), False),
    ("prctl", (15,), True),
    ("prctl", (1, 0), False),
    ("ioctl", (0, 0x5401), True),
    ("ioctl", (0, 0x5412), False),
    ("ioctl", (0, 0x5412 | 1 << 32), False),
    ("fcntl", (0, 1030), True),
    ("fcntl", (0, 8), False),
    ("openat", (0, 0, 0o1101), True),
    ("openat", (0, 0, 0o1000), False),
    ("openat", (0, 0, 0o1003), False),
    ("mmap", (0, 4096, 3, 0x22), True),
    ("mmap", (0, 4096, 3, 0x02), True),
    ("mmap", (0, 4096, 3, 0x01), True),
    ("mmap", (0, 4096, 3, 0x21), False),
    ("mmap", (0, 4096, 3, 0x122), False),
]


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
@pytest.mark.parametrize(("name", "arguments", "allowed"), ARGUMENTS)
def test_the_filter_checks_arguments(machine, name, arguments, allowed):
    column, architecture = seccomp.ARCHITECTURES[machine]
    number = NUMBERS[name][column]
    assert (verdict(seccomp.build(machine, pid=7), architecture, number, *arguments) == ALLOW) is allowed


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_the_filter_knows_its_own_architecture_only(machine):
    program = seccomp.build(machine, pid=7)
    _, architecture = seccomp.ARCHITECTURES[machine]
    assert verdict(program, 0x40000003, 20) == KILL
    assert verdict(program, architecture, 0x40000000 | 39) == 0x00050000 | 38
    assert verdict(program, architecture, 460) == 0x00050000 | 38


def test_a_machine_without_a_table_has_no_filter():
    with pytest.raises(OSError, match="no system call table for riscv64"):
        seccomp.build("riscv64", 7)
