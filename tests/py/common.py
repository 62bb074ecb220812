"""Helpers of the mounted cases: `CASE.py MOUNTPOINT`, python's standard library only, exit status 0 or 1.

Environment: COWFS_BIN (the binary), COWFS_BACKING (the backing directory of MOUNTPOINT).
A case prints one line for each check that fails and a summary at the end.
"""
import ctypes, errno, fcntl, hashlib, os, random, shutil, signal, stat, struct, subprocess, sys, time, traceback

libc = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534
# The kernel holds writes back, so that what the disk refuses is told later (docs/SEMANTICS.md).
WRITEBACK = "cache=writeback" in os.environ.get("COWFS_TEST_OPTIONS", "") and os.geteuid() == 0
# The root of a user namespace of one's own has few of root's powers.
ROOT = os.geteuid() == 0 and open("/proc/self/uid_map").read().split()[1] == "0"

# ------------------------------------------------------------------------------------------ raw calls


class Timestamp(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_int64), ("nsec", ctypes.c_uint32), ("_pad", ctypes.c_int32)]


class Timespec(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_int64), ("nsec", ctypes.c_int64)]


class Statx(ctypes.Structure):
    _fields_ = [("mask", ctypes.c_uint32), ("blksize", ctypes.c_uint32), ("attributes", ctypes.c_uint64),
                ("nlink", ctypes.c_uint32), ("uid", ctypes.c_uint32), ("gid", ctypes.c_uint32), ("mode", ctypes.c_uint16),
                ("_pad", ctypes.c_uint16), ("ino", ctypes.c_uint64), ("size", ctypes.c_uint64), ("blocks", ctypes.c_uint64),
                ("attributes_mask", ctypes.c_uint64), ("atime", Timestamp), ("btime", Timestamp), ("ctime", Timestamp),
                ("mtime", Timestamp), ("rdev_major", ctypes.c_uint32), ("rdev_minor", ctypes.c_uint32),
                ("dev_major", ctypes.c_uint32), ("dev_minor", ctypes.c_uint32), ("_spare", ctypes.c_uint64 * 14)]


def _check(result, path=""):
    if result < 0:
        e = ctypes.get_errno()
        raise OSError(e, os.strerror(e), path)
    return result


def statx(path):
    """All fields, without following a symlink. Times as (seconds, nanoseconds): python's own stat cannot show all of them."""
    b = Statx()
    _check(libc.statx(-100, os.fsencode(path), 0x100, 0x7FF, ctypes.byref(b)), path)
    return b


def mode_alone(path):
    """The mode, when nothing else is asked for: the kernel may know the mode and not the rest (STATX_TYPE, STATX_MODE)."""
    b = Statx()
    _check(libc.statx(-100, os.fsencode(path), 0x100, 3, ctypes.byref(b)), path)
    return oct(b.mode)


def set_times(path, atime, mtime):
    """(seconds, nanoseconds) each; seconds may be negative."""
    t = (Timespec * 2)(Timespec(*atime), Timespec(*mtime))
    _check(libc.utimensat(-100, os.fsencode(path), t, 0x100), path)


def renameat2(a, b, flags):
    _check(libc.renameat2(-100, os.fsencode(a), -100, os.fsencode(b), ctypes.c_uint(flags)), b)


NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH, COLLAPSE, ZERO, INSERT = 1, 2, 8, 16, 32


def fallocate(fd, mode, offset, length):
    _check(libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def acl(*entries):
    """Value of a POSIX ACL attribute. Entries: (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", t, p, i & 0xFFFFFFFF) for t, p, i in entries)


ACL_ACCESS, ACL_DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # a file capability: cap_net_raw+ep


def owner(path):
    s = os.lstat(path)
    return s.st_uid, s.st_gid


def holes(path):
    """[(start, end)] of the data of a file."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        out, at = [], 0
        while True:
            try:
                a = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as e:
                if e.errno == errno.ENXIO:
                    return out
                raise
            at = os.lseek(fd, a, os.SEEK_HOLE)
            out.append((a, at))
    finally:
        os.close(fd)


def digest(path):
    """Hash of the content; of a huge file that of its data and of samples, in time that does not grow with its holes."""
    h = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        size = os.fstat(fd).st_size
        if size > 64 << 20:
            for a, b in holes(path) + [(k * (size >> 4), k * (size >> 4) + 65536) for k in range(16)]:
                while a < b and (part := os.pread(fd, min(b - a, 1 << 20), a)):
                    h.update(b"%d:" % a + part)
                    a += len(part)
            return "%d:%s" % (size, h.hexdigest())
        while part := os.read(fd, 1 << 20):
            h.update(part)
    finally:
        os.close(fd)
    return h.hexdigest()


# ------------------------------------------------------------------------------------------ manifests


def xattrs(path):
    return {n: os.getxattr(path, n, follow_symlinks=False) for n in os.listxattr(path, follow_symlinks=False)
            if n != "security.selinux"}


class Entry(dict):
    """What an object is, field by field."""


def record(path, data=True, layout=True):
    s = statx(path)
    kind = stat.S_IFMT(s.mode)
    e = Entry(kind=kind, mode=stat.S_IMODE(s.mode), uid=s.uid, gid=s.gid, size=s.size, blocks=s.blocks,
              rdev=(s.rdev_major, s.rdev_minor), links=s.nlink)
    for t in ("atime", "mtime", "ctime"):
        e[t] = (getattr(s, t).sec, getattr(s, t).nsec)
    e["xattrs"] = xattrs(path)
    if kind == stat.S_IFLNK and data:
        e["target"] = os.readlink(os.fsencode(path))
    if kind == stat.S_IFREG and layout:
        e["data"] = holes(path)
    if kind == stat.S_IFREG and data:
        e["sha"] = digest(path)
    return e


def manifest(root, skip=(b".cowfs",), layout=True, visible_links=False):
    """{relative path: Entry}. All attributes are read before any content, as reading may set access times.

    visible_links: count the names found instead of asking stat (the backing directory, where a file that only a snapshot
    shows has a name in the store).
    """
    root = os.fsencode(root)
    out, numbers = {}, {}

    def walk(p, rel):
        out[rel or b"."] = record(p, data=False, layout=False)
        if out[rel or b"."]["kind"] != stat.S_IFDIR:
            numbers.setdefault(os.lstat(p).st_ino, []).append(rel)
            return
        names = sorted(os.listdir(p))
        if len(set(names)) != len(names):
            out[rel + b"/!listed twice"] = Entry()
        for n in names:
            if rel or n not in skip:
                walk(p + b"/" + n, rel + b"/" + n if rel else n)
    walk(root, b"")
    for names in numbers.values():
        for n in names:
            out[n]["same as"] = min(names)
            if visible_links:
                out[n]["links"] = len(names)
    for rel, e in out.items():
        if e.get("kind") == stat.S_IFREG:
            p = root + b"/" + rel
            if layout:
                e["data"] = holes(p)
            e["sha"] = digest(p)
        elif e.get("kind") == stat.S_IFLNK:
            e["target"] = os.readlink(root + b"/" + rel)
    return out


def difference(want, got, ignore=(), limit=6):
    """Lines that say how two manifests differ; none when they are equal."""
    lines = []
    for p in sorted(set(want) | set(got)):
        if p not in got:
            lines.append("%r is missing" % p)
        elif p not in want:
            lines.append("%r should not be there" % p)
        else:
            for f in sorted((set(want[p]) | set(got[p])) - set(ignore)):
                if want[p].get(f) != got[p].get(f):
                    lines.append("%r: %s is %.150r, not %.150r" % (p[:80], f, got[p].get(f), want[p].get(f)))
    return lines[:limit] + (["and %d more" % (len(lines) - limit)] if len(lines) > limit else [])


# ------------------------------------------------------------------------------------------ the mount


def command(*words, timeout=60):
    r = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout)
    if r.returncode:
        raise RuntimeError("%s: %d: %s" % (" ".join(map(os.fsdecode, words)), r.returncode, r.stdout.decode(errors="replace")[-500:]))
    return r.stdout.decode(errors="replace")


def mount_type(path):
    path, kind = os.path.realpath(path), None
    for line in open("/proc/self/mountinfo", errors="surrogateescape"):
        f = line.split(" ")
        if f[4].encode("utf-8", "surrogateescape").decode("unicode_escape") == path:
            kind = f[f.index("-") + 1]
    return kind


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        _check(libc.syncfs(fd), path)
    finally:
        os.close(fd)


def as_user(uid, fn, *args, gid=None, groups=(), umask=0o022):
    """Runs fn in a process of that user; returns ("ok", value) or ("error", errno name). Values travel by repr."""
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(r)
            os.umask(umask)
            os.setgroups(list(groups))
            os.setresgid(*[gid if gid is not None else uid] * 3)
            os.setresuid(uid, uid, uid)
            try:
                answer = ("ok", fn(*args))
            except OSError as e:
                answer = ("error", errno.errorcode.get(e.errno, str(e.errno)))
            os.write(w, repr(answer).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(w)
    with os.fdopen(r) as f:
        text = f.read()
    os.waitpid(pid, 0)
    return eval(text) if text else ("died", None)


class Case:
    def __init__(self, limit=150):
        if len(sys.argv) < 2:
            sys.exit("usage: %s MOUNTPOINT" % sys.argv[0])
        self.name = os.path.basename(sys.argv[0])
        self.mnt = os.path.realpath(sys.argv[1])
        self.bin = os.environ["COWFS_BIN"]
        self.backing = os.path.realpath(os.environ["COWFS_BACKING"])
        self.checks = self.failed = 0
        self.count = 0
        self.start = time.time()
        self.seed = os.environ.get("COWFS_SEED") or str(random.randrange(1 << 30))
        print("%s: COWFS_SEED=%s repeats this run" % (self.name, self.seed), flush=True)
        self.random = random.Random(self.seed)
        self.work = os.path.join(self.mnt, "live")
        os.mkdir(self.work)
        # an ordinary directory on the backing filesystem: what the mount does is compared with what it does
        self.control = os.path.join(os.path.dirname(self.backing), "control")
        os.umask(0o022)
        signal.signal(signal.SIGALRM, self._late)
        # `limit` is ample on a quiet machine; what counts is that a hang ends
        signal.alarm(limit * 5)
        sys.excepthook = self._crash

    def _late(self, *_):
        traceback.print_stack()
        print("FAIL %s: the time limit was reached" % self.name, flush=True)
        os._exit(1)

    def _crash(self, kind, value, trace):
        traceback.print_exception(kind, value, trace)
        print("FAIL %s: unexpected exception" % self.name, flush=True)
        os._exit(1)

    def ok(self, condition, what, detail=""):
        self.checks += 1
        if not condition:
            self.failed += 1
            print("not ok: %s %s" % (what, detail), flush=True)
        return condition

    def same(self, want, got, what, ignore=()):
        d = difference(want, got, ignore)
        return self.ok(not d, what, "\n    " + "\n    ".join(d))

    def equal(self, want, got, what):
        return self.ok(want == got, what, "is %.300r, not %.300r" % (got, want))

    def refused(self, what, codes, fn, *args):
        try:
            fn(*args)
            return self.ok(False, what, "it succeeded")
        except OSError as e:
            return self.ok(e.errno in codes, what, "gave %s" % errno.errorcode.get(e.errno, e.errno))

    def at(self, snapshot, *rel):
        """A path in a snapshot, relative to the directory of the case."""
        return os.path.join(self.mnt, ".snapshots", snapshot, "live", *rel)

    def snap(self, name=None):
        self.count += 1
        name = name or "s%d" % self.count
        os.mkdir(os.path.join(self.mnt, ".snapshots", name))
        return name

    def drop(self, name):
        end = time.time() + 10
        while True:
            try:
                return os.rmdir(os.path.join(self.mnt, ".snapshots", name))
            except OSError as e:
                if e.errno != errno.EBUSY or time.time() > end:
                    raise
                time.sleep(0.01)

    def names(self):
        return sorted(os.listdir(os.path.join(self.mnt, ".snapshots")))

    def umount(self):
        command(self.bin, "umount", self.mnt)

    def mount(self):
        command(self.bin, "mount", "-o", os.environ.get("COWFS_TEST_OPTIONS", ""), self.backing, self.mnt)
        if mount_type(self.mnt) != "fuse.cowfs":
            raise RuntimeError("not mounted after a remount")

    def remount(self):
        self.umount()
        self.mount()

    def done(self):
        signal.alarm(0)
        print("%s %s: %d checks, %d failed, %.1f s" % ("FAIL" if self.failed else "PASS", self.name, self.checks, self.failed, time.time() - self.start), flush=True)
        sys.exit(1 if self.failed else 0)
