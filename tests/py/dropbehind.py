#!/usr/bin/env python3
"""Who copies a snapshot does not fill the kernel's cache with it; what he and others read is right all the same."""
import mmap, multiprocessing

from common import *

c = Case(limit=120)
PAGE, MIB = mmap.PAGESIZE, 1 << 20
SIZE = 96 * MIB
libc.mmap.restype = ctypes.c_void_p


def cached(path):
    """How many pages of a file the kernel has in its cache of this mount (mincore(2))."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        at = libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
        c.ok(at != ctypes.c_void_p(-1).value, "%s is mapped" % path)
        there = (ctypes.c_ubyte * -(-size // PAGE))()
        c.equal(0, libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), there), "mincore of %s" % path)
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
        return sum(page & 1 for page in there)
    finally:
        os.close(fd)


def settles(path, what, left):
    """Of a file that was read no more than `left` bytes stay. What is dropped is dropped by somebody else."""
    pages = left // PAGE
    end = time.time() + 60
    while (now := cached(path)) > pages and time.time() < end:
        time.sleep(0.01)
    c.ok(now <= pages, what, "%d pages are cached, not %d" % (now, pages))


def read(path, size=MIB):
    h = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        while part := f.read(size):
            h.update(part)
    return h.hexdigest()


def read_directly(path):
    """Past the cache. The memory has to be aligned."""
    h, fd = hashlib.sha256(), os.open(path, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, MIB) as buffer:
        while n := os.readv(fd, [buffer]):
            h.update(buffer[:n])
    os.close(fd)
    return h.hexdigest()


def reads_and_drops(path, size, what):
    c.equal(want, read(path, size), "the content, " + what)
    # A page that somebody is just using stays.
    settles(path, what, MIB)


was = c.random.randbytes(SIZE)
want = hashlib.sha256(was).hexdigest()
with open(c.work + "/large", "wb") as f:
    f.write(was)
small = c.random.randbytes(MIB)
with open(c.work + "/small", "wb") as f:
    f.write(small)
s = c.snap()
# Some of it has pre-images, some is read from the live file.
with open(c.work + "/large", "r+b") as f:
    for _ in range(200):
        f.seek(c.random.randrange(SIZE // PAGE) * PAGE)
        f.write(c.random.randbytes(PAGE))
large = c.at(s, "large")

c.equal(0, cached(large), "nothing is cached before")
reads_and_drops(large, MIB, "a file of a snapshot that was read")
reads_and_drops(large, 10240, "by small reads")

with open(large, "rb", buffering=0) as f:
    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    while f.tell() < SIZE // 2:
        f.read(MIB)
    settles(large, "what was passed is dropped on the way", 24 * MIB)
    c.ok(cached(large) > 0, "what comes next is not")
    h = hashlib.sha256(was[:f.tell()])
    while part := f.read(MIB):
        h.update(part)
    c.equal(want, h.hexdigest(), "the content after that")

c.equal(hashlib.sha256(small).hexdigest(), read(c.at(s, "small")), "the content of a small file")
# Whatever the kernel takes away by itself.
c.ok(cached(c.at(s, "small")) > MIB // PAGE * 3 // 4, "a small file stays")
read(c.work + "/large")
c.ok(cached(c.work + "/large") > SIZE // PAGE * 3 // 4, "a file of the live tree stays")

with open(large, "rb", buffering=0) as f:
    places = [c.random.randrange(SIZE // PAGE) * PAGE for _ in range(5000)]
    for at in places:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        if was[at:at + PAGE] != os.pread(f.fileno(), PAGE, at):
            c.ok(False, "a page at %d" % at)
    pages = len(set(places)) * 3 // 4
    c.ok(cached(large) > pages, "what is read here and there stays")
c.equal(want, read_directly(large), "the content, past the cache")
end = time.time() + 1
while time.time() < end:
    c.ok(cached(large) > pages, "it stays also while others read past the cache")
    time.sleep(0.01)


def check_mapped(stop, told, seed):
    """Reads pages in any order through a mapping, while others have them dropped."""
    rng, wrong, done = random.Random(seed), 0, 0
    with open(large, "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
        while not done or not stop.is_set():
            at = rng.randrange(SIZE // PAGE) * PAGE
            wrong += m[at:at + PAGE] != was[at:at + PAGE]
            done += 1
    told.put(("a mapping", done, wrong))


def check_read(stop, told, size):
    wrong = done = 0
    while not done or not stop.is_set():
        wrong += read(large, size) != want
        done += 1
    told.put(("reads of %d" % size, done, wrong))


stop, told = multiprocessing.Event(), multiprocessing.Queue()
jobs = [(check_read, MIB), (check_read, 100000), (check_mapped, c.seed)]
running = [multiprocessing.Process(target=job, args=(stop, told, arg), daemon=True) for job, arg in jobs]
for process in running:
    process.start()
time.sleep(4)
stop.set()
for _ in running:
    what, done, wrong = told.get(timeout=60)
    c.equal(0, wrong, "%s: wrong content in %d" % (what, done))

# What waited to be dropped has been, when this is.
while cached(large) > MIB // PAGE:
    read(large)
    time.sleep(0.1)

# The mount of a snapshot by itself.
alone = os.path.join(os.path.dirname(c.mnt), "alone")
os.mkdir(alone)
command(c.bin, "mount", "-o", "snapshot=" + s, c.backing, alone)
try:
    c.equal("fuse.cowfs", mount_type(alone), "the snapshot is mounted")
    reads_and_drops(alone + "/live/large", MIB, "a file there")
finally:
    command(c.bin, "umount", alone)
c.done()
