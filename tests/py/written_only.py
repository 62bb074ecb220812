#!/usr/bin/env python3
"""Files open for writing alone: what is written to them is read at once through every other descriptor and mapping, nothing of a mapping is lost by it, and appends are whole."""
from common import *
import mmap

c = Case(limit=120)
PAGE, PAGES = 4096, 16
children, ending = [], mmap.mmap(-1, 1)


def child(work):
    """A process that calls `work` until end_children()."""
    pid = os.fork()
    if pid == 0:
        try:
            while not ending[0] and os.getppid() == me:
                work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(pid)


def end_children():
    ending[0] = 1
    while children:
        _, status = os.waitpid(children.pop(), 0)
        c.equal(0, status, "the status of a process that was there meanwhile")
    ending[0] = 0


def opened(name, flags, size=PAGES * PAGE):
    path = os.path.join(c.work, name)
    if not os.path.exists(path):
        with open(path, "wb") as f:
            f.write(bytes(size))
    return os.open(path, flags)


me = os.getpid()

# Readers fill the cache with what is there, all the time, while somebody else changes it.
reads = opened("shared", os.O_RDONLY)


def fill():
    for k in range(20):
        os.pread(reads, PAGES * PAGE, 0)
        os.posix_fadvise(reads, 0, 0, os.POSIX_FADV_DONTNEED)


child(fill)
child(fill)
writes = opened("shared", os.O_WRONLY)
sees = opened("shared", os.O_RDONLY)
mapping = mmap.mmap(sees, PAGES * PAGE, prot=mmap.PROT_READ)
late, end, n = [], time.monotonic() + 4, 0
while time.monotonic() < end and not late:
    n += 1
    at = c.random.randrange(PAGES * PAGE - 8)
    value = struct.pack("<Q", n)
    os.pwrite(writes, value, at)
    if (got := os.pread(sees, 8, at)) != value or (got := mapping[at:at + 8]) != value:
        late.append((n, at, got))
c.equal([], late, "every read finds what was written last, in %d writes" % n)
end_children()

# A mapping that is stored to at the same time, in other bytes of the same pages.
stores = opened("mapped", os.O_RDWR)
mine = mmap.mmap(stores, PAGES * PAGE)
rounds = mmap.mmap(-1, 8)


def store():
    n, = struct.unpack("<Q", rounds[:8])
    for k in range(PAGES):
        mine[k * PAGE:k * PAGE + 8] = struct.pack("<Q", n + 1)
    rounds[:8] = struct.pack("<Q", n + 1)


child(store)
writes, end, n = opened("mapped", os.O_WRONLY), time.monotonic() + 4, 0
late = end + 60
while time.monotonic() < end or time.monotonic() < late and (n <= 10 or struct.unpack("<Q", rounds[:8])[0] <= 10):
    n += 1
    for k in range(PAGES):
        os.pwrite(writes, struct.pack("<Q", n), k * PAGE + 2000)
end_children()
stored, = struct.unpack("<Q", rounds[:8])
c.ok(stored > 10 and n > 10, "both went on", "%d stores, %d writes" % (stored, n))
mine.flush()
with open(os.path.join(c.backing, "live", "mapped"), "rb") as f:
    data = f.read()
for k in range(PAGES):
    there, = struct.unpack_from("<Q", data, k * PAGE)
    c.equal(stored, there, "the store to page %d is not lost" % k)
    c.equal(n, struct.unpack_from("<Q", data, k * PAGE + 2000)[0], "nor the write to it")

# Records appended by several: each is whole. In a snapshot the last may end with the page that it began in, where the
# kernel makes two requests of it.
WRITERS, LONGEST = 3, 9000
opened("log", os.O_WRONLY, size=0)
counts = [mmap.mmap(-1, 8) for _ in range(WRITERS)]
for who in range(WRITERS):
    log, chance = opened("log", os.O_WRONLY | os.O_APPEND), random.Random("%s %d" % (c.seed, who))

    def append():
        n, = struct.unpack("<Q", counts[who][:8])
        length = chance.randrange(16, LONGEST)
        os.write(log, struct.pack("<HIQ", length, who, n).ljust(length, b"%d" % who))
        counts[who][:8] = struct.pack("<Q", n + 1)

    child(append)


def records(data):
    """The numbers of the records of each writer, and what is left at the end."""
    found, at = [[] for _ in range(WRITERS)], 0
    while at + 14 <= len(data):
        length, who, n = struct.unpack_from("<HIQ", data, at)
        whole = struct.pack("<HIQ", length, who, n).ljust(length, b"%d" % who)
        if data[at:at + length] != whole:
            break
        found[who].append(n)
        at += length
    return found, data[at:]


def read(path):
    with open(path, "rb") as f:
        return f.read()


cut = []
for k in range(8):
    time.sleep(0.1)
    end = time.monotonic() + 60
    while k == 7 and time.monotonic() < end and any(struct.unpack("<Q", count[:8])[0] <= 100 for count in counts):
        time.sleep(0.1)
    cut.append((c.snap(), [struct.unpack("<Q", count[:8])[0] for count in counts]))
c.ok(all(n > 100 for n in cut[-1][1]), "the writers went on meanwhile", repr(cut[-1][1]))
for s, _ in cut:
    found, left = records(read(c.at(s, "log")))
    c.ok(all(numbers == list(range(len(numbers))) for numbers in found), "snapshot %s has the records in order" % s)
    c.ok(not left or len(left) < LONGEST and os.path.getsize(c.at(s, "log")) % PAGE == 0, "snapshot %s ends with a whole record, or with a page" % s, repr(left[:40]))
for (s, before), (t, _) in zip(cut, cut[1:]):
    found, _ = records(read(c.at(t, "log")))
    c.ok(all(len(numbers) >= n for numbers, n in zip(found, before)), "what was written before snapshot %s is in it" % t, "%r, not %r" % ([len(x) for x in found], before))
end_children()
found, left = records(read(os.path.join(c.work, "log")))
c.ok(all(numbers == list(range(len(numbers))) for numbers in found) and not left, "no append was lost or torn", "%r is left" % left[:40])
c.done()
