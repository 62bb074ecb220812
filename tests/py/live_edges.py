#!/usr/bin/env python3
"""Corners of the live tree: each call is made in the mount and in an ordinary directory of the backing filesystem and must give the
same there; what FUSE offers no way to do must give the error of a filesystem that has no such thing."""
import array, fcntl
from common import *

c = Case(limit=120)
os.mkdir(c.control)
R = c.random


def outcome(fn, *a):
    try:
        return ("ok", fn(*a))
    except OSError as e:
        return ("error", errno.errorcode.get(e.errno, e.errno))


def both(what, fn, snapshot=True):
    """fn(fresh directory) in both places; with a snapshot just before, in which nothing may be seen of it."""
    got = []
    for base in (c.control, c.work):
        d = os.path.join(base, "d")
        os.mkdir(d)
        prepare(d)
        if base == c.work and snapshot:
            name = c.snap()
            before = manifest(c.at(name))
        got.append(outcome(fn, d))
        if base == c.work and snapshot:
            c.same(before, manifest(c.at(name)), "%s: the snapshot before it" % what)
            c.drop(name)
        shutil.rmtree(d)
    c.equal(got[0], got[1], what)


def prepare(d):
    for n in ("f", "g"):
        with open(d + "/" + n, "w") as f:
            f.write("content of " + n)
    os.makedirs(d + "/a/b/c/d/e")
    with open(d + "/a/b/c/leaf", "w") as f:
        f.write("leaf")
    os.mkdir(d + "/empty")


# ---------------------------------------------------------------------------------- open files without a name


def unlinked(d):
    fd = os.open(d + "/f", os.O_RDWR)
    os.unlink(d + "/f")
    out = [os.fstat(fd).st_nlink, os.pread(fd, 99, 0), os.pwrite(fd, b"new bytes", 3), os.pread(fd, 99, 0)]
    os.ftruncate(fd, 5000)
    os.fchmod(fd, 0o640)
    os.fchown(fd, 7, 8)
    os.utime(fd, ns=(1, 2))
    os.setxattr(fd, "user.x", b"1")
    out += [os.getxattr(fd, "user.x"), os.listxattr(fd)]
    os.removexattr(fd, "user.x")
    s = os.fstat(fd)
    out += [s.st_size, s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_mtime_ns]
    out.append(outcome(os.fsync, fd))
    out.append(outcome(lambda: fallocate(fd, PUNCH | KEEP_SIZE, 0, 4096)))
    out.append(outcome(os.link, "/proc/self/fd/%d" % fd, d + "/back"))
    os.close(fd)
    return out, sorted(os.listdir(d))


def unlinked_directory(d):
    fd = os.open(d + "/empty", os.O_RDONLY)
    os.rmdir(d + "/empty")
    out = [os.fstat(fd).st_nlink, outcome(os.listdir, fd), outcome(os.mkdir, "x"), outcome(lambda: os.mkdir("x", dir_fd=fd)),
           outcome(lambda: os.open("x", os.O_CREAT | os.O_RDWR, dir_fd=fd)), outcome(lambda: os.stat("..", dir_fd=fd).st_mode & 0o170000)]
    os.close(fd)
    os.path.exists("x") and os.rmdir("x")
    return [o for k, o in enumerate(out) if k != 2]


def renamed_over(d):
    old, new = os.open(d + "/g", os.O_RDWR), os.open(d + "/f", os.O_RDWR)
    os.rename(d + "/f", d + "/g")
    os.pwrite(old, b"OLD", 0)
    os.pwrite(new, b"NEW", 0)
    out = os.pread(old, 99, 0), os.pread(new, 99, 0), os.fstat(old).st_nlink, os.fstat(new).st_nlink, open(d + "/g").read()
    os.close(old)
    os.close(new)
    return out


def inside_a_moved_directory(d):
    here = os.getcwd()
    os.chdir(d + "/a/b/c")
    try:
        os.rename(d + "/a", d + "/empty/moved")
        out = [open("leaf").read(), os.getcwd()[len(d):], sorted(os.listdir("../..")), sorted(os.listdir("../../.."))]
        os.rename(d + "/empty/moved/b", d + "/b")
        out += [os.getcwd()[len(d):], os.path.exists(d + "/b/c/d/e"), outcome(os.rename, d + "/b", "d/e/b")]
        with open("made", "w") as f:
            f.write("x")
        shutil.rmtree(d + "/b")
        out += [outcome(os.getcwd)[0], outcome(os.listdir, "."), outcome(os.mkdir, "x"), outcome(os.stat, "leaf")]
        return out
    finally:
        os.chdir(here)


both("an open file without a name", unlinked)
both("an open directory without a name", unlinked_directory)
both("a rename over an open file", renamed_over)
both("a directory moves with a process in it", inside_a_moved_directory)


# ---------------------------------------------------------------------------------- names, paths, times

def odd_names(d):
    d = os.fsencode(d)
    for n in (b"\xff\xfe", b"new\nline", b" ", b"x" * 255, b"-", b"\x01", b"~", b"...", b".. "):
        os.mkdir(d + b"/" + n)
        os.rename(d + b"/" + n, d + b"/" + n[::-1])
    return sorted(os.listdir(d)), [outcome(os.mkdir, d + b"/" + n) for n in (b"y" * 256, b"", b".", b"..", b"f/", b"f/x", b"none/x")]


def longest_path(d):
    """By chdir to any depth; a path of more than PATH_MAX cannot be given."""
    here, names = os.getcwd(), 25
    os.chdir(d)
    try:
        for k in range(names):
            os.mkdir("n" * 200)
            os.chdir("n" * 200)
        open("bottom", "w").close()
        deep = d + ("/" + "n" * 200) * names
        return outcome(os.stat, deep + "/bottom"), outcome(os.stat, "/".join(["n" * 200] * 20)), os.listdir(".")
    finally:
        os.chdir(d)
        for k in range(names):
            os.chdir("n" * 200)
        os.unlink("bottom")
        for k in range(names):
            os.chdir("..")
            os.rmdir("n" * 200)
        os.chdir(here)


def odd_times(d):
    out = []
    for sec in (0, 1, -1, -2, 1 << 31, -(1 << 31), -(1 << 31) - 1, (1 << 34) - (1 << 31) - 1, (1 << 34), 1 << 40, -(1 << 40)):
        for nsec in (0, 1, 999_999_999):
            set_times(d + "/f", (sec, nsec), (sec, nsec))
            s = statx(d + "/f")
            out.append([(t.sec, t.nsec) for t in (s.atime, s.mtime)])
    return out


both("odd names", odd_names)
both("the longest path", longest_path, snapshot=False)  # deeper than a walk by path can go
if not WRITEBACK:  # the kernel shows times as they were set, also those that the disk cannot hold
    both("odd times", odd_times)


# ---------------------------------------------------------------------------------- groups, sticky directories, inheritance

def as_member(groups, *calls):
    def go(d):
        os.chmod(d, 0o755)
        for n, mode, uid, gid in (("shared", 0o770, 0, 5000), ("setgid", 0o2770, 0, 5000), ("sticky", 0o1777, 0, 0), ("other", 0o705, 0, 5000)):
            os.mkdir(d + "/" + n)
            with open(d + "/" + n + "/theirs", "w") as f:
                f.write("theirs")
            os.chown(d + "/" + n + "/theirs", 1002, 5000)
            os.chmod(d + "/" + n + "/theirs", 0o660)
            os.chown(d + "/" + n, uid, gid)
            os.chmod(d + "/" + n, mode)
        got = as_user(1001, lambda: [outcome(call, d) for call in calls], gid=1001, groups=groups, umask=0o027)
        found = sorted((os.path.relpath(os.path.join(p, n), d), oct(os.lstat(os.path.join(p, n)).st_mode), owner(os.path.join(p, n)))
                       for p, dirs, files in os.walk(d) for n in dirs + files)
        return got, found
    return go


def in_each(call):
    return lambda d: [outcome(call, d + "/" + n) for n in ("shared", "setgid", "sticky", "other")]


CALLS = [in_each(call) for call in (
    os.listdir, lambda p: open(p + "/theirs").read(), lambda p: open(p + "/theirs", "a").close(), lambda p: open(p + "/mine", "w").close(),
    lambda p: os.mkdir(p + "/dir"), lambda p: os.symlink("x", p + "/link"), lambda p: os.chown(p + "/mine", -1, 5000), lambda p: os.chmod(p + "/mine", 0o2755),
    lambda p: os.rename(p + "/theirs", p + "/renamed"), lambda p: os.link(p + "/mine", p + "/mine2"), lambda p: os.unlink(p + "/renamed"),
    lambda p: os.unlink(p + "/mine2"), lambda p: os.access(p, os.W_OK))]
c.equal(("ok", []), as_user(1001, os.listdir, c.work), "other users reach the mount, or the following would prove nothing")
for groups in ((), (5000,), (4999, 5000, 5001), tuple(range(5000, 5000 + 40))):
    both("a user in %d groups" % len(groups), as_member(groups, *CALLS), snapshot=False)


def inherits(umask):
    def go(d):
        os.setxattr(d + "/empty", ACL_DEFAULT, acl((1, 7, -1), (2, 7, 1001), (4, 5, -1), (16, 5, -1), (32, 1, -1)))
        old = os.umask(umask)
        try:
            p = d + "/empty"
            os.close(os.open(p + "/f", os.O_CREAT | os.O_WRONLY, 0o666))
            os.mkdir(p + "/d", 0o777)
            os.mkdir(p + "/d/e", 0o700)
            os.mkfifo(p + "/p", 0o640)
            os.mknod(p + "/s", stat.S_IFSOCK | 0o777)
            os.symlink("x", p + "/l")
            return [(n, oct(os.lstat(p + n).st_mode), sorted(xattrs(p + n).items())) for n in ("/f", "/d", "/d/e", "/p", "/s", "/l")]
        finally:
            os.umask(old)
    return go


for umask in (0, 0o022, 0o077):
    both("a default ACL is inherited under umask %o" % umask, inherits(umask))

# ---------------------------------------------------------------------------------- what FUSE or fuser has no way for

f = c.work + "/plain"
with open(f, "w") as file:
    file.write("plain")
fd = os.open(f, os.O_RDWR)
c.refused("O_TMPFILE", {errno.EOPNOTSUPP}, os.open, c.work, os.O_TMPFILE | os.O_RDWR, 0o600)
GETFLAGS, SETFLAGS, GETXATTR, FICLONE = 0x80086601, 0x40086602, 0x801C581F, 0x40049409
c.refused("FS_IOC_GETFLAGS (lsattr)", {errno.ENOTTY}, fcntl.ioctl, fd, GETFLAGS, array.array("l", [0]))
c.refused("FS_IOC_SETFLAGS (chattr)", {errno.ENOTTY}, fcntl.ioctl, fd, SETFLAGS, array.array("l", [0x10]))
c.refused("FS_IOC_FSGETXATTR", {errno.ENOTTY}, fcntl.ioctl, fd, GETXATTR, bytearray(28))
c.refused("an ioctl that nobody has", {errno.ENOTTY}, fcntl.ioctl, fd, 0x5A5A)
other = os.open(c.work + "/clone", os.O_RDWR | os.O_CREAT)
c.refused("FICLONE", {errno.EOPNOTSUPP, errno.ENOTTY}, fcntl.ioctl, other, FICLONE, fd)
s = statx(f)
c.equal(0x7FF & ~0x800, s.mask & 0x7FF, "statx gives all basic fields")
c.equal((0, 0), (s.btime.sec, s.btime.nsec), "and no time of birth")
c.equal(0, s.mask & 0x800, "nor says that it does")
sync(c.mnt)
os.sync()
os.close(fd)
os.close(other)

# A file that its owner made immutable in the backing directory: every change is refused as there, and snapshots go on.
hard = os.path.join(c.backing, "live/plain")
name = c.snap()
backing = os.open(hard, os.O_RDONLY)
try:
    flags = array.array("l", [0])
    fcntl.ioctl(backing, GETFLAGS, flags)
    fcntl.ioctl(backing, SETFLAGS, array.array("l", [flags[0] | 0x10]))
except OSError as e:
    c.ok(e.errno in (errno.ENOTTY, errno.EOPNOTSUPP), "the backing filesystem has no flags", str(e))
else:
    try:
        for what, fn in (("unlink", lambda: os.unlink(f)), ("rename", lambda: os.rename(f, f + "2")), ("rename over", lambda: os.rename(c.work + "/clone", f)),
                         ("truncate", lambda: os.truncate(f, 0)), ("write", lambda: os.close(os.open(f, os.O_WRONLY))), ("chmod", lambda: os.chmod(f, 0)),
                         ("link", lambda: os.link(f, f + "3")), ("setxattr", lambda: os.setxattr(f, "user.x", b"")), ("utime", lambda: os.utime(f, (1, 1)))):
            c.refused("%s of an immutable file" % what, {errno.EPERM, errno.EACCES}, fn)
        c.equal("plain", open(f).read(), "an immutable file is read")
    finally:
        fcntl.ioctl(backing, SETFLAGS, flags)
os.close(backing)
os.unlink(f)
c.equal("plain", open(c.at(name, "plain")).read(), "the snapshot of what was immutable")


# ---------------------------------------------------------------------------------- numbers

def entries(d):
    """(name, d_ino) as getdents gives them, '.' and '..' as well."""
    return [(n, i) for n, i, _ in Stream(d)]


class Dirent(ctypes.Structure):
    _fields_ = [("ino", ctypes.c_uint64), ("off", ctypes.c_int64), ("reclen", ctypes.c_uint16), ("type", ctypes.c_uint8), ("name", ctypes.c_char * 256)]


libc.opendir.restype = libc.readdir64.restype = ctypes.c_void_p
libc.readdir64.argtypes = libc.closedir.argtypes = libc.telldir.argtypes = libc.rewinddir.argtypes = [ctypes.c_void_p]
libc.telldir.restype = ctypes.c_long
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


class Stream:
    """A directory stream of the C library: (name, d_ino, telldir after it)."""

    def __init__(self, path):
        self.dir = libc.opendir(os.fsencode(path))
        if not self.dir:
            raise OSError(ctypes.get_errno(), path)

    def __iter__(self):
        return self

    def __next__(self):
        e = libc.readdir64(self.dir)
        if not e:
            libc.closedir(self.dir)
            raise StopIteration
        e = Dirent.from_address(e)
        return os.fsdecode(ctypes.string_at(ctypes.addressof(e) + Dirent.name.offset)), e.ino, libc.telldir(self.dir)

    def seek(self, at):
        libc.seekdir(self.dir, at)


os.makedirs(c.work + "/tree/one/two")
for k in range(5):
    open(c.work + "/tree/one/f%d" % k, "w").close()
os.link(c.work + "/tree/one/f0", c.work + "/tree/hard")
name = c.snap()
os.rename(c.work + "/tree/one/two", c.work + "/tree/two")


def check_numbers(top):
    for p, dirs, files in os.walk(top):
        for n, number in entries(p):
            if n == ".." and p == c.mnt:
                continue
            c.equal(os.lstat(os.path.join(p, n)).st_ino, number, "d_ino and st_ino of %s" % os.path.relpath(os.path.join(p, n), c.mnt))


for _ in range(2):
    check_numbers(c.mnt)
    check_numbers(os.path.join(c.mnt, ".snapshots", name))
    for n, number in entries(os.path.join(c.mnt, ".snapshots")):
        c.equal(os.lstat(os.path.join(c.mnt, ".snapshots", n)).st_ino, number, "d_ino and st_ino of .snapshots/%s" % n)
    # as in the root of any filesystem
    c.equal({os.lstat(c.mnt).st_ino}, {i for n, i in entries(c.mnt) if n in (".", "..")}, "the numbers of '.' and '..' of the root")
    numbers = {p: os.lstat(os.path.join(c.work, p)).st_ino for p in ("tree", "tree/one", "tree/hard", "tree/two")}
    c.snap()
    c.equal(numbers, {p: os.lstat(os.path.join(c.work, p)).st_ino for p in numbers}, "a cut changes no number")
    c.remount()
    c.equal(numbers, {p: os.lstat(os.path.join(c.work, p)).st_ino for p in numbers}, "a remount changes no number")
for n in c.names():
    c.drop(n)
held = [os.open(c.work + "/held-%d" % k, os.O_CREAT | os.O_RDWR) for k in range(20)]
for k in range(20):
    os.unlink(c.work + "/held-%d" % k)
taken = {os.fstat(fd).st_ino for fd in held}
for k in range(500):
    p = c.work + "/new-%d" % k
    os.close(os.open(p, os.O_CREAT | os.O_RDWR))
    c.ok(os.lstat(p).st_ino not in taken, "a number in use is given to no other file")
for k, fd in enumerate(held):
    os.pwrite(fd, b"%d" % k, 0)
    c.equal(b"%d" % k, os.pread(fd, 9, 0), "an open file without a name is its own")
    os.close(fd)

# ---------------------------------------------------------------------------------- directory streams

os.mkdir(c.work + "/stream")
for k in range(2000):
    os.mknod(c.work + "/stream/stay-%d" % k)
    os.mknod(c.work + "/stream/go-%d" % k)
name = c.snap()
for what, d, moves in (("the live tree", c.work + "/stream", True), ("a snapshot", c.at(name, "stream"), False)):
    stream, places, got = Stream(d), [], []
    for n, _, at in stream:
        got.append(n)
        places.append((at, len(got)))
    wanted = got
    c.equal(4002, len(set(got)), "a listing of %s is whole" % what)
    stream, _ = Stream(d), R.shuffle(places)
    for at, index in places[:30]:
        stream.seek(at)
        c.equal(wanted[index:index + 1], [n for n, _, _ in [next(stream, ("end", 0, 0))] if index < len(wanted)], "seekdir to a place of telldir in %s" % what)
        if index == len(wanted):
            stream = Stream(d)
    # what is there throughout is listed exactly once, whatever comes and goes meanwhile
    stream, got, k = Stream(d), [], 0
    for n, _, at in stream:
        got.append(n)
        if len(got) % 4 == 0 and k < 1000:
            os.unlink(c.work + "/stream/go-%d" % k) if moves else None
            os.mknod(c.work + "/stream/come-%s-%d" % (moves, k))
            k += 1
        if len(got) % 500 == 0:
            stream.seek(at)
    stay = [n for n in got if n.startswith("stay")]
    c.equal((2000, 2000), (len(stay), len(set(stay))), "what stays is listed once in %s" % what)
    c.equal(len(got), len(set(got)), "nothing is listed twice in %s" % what)
shutil.rmtree(c.control)
c.done()
