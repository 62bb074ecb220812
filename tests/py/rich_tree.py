#!/usr/bin/env python3
"""A snapshot of a tree with every kind of object equals a frozen copy of it, as far as rsync, tar, diff and a walk of everything
that can be asked of a file can tell: at once, after every object was changed in every way, after a remount, and after other
snapshots before and after it were deleted.

Runs as root, and as an ordinary user for what one can make; what is left out is printed.
"""
import tree
from tree import *

c = Case(limit=230)
R = c.random
os.mkdir(c.control)

build(c.work, R, large=600)
older = c.snap("older")
remove_all(c.work, R)
build(c.work, R, large=600)
c.remount()  # so that nothing is answered from what the kernel remembers of the making
frozen = Frozen(c.work, os.path.join(c.control, "frozen"))
rich = [c.snap("same"), c.snap("rich")]  # what is kept later serves both
others = [older]


def check(when, names=rich, fully=True):
    for name in names:
        (frozen.check if fully else frozen.check_walk)(c, c.at(name), "%s, %s" % (name, when))


check("at once")
for way in WAYS:
    way(c.work, R)
    check("after " + way.__name__, R.sample(rich, 1), fully=False)
    others.append(c.snap("after-%s-%d" % (way.__name__, len(others))))
check("after every change", rich[:1])
c.remount()
check("after a remount", rich[1:])
c.equal(sorted(rich + others), c.names(), "the snapshots that there are")
others.append(rich.pop(0))
R.shuffle(others)
for k, name in enumerate(others):
    c.drop(name)
    if k == len(others) // 2:
        check("after the deletion of half of the others", fully=False)
c.remount()
check("alone, after a remount")
frozen.remove()
os.rmdir(c.control)
for what in sorted(tree.left_out):
    print("left out, as only root can make them: " + what)
c.done()
