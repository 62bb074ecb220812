#!/usr/bin/env python3
"""Locks across processes: fcntl (process and open-file-description) and flock, as on any local filesystem, over a cut too."""
from common import *

c = Case(limit=60)
f = os.path.join(c.work, "file")
with open(f, "wb") as h:
    h.write(b"0" * 1000)
OFD_SETLK, OFD_SETLKW = 37, 38


def lock(fd, kind, start, length, command=fcntl.F_SETLK):
    return fcntl.fcntl(fd, command, struct.pack("hhqqi", kind, 0, start, length, 0))


class Other:
    """A process that runs commands on a descriptor of its own."""

    def __init__(self):
        self.r, w = os.pipe()
        r, self.w = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.r)
            os.close(self.w)
            fd = os.open(f, os.O_RDWR)
            with os.fdopen(r) as commands:
                for line in commands:
                    try:
                        eval(line, globals(), {"fd": fd})
                        os.write(w, b"ok\n")
                    except OSError as e:
                        os.write(w, errno.errorcode[e.errno].encode() + b"\n")
            os._exit(0)
        os.close(r)
        os.close(w)
        self.file = os.fdopen(self.r)

    def say(self, line):
        os.write(self.w, line.encode() + b"\n")

    def answer(self):
        return self.file.readline().strip()

    def do(self, line):
        self.say(line)
        return self.answer()

    def end(self):
        os.close(self.w)
        os.waitpid(self.pid, 0)


fd = os.open(f, os.O_RDWR)
o = Other()
BUSY = ("EAGAIN", "EACCES")
for set_it, name in ((fcntl.F_SETLK, "fcntl"), (OFD_SETLK, "open file description")):
    lock(fd, fcntl.F_WRLCK, 100, 100, set_it)
    c.ok(o.do("lock(fd, fcntl.F_WRLCK, 150, 10)") in BUSY, name + ": an overlapping write lock is refused")
    c.ok(o.do("lock(fd, fcntl.F_RDLCK, 199, 10)") in BUSY, name + ": an overlapping read lock is refused")
    c.equal("ok", o.do("lock(fd, fcntl.F_WRLCK, 200, 10)"), name + ": a lock beside it")
    c.equal("ok", o.do("lock(fd, fcntl.F_UNLCK, 200, 10)"), name + ": released")
    c.snap()
    c.ok(o.do("lock(fd, fcntl.F_WRLCK, 150, 10)") in BUSY, name + ": a lock lasts over a cut")
    o.say("lock(fd, fcntl.F_WRLCK, 150, 10, fcntl.F_SETLKW)")
    time.sleep(0.3)
    lock(fd, fcntl.F_UNLCK, 100, 100, set_it)
    c.equal("ok", o.answer(), name + ": a waiting lock is granted on release")
    try:
        lock(fd, fcntl.F_WRLCK, 0, 0, set_it)
        c.ok(False, name + ": the other's lock holds")
    except OSError as e:
        c.ok(errno.errorcode[e.errno] in BUSY, name + ": the other's lock holds")
    c.equal("ok", o.do("lock(fd, fcntl.F_UNLCK, 0, 0)"), name + ": all released")
    lock(fd, fcntl.F_RDLCK, 0, 50, set_it)
    c.equal("ok", o.do("lock(fd, fcntl.F_RDLCK, 0, 50)"), name + ": two read locks")
    lock(fd, fcntl.F_UNLCK, 0, 0, set_it)
    o.do("lock(fd, fcntl.F_UNLCK, 0, 0)")

fcntl.flock(fd, fcntl.LOCK_EX)
c.ok(o.do("fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)") in BUSY + ("EWOULDBLOCK",), "flock is refused")
o.say("fcntl.flock(fd, fcntl.LOCK_EX)")
time.sleep(0.2)
c.snap()
fcntl.flock(fd, fcntl.LOCK_UN)
c.equal("ok", o.answer(), "a waiting flock is granted")
o.end()  # its locks go with it
fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
c.ok(True, "a dead process holds nothing")
fcntl.flock(fd, fcntl.LOCK_UN)

o = Other()
o.do("lock(fd, fcntl.F_WRLCK, 0, 0)")
os.kill(o.pid, signal.SIGKILL)
os.waitpid(o.pid, 0)
lock(fd, fcntl.F_WRLCK, 0, 0)
c.ok(True, "a killed process holds nothing")
lock(fd, fcntl.F_UNLCK, 0, 0)

# A counter that several processes add to under a lock loses nothing, with snapshots being cut all the time.
path = os.path.join(c.work, "counter")
with open(path, "w") as h:
    h.write("%010d" % 0)
kids = []
for k in range(4):
    pid = os.fork()
    if pid == 0:
        g = os.open(path, os.O_RDWR)
        for _ in range(300):
            if k % 2:
                lock(g, fcntl.F_WRLCK, 0, 10, OFD_SETLKW)
            else:
                lock(g, fcntl.F_WRLCK, 0, 10, fcntl.F_SETLKW)
            n = int(os.pread(g, 10, 0))
            os.pwrite(g, b"%010d" % (n + 1), 0)
            lock(g, fcntl.F_UNLCK, 0, 10, OFD_SETLKW if k % 2 else fcntl.F_SETLKW)
        os._exit(0)
    kids.append(pid)
last = 0
for _ in range(15):
    s = c.snap()
    n = int(open(c.at(s, "counter")).read())
    c.ok(n >= last, "the counter in a snapshot never falls", (last, n))
    last = n
    time.sleep(0.02)
for pid in kids:
    c.equal(0, os.waitpid(pid, 0)[1], "a counting process ends well")
c.equal(1200, int(open(path).read()), "nothing is lost under locks")
# locks in a snapshot: a read lock is possible, and no lock of the live file is seen there
s = c.snap()
lock(fd, fcntl.F_WRLCK, 0, 0)
g = os.open(c.at(s, "file"), os.O_RDONLY)
lock(g, fcntl.F_RDLCK, 0, 0)
fcntl.flock(g, fcntl.LOCK_SH | fcntl.LOCK_NB)
c.ok(True, "a file in a snapshot can be locked for reading")
c.done()
