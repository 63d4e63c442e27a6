"""What processes give up before they touch an upload.

Libraries that decode audio are large, old and written in C; a file made for the purpose may take such a
process over. Little is left for it to do then: it computes on what it holds, and talks over the socket it
has. Each restriction stands alone, so that a kernel that lacks one still holds the others.

``confine``, once, for a process and all that it forks:

- no writes to files, no core dumps, few descriptors
- Linux: no capabilities, no new privileges; first to go when the machine runs out of memory
- Landlock (Linux 5.13 and later): no file is written and none is read but the Python installation, no
  TCP (6.7), no signals or abstract sockets to processes outside (6.12)
- seccomp (Linux, x86-64 and ARM64): no sockets, no programs, nothing opened for writing, no changes to
  names, owners, modes or other processes' limits, none of the kernel's rarely used doors

``restrict``, in each process of its own, for it is about that one:

- address space and processor time
- seccomp: no processes, no signals but to itself

The first is the larger and takes the kernel longer; a fork inherits it for nothing.

Sources: landlock(7), seccomp(2), capabilities(7), prctl(2), getrlimit(2) of the Linux man-pages; the
kernel's ``syscall_64.tbl`` and ``asm-generic/unistd.h`` for the numbers.
"""

import ctypes
import errno
import math
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522

#: descriptors that a decoder may have open at once: a handful, and room for imports
_MAX_DESCRIPTORS = 32


@dataclass(frozen=True)
class Restrictions:
    """What a process gave up.

    Attributes:
        applied: what holds, such as ``"landlock 7"``.
        skipped: what does not hold on this system, each with the reason.
    """

    applied: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def attempt(self, what: str, action: Callable[[], str | None]) -> "Restrictions":
        """Return these and ``what``, as it went; ``action`` may return words to add to it."""
        try:
            return Restrictions((*self.applied, what + (action() or "")), self.skipped)
        except (OSError, ValueError, AttributeError, ImportError) as error:
            reason = getattr(error, "strerror", None) or error
            return Restrictions(self.applied, (*self.skipped, f"{what}: {reason}"))


def confine(readable: Iterable[str]) -> Restrictions:
    """Restrict this process and those that it will fork, for good. It should have one thread.

    Args:
        readable: folders and files that may still be read, such as ``sys.path``.

    Returns:
        what was applied and what could not be.
    """
    done = (
        Restrictions()
        .attempt("no file writes", lambda: _limit("RLIMIT_FSIZE", 0))
        .attempt("no core dumps", lambda: _limit("RLIMIT_CORE", 0))
        .attempt("few descriptors", lambda: _limit("RLIMIT_NOFILE", _MAX_DESCRIPTORS))
    )
    if not sys.platform.startswith("linux"):
        return Restrictions(done.applied, (*done.skipped, f"landlock, seccomp: {platform.system()} has none"))
    return (
        done.attempt("out of memory first", _offer_to_the_oom_killer)
        .attempt("no capabilities", _drop_capabilities)
        .attempt("no new privileges", lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1))
        .attempt("landlock", lambda: _landlock(readable))
        .attempt("seccomp", lambda: _seccomp(_confining))
    )


def restrict(confined: Restrictions, max_address_space: int, max_cpu_seconds: float) -> Restrictions:
    """Restrict this process alone, for good, before it touches an upload. It should have one thread.

    Args:
        confined: what ``confine`` returned.
        max_address_space: bytes, with what it has.
        max_cpu_seconds: processor time from its fork on.

    Returns:
        all that was applied and all that could not be.
    """
    seconds = math.ceil(max_cpu_seconds)
    done = (
        confined.attempt("limited memory", lambda: _limit("RLIMIT_AS", max_address_space))
        # the soft limit ends the process by a signal of its own, by which it is told; the hard one in any case
        .attempt("limited processor time", lambda: _limit("RLIMIT_CPU", seconds, seconds + 2))
    )
    if "seccomp" in confined.applied:
        return done.attempt("no processes", lambda: _seccomp(_restricting))
    # counts threads, too, and all those of the user: the last resort
    return done.attempt("no processes", _limit_processes)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends (Linux; elsewhere nothing)."""
    if sys.platform.startswith("linux"):
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(name: str, soft: int, hard: int | None = None) -> None:
    import resource  # not on Windows

    kind = getattr(resource, name)
    highest = resource.getrlimit(kind)[1]

    def lower(value: int) -> int:
        return value if highest == resource.RLIM_INFINITY else min(value, highest)

    resource.setrlimit(kind, (lower(soft), lower(soft if hard is None else hard)))


def _limit_processes() -> None:
    if os.getuid() == 0:
        raise OSError(errno.EPERM, "root is not counted")
    _limit("RLIMIT_NPROC", 0)


def address_space() -> int:
    """Return the bytes of address space in use, 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        # libraries map a few hundred megabytes
        return 1 << 30


def _offer_to_the_oom_killer() -> None:
    Path("/proc/self/oom_score_adj").write_text("900")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _prctl(option: int, value: int, pointer: ctypes.c_void_p | None = None) -> None:
    _checked(_libc().prctl(option, ctypes.c_ulong(value), pointer or ctypes.c_void_p(), ctypes.c_ulong(0), 0))


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    """Call the kernel directly, for what the C library has no function for."""
    values = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    return _checked(_libc().syscall(ctypes.c_long(number), *values))


def _drop_capabilities() -> None:
    # a server in a container is often root: without them, root is a user like others
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _checked(_libc().capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24))))


# ---------------------------------------------------------------------------------------------------
# Landlock: the system calls have the same numbers everywhere

_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_ADD_RULE = 445
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
#: rights on files that each version of the interface knows: all below this bit
_NUM_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_ALL_TCP = 0b11
_ALL_SCOPES = 0b11


def _landlock(readable: Iterable[str]) -> str:
    version = _syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    # what is handled is forbidden, save what a rule allows; the kernel refuses words it does not know
    handled = struct.pack("Q", (1 << _NUM_FILE_RIGHTS.get(version, 16)) - 1)
    if version >= 4:
        handled += struct.pack("Q", _ALL_TCP)
    if version >= 6:
        handled += struct.pack("Q", _ALL_SCOPES)
    rules = _syscall(_LANDLOCK_CREATE_RULESET, handled, len(handled), 0)
    try:
        for path in readable:
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # the search path names folders that do not exist
            try:
                rights = _READ_FILE | _READ_DIR if Path(path).is_dir() else _READ_FILE
                rule = struct.pack("=Qi", rights, place)
                _syscall(_LANDLOCK_ADD_RULE, rules, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)
            finally:
                os.close(place)
        _syscall(_LANDLOCK_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)
    return f" {version}"


# ---------------------------------------------------------------------------------------------------
# seccomp

#: what ``confine`` refuses, whatever the arguments: name, number on x86-64, number on ARM64 (None: not there)
_REFUSED: tuple[tuple[str, int | None, int | None], ...] = (
    # talking to others
    ("socket", 41, 198), ("socketpair", 53, 199), ("connect", 42, 203), ("bind", 49, 200), ("listen", 50, 201),
    ("accept", 43, 202), ("accept4", 288, 242), ("shmget", 29, 194), ("shmat", 30, 196), ("shmctl", 31, 195),
    ("semget", 64, 190), ("msgget", 68, 186), ("mq_open", 240, 180), ("memfd_create", 319, 279),
    ("memfd_secret", 447, 447),
    # programs and processes
    ("execve", 59, 221), ("execveat", 322, 281), ("ptrace", 101, 117),
    ("process_vm_readv", 310, 270), ("process_vm_writev", 311, 271), ("process_madvise", 440, 440),
    ("kcmp", 312, 272), ("tkill", 200, 130), ("rt_sigqueueinfo", 129, 138), ("rt_tgsigqueueinfo", 297, 240),
    ("pidfd_open", 434, 434), ("pidfd_send_signal", 424, 424), ("pidfd_getfd", 438, 438),
    ("setpriority", 141, 140), ("ioprio_set", 251, 30), ("sched_setaffinity", 203, 122),
    ("sched_setscheduler", 144, 119), ("sched_setattr", 314, 274), ("sched_setparam", 142, 118),
    ("setrlimit", 160, 164), ("migrate_pages", 256, 238), ("move_pages", 279, 239),
    # names, owners, modes and contents of files
    ("creat", 85, None), ("truncate", 76, 45), ("ftruncate", 77, 46), ("fallocate", 285, 47),
    ("rename", 82, None), ("renameat", 264, 38), ("renameat2", 316, 276), ("unlink", 87, None),
    ("unlinkat", 263, 35), ("mkdir", 83, None), ("mkdirat", 258, 34), ("rmdir", 84, None), ("link", 86, None),
    ("linkat", 265, 37), ("symlink", 88, None), ("symlinkat", 266, 36), ("mknod", 133, None), ("mknodat", 259, 33),
    ("chmod", 90, None), ("fchmod", 91, 52), ("fchmodat", 268, 53), ("fchmodat2", 452, 452), ("chown", 92, None),
    ("fchown", 93, 55), ("lchown", 94, None), ("fchownat", 260, 54), ("utime", 132, None), ("utimes", 235, None),
    ("utimensat", 280, 88), ("futimesat", 261, None), ("setxattr", 188, 5), ("lsetxattr", 189, 6),
    ("fsetxattr", 190, 7), ("removexattr", 197, 14), ("lremovexattr", 198, 15), ("fremovexattr", 199, 16),
    ("open_by_handle_at", 304, 265), ("name_to_handle_at", 303, 264), ("inotify_init", 253, None),
    ("inotify_init1", 294, 26), ("fanotify_init", 300, 262),
    # the system
    ("mount", 165, 40), ("umount2", 166, 39), ("pivot_root", 155, 41), ("chroot", 161, 51), ("unshare", 272, 97),
    ("setns", 308, 268), ("open_tree", 428, 428), ("move_mount", 429, 429), ("fsopen", 430, 430),
    ("fsconfig", 431, 431), ("fsmount", 432, 432), ("fspick", 433, 433), ("mount_setattr", 442, 442),
    ("bpf", 321, 280), ("perf_event_open", 298, 241), ("userfaultfd", 323, 282), ("io_uring_setup", 425, 425),
    ("io_uring_enter", 426, 426), ("io_uring_register", 427, 427), ("io_setup", 206, 0), ("add_key", 248, 217),
    ("request_key", 249, 218), ("keyctl", 250, 219), ("personality", 135, 92), ("init_module", 175, 105),
    ("finit_module", 313, 273), ("delete_module", 176, 106), ("kexec_load", 246, 104),
    ("kexec_file_load", 320, 294), ("reboot", 169, 142), ("swapon", 167, 224), ("swapoff", 168, 225),
    ("acct", 163, 89), ("quotactl", 179, 60), ("syslog", 103, 116), ("iopl", 172, None), ("ioperm", 173, None),
    ("modify_ldt", 154, None), ("settimeofday", 164, 170), ("clock_settime", 227, 112), ("adjtimex", 159, 171),
    ("clock_adjtime", 305, 266), ("sethostname", 170, 161), ("setdomainname", 171, 162),
)  # fmt: skip


@dataclass(frozen=True)
class _Machine:
    """How system calls are numbered on one kind of processor."""

    audit: int
    column: int
    clone: int
    kill: int
    tgkill: int
    prlimit64: int
    openat: int
    open: int | None
    fork: int | None
    vfork: int | None


_MACHINES = {
    "x86_64": _Machine(
        0xC000003E, 0, clone=56, kill=62, tgkill=234, prlimit64=302, openat=257, open=2, fork=57, vfork=58
    ),
    "aarch64": _Machine(
        0xC00000B7, 1, clone=220, kill=129, tgkill=131, prlimit64=261, openat=56, open=None, fork=None, vfork=None
    ),
}
#: these have their flags behind a pointer, where a filter cannot look: as if the kernel were older than them
_CLONE3 = 435
_OPENAT2 = 437
#: the last system call known here; to later ones the same answer, whatever they may do
_LAST_KNOWN = 462
_CLONE_THREAD = 0x00010000
#: flags of open() that make or change a file; the last is O_TMPFILE
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0x400000

_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000
_KILL = 0x80000000
#: offsets in struct seccomp_data; arguments are 8 bytes each, the low half first
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16


class _Filter:
    """A program of 8-byte instructions that judges each system call; what it says nothing of is allowed."""

    def __init__(self, machine: _Machine) -> None:
        self.machine = machine
        self._code: list[bytes] = []
        self._add(_LOAD, _ARCHITECTURE)
        self._add(_JUMP_EQUAL, machine.audit, 1, 0)
        self._add(_RETURN, _KILL)
        self._add(_LOAD, _NUMBER)

    def _add(self, operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        self._code.append(struct.pack("HBBI", operation, if_true, if_false, value))

    def refuse(self, number: int | None, reason: int = errno.EPERM, comparison: int = _JUMP_EQUAL) -> None:
        """Refuse the system call of this number (None: there is none), or those whose numbers compare to it."""
        if number is not None:
            self._add(comparison, number, 0, 1)
            self._add(_RETURN, _REFUSE | reason)

    def refuse_if(self, holds: bool, number: int | None, argument: int, comparison: int, value: int) -> None:
        """Refuse a system call if the low half of one argument compares to ``value``, or if it does not."""
        if number is not None:
            verdicts = (_REFUSE | errno.EPERM, _ALLOW) if holds else (_ALLOW, _REFUSE | errno.EPERM)
            self._add(_JUMP_EQUAL, number, 0, 4)
            self._add(_LOAD, _ARGUMENTS + 8 * argument)
            self._add(comparison, value, 0, 1)
            self._add(_RETURN, verdicts[0])
            self._add(_RETURN, verdicts[1])

    def install(self) -> None:
        """Give the program to the kernel."""
        program = b"".join([*self._code, struct.pack("HBBI", _RETURN, 0, 0, _ALLOW)])
        code = ctypes.create_string_buffer(program, len(program))
        # struct sock_fprog
        header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code)), 16)
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.cast(header, ctypes.c_void_p))


def _seccomp(fill: Callable[[_Filter], None]) -> None:
    machine = _MACHINES.get(platform.machine())
    if machine is None or sys.byteorder != "little" or sys.maxsize < 1 << 32:
        raise OSError(errno.ENOSYS, f"no filter for {platform.machine()}")
    program = _Filter(machine)
    fill(program)
    program.install()


def _confining(program: _Filter) -> None:
    machine = program.machine
    # the second set of numbers of x86-64 (x32) lies there, too
    program.refuse(_LAST_KNOWN, errno.ENOSYS, _JUMP_GREATER)
    program.refuse(_CLONE3, errno.ENOSYS)
    program.refuse(_OPENAT2, errno.ENOSYS)
    # a process may read and lower its own limits
    program.refuse_if(False, machine.prlimit64, 0, _JUMP_EQUAL, 0)
    program.refuse_if(True, machine.openat, 2, _JUMP_ANY_BIT, _WRITING)
    program.refuse_if(True, machine.open, 1, _JUMP_ANY_BIT, _WRITING)
    for _, *numbers in _REFUSED:
        program.refuse(numbers[machine.column])


def _restricting(program: _Filter) -> None:
    machine = program.machine
    # a thread shares this process's fate; anything else would outlive it
    program.refuse_if(False, machine.clone, 0, _JUMP_ANY_BIT, _CLONE_THREAD)
    program.refuse(machine.fork)
    program.refuse(machine.vfork)
    # to itself a process may send what it likes: that is how abort() works
    program.refuse_if(False, machine.kill, 0, _JUMP_EQUAL, os.getpid())
    program.refuse_if(False, machine.tgkill, 0, _JUMP_EQUAL, os.getpid())
