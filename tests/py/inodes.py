#!/usr/bin/env python3
"""Inode numbers: stable over remounts and renames, never shared by two objects, different in every view; .snapshots is there and not listed."""
from common import *

c = Case(limit=90)
for k in range(3):
    os.makedirs(c.work + "/d%d/e" % k)
    for j in range(20):
        with open(c.work + "/d%d/f%d" % (k, j), "w") as f:
            f.write("%d" % j)
os.link(c.work + "/d0/f0", c.work + "/d1/hard")
os.symlink("x", c.work + "/sl")


def numbers(root):
    out = {}
    for p, dirs, files in os.walk(root):
        for n in [""] + files:
            q = os.path.join(p, n) if n else p
            s = os.lstat(q)
            out[os.path.relpath(q, root)] = (s.st_dev, s.st_ino)
    return out


live = numbers(c.work)
c.equal(live["d0/f0"], live["d1/hard"], "two names of one file have one number")
c.equal(len(live) - 1, len(set(live.values())), "no two objects share a number")
s1 = c.snap()
n1 = numbers(c.at(s1))
for k in range(20):
    os.unlink(c.work + "/d2/f%d" % k)
    with open(c.work + "/d2/again%d" % k, "w") as f:
        f.write("a new file, perhaps with an old number of the backing filesystem")
s2 = c.snap()
n2 = numbers(c.at(s2))
live2 = numbers(c.work)
for what, a, b in (("snapshot 1 and the live tree", n1, live2), ("snapshot 2 and the live tree", n2, live2), ("snapshot 1 and snapshot 2", n1, n2)):
    c.ok(not set(a.values()) & set(b.values()), "%s share no number" % what)
c.equal(n1["d0/f0"], n1["d1/hard"], "two names of one file have one number in a snapshot")
c.ok(max(v[1] for n in (n1, n2) for v in n.values()) < 2 ** 53, "numbers of snapshots are exact as doubles")
c.equal(1, os.stat(os.path.join(c.work, ".snapshots")).st_nlink, "links of .snapshots: it is not told how many directories it has")
gone = {live["d2/f%d" % k] for k in range(20)}
c.ok(not gone & set(live2.values()), "a number that a snapshot's object had is not given to another")


def agree(when):
    for what, root, want in (("live", c.work, live2), ("snapshot 1", c.at(s1), n1), ("snapshot 2", c.at(s2), n2)):
        got = numbers(root)
        c.equal({k: v[1] for k, v in want.items()}, {k: v[1] for k, v in got.items()}, "%s: %s" % (when, what))


agree("at once")
fd = os.open(c.work + "/d0/f1", os.O_RDONLY)
os.rename(c.work + "/d0/f1", c.work + "/d0/renamed")
os.rename(c.work + "/d0/renamed", c.work + "/d0/f1")
c.equal(live["d0/f1"][1], os.fstat(fd).st_ino, "a rename changes no number")
os.close(fd)
agree("after renames")
c.remount()
agree("after a remount")
for k in range(20):
    open(c.work + "/other%d" % k, "w").close()
    os.unlink(c.work + "/other%d" % k)
c.remount()
agree("after another")
for root in (c.work, c.at(s1)):
    for e in os.scandir(root):
        c.equal(os.lstat(e.path).st_ino, e.inode(), "readdir and stat agree on the number of %s" % e.name)

# .snapshots
hidden = os.path.join(c.mnt, ".snapshots")
c.ok(".snapshots" not in os.listdir(c.mnt), ".snapshots is not listed at the root")
c.ok(".snapshots" not in os.listdir(c.work), "nor in a directory")
c.equal([s1, s2], sorted(os.listdir(hidden)), ".snapshots lists the snapshots")
c.equal([s1, s2], sorted(os.listdir(c.work + "/.snapshots")), "also in a directory")
os.mkdir(c.work + "/young")
try:
    c.equal([], os.listdir(c.work + "/young/.snapshots"), "a directory that is in no snapshot shows none")
except FileNotFoundError:
    pass  # as good: there is nothing to show
ways = c.at(s1, "d0"), c.work + "/d0/.snapshots/" + s1
below, through = map(numbers, ways)
c.equal(sorted(below), sorted(through), "d0/.snapshots/S is S/d0")
c.ok(not set(below.values()) & set(through.values()), "with numbers of its own")
c.equal(len(through), len(set(through.values())), "one for each object")
for e in os.scandir(ways[1]):
    c.equal(os.lstat(e.path).st_ino, e.inode(), "readdir and stat agree on the number of %s there" % e.name)
c.equal(os.lstat(ways[1] + "/.").st_ino, os.lstat(ways[1] + "/e/..").st_ino, "'..' there")
c.remount()
for way, before in zip(ways, (below, through)):
    # The device may be another one.
    c.equal({k: v[1] for k, v in before.items()}, {k: v[1] for k, v in numbers(way).items()}, "both stay after a remount")
c.ok(os.path.isdir(hidden) and os.path.isdir(os.path.join(hidden, s1)), ".snapshots and a snapshot are directories")
found = subprocess.run(["find", c.mnt], capture_output=True, text=True).stdout
c.ok("/.snapshots" not in found, "find does not descend into .snapshots")
c.ok(os.lstat(hidden).st_ino != os.lstat(c.mnt).st_ino != os.lstat(os.path.join(hidden, s1)).st_ino, "its number is its own")
os.rename(c.work + "/d0", c.work + "/d0-moved")
c.equal("0", open(c.work + "/d0-moved/.snapshots/%s/f0" % s1).read(), "a renamed directory still finds its past")
for dirs in (c.work, c.at(s1), hidden):
    up = os.lstat(dirs + "/..").st_ino
    c.equal(os.lstat(os.path.dirname(dirs)).st_ino, up, "'..' of %s" % os.path.relpath(dirs, c.mnt))
c.done()
