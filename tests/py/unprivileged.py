#!/usr/bin/env python3
"""A mount of one who is not root: what it refuses is what the kernel refuses the same user in an ordinary directory, and
snapshots hold although objects cannot be opened by handle and modes shut the daemon out. Run as root it is the control."""
from common import *

c = Case(limit=120)
os.mkdir(c.control)
uid, gid = os.geteuid(), os.getegid()


def touch(p, mode=0o644, data=b"content"):
    with open(p, "wb") as h:
        h.write(data)
    os.chmod(p, mode)


def outcome(fn, d):
    try:
        value = fn(d)
        return "ok", value
    except OSError as e:
        return "error", errno.errorcode.get(e.errno, str(e.errno))


def both(what, fn, setup=None):
    """The same call on the mount and in an ordinary directory."""
    c.count += 1
    answers = []
    for base in (c.work, c.control):
        d = os.path.join(base, "both%d" % c.count)
        os.mkdir(d)
        if setup:
            setup(d)
        answers.append(outcome(fn, d))
    c.equal(answers[1], answers[0], what)
    return answers[0]


FILE = lambda d: touch(d + "/f")
# ---- what is refused, and what is not
if not ROOT:
    for what, fn in (("a device", lambda d: os.mknod(d + "/c", stat.S_IFCHR | 0o600, os.makedev(1, 3))),
                     ("a trusted attribute", lambda d: os.setxattr(d + "/f", "trusted.x", b"1")),
                     ("another owner", lambda d: os.chown(d + "/f", uid + 1 if uid else 12345, -1))):
        kind, why = both(what, fn, FILE)
        c.equal("error", kind, what + " is refused")
both("a FIFO", lambda d: (os.mkfifo(d + "/p"), stat.S_IFMT(os.lstat(d + "/p").st_mode))[1])
both("a socket", lambda d: (os.mknod(d + "/s", stat.S_IFSOCK | 0o600), stat.S_IFMT(os.lstat(d + "/s").st_mode))[1])
both("a user attribute", lambda d: (os.setxattr(d + "/f", "user.x", b"1"), os.getxattr(d + "/f", "user.x"))[1], FILE)
both("the same owner", lambda d: os.chown(d + "/f", uid, gid), FILE)
both("setuid and setgid", lambda d: (os.chmod(d + "/f", 0o6755), os.lstat(d + "/f").st_mode)[1], FILE)
both("owner of a new file", lambda d: (touch(d + "/n"), owner(d + "/n"))[1])
both("umask", lambda d: (os.close(os.open(d + "/n", os.O_CREAT, 0o666)), os.lstat(d + "/n").st_mode)[1])
both("a link", lambda d: (os.link(d + "/f", d + "/g"), os.lstat(d + "/g").st_nlink)[1], FILE)
both("a link to a symlink", lambda d: (os.symlink("x", d + "/l"), os.link(d + "/l", d + "/m", follow_symlinks=False),
                                       os.readlink(d + "/m"))[2])


def write_only(d):
    touch(d + "/f", 0o200)
    fd = os.open(d + "/f", os.O_WRONLY)
    os.pwrite(fd, b"CON", 0)
    os.close(fd)
    os.chmod(d + "/f", 0o600)
    return open(d + "/f", "rb").read()


both("a file that may only be written to", write_only)
both("reading what one shut oneself out of", lambda d: open(d + "/f", "rb").read(), lambda d: touch(d + "/f", 0))
both("truncation of what may only be written to",
     lambda d: (os.truncate(d + "/f", 2), os.lstat(d + "/f").st_size)[1], lambda d: touch(d + "/f", 0o200))

# ---- what a snapshot shows, whatever its user does to modes
w = os.path.join(c.work, "tree")
os.makedirs(w + "/d/e/f")
os.makedirs(w + "/shut")
os.chmod(w + "/shut", 0o555)
for k in range(20):
    touch(w + "/d/e/file%d" % k, data=b"%d" % k * 3000)
touch(w + "/big", data=os.urandom(3 << 20))
with open(w + "/sparse", "wb") as h:
    h.truncate(5 << 20)
    h.seek(4 << 20)
    h.write(b"data")
os.symlink("d/e/file1", w + "/l")
os.link(w + "/d/e/file2", w + "/other")
manifest(w)  # reads once, so that no access time is due for an update
want = manifest(w)
os.utime(w + "/l", (1000, 1000), follow_symlinks=False)
for t in ("atime", "mtime", "ctime"):
    want[b"l"][t] = (getattr(statx(w + "/l"), t).sec, getattr(statx(w + "/l"), t).nsec)
s = c.snap()
at = lambda: manifest(c.at(s, "tree"))
c.same(want, at(), "a snapshot")
os.readlink(w + "/l")
os.chmod(w + "/big", 0)
os.chmod(w + "/sparse", 0o200)
os.chmod(w + "/d/e/file3", 0o000)
os.chmod(w + "/d/e/file4", 0o200)
c.same(want, at(), "after reading was forbidden")
os.rename(w + "/d/e", w + "/moved")
os.unlink(w + "/moved/file2")
os.rmdir(w + "/shut")
os.rename(w + "/moved/file5", w + "/moved/file6")
os.chmod(w + "/moved/file7", 0o200)
if not ROOT:
    # what may only be written to and was not kept before it could not be read: refused, and nothing is spoilt
    t = c.snap()
    fd = os.open(w + "/moved/file7", os.O_WRONLY)
    try:
        os.pwrite(fd, b"changed", 0)
    except OSError as e:
        c.equal(errno.EACCES, e.errno, "a change whose old value cannot be read")
    os.close(fd)
    c.drop(t)
c.same(want, at(), "after moves and removals")
c.remount()
c.same(want, at(), "after a remount")
os.makedirs(w + "/d/e/new")
os.rename(w + "/moved", w + "/d/e/new/deeper")
os.chmod(w + "/d/e/new/deeper/file8", 0o600)
touch(w + "/d/e/new/deeper/file9", data=b"changed")
shutil.rmtree(w + "/d/e/new")
c.same(want, at(), "after more of it")
c.remount()
c.same(want, at(), "after another remount")
c.equal(1, os.lstat(w + "/other").st_nlink, "links of what has one name left")
c.equal(b"2" * 3000, open(w + "/other", "rb").read(), "what has one name left")
c.drop(s)
c.done()
