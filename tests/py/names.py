#!/usr/bin/env python3
"""Operations on names under snapshots: what each does to the live tree, and that none of it shows in the snapshot before."""
from common import *

c = Case(limit=120)
R = c.random


def tree(root):
    """{path: what it is}, small and exact: kind, content, links, which names are one object."""
    out, same = {}, {}
    root = os.fsencode(root)
    for p, dirs, files in os.walk(root):
        for n in dirs + files:
            q = os.path.join(p, n)
            s = os.lstat(q)
            rel = q[len(root) + 1:]
            if stat.S_ISDIR(s.st_mode):
                out[rel] = ("dir", s.st_mode & 0o7777)
            elif stat.S_ISLNK(s.st_mode):
                out[rel] = ("link", os.readlink(q))
            else:
                out[rel] = ("file", open(q, "rb").read() if stat.S_ISREG(s.st_mode) else s.st_mode, s.st_nlink)
                same.setdefault(s.st_ino, []).append(rel)
    return out, sorted(sorted(v) for v in same.values() if len(v) > 1)


kept = {}


def cut():
    s = c.snap()
    kept[s] = tree(c.at(s))
    c.equal(tree(c.work), kept[s], "snapshot %s is the live tree" % s)
    return s


def verify(when):
    for s, want in kept.items():
        c.equal(want, tree(c.at(s)), "%s: snapshot %s" % (when, s))


def w(rel, text):
    with open(os.path.join(c.work, rel), "w") as f:
        f.write(text)


def p(*rel):
    return os.path.join(c.work, *rel)


def reset():
    for n in os.listdir(c.work):
        q = p(n)
        shutil.rmtree(q) if os.path.isdir(q) and not os.path.islink(q) else os.unlink(q)
    for d in ("a", "a/deep", "a/deep/er", "b", "empty"):
        os.mkdir(p(d))
    w("f", "content of f")
    w("g", "content of g")
    w("a/h", "content of h")
    w("a/deep/er/leaf", "leaf")
    os.symlink("f", p("sl"))
    os.mkfifo(p("fifo"))


def step(name, fn, *after):
    reset()
    cut()
    fn()
    for path, want in after:
        got = open(p(path)).read() if os.path.lexists(p(path)) and os.path.isfile(p(path)) else ("there" if os.path.lexists(p(path)) else None)
        c.equal(want, got, "%s: live %s" % (name, path))
    verify(name)
    while len(kept) > 3:
        s = R.choice(sorted(kept))
        c.drop(s)
        del kept[s]
    verify(name + ", after a deletion")


def reopen_removed():
    fd = os.open(p("f"), os.O_RDWR)
    os.unlink(p("f"))
    c.equal(0, os.fstat(fd).st_nlink, "an open file without a name has no links")
    os.pwrite(fd, b"CHANGED", 0)
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, 9)
    c.equal(b"CHANGED o", os.pread(fd, 100, 0), "an open file without a name is written and read")
    s = cut()
    os.pwrite(fd, b"again", 0)
    os.fsync(fd)
    verify("write to an open removed file")
    os.close(fd)


def recreate():
    for k in range(5):
        os.unlink(p("f"))
        w("f", "generation %d" % k)
        cut()
        verify("recreated")


def replace_dir():
    os.rename(p("b"), p("empty"))
    os.rename(p("a/deep"), p("b"))
    w("b/er/leaf", "changed where it moved")


def whiteout(source, target):
    """What overlayfs moves away leaves a character device 0:0, in the same step."""
    renameat2(p(source), p(target), WHITEOUT)
    s = os.lstat(p(source))
    c.equal((True, 0, os.geteuid()), (stat.S_ISCHR(s.st_mode), s.st_rdev, s.st_uid), "a whiteout stays at %s" % source)
    cut()
    os.chmod(p(source), 0o600)
    os.unlink(p(source))
    w(source, "in place of the whiteout")


def overlay():
    """overlayfs has its upper directory here, and what it does there is in snapshots as anything is."""
    for d in ("lower/d", "upper", "work", "merged"):
        os.makedirs(p("ov", d))
    for n in ("f1", "f2", "f3", "d/g"):
        w("ov/lower/" + n, "lower " + n)
    options = "lowerdir=%s,upperdir=%s,workdir=%s" % (p("ov/lower"), p("ov/upper"), p("ov/work"))
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, p("ov/merged")], check=True, timeout=20)
    try:
        m = lambda n: p("ov/merged", n)
        os.unlink(m("f1"))
        os.rename(m("f2"), m("moved"))
        os.rename(m("f3"), m("d/g"))
        with open(m("d/new"), "w") as f:
            f.write("new")
        s = c.snap()  # not kept: the live tree shows what is mounted in it, too
        os.rename(m("moved"), m("f1"))
        os.unlink(m("d/new"))
        c.equal((["d", "f1"], ["g"]), (sorted(os.listdir(m(""))), sorted(os.listdir(m("d")))), "what overlayfs shows")
        c.equal("lower f3", open(m("d/g")).read(), "what was renamed over what is below")
        upper = os.path.join(c.at(s), "ov/upper")
        devices = [n for n in ("f1", "f2", "f3") if stat.S_ISCHR(os.lstat(os.path.join(upper, n)).st_mode)]
        c.equal(["f1", "f2", "f3"], devices, "whiteouts in the snapshot")
        c.equal("lower f2", open(os.path.join(upper, "moved")).read(), "what was renamed, in the snapshot")
    finally:
        subprocess.run(["umount", "-l", p("ov/merged")], check=True, timeout=20)


def loop_refused():
    c.refused("a directory into itself", {errno.EINVAL}, os.rename, p("a"), p("a/deep/a"))
    c.refused("a directory over a file", {errno.ENOTDIR}, os.rename, p("a"), p("f"))
    c.refused("a file over a directory", {errno.EISDIR}, os.rename, p("f"), p("empty"))
    c.refused("a directory over a full one", {errno.ENOTEMPTY, errno.EEXIST}, os.rename, p("empty"), p("a"))
    c.refused("rmdir of a full one", {errno.ENOTEMPTY}, os.rmdir, p("a"))
    c.refused("unlink of a directory", {errno.EISDIR, errno.EPERM}, os.unlink, p("a"))
    c.refused("rmdir of a file", {errno.ENOTDIR}, os.rmdir, p("f"))
    c.refused("mkdir of what exists", {errno.EEXIST}, os.mkdir, p("a"))
    c.refused("link of what exists", {errno.EEXIST}, os.link, p("f"), p("g"))
    c.refused("hard link of a directory", {errno.EPERM}, os.link, p("a"), p("a2"))
    c.refused("RENAME_NOREPLACE over what exists", {errno.EEXIST}, renameat2, p("f"), p("g"), NOREPLACE)
    c.refused("rename of nothing", {errno.ENOENT}, os.rename, p("nothing"), p("x"))
    c.refused("exchange with nothing", {errno.ENOENT}, renameat2, p("f"), p("nothing"), EXCHANGE)
    c.refused("a name of 256 bytes", {errno.ENAMETOOLONG}, os.mkdir, p("n" * 256))


def links():
    for k in range(6):
        os.link(p("f"), p(R.choice(("a", "b", "a/deep")), "l%d" % k))
    c.equal(7, os.stat(p("f")).st_nlink, "seven names")
    s = cut()
    c.equal(7, os.stat(c.at(s, "f")).st_nlink, "seven names in the snapshot")
    found = [os.path.join(d, n) for d, _, ns in os.walk(c.work) for n in ns if n.startswith("l") and n[1:].isdigit()]
    R.shuffle(found)
    with open(found[0], "w") as f:
        f.write("through another name")
    c.equal("through another name", open(p("f")).read(), "all names show it")
    for k, q in enumerate(found):
        os.unlink(q)
        c.equal(6 - k, os.stat(p("f")).st_nlink, "names left")
        verify("unlink of one of several names")
    os.unlink(p("f"))


def over_itself():
    os.link(p("f"), p("f2"))
    os.rename(p("f"), p("f2"))  # two names of one object: nothing happens
    c.ok(os.path.exists(p("f")) and os.path.exists(p("f2")), "rename between two names of one file does nothing")
    os.rename(p("f"), p("f"))


def moved_directory_changes():
    fd = os.open(p("a"), os.O_RDONLY)
    os.rename(p("a"), p("b/a-moved"))
    with open("new", "w", opener=lambda n, fl: os.open(n, fl, 0o644, dir_fd=fd)) as f:
        f.write("made through the old descriptor")
    os.unlink("h", dir_fd=fd)
    os.close(fd)


def half_read_directory():
    """A directory stream that is open during changes ends, and shows what was there all the time."""
    os.mkdir(p("many"))
    for k in range(3000):
        open(p("many", "stay-%d" % k), "w").close()
    with os.scandir(p("many")) as it:
        got = [next(it).name for _ in range(100)]
        for k in range(500):
            open(p("many", "new-%d" % k), "w").close()
        cut()
        got += [e.name for e in it]
    stay = [n for n in got if n.startswith("stay")]
    c.ok(len(stay) == 3000 == len(set(stay)), "what was there all the time is listed once", len(stay))


reset()
step("unlink", lambda: os.unlink(p("f")), ("f", None))
step("unlink of a symlink", lambda: os.unlink(p("sl")), ("sl", None), ("f", "content of f"))
step("unlink of a fifo", lambda: os.unlink(p("fifo")), ("fifo", None))
step("rmdir", lambda: os.rmdir(p("empty")), ("empty", None))
step("rename", lambda: os.rename(p("f"), p("new")), ("f", None), ("new", "content of f"))
step("rename over a file", lambda: os.rename(p("f"), p("g")), ("f", None), ("g", "content of f"))
step("rename over, across directories", lambda: os.rename(p("g"), p("a/h")), ("a/h", "content of g"))
step("rename over a symlink", lambda: os.rename(p("f"), p("sl")), ("sl", "content of f"))
step("rename of a symlink over a file", lambda: os.rename(p("sl"), p("f")), ("sl", None))
step("rename of a directory", lambda: os.rename(p("a"), p("b/a")), ("b/a/deep/er/leaf", "leaf"), ("a", None))
step("rename over an empty directory", replace_dir, ("b/er/leaf", "changed where it moved"), ("empty", "there"))
step("exchange of files", lambda: renameat2(p("f"), p("a/h"), EXCHANGE), ("f", "content of h"), ("a/h", "content of f"))
step("exchange of a file and a directory", lambda: renameat2(p("f"), p("a"), EXCHANGE), ("f/h", "content of h"), ("a", "content of f"))
step("exchange of directories", lambda: renameat2(p("a/deep"), p("b"), EXCHANGE), ("b/er/leaf", "leaf"))
if os.geteuid() == 0:
    step("whiteout, to a free name", lambda: whiteout("f", "free"), ("free", "content of f"), ("f", "in place of the whiteout"))
    step("whiteout, over a file", lambda: whiteout("f", "g"), ("g", "content of f"))
    step("whiteout, over a directory", lambda: whiteout("b", "empty"), ("empty", "there"), ("b", "in place of the whiteout"))
if ROOT:
    step("overlayfs", overlay)
step("NOREPLACE to a free name", lambda: renameat2(p("f"), p("free"), NOREPLACE), ("free", "content of f"))
step("an open file loses its name", reopen_removed, ("f", None))
step("the same name again and again", recreate, ("f", "generation 4"))
step("hard links", links, ("f", None))
step("rename to another name of itself", over_itself)
step("what must be refused", loop_refused)
step("a directory moves while it is open", moved_directory_changes, ("b/a-moved/new", "made through the old descriptor"))
step("a directory listed in halves", half_read_directory)

# A name that changes its kind at every snapshot.
reset()
kept.clear()
for k in range(9):
    if os.path.lexists(p("thing")):
        (os.rmdir if os.path.isdir(p("thing")) and not os.path.islink(p("thing")) else os.unlink)(p("thing"))
    if k % 3 == 0:
        w("thing", "file %d" % k)
    elif k % 3 == 1:
        os.mkdir(p("thing"))
    else:
        os.symlink("to-%d" % k, p("thing"))
    cut()
verify("a name of changing kind")

# Random operations over few names, with snapshots in between.
NAMES = ["%s%d" % (d, k) for d in ("", "a/", "b/") for k in range(4)]
for k in range(1500):
    x, y = p(R.choice(NAMES)), p(R.choice(NAMES))
    try:
        op = R.randrange(10)
        if op < 2:
            with open(x, "a") as f:
                f.write(str(k))
        elif op == 2:
            os.unlink(x)
        elif op == 3:
            os.mkdir(x)
        elif op == 4:
            os.rmdir(x)
        elif op == 5:
            os.link(x, y, follow_symlinks=False)
        elif op == 6:
            os.symlink(str(k), x)
        elif op == 7:
            renameat2(x, y, EXCHANGE)
        else:
            os.rename(x, y)
    except OSError as e:
        c.ok(e.errno in (errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EINVAL, errno.ELOOP), "errno of a random operation", str(e))
    if k % 150 == 149:
        cut()
        if len(kept) > 5:
            s = R.choice(sorted(kept))
            c.drop(s)
            del kept[s]
        verify("random operations")
c.remount()
verify("after a remount")
for when in "unseen", "in a snapshot":
    link = os.path.join(c.work, "nameless")
    os.symlink("target", link)
    if when != "unseen":
        c.snap()
    fd = os.open(link, os.O_PATH | os.O_NOFOLLOW)
    os.unlink(link)
    c.equal("target", os.readlink("", dir_fd=fd), "a link without a name, " + when)
    os.close(fd)
c.done()
