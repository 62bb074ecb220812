#!/usr/bin/env python3
"""A snapshot of a directory is reached below the root's .snapshots and through the directory's own: who uses the one does not notice those who use the other, or who renames."""
import multiprocessing
import time

from common import *

SECONDS = 5
c = Case(limit=90)
os.makedirs(c.work + "/d/e")
with open(c.work + "/d/e/f", "w") as f:
    f.write("content")
s = c.snap()
WAYS = c.at(s, "d", "e"), c.work + "/d/.snapshots/%s/e" % s


def rename(stop, told, name):
    """Renames into another directory take the lock that moving a directory in the kernel's memory takes."""
    a, b = c.work + "/a" + name, c.work + "/b" + name
    os.mkdir(a)
    os.mkdir(b)
    open(a + "/f", "w").close()
    done = 0
    while not stop.is_set():
        os.rename(a + "/f", b + "/f")
        os.rename(b + "/f", a + "/f")
        done += 2
    told.put(("renames", done, {}))


def read(stop, told, way):
    done, failed = 0, {}
    while not stop.is_set():
        try:
            with open(way + "/f") as f:
                failed["content"] = failed.get("content", 0) + (f.read() != "content")
            done += 1
        except OSError as e:
            failed[e.errno] = failed.get(e.errno, 0) + 1
    told.put(("reads of %s" % os.path.relpath(way, c.mnt), done, failed))


os.chdir(WAYS[0])
os.listdir(WAYS[1])
c.equal(WAYS[0], os.getcwd(), "the working directory stays where it is")
os.chdir("/")
stop, told = multiprocessing.Event(), multiprocessing.Queue()
jobs = [(rename, "0"), (rename, "1")] + [(read, way) for way in WAYS]
running = [multiprocessing.Process(target=job, args=(stop, told, arg), daemon=True) for job, arg in jobs]
for process in running:
    process.start()
time.sleep(SECONDS)
stop.set()
for _ in running:
    what, done, failed = told.get(timeout=30)
    c.equal({}, {why: n for why, n in failed.items() if n}, what)
    c.ok(done > 100, "%s went on" % what, "%d" % done)
c.done()
