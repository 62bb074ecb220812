#!/usr/bin/env python3
"""A snapshot equals a frozen copy in everything that can be seen, and stays so whatever happens to the objects afterwards.

The reference is the backing directory itself, read through a bind mount that sets no access times, at a moment when nobody
writes. Then every object is changed in every way, with a snapshot between the ways; at each stage, after a remount, and after
the deletion of snapshots before and after, every snapshot must still equal its reference.
"""
from common import *

c = Case(limit=200)
R = c.random
PREALLOCATED = b"prealloc"  # SEEK_DATA of unwritten extents depends on what the page cache holds: only content and size count

# the reference view
ref = os.path.join(os.path.dirname(c.mnt), "reference")
os.mkdir(ref)
command("mount", "--bind", c.backing, ref)
command("mount", "-o", "remount,bind,noatime", ref)


def frozen():
    """The backing directory as it is. Blocks are assigned to fresh writes late: sync first."""
    sync(c.backing)
    return manifest(os.path.join(ref, "work"), visible_links=True)


def relax(m):
    for p, e in m.items():
        if PREALLOCATED in p:
            e.pop("data", None)
    return m


def shown(name):
    return relax(manifest(c.at(name)))


TIMES = [((0, 0), (0, 0)), ((1, 1), (1, 999999999)), ((-1, 500000000), (-1, 1)), ((-86400 * 365, 7), (-86400 * 3650, 123456789)),
         ((1 << 31, 5), ((1 << 31) + 5, 250000000)), ((1 << 32, 0), (5_000_000_000, 17))]
NAMES = [b"plain", b"with space", b"new\nline", b"back\\slash", b"\xff\xfe not utf-8", "umlaut-\u00e4".encode(), b"-rf", b"*", b"x" * 255, b"...", b"tab\t"]


def fill(path, n):
    with open(path, "wb") as f:
        f.write(R.randbytes(n))


def build(d):
    """Every kind of object."""
    D = os.fsencode(d)
    for k in range(4):
        os.mkdir(d + "/dir%d" % k)
    os.mkdir(d + "/dir0/sub")
    os.mkdir(d + "/empty")
    for n in NAMES:
        with open(D + b"/dir0/" + n, "wb") as f:
            f.write(n)
    for n in (0, 1, 4095, 4096, 4097, 65536, 1 << 20, 3_000_001):
        fill(d + "/size-%d" % n, n)
    for k, (a, m) in enumerate(TIMES):
        fill(d + "/time-%d" % k, 10)
        os.symlink("t", d + "/timelink-%d" % k)
        os.mkdir(d + "/timedir-%d" % k)
    with open(d + "/hole-start", "wb") as f:
        f.seek(1 << 20)
        f.write(b"end" * 3000)
    with open(d + "/hole-middle", "wb") as f:
        f.write(b"a" * 8192)
        f.seek(256 << 10)
        f.write(b"b" * 8192)
    with open(d + "/hole-end", "wb") as f:
        f.write(b"data" * 5000)
        f.truncate(700_001)
    with open(d + "/hole-only", "wb") as f:
        f.truncate((32 << 20) + 11)
    with open(d + "/huge", "wb") as f:
        f.seek((4 << 30) + 5)
        f.write(R.randbytes(10_000))
        f.truncate((9 << 30) + 1)
    with open(d + "/hole-many", "wb") as f:
        for k in range(0, 600, 3):
            f.seek(k * 4096)
            f.write(R.randbytes(4096))
    with open(d + "/prealloc", "wb") as f:
        f.write(b"z" * 10000)
        fallocate(f.fileno(), KEEP_SIZE, 0, 1 << 20)
    for k in range(5):
        os.link(d + "/size-65536", d + "/dir%d/hard-%d" % (k % 4, k))
    os.symlink("size-4096", d + "/link")
    os.symlink(b"\xffodd \n target", D + b"/link-odd")
    os.symlink("y" * 3000, d + "/link-long")
    os.symlink("../nowhere", d + "/dir1/dangling")
    os.link(d + "/link", d + "/dir1/hardlink-to-symlink", follow_symlinks=False)
    os.mkfifo(d + "/fifo", 0o640)
    os.mknod(d + "/sock", stat.S_IFSOCK | 0o755)
    os.mknod(d + "/char", stat.S_IFCHR | 0o620, os.makedev(1, 3))
    os.mknod(d + "/block", stat.S_IFBLK | 0o660, os.makedev(7, 300))
    os.link(d + "/fifo", d + "/dir2/fifo-too")
    for k, mode in enumerate((0o000, 0o400, 0o644, 0o755, 0o4755, 0o2755, 0o1777, 0o7777, 0o2640)):
        fill(d + "/mode-%d" % k, 100)
        os.chown(d + "/mode-%d" % k, 1000 + k, 2000 + k)
        os.chmod(d + "/mode-%d" % k, mode)
    os.chmod(d + "/dir2", 0o2775)
    os.chmod(d + "/dir3", 0o1777)
    os.chown(d + "/dir3", 4_000_000_000, 3_999_999_999)
    os.lchown(d + "/link", 77, 78)
    for n in ("user.small", "trusted.t", "security.s"):
        os.setxattr(d + "/size-4096", n, n.encode())
    os.setxattr(d + "/size-4096", "user.empty", b"")
    os.setxattr(d + "/size-4096", "user.binary", bytes(range(256)))
    os.setxattr(d + "/size-4097", "user.big", R.randbytes(3000))
    os.setxattr(d + "/dir1", "user.dir", b"on a directory")
    os.setxattr(d + "/dir1", "trusted.dir", b"t")
    os.setxattr(d + "/link", "trusted.link", b"on a symlink", follow_symlinks=False)
    os.setxattr(d + "/fifo", "trusted.fifo", b"on a fifo")
    fill(d + "/capable", 5000)
    os.chmod(d + "/capable", 0o755)
    os.setxattr(d + "/capable", "security.capability", NET_RAW)
    fill(d + "/acl", 100)
    os.setxattr(d + "/acl", ACL_ACCESS, acl((1, 6, -1), (2, 4, 1234), (4, 4, -1), (8, 5, 4321), (16, 5, -1), (32, 0, -1)))
    os.setxattr(d + "/dir2", ACL_DEFAULT, acl((1, 7, -1), (2, 5, 1234), (4, 5, -1), (16, 5, -1), (32, 1, -1)))
    fill(d + "/dir2/inherits", 10)
    os.mkdir(d + "/dir2/inherits-too")
    for k in range(300):
        open(d + "/dir3/entry-%03d" % k, "w").close()
    for k, (a, m) in enumerate(TIMES):
        for n in ("time-", "timelink-", "timedir-"):
            set_times(d + "/%s%d" % (n, k), a, m)


def everything(d, kind=None):
    out = []
    for p, dirs, files in os.walk(os.fsencode(d)):
        out += [os.path.join(p, n) for n in files + dirs]
    return [p for p in out if kind is None or stat.S_IFMT(os.lstat(p).st_mode) == kind]


def change_data(d):
    for p in everything(d, stat.S_IFREG):
        size = os.lstat(p).st_size
        mode = os.lstat(p).st_mode & 0o7777
        with open(p, "r+b") as f:
            f.write(b"HEAD")
            f.seek(size // 2)
            f.write(R.randbytes(5000))
            f.seek(size)
            f.write(b"TAIL")
    with open(d + "/hole-only", "r+b") as f:
        f.seek(20 << 20)
        f.write(b"deep in the hole")
        f.truncate(1 << 20)
    with open(d + "/huge", "r+b") as f:
        f.seek((4 << 30) - 4096)
        f.write(R.randbytes(20_000))
        f.seek(8 << 30)
        f.write(b"in the hole behind")
        f.truncate((4 << 30) + 8192)
    with open(d + "/hole-many", "r+b") as f:
        fallocate(f.fileno(), PUNCH | KEEP_SIZE, 4096 * 30, 4096 * 100)
        f.seek(4096 * 301)
        f.write(R.randbytes(4096 * 3))
    with open(d + "/size-1048576", "r+b") as f:
        fallocate(f.fileno(), PUNCH | KEEP_SIZE, 100_000, 300_000)
        fallocate(f.fileno(), ZERO, 600_000, 5000)
        f.truncate(900_000)
        f.truncate(1_300_000)
    os.truncate(d + "/size-3000001", 0)
    with open(d + "/size-3000001", "r+b") as f:
        f.seek(2_000_000)
        f.write(b"beyond")


def change_attributes(d):
    for k, p in enumerate(everything(d)):
        s = os.lstat(p)
        if not stat.S_ISLNK(s.st_mode):
            os.chmod(p, (s.st_mode & 0o7777) ^ 0o021)
        os.lchown(p, 5000 + k, 6000 + k)
        try:
            os.setxattr(p, "trusted.changed", b"%d" % k, follow_symlinks=False)
            for n in os.listxattr(p, follow_symlinks=False):
                if n.startswith(("user.", "security.")):
                    if k % 2:
                        os.setxattr(p, n, b"changed", follow_symlinks=False) if n != "security.capability" else None
                    else:
                        os.removexattr(p, n, follow_symlinks=False)
        except OSError as e:
            if e.errno not in (errno.EPERM, errno.ENOTSUP):
                raise
        set_times(p, (k, k), (-k, k))
    os.setxattr(d + "/acl", ACL_ACCESS, acl((1, 7, -1), (4, 7, -1), (16, 7, -1), (32, 7, -1)))
    os.removexattr(d + "/dir2", ACL_DEFAULT)


def change_names(d):
    D = os.fsencode(d)
    for k, p in enumerate(everything(d)):
        if not os.path.lexists(p):
            continue
        s, b = os.lstat(p), os.path.basename(p)
        if stat.S_ISDIR(s.st_mode):
            if k % 2:
                os.rename(p, p[:-1] + b"~" if len(b) > 200 else p + b"~")
        elif k % 5 == 0:
            os.unlink(p)
        elif k % 5 == 1:
            os.unlink(p)
            os.mkdir(p)
        elif k % 5 == 2:
            os.rename(p, D + b"/moved-%d" % k)
        elif k % 5 == 3:
            q = D + b"/over-%d" % k
            open(q, "w").close()
            os.rename(q, p)
        elif not stat.S_ISDIR(s.st_mode):
            os.link(p, D + b"/another-%d" % k, follow_symlinks=False)
    left = [p for p in everything(d, stat.S_IFREG)][:20]
    for a, b in zip(left[::2], left[1::2]):
        renameat2(a, b, EXCHANGE)


def remove_all(d):
    for n in os.listdir(d):
        p = os.path.join(d, n)
        shutil.rmtree(p) if os.path.isdir(p) and not os.path.islink(p) else os.unlink(p)


def rebuild(d):
    build(d)


kept = {}


def cut(label):
    want = relax(frozen())
    name = c.snap(label)
    kept[name] = want
    # the live tree of the mount is the backing directory
    live = relax(manifest(c.work))
    c.same(want, live, "%s: the live tree equals the backing directory" % label, ignore=("blocks", "atime"))


def verify(when):
    for name, want in kept.items():
        c.same(want, shown(name), "%s: snapshot %s equals its frozen copy" % (when, name))


build(c.work)
c.remount()  # so that nothing is answered from what the kernel remembers of the making
cut("built")
verify("at once")
for stage in (change_data, change_attributes, change_names, remove_all, rebuild, change_data, change_names):
    stage(c.work)
    verify("after " + stage.__name__)
    cut("%s-%d" % (stage.__name__, len(kept)))
verify("with all snapshots")
for name in kept:
    a, b = manifest(c.at(name)), manifest(c.at(name))
    c.same(a, b, "reading snapshot %s changes nothing in it" % name)
c.remount()
verify("after a remount")
order = {n: os.listdir(c.at(n, "dir3")) for n in kept if os.path.isdir(c.at(n, "dir3"))}
c.remount()
for n, names in order.items():
    c.equal(names, os.listdir(c.at(n, "dir3")), "the order of a directory in %s is the same after a remount" % n)
# snapshots before and after others go, in an order of no pattern
left = list(kept)
R.shuffle(left)
for name in left[:-1]:
    c.drop(name)
    del kept[name]
    verify("after deleting %s" % name)
c.remount()
verify("the last one, after a remount")
command("umount", ref)
os.rmdir(ref)
c.done()
