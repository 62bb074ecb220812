#!/usr/bin/env python3
"""A snapshot equals a frozen copy in everything that can be seen, and stays so whatever happens to the objects afterwards.

The reference is the backing directory itself, read through a bind mount that sets no access times, at a moment when nobody
writes. Then every object is changed in every way, with a snapshot between the ways; at each stage, after a remount, and after
the deletion of snapshots before and after, every snapshot must still equal its reference.
"""
from tree import *

c = Case(limit=230)
R = c.random

# the reference view
ref = os.path.join(os.path.dirname(c.mnt), "reference")
os.mkdir(ref)
command("mount", "--bind", c.backing, ref)
command("mount", "-o", "remount,bind,noatime", ref)


def frozen():
    """The backing directory as it is. Blocks are assigned to fresh writes late: sync first."""
    sync(c.backing)
    return manifest(os.path.join(ref, "live"), visible_links=True)


def shown(name):
    return relax(manifest(c.at(name)), name.startswith("allocate"))


kept = {}


def cut(label):
    want = relax(frozen(), label.startswith("allocate"))
    name = c.snap(label)
    kept[name] = want
    if len(kept) % 4 != 1:
        return
    # the live tree of the mount is the backing directory
    live = relax(manifest(c.work), label.startswith("allocate"))
    c.same(want, live, "%s: the live tree equals the backing directory" % label, ignore=("blocks", "atime") + (("ctime",) if WRITEBACK else ()))


def verify(when, some=None):
    """Every snapshot, or the newest and a few others."""
    names = list(kept)
    if some is not None and len(names) > some + 1:
        names = R.sample(names[:-1], some) + names[-1:]
    for name in names:
        c.same(kept[name], shown(name), "%s: snapshot %s equals its frozen copy" % (when, name))


build(c.work, R, huge=True, large=100)
c.remount()  # so that nothing is answered from what the kernel remembers of the making
cut("built")
verify("at once")
for way in WAYS:
    way(c.work, R)
    verify("after " + way.__name__, some=1)
    cut("%s-%d" % (way.__name__, len(kept)))
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
    verify("after deleting %s" % name, some=0)
c.remount()
verify("the last one, after a remount")
command("umount", ref)
os.rmdir(ref)
c.done()
