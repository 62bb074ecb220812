#!/usr/bin/env python3
"""A snapshot mounted by itself: the numbers of the live tree, the content of the cut, nothing to be changed."""
from common import *

c = Case(limit=200)
one, two = (os.path.join(os.path.dirname(c.mnt), n) for n in ("one", "two"))
os.mkdir(one)
os.mkdir(two)


def mount(name, at, *options, source=None):
    command(c.bin, "mount", "-o", ",".join(("snapshot=" + name,) + options), source or c.backing, at)
    c.equal("fuse.cowfs", mount_type(at), "%s is mounted at %s" % (name, at))


def umount(at):
    command(c.bin, "umount", at)
    c.ok(not os.path.ismount(at), "%s is unmounted" % at)


def numbers(root):
    """{path: (st_ino, links)} of everything, the root included; d_ino is checked against st_ino on the way."""
    out = {".": (os.lstat(root).st_ino, os.lstat(root).st_nlink)}
    for p, dirs, files in os.walk(root):
        for e in os.scandir(p):
            s = os.lstat(e.path)
            out[os.path.relpath(e.path, root)] = (s.st_ino, s.st_nlink)
            if e.inode() != s.st_ino:
                c.ok(False, "d_ino of %s" % e.path, "is %d, st_ino %d" % (e.inode(), s.st_ino))
    return out


def order(root):
    return [(p[len(root):], [e.name for e in os.scandir(p)]) for p, _, _ in os.walk(root)]


def fill(path, seed, size):
    with open(path, "wb") as f:
        f.write(random.Random(seed).randbytes(size))


# ---- a tree with everything
w = c.work
for k in range(4):
    os.makedirs(w + "/d%d/deep/er" % k)
    for j in range(60):
        fill(w + "/d%d/f%d" % (k, j), k * 100 + j, (k * 7919 + j * 3001) % 300000)
os.link(w + "/d0/f1", w + "/d1/hard")
os.link(w + "/d0/f1", w + "/d2/deep/hard too")
os.symlink("f1", w + "/d0/link")
os.symlink("nowhere" * 20, w + "/dangling")
os.mkfifo(w + "/fifo", 0o640)
os.mknod(w + "/null", 0o644 | stat.S_IFCHR, os.makedev(1, 3))
os.mknod(w + "/block", 0o600 | stat.S_IFBLK, os.makedev(7, 300))
open(w + "/empty", "w").close()
with open(w + "/holes", "wb") as f:
    for at in (0, 3 << 20, 9 << 20):
        f.seek(at)
        f.write(b"data" * 3000)
    f.truncate(20 << 20)
os.setxattr(w + "/d0/f2", "user.note", b"of the cut")
os.setxattr(w + "/d1", "trusted.note", b"for root")
os.setxattr(w + "/d0/f3", ACL_ACCESS, acl((1, 6, -1), (2, 4, NOBODY), (4, 0, -1), (16, 4, -1), (32, 0, -1)))
os.setxattr(w + "/d2", ACL_DEFAULT, acl((1, 7, -1), (4, 5, -1), (32, 0, -1)))
fill(w + "/secret", 1, 5000)
os.chmod(w + "/secret", 0o600)
os.chmod(w + "/d3", 0o2751)
os.chown(w + "/d0/f4", 1234, 4321)
os.chmod(w + "/d0/f4", 0o4755)
set_times(w + "/d0/f5", (-12345, 987654321), (1 << 33, 123456789))
big = w + "/many"
os.mkdir(big)
for k in range(1500):
    open(big + "/entry number %05d of a directory with several requests' worth" % k, "w").close()

live = numbers(c.mnt)
c.equal(os.lstat(c.backing).st_ino, live["."][0], "the root of the live mount shows the number of the backing directory")
a = c.snap("a")
want = manifest(os.path.join(c.mnt, ".snapshots", a))


def check(at, numbers_then, content, listing, when):
    c.equal(numbers_then, numbers(at), "%s: the numbers of the live tree at the cut" % when)
    c.same(content, manifest(at), "%s: the content of the cut" % when)
    c.equal(listing, order(at), "%s: the order of listings" % when)


mount(a, one)
listing = order(one)
c.equal([p for p, _ in listing], [p for p, _ in order(os.path.join(c.mnt, ".snapshots", a))], "listed as in .snapshots")
check(one, live, want, listing, "at first")
c.ok(not os.path.lexists(one + "/.snapshots"), "there is no .snapshots in it")
c.ok(not os.path.lexists(one + "/live/d0/.snapshots"), "nor in a directory of it")
c.ok(not os.path.lexists(one + "/.cowfs"), "nor the store")
c.equal(os.statvfs(c.mnt)[:3], os.statvfs(one)[:3], "statfs is that of the live mount")
c.equal([(0, 12288), (3 << 20, (3 << 20) + 12288), (9 << 20, (9 << 20) + 12288)],
        [(x, y) for x, y in holes(one + "/live/holes")], "data and holes")

# ---- the live tree changes in every way
for k in range(0, 60, 2):
    fill(w + "/d0/f%d" % k, "new", 1000 + k)
for k in range(1, 60, 4):
    with open(w + "/d1/f%d" % k, "r+b") as f:
        f.write(b"same size, other bytes")
for k in range(3, 60, 4):
    os.unlink(w + "/d1/f%d" % k)
for k in range(0, 60, 5):
    os.truncate(w + "/d2/f%d" % k, 10)
os.rename(w + "/d3", w + "/d2/moved")
renameat2(w + "/d0", w + "/d1", EXCHANGE)
shutil.rmtree(w + "/d2/deep")
shutil.rmtree(big)
os.chmod(w + "/secret", 0o666)
os.removexattr(w + "/d1/f2", "user.note")
os.setxattr(w + "/d1/f5", "user.new", b"1")
os.unlink(w + "/dangling")
os.symlink("elsewhere", w + "/dangling")
os.unlink(w + "/fifo")
os.mkdir(w + "/fifo")
os.rename(w + "/empty", w + "/null")
fd = os.open(w + "/holes", os.O_RDWR)
fallocate(fd, PUNCH | KEEP_SIZE, 0, 8192)
os.pwrite(fd, b"x" * 100000, 5 << 20)
os.close(fd)
for k in range(200):  # new objects, which want numbers
    fill(w + "/new%d" % k, k, 100)
check(one, live, want, listing, "after changes of every kind")
command("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
check(one, live, want, listing, "read anew")

# ---- a second one beside it
live_b = numbers(c.mnt)
b = c.snap("b")
want_b = manifest(os.path.join(c.mnt, ".snapshots", b))
mount(b, two, "noatime,nosuid", source=w)
listing_b = order(two)
check(two, live_b, want_b, listing_b, "the second")
check(one, live, want, listing, "the first beside the second")
moved = {p for p in set(live) & set(live_b) if live[p] != live_b[p]}
c.ok(moved and live["live/d3"][0] == live_b["live/d2/moved"][0], "numbers follow objects, not paths")
shutil.rmtree(w)
os.mkdir(w)
check(one, live, want, listing, "the first, all removed")
check(two, live_b, want_b, listing_b, "the second, all removed")

# ---- the same after everything was mounted anew, and one path for two snapshots in turn
umount(one)
umount(two)
c.remount()
mount(b, one)
check(one, live_b, want_b, listing_b, "after a remount, at the other's place")
umount(one)
mount(a, one)
check(one, live, want, listing, "after a remount")

# ---- nothing can be changed, also when the kernel lets changes through
ro = (errno.EROFS,)


def changes(p, when):
    f = p + "/live/d0/f1"
    for what, fn, args in (
            ("write", os.open, (f, os.O_WRONLY)), ("read and write", os.open, (f, os.O_RDWR)),
            ("create", os.open, (p + "/new", os.O_CREAT | os.O_RDONLY)), ("truncate", os.truncate, (f, 3)),
            ("O_TRUNC", os.open, (f, os.O_RDONLY | os.O_TRUNC)), ("chmod", os.chmod, (f, 0o600)),
            ("chown", os.chown, (f, 1, 1)), ("utime", os.utime, (f, (1, 1))), ("unlink", os.unlink, (f,)),
            ("rmdir", os.rmdir, (p + "/live/d0/deep/er",)), ("mkdir", os.mkdir, (p + "/dir",)),
            ("mknod", os.mknod, (p + "/node", 0o600 | stat.S_IFIFO)), ("symlink", os.symlink, ("x", p + "/sl")),
            ("link", os.link, (f, p + "/hl")), ("rename", os.rename, (f, p + "/moved")),
            ("setxattr", os.setxattr, (f, "user.x", b"1")), ("removexattr", os.removexattr, (p + "/live/d0/f2", "user.note"))):
        c.refused("%s: %s" % (when, what), ro, fn, *args)


changes(one, "read-only")
command("mount", "-i", "-o", "remount,rw", one)
changes(one, "remounted rw")
check(one, live, want, listing, "after all that")
c.equal("no", "no" if as_user(NOBODY, os.open, one + "/live/secret", os.O_RDONLY)[0] == "error" else "yes",
        "what a user could not read at the cut stays closed")
c.equal("ok", as_user(NOBODY, os.path.getsize, one + "/live/d0/f1")[0], "other users are let in")
c.equal("ok", as_user(NOBODY, lambda: open(one + "/live/d0/f3", "rb").read(1) and 1)[0], "by an ACL too")
umount(one)
mount(a, one, "no_allow_other")
c.equal("error", as_user(NOBODY, os.path.getsize, one + "/live")[0], "or not, if told so")
umount(one)

# ---- copying out of it
os.mkdir(c.mnt + "/copy")
mount(a, one)
command("cp", "-a", one + "/live/d0", c.mnt + "/copy/")
c.same({k: v for k, v in manifest(one + "/live/d0", layout=False).items()}, manifest(c.mnt + "/copy/d0", layout=False),
       "cp -a into the live tree", ignore=("ctime", "blocks", "links", "same as", "size", "atime"))
umount(one)
c.drop(a)
c.drop(b)
c.done()
