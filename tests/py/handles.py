#!/usr/bin/env python3
"""File handles (name_to_handle_at(2)) of the live tree: they open the object after the kernel has forgotten it, wherever it is by then, and nothing once it is removed."""
from common import *

c = Case(limit=90)
os.makedirs(c.work + "/deep/er/est")
os.makedirs(c.work + "/other")
FILES = ["deep/er/est/f%d" % k for k in range(300)]
for name in FILES:
    with open(os.path.join(c.work, name), "w") as f:
        f.write(name)


class Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint), ("kind", ctypes.c_int), ("data", ctypes.c_ubyte * 128)]


def handle(path):
    h, mount = Handle(128), ctypes.c_int()
    if libc.name_to_handle_at(-100, os.fsencode(path), ctypes.byref(h), ctypes.byref(mount), 0) < 0:
        raise OSError(ctypes.get_errno(), "name_to_handle_at", path)
    return h


top = os.open(c.work, os.O_RDONLY)


def reopen(h, flags=os.O_RDONLY):
    fd = libc.open_by_handle_at(top, ctypes.byref(h), flags)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "open_by_handle_at")
    return fd


def content(h):
    with os.fdopen(reopen(h)) as f:
        return f.read()


def forget():
    with open("/proc/sys/vm/drop_caches", "w") as f:
        f.write("2")


def fails(h):
    try:
        os.close(reopen(h))
    except OSError as e:
        return e.errno
    return 0


def settles(h):
    """As fails(), once the kernel has let go of the inode: it holds it until the server has answered RELEASE, which it sends in its own time after the last close (fuse_prepare_release of fs/fuse/file.c)."""
    end = time.monotonic() + 10
    while not (error := fails(h)) and time.monotonic() < end:
        time.sleep(0.001)
    return error


files = {name: handle(os.path.join(c.work, name)) for name in FILES}
below = handle(c.work + "/deep/er/est")
for k in range(3):
    forget()
    for name, h in files.items():
        c.equal(name, content(h), "the file behind a handle")
    fd = reopen(below, os.O_RDONLY | os.O_DIRECTORY)
    c.equal(len(FILES), len(os.listdir(fd)), "the directory behind a handle")
    c.equal(c.work + "/deep/er/est", os.readlink("/proc/self/fd/%d" % fd), "its path")
    os.close(fd)
os.rename(c.work + "/deep/er", c.work + "/other/moved")
os.rename(c.work + "/other/moved/est/f0", c.work + "/f0")
forget()
c.equal("deep/er/est/f0", content(files["deep/er/est/f0"]), "a file that was moved")
fd = reopen(below, os.O_RDONLY | os.O_DIRECTORY)
c.equal(c.work + "/other/moved/est", os.readlink("/proc/self/fd/%d" % fd), "the path of a directory that was moved")
os.close(fd)
fd = reopen(files["deep/er/est/f1"], os.O_WRONLY | os.O_TRUNC)
os.write(fd, b"written")
os.close(fd)
with open(c.work + "/other/moved/est/f1") as f:
    c.equal("written", f.read(), "what was written through a handle")

os.unlink(c.work + "/f0")
forget()
c.equal(errno.ESTALE, settles(files["deep/er/est/f0"]), "a handle of a removed file")
s = c.snap()
shown = os.path.join(c.at(s), "other/moved/est/f2")
os.unlink(c.work + "/other/moved/est/f2")
forget()
c.equal(errno.ESTALE, settles(files["deep/er/est/f2"]), "a handle of a removed file that a snapshot shows")
with open(shown) as f:
    c.equal("deep/er/est/f2", f.read(), "that file in the snapshot")
fd = os.open(c.work + "/other/moved/est/f3", os.O_RDONLY)
os.unlink(c.work + "/other/moved/est/f3")
c.equal("deep/er/est/f3", content(files["deep/er/est/f3"]), "a handle of a file without a name that is open")
os.close(fd)
c.equal(errno.ESTALE, settles(files["deep/er/est/f3"]), "the same when it is closed")
for _ in range(100):
    fd = os.open(c.work + "/passing", os.O_CREAT | os.O_RDWR, 0o600)
    h = handle(c.work + "/passing")
    os.unlink(c.work + "/passing")
    os.close(fd)
    c.equal(errno.ESTALE, settles(h), "a handle of a file that was removed and closed at once")
os.close(top)
c.done()
