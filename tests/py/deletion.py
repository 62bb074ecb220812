#!/usr/bin/env python3
"""Snapshots are deleted in any order: those that stay do not change, and the space comes back."""
from common import *
import threading

c = Case(limit=150)
R = c.random
STORE = os.path.join(c.backing, ".cowfs")


def used():
    """Bytes that the store holds on disk."""
    total = 0
    for p, dirs, files in os.walk(STORE):
        for n in files:
            try:
                total += os.lstat(os.path.join(p, n)).st_blocks * 512
            except FileNotFoundError:
                pass
    return total


def settle(limit, below):
    end = time.time() + limit
    while used() > below and time.time() < end:
        time.sleep(0.2)
    return used()


FILES, SIZE = 24, 1 << 20
for k in range(FILES):
    with open(os.path.join(c.work, "f%d" % k), "wb") as f:
        f.write(R.randbytes(SIZE))
start = used()


def state():
    return {n: digest(os.path.join(c.work, n)) for n in os.listdir(c.work)}


def shows(s):
    return {n: digest(c.at(s, n)) for n in os.listdir(c.at(s))}


def churn(k):
    for n in R.sample(range(FILES), 10):
        f = os.path.join(c.work, "f%d" % n)
        what = R.randrange(4)
        if not os.path.exists(f) or what == 0:
            with open(f + ".new", "wb") as h:
                h.write(R.randbytes(SIZE // 2))
            os.rename(f + ".new", f)
        elif what == 1:
            with open(f, "r+b") as h:
                for _ in range(40):
                    h.seek(R.randrange(SIZE))
                    h.write(R.randbytes(9000))
        elif what == 2:
            os.unlink(f)
        else:
            with open(f, "wb") as h:
                h.write(R.randbytes(SIZE))


for turn in range(3):
    kept = {}
    for k in range(10):
        s = c.snap("t%d-%d" % (turn, k))
        kept[s] = state()
        churn(k)
    peak = used()
    c.ok(peak > start + (8 << 20), "the store holds pre-images", "%.1f MiB" % (peak / 2**20))
    for s, want in kept.items():
        c.equal(want, shows(s), "snapshot %s before any deletion" % s)
    order = list(kept)
    R.shuffle(order)
    if turn == 0:
        order.sort()
    elif turn == 1:
        order.sort(reverse=True)
    for k, s in enumerate(order):
        c.drop(s)
        del kept[s]
        c.ok(s not in c.names(), "%s is gone from .snapshots" % s)
        c.refused("a deleted snapshot's path", {errno.ENOENT}, os.stat, c.at(s))
        if k in (2, 7):
            c.remount()
        churn(k)
        for t, want in kept.items():
            c.equal(want, shows(t), "snapshot %s after deleting %s" % (t, s))
    c.equal([], c.names(), "no snapshot is left")
    end = settle(30, start + (6 << 20))
    c.ok(end <= start + (6 << 20), "turn %d: the space comes back" % turn, "%.1f MiB at first, %.1f at the peak, %.1f in the end" % tuple(x / 2**20 for x in (start, peak, end)))
    print("# turn %d: store %.1f MiB at first, %.1f at the peak, %.1f in the end" % ((turn,) + tuple(x / 2**20 for x in (start, peak, end))))

# A name can be used again at once, and means the new snapshot.
for k in range(5):
    with open(os.path.join(c.work, "again"), "w") as f:
        f.write("round %d" % k)
    c.snap("same-name")
    with open(os.path.join(c.work, "again"), "w") as f:
        f.write("later")
    c.equal("round %d" % k, open(c.at("same-name", "again")).read(), "a name used again shows the new snapshot")
    c.drop("same-name")

# A snapshot in use: rmdir waits or says EBUSY; the reader never gets anything but the snapshot.
with open(os.path.join(c.work, "read"), "wb") as f:
    f.write(b"old" * 100_000)
s = c.snap("in-use")
with open(os.path.join(c.work, "read"), "r+b") as f:
    f.write(b"new" * 100_000)
fd = os.open(c.at(s, "read"), os.O_RDONLY)
half = os.read(fd, 150_000)
answer = []


def remove():
    try:
        os.rmdir(os.path.join(c.mnt, ".snapshots", s))
        answer.append(0)
    except OSError as e:
        answer.append(e.errno)


t = threading.Thread(target=remove, daemon=True)
t.start()
t.join(3)
c.ok(answer in ([], [0], [errno.EBUSY]), "deleting a snapshot in use waits, succeeds or says EBUSY", answer)
deleted = answer == [0]
try:
    rest = os.pread(fd, 150_000, 150_000)
    c.ok(rest == (b"old" * 100_000)[150_000:], "a reader of a snapshot being deleted gets its data or an error")
except OSError as e:
    c.ok(deleted and e.errno in (errno.ESTALE, errno.ENOENT, errno.EIO), "errno of reading a deleted snapshot", str(e))
os.close(fd)
t.join(20)
if answer == [errno.EBUSY]:
    c.drop(s)
c.equal([], c.names(), "nothing is left")

# Rename, and what must be refused.
s = c.snap("one")
os.rename(os.path.join(c.mnt, ".snapshots", "one"), os.path.join(c.mnt, ".snapshots", "two"))
c.equal(["two"], c.names(), "a snapshot renamed")
c.equal((b"new" * 100_000), open(c.at("two", "read"), "rb").read(), "and read under its new name")
c.snap("three")
c.refused("rename over another snapshot", {errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY}, os.rename, os.path.join(c.mnt, ".snapshots", "three"), os.path.join(c.mnt, ".snapshots", "two"))
c.equal(["three", "two"], c.names(), "both are still there")
c.remount()
c.equal(["three", "two"], c.names(), "names last over a remount")
c.done()
