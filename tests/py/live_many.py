#!/usr/bin/env python3
"""Large numbers in the live tree, with snapshots: a directory of 100,000 entries, as many links as the backing filesystem allows, a
sparse file of 8 TiB."""
import json
from common import *

c = Case(limit=220)
os.mkdir(c.control)
ENTRIES, MOST_LINKS, LINKS, TIB = 100_000, 64_900, 65_100, 1 << 40


def status():
    return json.loads(command(c.bin, "status", "--json", c.mnt))


# ---------------------------------------------------------------------------------- entries

d = c.work + "/many"
# Most are made while cowfs is away, as they would take most of the time of this case.
c.umount()
os.mkdir(c.backing + "/live/many")
for k in range(ENTRIES - 1000):
    os.mknod(c.backing + "/live/many/%d" % k)
c.mount()
for k in range(ENTRIES - 1000, ENTRIES):
    os.mknod(d + "/%d" % k)
s = c.snap()
whole = {str(k) for k in range(ENTRIES)}


def listed(path):
    names = os.listdir(path)
    c.equal(len(set(names)), len(names), "%s lists nothing twice" % path)
    return set(names)


c.ok(listed(d) == whole, "100,000 entries are listed")
c.ok(listed(c.at(s, "many")) == whole, "and in a snapshot")
# Another process makes and removes entries while both are listed.
pid = os.fork()
if pid == 0:
    for k in range(0, 20_000, 2):
        os.unlink(d + "/%d" % k)
        os.mknod(d + "/new-%d" % k)
    os._exit(0)
rounds = 0
while rounds < 2:
    names = listed(d)
    stay = {n for n in names if n.isdigit() and (int(n) % 2 or int(n) >= 20_000)}
    c.equal(ENTRIES - 10_000, len(stay), "what stays is listed while other entries come and go")
    c.ok(listed(c.at(s, "many")) == whole, "the snapshot's listing meanwhile")
    rounds += 1
c.equal(0, os.waitpid(pid, 0)[1], "the process that makes and removes entries ends well")
c.equal(ENTRIES, len(listed(d)), "entries afterwards")
c.remount()
c.ok(listed(c.at(s, "many")) == whole, "the snapshot's listing after a remount")
c.equal({"new-%d" % k for k in range(0, 20_000, 2)}, listed(d) - whole, "the live listing after a remount")
c.drop(s)
print("%.0f s" % (time.time() - c.start), flush=True)

# ---------------------------------------------------------------------------------- links


def link_up_to(base, first, last):
    """How many links one file gets, in two directories, the error of the next, and st_nlink."""
    for k in range(first, last):
        try:
            os.link(base + "/x/0", base + ("/x/%d", "/y/%d")[k % 2] % k)
        except OSError as e:
            return k, errno.errorcode[e.errno], os.stat(base + "/x/0").st_nlink
    return last, None, os.stat(base + "/x/0").st_nlink


def with_most_links(base):
    for n in ("/x", "/y"):
        os.mkdir(base + n)
    os.mknod(base + "/x/0")
    return link_up_to(base, 1, MOST_LINKS)


c.umount()
c.equal(with_most_links(c.control), with_most_links(c.backing + "/live"), "links outside the mount")
c.mount()
want = link_up_to(c.control, MOST_LINKS, LINKS)
got = link_up_to(c.work, MOST_LINKS, LINKS)
c.equal(want, got, "links of one file, the error of one too many, and st_nlink")
s = c.snap()
for k in range(2, 202):
    os.unlink(c.work + ("/x/%d", "/y/%d")[k % 2] % k)
c.equal(want[2] - 200, os.stat(c.work + "/x/0").st_nlink, "links after some were removed")
c.equal(want[2], os.stat(c.at(s, "x/0")).st_nlink, "links in the snapshot before it")
c.drop(s)
print("%.0f s" % (time.time() - c.start), flush=True)

# ---------------------------------------------------------------------------------- a sparse file of 8 TiB


def sparse(base):
    fd = os.open(base + "/sparse", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, 8 * TIB)
    except OSError as e:
        os.close(fd)
        return errno.errorcode[e.errno]
    for at in (5, TIB + 12_345, 4 * TIB, 8 * TIB - 4096):
        os.pwrite(fd, b"data at %d" % at, at)
    os.fsync(fd)
    os.close(fd)
    return look(base + "/sparse")


def look(path):
    return os.stat(path).st_size, os.stat(path).st_blocks, holes(path), digest(path)


def cut_short(path):
    os.truncate(path, 3 * TIB + 1)


def punched(path):
    fd = os.open(path, os.O_RDWR)
    fallocate(fd, PUNCH | KEEP_SIZE, 100, 2 * TIB)
    os.close(fd)


def grown_again(path):
    os.truncate(path, 6 * TIB)
    with open(path, "r+b") as f:
        for at in (1 << 30, TIB + 12_345, 4 * TIB + 4096, 5 * TIB, 5 * TIB + (7 << 30) + 12_345):
            f.seek(at)
            f.write(b"where a hole was")
        f.flush()
        os.fsync(f.fileno())


def emptied(path):
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


want, got = sparse(c.control), sparse(c.work)
c.equal(want, got, "a sparse file of 8 TiB, or the refusal of one")
if not isinstance(got, str):
    kept, before = {}, status()["store_bytes"]
    for step in (cut_short, punched, grown_again, emptied):
        name = c.snap()
        kept[name] = look(c.at(name, "sparse"))
        c.equal(want, kept[name], "a snapshot before it is %s" % step.__name__)
        step(c.control + "/sparse")
        step(c.work + "/sparse")
        want = look(c.control + "/sparse")
        c.equal(want, look(c.work + "/sparse"), "the live file when %s" % step.__name__)
        for name, was in kept.items():
            c.equal(was, look(c.at(name, "sparse")), "snapshot %s when %s" % (name, step.__name__))
    more = status()["store_bytes"] - before
    # A record for each MiB of hole would be half a GiB.
    c.ok(more < 200 << 20, "the store keeps data, and not holes", more)
    c.remount()
    for name, was in kept.items():
        c.equal(was, look(c.at(name, "sparse")), "snapshot %s after a remount" % name)
shutil.rmtree(c.control)
c.done()
