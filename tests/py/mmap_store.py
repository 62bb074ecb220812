#!/usr/bin/env python3
"""Shared mappings: a store made before the snapshot was asked for is in it, one made after is not."""
from common import *
import mmap

c = Case(limit=90)
PAGE = 4096
FILES, PAGES = 20, 64


def mapped(name, pages):
    fd = os.open(os.path.join(c.work, name), os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(fd, pages * PAGE)
    m = mmap.mmap(fd, pages * PAGE)
    return fd, m


def page(m, k, value):
    m[k * PAGE:k * PAGE + 8] = struct.pack("<Q", value)


def values(path, pages):
    with open(path, "rb") as f:
        b = f.read()
    return [struct.unpack_from("<Q", b, k * PAGE)[0] for k in range(pages)] if len(b) == pages * PAGE else ("size", len(b))


maps = [mapped("m%d" % k, PAGES) for k in range(FILES)]
# The helper that cannot open files by their numbers asks for them by a name, which means nothing to others, and goes on to
# mean something to it.
for fd, _ in maps:
    try:
        os.stat(os.path.join(c.mnt, ".cowfs-node-%x" % os.fstat(fd).st_ino))
        c.ok(False, "the name of a node means nothing to others")
    except FileNotFoundError:
        pass
taken = []
for generation in range(1, 7):
    for fd, m in maps:
        for k in range(PAGES):
            page(m, k, generation)
    if generation == 3:
        for fd, _ in maps:
            os.close(fd)  # a mapping outlives its descriptor
    s = c.snap()
    taken.append((s, generation))
    for k in range(FILES):
        c.equal([generation] * PAGES, values(c.at(s, "m%d" % k), PAGES), "stores before snapshot %s are in it (file %d)" % (s, k))
    # stores after it: in the live tree, not in the snapshot
    for fd, m in maps:
        for k in range(PAGES):
            page(m, k, 1000 + generation)
    for k, (fd, m) in enumerate(maps):
        m.flush()
        c.equal([1000 + generation] * PAGES, values(os.path.join(c.work, "m%d" % k), PAGES), "live file shows the store")
for s, generation in taken:
    for k in range(FILES):
        c.equal([generation] * PAGES, values(c.at(s, "m%d" % k), PAGES), "snapshot %s is unchanged later (file %d)" % (s, k))

# A time that somebody sets stays, though what was stored before it has yet to be written back.
path = os.path.join(c.work, "stamped")
for seconds in (5, 10 ** 9):
    fd, m = mapped("stamped", 8)
    for k in range(8):
        page(m, k, seconds)
    os.utime(path, (seconds, seconds))
    m.close()
    os.close(fd)
    c.equal(seconds, os.stat(path).st_mtime, "the time that was set")
    s = c.snap()
    c.equal(seconds, os.stat(c.at(s, "stamped")).st_mtime, "the time that was set, in the snapshot")
    c.equal([seconds] * 8, values(c.at(s, "stamped"), 8), "what was stored")

# Where somebody has stored there is data for who looks for it (cp(1), tar -S), before the kernel has written it back.
fd, sparse = mapped("sparse", 256)
other = os.open(os.path.join(c.work, "sparse"), os.O_RDONLY)
for k in (100, 200, 10):
    page(sparse, k, k)
    for reader in (other, fd):
        c.equal(k * PAGE, os.lseek(reader, (k - 1) * PAGE, os.SEEK_DATA), "data at page %d" % k)
os.close(other)

# One file much larger, a store here and there, while a process goes on storing a counter into a page.
fd, big = mapped("big", 8192)
stop = os.path.join(c.work, "stop")
ready_r, ready_w = os.pipe()
counter_fd, counter = mapped("counter", 1)
pid = os.fork()
if pid == 0:
    n = 0
    while not os.path.exists(stop):
        for _ in range(1000):
            n += 1
            counter[0:8] = struct.pack("<Q", n)
        if n == 1000:
            os.write(ready_w, b"x")
    os._exit(0)
os.read(ready_r, 1)
for generation in range(1, 6):
    at = sorted(c.random.sample(range(8192), 500))
    for k in at:
        page(big, k, generation)
    low = struct.unpack("<Q", counter[0:8])[0]
    s = c.snap()
    high = struct.unpack("<Q", counter[0:8])[0]
    got = values(c.at(s, "big"), 8192)
    c.ok(all(got[k] == generation for k in at), "500 stores over 32 MiB are in snapshot %s" % s, [k for k in at if got[k] != generation][:5])
    n = values(c.at(s, "counter"), 1)[0]
    c.ok(low <= n <= high, "a counter stored all the time", "%d <= %d <= %d" % (low, n, high))
    time.sleep(0.1)
    c.equal(n, values(c.at(s, "counter"), 1)[0], "the counter in the snapshot stands still")
open(stop, "w").close()
os.waitpid(pid, 0)

# A mapping of a file that has lost its name, and of one that was renamed.
fd, m = mapped("gone", 4)
page(m, 1, 7)
s1 = c.snap()
os.unlink(os.path.join(c.work, "gone"))
page(m, 1, 8)
m.flush()
s2 = c.snap()
c.equal([0, 7, 0, 0], values(c.at(s1, "gone"), 4), "a mapped file in the snapshot before its removal")
c.ok(not os.path.lexists(c.at(s2, "gone")), "and not in the one after")
fd, m = mapped("old-name", 4)
page(m, 2, 5)
os.rename(os.path.join(c.work, "old-name"), os.path.join(c.work, "new-name"))
s3 = c.snap()
page(m, 2, 6)
m.flush()
c.equal([0, 0, 5, 0], values(c.at(s3, "new-name"), 4), "a mapped file under its new name")

# Who asks for holes waits for no cut, which waits for pages of files that are being cut short.
stop = os.path.join(c.work, "stop-seeking")
count_r, count_w = os.pipe()


def child(loop):
    pid = os.fork()
    if pid == 0:
        try:
            while not os.path.exists(stop):
                loop()
            os.write(count_w, b"x")
        finally:
            os._exit(0)
    return pid


def seeker(name):
    fd, _ = mapped(name, 256)
    os.pwrite(fd, b"x", 500000)
    return lambda: os.lseek(fd, 0, os.SEEK_DATA)


def cutter(name):
    fd, m = mapped(name, 1024)

    def loop():
        for k in range(1023):
            page(m, k, k)
        os.ftruncate(fd, 1023 * PAGE)
        os.ftruncate(fd, 1024 * PAGE)
    return loop


pids = [child(seeker("seek%d" % k)) for k in range(16)] + [child(cutter("cut%d" % k)) for k in range(4)]
for k in range(40):
    c.snap()
open(stop, "w").close()
for pid in pids:
    os.waitpid(pid, 0)
os.close(count_w)
c.equal(len(pids), len(os.read(count_r, 100)), "nobody who asked for holes, or cut files short, hung or failed")

# Private mappings change nothing; a program can be run from the mount and from a snapshot.
shutil.copy("/bin/true", os.path.join(c.work, "program"))
s4 = c.snap()
os.truncate(os.path.join(c.work, "program"), 10)
c.ok(subprocess.run([c.at(s4, "program")]).returncode == 0, "a program runs from a snapshot")
c.done()
