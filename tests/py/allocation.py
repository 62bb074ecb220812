#!/usr/bin/env python3
"""Everything that changes or moves data: fallocate in all its modes, append, truncate, sparse files, copy_file_range, lseek, direct
and vectored I/O. The mount and an ordinary directory of the backing filesystem get the same calls and must give the same; a
snapshot taken before each call keeps what was there."""
from common import *
import subprocess

c = Case(limit=150)
os.mkdir(c.control)
R = c.random
K = 1024


def outcome(fn, *a):
    try:
        return ("ok", fn(*a))
    except OSError as e:
        return ("error", errno.errorcode.get(e.errno, e.errno))


def content(p):
    with open(p, "rb") as f:
        return f.read()


BASE = R.randbytes(300 * K)


def fresh(base, name="f", data=None):
    p = os.path.join(base, name)
    with open(p, "wb") as f:
        f.write(BASE if data is None else data)
    return p


number = 0


def both(what, fn, allowed=(), data=None):
    """fn(path) on the same file in both places. `allowed`: errno names that the mount may give where the kernel offers FUSE no way."""
    global number
    number += 1
    got = []
    for base in (c.control, c.work):
        p = fresh(base, "f%d" % number, data)
        before = content(p)
        if base == c.work:
            s = c.snap()
        r = outcome(fn, p)
        got.append((r, content(p), os.stat(p).st_size))
        if base == c.work:
            c.ok(content(c.at(s, os.path.basename(p))) == before, "%s: the snapshot before it is unchanged" % what)
            c.ok(os.stat(c.at(s, os.path.basename(p))).st_size == len(before), "%s: size in the snapshot" % what)
            t = c.snap()
            c.ok(content(c.at(t, os.path.basename(p))) == got[1][1], "%s: the snapshot after it shows it" % what)
            c.drop(R.choice((s, t)))
            if len(c.names()) > 12:
                c.drop(R.choice(c.names()))
    if got[1][0][0] == "error" and got[1][0][1] in allowed:
        c.ok(got[1][1] == (BASE if data is None else data), "%s: refused and nothing changed" % what)
        return
    c.equal(got[0][0], got[1][0], "%s: outcome" % what)
    c.equal(got[0][2], got[1][2], "%s: size" % what)
    c.ok(got[0][1] == got[1][1], "%s: content" % what)


def falloc(mode, a, n):
    def go(p):
        fd = os.open(p, os.O_RDWR)
        try:
            fallocate(fd, mode, a, n)
            return os.fstat(fd).st_size
        finally:
            os.close(fd)
    return go


NAMED = {0: "allocate", KEEP_SIZE: "keep size", PUNCH | KEEP_SIZE: "punch", ZERO: "zero", ZERO | KEEP_SIZE: "zero keep size", COLLAPSE: "collapse", INSERT: "insert",
         PUNCH: "punch without keep size", PUNCH | ZERO: "punch and zero"}
for mode, name in NAMED.items():
    for a, n in ((0, 4 * K), (1, 1), (4096, 8192), (5000, 100_000), (299 * K, 10 * K), (400 * K, 50 * K), (0, 300 * K), (1 << 20, 1 << 20)):
        both("fallocate %s %d+%d" % (name, a, n), falloc(mode, a, n), allowed=("EOPNOTSUPP", "ENOTSUP") if mode & (COLLAPSE | INSERT) else ())
both("fallocate of nothing", falloc(0, 0, 0))
both("fallocate on a read-only descriptor", lambda p: fallocate(os.open(p, os.O_RDONLY), 0, 0, 4096))


def with_fd(flags, fn):
    def go(p):
        fd = os.open(p, flags)
        try:
            return fn(fd)
        finally:
            os.close(fd)
    return go


both("append", with_fd(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"appended" * 1000)))
both("append after a seek", with_fd(os.O_RDWR | os.O_APPEND, lambda fd: (os.lseek(fd, 10, 0), os.write(fd, b"x" * 5000), os.lseek(fd, 0, 1))[1:]))
both("pwrite on an append descriptor", with_fd(os.O_WRONLY | os.O_APPEND, lambda fd: os.pwrite(fd, b"y" * 100, 5)))
both("O_TRUNC", with_fd(os.O_WRONLY | os.O_TRUNC, lambda fd: os.write(fd, b"short")))
both("O_TRUNC read-only", with_fd(os.O_RDONLY | os.O_TRUNC, lambda fd: os.fstat(fd).st_size))
for size in (0, 1, 4095, 4096, 100_001, 300 * K, 300 * K + 1, 1 << 20, (1 << 20) + 77):
    both("truncate to %d" % size, lambda p: os.truncate(p, size))
    both("ftruncate to %d and back" % size, with_fd(os.O_RDWR, lambda fd: (os.ftruncate(fd, size), os.ftruncate(fd, 200_000))[1]))
both("truncate to a negative size", lambda p: os.truncate(p, -1))
both("truncate of a read-only descriptor", with_fd(os.O_RDONLY, lambda fd: os.ftruncate(fd, 1)))
for a, n in ((0, 1), (4095, 2), (8192, 4096), (300 * K - 1, 2), (300 * K, 10), (500 * K, 10), (10, 299 * K), (0, 2 << 20)):
    both("write %d+%d" % (a, n), with_fd(os.O_RDWR, lambda fd: os.pwrite(fd, b"w" * n, a)))
both("write of nothing", with_fd(os.O_RDWR, lambda fd: os.pwrite(fd, b"", 1 << 30)))
both("write on a read-only descriptor", with_fd(os.O_RDONLY, lambda fd: os.pwrite(fd, b"1", 0)))
both("read on a write-only descriptor", with_fd(os.O_WRONLY, lambda fd: os.pread(fd, 1, 0)))
both("read beyond the end", with_fd(os.O_RDONLY, lambda fd: (os.pread(fd, 10, 300 * K), os.pread(fd, 10, 300 * K - 3) == BASE[-3:], os.pread(fd, 9, 1 << 40))))
both("pwritev", with_fd(os.O_RDWR, lambda fd: os.pwritev(fd, [b"a" * 1000, b"b" * 5000, b"c" * 3], 4090)))
both("O_SYNC write", with_fd(os.O_RDWR | os.O_SYNC, lambda fd: os.pwrite(fd, b"sync" * 1000, 7)))
both("O_DSYNC and fdatasync", with_fd(os.O_RDWR | os.O_DSYNC, lambda fd: (os.pwrite(fd, b"s", 9), os.fdatasync(fd), os.fsync(fd))[0]))
both("write to 4 GiB", with_fd(os.O_RDWR, lambda fd: (os.pwrite(fd, b"far", 1 << 32), os.pread(fd, 5, (1 << 32) - 2), os.ftruncate(fd, 100))[1]))
if not WRITEBACK:
    both("a write past the largest size", with_fd(os.O_RDWR, lambda fd: os.pwrite(fd, b"x", 1 << 62)))
both("two descriptors", with_fd(os.O_RDWR, lambda fd: [(os.pwrite(fd, b"%d" % k, k), os.pread(os.open("/proc/self/fd/%d" % fd, os.O_RDONLY), 1, k)) for k in range(9)]))


def direct(p):
    import mmap
    fd = os.open(p, os.O_RDWR | os.O_DIRECT)
    try:
        b = mmap.mmap(-1, 64 * K)
        b[:] = b"D" * (64 * K)
        n = os.pwritev(fd, [b], 32 * K)
        m = os.preadv(fd, [b], 0)
        return n, m, bytes(b[:32 * K]) == BASE[:32 * K], bytes(b[32 * K:]) == b"D" * 32 * K
    finally:
        os.close(fd)


both("O_DIRECT", direct)


def copy(a, b, n):
    def go(p):
        q = p + ".copy"
        with open(q, "wb") as f:
            f.write(b"-" * 100_000)
        src, dst = os.open(p, os.O_RDONLY), os.open(q, os.O_RDWR)
        total = 0
        while total < n:
            k = os.copy_file_range(src, dst, n - total, a + total, b + total)
            if k == 0:
                break
            total += k
        os.close(src)
        os.close(dst)
        return total, hashlib.sha256(content(q)).hexdigest()
    return go


for a, b, n in ((0, 0, 4096), (0, 0, 300 * K), (100, 50_000, 100_000), (299 * K, 0, 5000), (400 * K, 0, 10), (4096, 8192, 200 * K), (0, 1 << 20, 4096)):
    both("copy_file_range %d->%d %d" % (a, b, n), copy(a, b, n))


def within(a, b, n):
    return with_fd(os.O_RDWR, lambda fd: os.copy_file_range(fd, fd, n, a, b))


both("copy_file_range within a file", within(0, 150 * K, 100_000))
both("copy_file_range within a file, overlapping", within(0, 50, 100_000))
both("copy_file_range to a read-only descriptor", lambda p: os.copy_file_range(os.open(p, os.O_RDONLY), os.open(p, os.O_RDONLY), 10, 0, 5000))
both("sendfile out", lambda p: (lambda src, dst: (os.sendfile(dst, src, 0, 100_000), os.fstat(dst).st_size))(os.open(p, os.O_RDONLY), os.open(p + ".out", os.O_RDWR | os.O_CREAT)))


def sparse(p):
    fd = os.open(p, os.O_RDWR)
    try:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, 2 << 20)
        os.pwrite(fd, b"x" * 4096, 512 * K)
        os.pwrite(fd, b"y" * 10, 1 << 20)
        os.fsync(fd)
        out = [(w, at, outcome(os.lseek, fd, at, w)) for w in (os.SEEK_DATA, os.SEEK_HOLE) for at in (0, 1, 512 * K, 516 * K, 1 << 20, (1 << 20) + 4096, (2 << 20) - 1, 2 << 20, 3 << 20)]
        out += [(w, outcome(os.lseek, fd, at, w)) for w in (os.SEEK_DATA, os.SEEK_HOLE) for at in (-1, -(1 << 62))]
        return out, os.lseek(fd, -5, os.SEEK_END), outcome(os.lseek, fd, -1, os.SEEK_SET)
    finally:
        os.close(fd)


both("lseek over holes", sparse)
both("copy from a snapshot into the live tree", lambda p: shutil.copyfile(p, p + ".again") and None)

# from a snapshot into the live tree, whichever way the kernel copies
p = fresh(c.work, "source")
s = c.snap()
os.truncate(p, 0)
src, dst = os.open(c.at(s, "source"), os.O_RDONLY), os.open(c.work + "/restored", os.O_RDWR | os.O_CREAT, 0o644)
at = 0
while at < len(BASE):
    try:
        n = os.copy_file_range(src, dst, len(BASE) - at)
    except OSError as e:
        c.ok(e.errno in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP), "copy_file_range from a snapshot", str(e))
        n = os.write(dst, os.pread(src, 1 << 20, at))
    if not n:
        break
    at += n
os.close(src)
os.close(dst)
c.ok(content(c.work + "/restored") == BASE, "a file copied back from a snapshot")
command("cp", "-a", c.at(s, "source"), c.work + "/restored-by-cp")
c.ok(content(c.work + "/restored-by-cp") == BASE, "a file copied back by cp -a")

# O_APPEND from several processes: every record once; in every snapshot a prefix. A record may end at a page boundary there:
# the kernel sends an append that leaves a half-filled page as two requests.
log = c.work + "/log"
open(log, "w").close()
kids = []
for k in range(4):
    pid = os.fork()
    if pid == 0:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND)
        for j in range(400):
            line = b"%d:%06d:" % (k, j)
            os.write(fd, line + b"." * ((k * 977 + j * 131) % 5000) + b"\n")
        os._exit(0)
    kids.append(pid)
seen = []
for _ in range(12):
    s = c.snap()
    b = content(c.at(s, "log"))
    c.ok(b == b"" or b.endswith(b"\n") or len(b) % 4096 == 0, "appends are whole in a snapshot", (len(b), len(b) % 4096, b[-60:]))
    seen.append((s, b))
    time.sleep(0.03)
for pid in kids:
    c.equal(0, os.waitpid(pid, 0)[1], "an appending process ends well")
whole = content(log)
for s, b in seen:
    c.ok(whole.startswith(b) and content(c.at(s, "log")) == b, "the log in %s is a prefix and stays so" % s)
lines = [l.split(b":") for l in whole.splitlines()]
for k in range(4):
    c.equal(list(range(400)), [int(l[1]) for l in lines if int(l[0]) == k], "the records of process %d" % k)

# statfs
a, b = os.statvfs(c.control), os.statvfs(c.work)
for f in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
    c.equal(getattr(a, f), getattr(b, f), "statvfs " + f)
shutil.rmtree(c.control)
c.done()
