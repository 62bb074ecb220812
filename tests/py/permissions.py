#!/usr/bin/env python3
"""Owners, modes, ACLs and other users: the mount does what the backing filesystem does, and a snapshot keeps the rules of its cut.

Each operation runs twice, in the mount and in an ordinary directory of the backing filesystem; outcome and resulting modes,
owners and attributes must be the same.
"""
from common import *
import mmap

c = Case(limit=90)
os.mkdir(c.control)
os.chmod(c.work, 0o755)
A, B = 1001, 1002


def facts(d):
    out = {}
    for p, dirs, files in os.walk(d):
        for n in [""] + files:
            q = os.path.join(p, n) if n else p
            s = os.lstat(q)
            x = {}
            for k, v in xattrs(q).items():
                x[k] = v
            out[os.path.relpath(q, d)] = (oct(s.st_mode), s.st_uid, s.st_gid, s.st_nlink if n else 0, x)
    return out


def both(what, fn, user=0, setup=None, **kw):
    """Runs setup (as root) and fn (as the user) in a fresh directory of each; compares."""
    got = []
    for base in (c.control, c.work):
        d = os.path.join(base, "case")
        shutil.rmtree(d, ignore_errors=True)
        os.mkdir(d)
        os.chmod(d, 0o777)
        if setup:
            setup(d)
        r = as_user(user, fn, d, **kw)
        got.append((r, facts(d)))
    c.equal(got[0][0], got[1][0], "%s: outcome" % what)
    c.equal(got[0][1], got[1][1], "%s: modes, owners, attributes" % what)


def touch(p, mode=0o644, uid=0, gid=0, text="some content"):
    with open(p, "w") as f:
        f.write(text)
    os.chown(p, uid, gid)
    os.chmod(p, mode)


def create(d):
    open(d + "/f", "w").close()
    os.mkdir(d + "/d")
    os.symlink("x", d + "/l")
    os.mkfifo(d + "/p")
    return owner(d + "/f"), owner(d + "/d"), owner(d + "/l"), owner(d + "/p")


both("create as a user", create, A)
for umask in (0o000, 0o027, 0o077):
    both("create with umask %o" % umask, create, A, umask=umask)
both("create in a directory with setgid", create, A, setup=lambda d: (os.chown(d, 5, 77), os.chmod(d, 0o2777)))
both("create with a default ACL", create, A, umask=0o022,
     setup=lambda d: os.setxattr(d, ACL_DEFAULT, acl((1, 7, -1), (2, 6, B), (4, 5, -1), (16, 7, -1), (32, 0, -1))))
both("device node as a user", lambda d: os.mknod(d + "/c", stat.S_IFCHR | 0o600, os.makedev(1, 3)), A)
both("open mode 0200 create, read back", lambda d: os.write(os.open(d + "/f", os.O_CREAT | os.O_RDWR, 0o000), b"x"), A)

for mode in (0o600, 0o640, 0o644, 0o666, 0o000):
    for who in (A, B, NOBODY):
        both("read %o as %d" % (mode, who), lambda d: open(d + "/f").read(), who, setup=lambda d: touch(d + "/f", mode, A, B))
        both("write %o as %d" % (mode, who), lambda d: open(d + "/f", "r+").write("x"), who, setup=lambda d: touch(d + "/f", mode, A, B))
        both("access %o as %d" % (mode, who), lambda d: [os.access(d + "/f", m) for m in (4, 2, 1)], who, setup=lambda d: touch(d + "/f", mode, A, B))
both("group of the process", lambda d: open(d + "/f").read(), NOBODY, groups=(5000,), setup=lambda d: touch(d + "/f", 0o640, A, 5000))
both("closed directory", lambda d: os.stat(d + "/x/f"), A, setup=lambda d: (os.mkdir(d + "/x", 0o700), touch(d + "/x/f")))
both("directory that may be entered only", lambda d: os.listdir(d + "/x"), A, setup=lambda d: (os.mkdir(d + "/x", 0o711), touch(d + "/x/f")))
both("sticky: another's file", lambda d: os.unlink(d + "/f"), A, setup=lambda d: (os.chmod(d, 0o1777), touch(d + "/f", 0o666, B, B)))
both("sticky: rename of another's file", lambda d: os.rename(d + "/f", d + "/g"), A, setup=lambda d: (os.chmod(d, 0o1777), touch(d + "/f", 0o666, B, B)))
both("sticky: one's own", lambda d: os.unlink(d + "/f"), A, setup=lambda d: (os.chmod(d, 0o1777), touch(d + "/f", 0o666, A, A)))
both("chmod of another's", lambda d: os.chmod(d + "/f", 0o777), A, setup=lambda d: touch(d + "/f", 0o666, B, B))
both("chmod of one's own, setgid of a strange group", lambda d: os.chmod(d + "/f", 0o2755), A, setup=lambda d: touch(d + "/f", 0o666, A, B))
both("chown to another", lambda d: os.chown(d + "/f", B, -1), A, setup=lambda d: touch(d + "/f", 0o666, A, A))
both("chgrp to one's own group", lambda d: os.chown(d + "/f", -1, 5000), A, groups=(5000,), setup=lambda d: touch(d + "/f", 0o6755, A, A))
both("utime to now with write permission", lambda d: os.utime(d + "/f"), A, setup=lambda d: touch(d + "/f", 0o666, B, B))
both("utime to a time without ownership", lambda d: os.utime(d + "/f", (1, 1)), A, setup=lambda d: touch(d + "/f", 0o666, B, B))
both("xattr without permission", lambda d: os.setxattr(d + "/f", "user.x", b"1"), A, setup=lambda d: touch(d + "/f", 0o644, B, B))
both("xattr with permission", lambda d: os.setxattr(d + "/f", "user.x", b"1"), A, setup=lambda d: touch(d + "/f", 0o646, B, B))
both("trusted xattr as a user", lambda d: os.setxattr(d + "/f", "trusted.x", b"1"), A, setup=lambda d: touch(d + "/f", 0o644, A, A))
both("xattr create that exists", lambda d: os.setxattr(d + "/f", "user.x", b"2", os.XATTR_CREATE), 0, setup=lambda d: (touch(d + "/f"), os.setxattr(d + "/f", "user.x", b"1")))
both("xattr replace that does not exist", lambda d: os.setxattr(d + "/f", "user.x", b"2", os.XATTR_REPLACE), 0, setup=lambda d: touch(d + "/f"))
both("xattr remove that does not exist", lambda d: os.removexattr(d + "/f", "user.x"), 0, setup=lambda d: touch(d + "/f"))
both("xattr get that does not exist", lambda d: os.getxattr(d + "/f", "user.x"), 0, setup=lambda d: touch(d + "/f"))

# setuid, setgid and capabilities go when they must
SUID = lambda d: (touch(d + "/f", 0o6755, A, A), os.chmod(d + "/f", 0o6777))
for who in (0, A, B):
    both("write to a setuid file as %d" % who, lambda d: open(d + "/f", "r+").write("x"), who, setup=SUID)
    both("write alone to a setuid file as %d" % who, lambda d: os.write(os.open(d + "/f", os.O_WRONLY), b"x"), who, setup=SUID)
    both("truncate of a setuid file as %d" % who, lambda d: os.truncate(d + "/f", 1), who, setup=SUID)
    both("O_TRUNC of a setuid file as %d" % who, lambda d: os.close(os.open(d + "/f", os.O_WRONLY | os.O_TRUNC)), who, setup=SUID)
    both("fallocate on a setuid file as %d" % who, lambda d: fallocate(os.open(d + "/f", os.O_RDWR), 0, 0, 8192), who, setup=SUID)
def rewrite(flags):
    def fn(d):
        fd = os.open(d + "/f", flags)
        page = mmap.mmap(-1, 4096)
        before = mode_alone(d + "/f")
        os.pwrite(fd, page, 0)
        return before, mode_alone(d + "/f")
    return fn


def within(d):
    fd = os.open(d + "/f", os.O_RDWR)
    before = mode_alone(d + "/f")
    os.copy_file_range(fd, fd, 100, 0, 200)
    return before, mode_alone(d + "/f")


# A setgid bit without permission for the group to execute stays when the caller is of the group, and goes otherwise.
for mode in (0o2666, 0o6666, 0o6766, 0o2676, 0o6676, 0o6777):
    for who, groups in ((0, ()), (A, ()), (B, ()), (B, (A,))):
        setup = lambda d: (touch(d + "/f", mode, A, A, "x" * 8192), os.chmod(d + "/f", mode))
        for what, fn in (("write", rewrite(os.O_RDWR)), ("write alone", rewrite(os.O_WRONLY)), ("direct write", rewrite(os.O_RDWR | os.O_DIRECT)), ("copy_file_range", within),
                         ("truncate", lambda d: (os.truncate(d + "/f", 1), mode_alone(d + "/f"))),
                         ("fallocate", lambda d: (fallocate(os.open(d + "/f", os.O_RDWR), 0, 0, 65536), mode_alone(d + "/f")))):
            both("%s of mode %o as %d with groups %r" % (what, mode, who, groups), fn, who, groups=groups, setup=setup)
# Root's group is no better than another, and the daemon is in it.
for mode in (0o2666, 0o6666):
    for what, fn in (("write", rewrite(os.O_RDWR)), ("truncate", lambda d: (os.truncate(d + "/f", 1), mode_alone(d + "/f"))),
                     ("fallocate", lambda d: (fallocate(os.open(d + "/f", os.O_RDWR), 0, 0, 65536), mode_alone(d + "/f"))),
                     ("O_TRUNC", lambda d: (os.open(d + "/f", os.O_WRONLY | os.O_TRUNC), mode_alone(d + "/f")))):
        both("%s of mode %o of root's group" % (what, mode), fn, A, setup=lambda d: touch(d + "/f", mode, 0, 0, "x" * 8192))
    both("set an ACL on mode %o of root's group" % mode, lambda d: os.setxattr(d + "/f", ACL_ACCESS, acl((1, 7, -1), (4, 7, -1), (32, 7, -1))), A, setup=lambda d: touch(d + "/f", mode, A, 0))
    # An owner who gives the file another of the owner's groups, and one who does not, in and out of the group that it has.
    for gid in (A, B, 3000):
        for to in ((A, -1), (-1, A), (-1, B), (-1, gid)):
            both("chown of mode %o, group %d, to %r by its owner" % (mode, gid, to), lambda d: (os.chown(d + "/f", *to), mode_alone(d + "/f")), A, groups=(B,), setup=lambda d: touch(d + "/f", mode, A, gid))
both("chown of a setuid file to another", lambda d: os.chown(d + "/f", B, B), 0, setup=SUID)
CAP = lambda d: (touch(d + "/f", 0o777, A, A), os.setxattr(d + "/f", "security.capability", NET_RAW))
for who in (0, A):
    both("write to a file with capabilities as %d" % who, lambda d: open(d + "/f", "r+").write("x"), who, setup=CAP)
    both("write alone to a file with capabilities as %d" % who, lambda d: os.write(os.open(d + "/f", os.O_WRONLY), b"x"), who, setup=CAP)
    both("truncate of a file with capabilities as %d" % who, lambda d: os.truncate(d + "/f", 1), who, setup=CAP)


# What was written before they were given does not take them away when it reaches the disk.
def given_after_write(d):
    fd = os.open(d + "/f", os.O_RDWR)
    os.write(fd, b"program" * 10000)
    os.setxattr(fd, "security.capability", NET_RAW)
    os.fsync(fd)
    os.close(fd)
    return xattrs(d + "/f")


def given_after_store(d):
    fd = os.open(d + "/f", os.O_RDWR)
    os.ftruncate(fd, 8192)
    with mmap.mmap(fd, 8192) as m:
        m[:] = b"y" * 8192
        os.setxattr(d + "/f", "security.capability", NET_RAW)
    os.fsync(fd)
    os.close(fd)
    return xattrs(d + "/f")


both("capabilities after a write", given_after_write, setup=lambda d: touch(d + "/f", 0o755))
both("capabilities after a store", given_after_store, setup=lambda d: touch(d + "/f", 0o755))
both("chown of a file with capabilities", lambda d: os.chown(d + "/f", B, B), 0, setup=CAP)


# Again when they are set on a file that others have written to before, and for one who has it open all the time.
def marked_anew(mode):
    def fn(d):
        seen = []
        fd = os.open(d + "/f", os.O_RDWR)
        for _ in range(2):
            as_user(A, lambda: os.pwrite(fd, b"x", 0))
            seen.append(mode_alone(d + "/f"))
            os.chmod(d + "/f", mode)
            seen.append(mode_alone(d + "/f"))
        as_user(A, lambda: os.ftruncate(fd, 5))
        return seen + [mode_alone(d + "/f")]
    return fn


for mode in (0o4755, 0o2755, 0o6777, 0o2644):
    both("setuid and setgid set between writes, mode %o" % mode, marked_anew(mode), setup=lambda d: touch(d + "/f", 0o666, A, A))

# ACLs
ACL = acl((1, 6, -1), (2, 6, B), (4, 0, -1), (16, 6, -1), (32, 0, -1))
WITH = lambda d: (touch(d + "/f", 0o600, A, A), os.setxattr(d + "/f", ACL_ACCESS, ACL))
for who in (A, B, NOBODY):
    both("read with an ACL as %d" % who, lambda d: open(d + "/f").read(), who, setup=WITH)
    both("set an ACL as %d" % who, lambda d: os.setxattr(d + "/f", ACL_ACCESS, acl((1, 7, -1), (4, 7, -1), (32, 7, -1))), who, setup=WITH)
both("chmod of a file with an ACL", lambda d: os.chmod(d + "/f", 0o640), A, setup=WITH)
both("removal of an ACL", lambda d: os.removexattr(d + "/f", ACL_ACCESS), A, setup=WITH)
both("an ACL that a mode can say", lambda d: os.setxattr(d + "/f", ACL_ACCESS, acl((1, 7, -1), (4, 5, -1), (32, 4, -1))), A, setup=WITH)
both("a wrong ACL", lambda d: os.setxattr(d + "/f", ACL_ACCESS, b"nonsense"), 0, setup=WITH)
both("a default ACL on a file", lambda d: os.setxattr(d + "/f", ACL_DEFAULT, ACL), 0, setup=WITH)
both("the setgid bit and an ACL set by one who is not of the group", lambda d: os.setxattr(d + "/f", ACL_ACCESS, ACL), A, setup=lambda d: (touch(d + "/f", 0o2755, A, B), os.chmod(d + "/f", 0o2755)))

# Snapshots keep the rules of the cut.
shutil.rmtree(os.path.join(c.work, "case"))
d = c.work + "/secrets"
os.mkdir(d)
touch(d + "/private", 0o600, A, A, "private")
touch(d + "/public", 0o644, A, A, "public")
touch(d + "/by-acl", 0o600, 0, 0, "by acl")
os.setxattr(d + "/by-acl", ACL_ACCESS, ACL)
os.mkdir(d + "/closed", 0o700)
touch(d + "/closed/inside", 0o644, 0, 0, "inside")
s = c.snap()
at = c.at(s, "secrets")
os.chmod(d + "/private", 0o644)
os.chmod(d + "/closed", 0o755)
os.chmod(d + "/public", 0o600)
os.removexattr(d + "/by-acl", ACL_ACCESS)
for name, who, want in (("private", A, ("ok", "private")), ("private", B, ("error", "EACCES")), ("public", NOBODY, ("ok", "public")),
                        ("closed/inside", B, ("error", "EACCES")), ("by-acl", B, ("ok", "by acl")), ("by-acl", NOBODY, ("error", "EACCES"))):
    c.equal(want, as_user(who, lambda: open(at + "/" + name).read()), "%s in the snapshot for user %d" % (name, who))
c.equal(("ok", True), as_user(A, lambda: os.access(at + "/private", os.R_OK)), "access(2) in the snapshot for its owner")
c.equal(("ok", False), as_user(B, lambda: os.access(at + "/private", os.R_OK)), "access(2) in the snapshot for another")
for what, fn in (("write", lambda: open(at + "/private", "r+")), ("create", lambda: open(at + "/new", "w")), ("unlink", lambda: os.unlink(at + "/public")),
                 ("chmod", lambda: os.chmod(at + "/private", 0o777)), ("setxattr", lambda: os.setxattr(at + "/private", "user.x", b"")),
                 ("mkdir", lambda: os.mkdir(at + "/d")), ("utime", lambda: os.utime(at + "/private")), ("chown", lambda: os.chown(at + "/private", 0, 0)),
                 ("removexattr", lambda: os.removexattr(at + "/by-acl", ACL_ACCESS)), ("mkfifo", lambda: os.mkfifo(at + "/p"))):
    for who in (0, A):
        r = as_user(who, lambda: fn() and None)
        c.ok(r[0] == "error" and r[1] in (("EROFS",) if who == 0 else ("EROFS", "EACCES", "EPERM")), "%s in a snapshot as %d is refused" % (what, who), r)
r = as_user(B, lambda: os.mkdir(os.path.join(c.mnt, ".snapshots", "by-a-user")))
c.ok(r[0] == "error" and r[1] in ("EACCES", "EPERM"), "another user creates no snapshot", r)
r = as_user(B, lambda: os.rmdir(os.path.join(c.mnt, ".snapshots", s)))
c.ok(r[0] == "error" and r[1] in ("EACCES", "EPERM"), "another user deletes no snapshot", r)
r = as_user(B, lambda: os.rename(os.path.join(c.mnt, ".snapshots", s), os.path.join(c.mnt, ".snapshots", "mine")))
c.ok(r[0] == "error" and r[1] in ("EACCES", "EPERM"), "another user renames no snapshot", r)

# The store is out of reach.
c.ok(".cowfs" not in os.listdir(c.mnt), ".cowfs is not listed")
c.refused("the store by name", {errno.ENOENT, errno.EACCES, errno.EPERM}, os.stat, c.mnt + "/.cowfs")
c.refused("making something of the store's name", {errno.EACCES, errno.EPERM, errno.EEXIST, errno.EINVAL, errno.ENOENT, errno.EROFS, errno.EBUSY}, os.mkdir, c.mnt + "/.cowfs")
c.refused("the store in a snapshot", {errno.ENOENT, errno.EACCES, errno.EPERM}, os.stat, os.path.join(c.mnt, ".snapshots", s, ".cowfs"))
c.refused("renaming onto the store", {errno.EACCES, errno.EPERM, errno.EEXIST, errno.EINVAL, errno.ENOENT, errno.EROFS, errno.EBUSY, errno.ENOTEMPTY}, os.rename, d, c.mnt + "/.cowfs")
os.symlink("../../.cowfs", d + "/way-in")
c.refused("the store through a symlink", {errno.ENOENT, errno.EACCES, errno.EPERM}, os.listdir, d + "/way-in")
c.equal(0o700, os.lstat(os.path.join(c.backing, ".cowfs")).st_mode & 0o7777, "the store is its owner's alone")
os.symlink("/etc/hostname", d + "/absolute")
s = c.snap()
c.equal("/etc/hostname", os.readlink(c.at(s, "secrets/absolute")), "an absolute symlink stays as it is")
shutil.rmtree(c.control)
c.done()
