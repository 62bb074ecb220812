#!/usr/bin/env python3
"""The exact cut where the kernel holds writes back, over every kind of change: two processes pass a token to and fro, and
each holder makes one change, in turn a write of some kind and a change of names, attributes or sizes of files that are open
for writing. So the changes have one order, and a snapshot must show a beginning of it. Others look at the files meanwhile, in
ways that ask for attributes with an inode's lock held and without.

COWFS_CHAIN_SECONDS (20), COWFS_CHAIN_ROUNDS (10: how often each kind must have been made, and the least snapshots),
COWFS_SEED.
"""
from common import *
import mmap, multiprocessing

c = Case(limit=600)
SECONDS = int(os.environ.get("COWFS_CHAIN_SECONDS", "20"))
ROUNDS = int(os.environ.get("COWFS_CHAIN_ROUNDS", "10"))
PAGE = 4096
SOURCE = os.path.join(c.work, "source")


# ---------------------------------------------------------------------------------------- kinds of change
class Aspect:
    """One thing that some step sets to the number of the step. `path` is of the work directory or of a snapshot's."""

    def __init__(self, name):
        self.name = name

    def prepare(self, d):
        with open(os.path.join(d, self.name), "wb") as f:
            f.write(struct.pack("<Q", 0) * 2048)

    def open(self, d):
        self.path = os.path.join(d, self.name)
        self.fd = os.open(self.path, os.O_RDWR)


class Write(Aspect):
    """A write over two pages and a half, which must not be seen in part."""
    at, times = 1000, 1250

    def step(self, n):
        os.pwrite(self.fd, struct.pack("<Q", n) * self.times, self.at)

    def shown(self, d):
        with open(os.path.join(d, self.name), "rb") as f:
            b = f.read()[self.at:self.at + 8 * self.times]
        values = set(struct.unpack("<%dQ" % self.times, b))
        if len(values) != 1:
            raise Exception("%s is torn: %s" % (self.name, sorted(values)))
        return values.pop()


class WriteOnly(Write):
    """By a descriptor that cannot read, at odd places: the kernel must read the rest of the pages by it."""

    def open(self, d):
        self.path = os.path.join(d, self.name)
        self.fd = os.open(self.path, os.O_WRONLY)


class Sync(Write):
    def step(self, n):
        super().step(n)
        os.fsync(self.fd)


class OSync(Write):
    def open(self, d):
        self.path = os.path.join(d, self.name)
        self.fd = os.open(self.path, os.O_RDWR | os.O_DSYNC)


class Direct(Write):
    at, times = 0, 1024

    def open(self, d):
        self.path = os.path.join(d, self.name)
        self.fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        self.buffer = mmap.mmap(-1, 2 * PAGE)

    def step(self, n):
        self.buffer[:] = struct.pack("<Q", n) * self.times
        os.pwritev(self.fd, [self.buffer], 0)


class Aio(Write):
    """io_submit(2) and io_getevents(2)."""
    SETUP, SUBMIT, GETEVENTS = (206, 209, 208) if os.uname().machine == "x86_64" else (0, 2, 4)

    def open(self, d):
        super().open(d)
        self.context = ctypes.c_ulong(0)
        if libc.syscall(self.SETUP, 4, ctypes.byref(self.context)) < 0:
            raise OSError(ctypes.get_errno(), "io_setup")

    def step(self, n):
        data = ctypes.create_string_buffer(struct.pack("<Q", n) * self.times, 8 * self.times)
        # struct iocb: data, key, rw_flags, opcode (1: pwrite), priority, descriptor, buffer, length, offset, 2 reserved
        block = ctypes.create_string_buffer(struct.pack("<QIIHhIQQqQII", 0, 0, 0, 1, 0, self.fd, ctypes.addressof(data), 8 * self.times, self.at, 0, 0, 0), 64)
        pointer = ctypes.c_void_p(ctypes.addressof(block))
        if libc.syscall(self.SUBMIT, self.context, 1, ctypes.byref(pointer)) != 1:
            raise OSError(ctypes.get_errno(), "io_submit")
        event = ctypes.create_string_buffer(32)
        if libc.syscall(self.GETEVENTS, self.context, 1, 1, event, None) != 1:
            raise OSError(ctypes.get_errno(), "io_getevents")
        if struct.unpack("<QQqq", event.raw)[2] != 8 * self.times:
            raise Exception("short asynchronous write")


class Splice(Write):
    """From a pipe: one page, which is one write inside the kernel."""
    at, times = 0, 512

    def open(self, d):
        super().open(d)
        self.r, self.w = os.pipe()

    def step(self, n):
        os.write(self.w, struct.pack("<Q", n) * self.times)
        if os.splice(self.r, self.fd, 8 * self.times, offset_dst=0) != 8 * self.times:
            raise Exception("short splice")


class Copy(Write):
    """copy_file_range(2), of one page."""
    at, times = 0, 512

    def open(self, d):
        super().open(d)
        self.source = os.open(SOURCE, os.O_RDWR)

    def step(self, n):
        os.pwrite(self.source, struct.pack("<Q", n) * self.times, 0)
        if os.copy_file_range(self.source, self.fd, 8 * self.times, 0, 0) != 8 * self.times:
            raise Exception("short copy")


class Suid(Write):
    """A setuid file, which the kernel writes through."""

    def prepare(self, d):
        super().prepare(d)
        os.chmod(os.path.join(d, self.name), 0o6755)


class Reopen(Write):
    """Opened, written and closed."""

    def step(self, n):
        fd = os.open(self.path, os.O_WRONLY)
        os.pwrite(fd, struct.pack("<Q", n) * self.times, self.at)
        os.close(fd)


class Append(Aspect):
    def prepare(self, d):
        open(os.path.join(d, self.name), "wb").close()

    def open(self, d):
        self.path = os.path.join(d, self.name)
        self.fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def step(self, n):
        os.write(self.fd, struct.pack("<Q", n) * 11)

    def shown(self, d):
        with open(os.path.join(d, self.name), "rb") as f:
            b = f.read()
        if len(b) % 88 or b[-88:] != b[-8:] * 11:
            raise Exception("%s ends in half a record" % self.name)
        return struct.unpack("<Q", b[-8:])[0] if b else 0


class Size(Aspect):
    """The size, as fallocate or ftruncate leaves it."""
    way = "fallocate"

    def prepare(self, d):
        open(os.path.join(d, self.name), "wb").close()

    def step(self, n):
        if self.way == "fallocate":
            fallocate(self.fd, 0, n - 1, 1)
        elif self.way == "ftruncate":
            os.ftruncate(self.fd, n)
        else:
            os.truncate(self.path, n)

    def shown(self, d):
        return os.stat(os.path.join(d, self.name)).st_size


class Truncate(Size):
    way = "ftruncate"


class TruncatePath(Size):
    way = "truncate"


class Xattr(Aspect):
    def step(self, n):
        os.setxattr(self.fd, "user.step", b"%d" % n)

    def shown(self, d):
        try:
            return int(os.getxattr(os.path.join(d, self.name), "user.step"))
        except OSError as e:
            if e.errno == errno.ENODATA:
                return 0
            raise


class Trusted(Xattr):
    """An attribute that no permission is asked for."""

    def step(self, n):
        os.setxattr(self.path, "trusted.step", b"%d" % n)

    def shown(self, d):
        try:
            return int(os.getxattr(os.path.join(d, self.name), "trusted.step"))
        except OSError as e:
            if e.errno == errno.ENODATA:
                return 0
            raise


class Times(Aspect):
    def prepare(self, d):
        super().prepare(d)
        os.utime(os.path.join(d, self.name), (0, 0))

    def step(self, n):
        os.utime(self.fd, (n, n))

    def shown(self, d):
        return int(os.stat(os.path.join(d, self.name)).st_mtime)


class Mtime(Times):
    """The time of change of content alone, which a cut never makes wait."""

    def step(self, n):
        times = (Timespec * 2)(Timespec(0, 0x3ffffffe), Timespec(n, 0))
        if libc.utimensat(-100, os.fsencode(self.path), times, 0):
            raise OSError(ctypes.get_errno(), "utimensat")


class Owner(Aspect):
    def prepare(self, d):
        super().prepare(d)
        os.chown(os.path.join(d, self.name), 0, 0)

    def step(self, n):
        os.fchown(self.fd, n, -1)

    def shown(self, d):
        return os.stat(os.path.join(d, self.name)).st_uid


class Link(Aspect):
    """The second name of a file that is open for writing."""

    def prepare(self, d):
        super().prepare(d)
        os.mkdir(os.path.join(d, self.name + ".d"))

    def open(self, d):
        super().open(d)
        self.d = os.path.join(d, self.name + ".d")

    def step(self, n):
        os.link(self.path, os.path.join(self.d, "%d" % n))

    def shown(self, d):
        return max(map(int, os.listdir(os.path.join(d, self.name + ".d"))), default=0)


class Rename(Link):
    """A new file, written to, takes the place of one that is open for writing."""

    def step(self, n):
        new = os.path.join(self.d, "new")
        fd = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        os.write(fd, b"%d" % n)
        os.rename(new, os.path.join(self.d, "it"))
        self.last, old = fd, getattr(self, "last", None)
        if old is not None:
            os.close(old)

    def shown(self, d):
        try:
            with open(os.path.join(d, self.name + ".d", "it"), "rb") as f:
                b = f.read()
        except FileNotFoundError:
            return 0
        return int(b)


class Unlink(Link):
    """Files that are open for writing lose their names."""

    def step(self, n):
        # The last one goes; the next one comes. Both are one change of two, seen by what is there.
        there = os.listdir(self.d)
        fd = os.open(os.path.join(self.d, "%d" % n), os.O_CREAT | os.O_RDWR, 0o600)
        os.write(fd, b"x")
        for name in there:
            os.unlink(os.path.join(self.d, name))
        os.close(fd)


class Mkdir(Link):
    def step(self, n):
        os.mkdir(os.path.join(self.d, "%d" % n))


KINDS = [Write, Size, WriteOnly, Xattr, Sync, Link, Direct, Times, Aio, Truncate, Splice, Rename, Suid, Mtime, OSync, Mkdir, Copy,
         Trusted, Reopen, TruncatePath, Append, Owner, Unlink]


def aspects():
    return [kind("%02d-%s" % (k, kind.__name__)) for k, kind in enumerate(KINDS)]


def expected(k, n):
    """The last step up to `n` that set aspect `k`."""
    return max(n - (n - 1 - k) % len(KINDS), 0) if n else 0


# ---------------------------------------------------------------------------------------- the processes
begun, done, stop = (multiprocessing.RawValue("q", 0) for _ in range(3))


def chain(number, mine, theirs):
    """Makes each second step, when the other has made the one before."""
    all_ = aspects()
    for a in all_:
        a.open(c.work)
    n = number
    while True:
        if not os.read(mine, 1) or stop.value:
            break
        n += 2
        begun.value = n - 1
        all_[(n - 2) % len(KINDS)].step(n - 1)
        done.value = n - 1
        os.write(theirs, b"t")
    os.close(theirs)


def look():
    """What asks for attributes, with the lock of the inode (SEEK_END of a new file, a seek for data) and without."""
    all_ = aspects()
    rng = random.Random(os.getpid())
    fds = [os.open(os.path.join(c.work, a.name), os.O_RDONLY) for a in all_]
    while not stop.value:
        k = rng.randrange(len(all_))
        path = os.path.join(c.work, all_[k].name)
        rng.choice([
            lambda: os.stat(path),
            lambda: os.lseek(fds[k], 0, os.SEEK_END),
            lambda: os.lseek(fds[k], 0, os.SEEK_HOLE) if os.fstat(fds[k]).st_size else 0,
            lambda: os.pread(fds[k], 100, 0),
            lambda: os.close(os.open(path, os.O_RDONLY)),
            lambda: os.listdir(c.work),
            lambda: os.listxattr(path),
            lambda: os.statvfs(path),
        ])()
        time.sleep(0.0005)


def until_death(fn, args):
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: who is left must not go on for ever
    fn(*args)


def start(fn, *args):
    p = multiprocessing.Process(target=until_death, args=(fn, args))
    p.start()
    return p


def check(s, low, high):
    try:
        shown = [a.shown(c.at(s)) for a in aspects()]
    except Exception as e:
        c.ok(False, "VIOLATION: snapshot %s: %r" % (s, e))
        return None
    n = max(shown)
    wrong = ["%s shows %d, not %d" % (KINDS[k].__name__, shown[k], expected(k, n)) for k in range(len(KINDS)) if shown[k] != expected(k, n)]
    c.ok(not wrong, "VIOLATION: snapshot %s, whose last step is %d (%s):" % (s, n, KINDS[(n - 1) % len(KINDS)].__name__), "; ".join(wrong))
    c.ok(low <= n <= high, "VIOLATION: snapshot %s shows step %d, not one of %d to %d" % (s, n, low, high))
    return shown


with open(SOURCE, "wb") as f:
    f.write(b"s" * PAGE)
for a in aspects():
    a.prepare(c.work)
first_r, first_w = os.pipe()
second_r, second_w = os.pipe()
people = [start(chain, 0, first_r, second_w), start(chain, 1, second_r, first_w)] + [start(look) for _ in range(2)]
os.write(first_w, b"t")
taken, busy, end = [], 0, time.time() + SECONDS
while time.time() < end and all(p.is_alive() for p in people):
    time.sleep(random.random() * 0.05)
    low = done.value
    try:
        s = c.snap()
    except OSError as e:
        # It may give up rather than be wrong, but that must be the exception.
        if e.errno != errno.EBUSY:
            raise
        busy += 1
        continue
    high = begun.value
    shown = check(s, low, high)
    taken.append((s, shown))
    if len(taken) > 30:
        s, shown = taken.pop(random.randrange(len(taken)))
        c.equal(shown, [a.shown(c.at(s)) for a in aspects()], "VIOLATION: snapshot %s stands still" % s)
        c.drop(s)
c.ok(all(p.is_alive() for p in people), "everybody is still at work")
stop.value = 1
os.write(first_w, b"t")
os.write(second_w, b"t")
for p in people:
    p.join(20)
    c.ok(p.exitcode == 0, "a process ended well", p.exitcode)
c.ok(c.count - busy >= ROUNDS, "there were snapshots", c.count)
c.ok(done.value > ROUNDS * len(KINDS), "there were steps", done.value)
c.ok(busy * 10 <= c.count, "few cuts were given up", busy)
print("%d snapshots of %d steps, %d given up" % (c.count - busy, done.value, busy))
c.done()
