"""A tree with every kind of object, every way to change all of it, and the comparison of a snapshot with a frozen copy by other
people's programs.

What an ordinary user cannot make (devices, other owners, attributes in trusted and security, modes that shut the owner out) is
left out for one, and collected in `left_out`.
"""
from common import *

left_out = set()
PREALLOCATED = b"prealloc"  # SEEK_DATA of unwritten extents depends on what the page cache holds: only content and size count

NAMES = [b"plain", b"with space", b"trailing space ", b"new\nline", b"back\\slash", b"\xff\xfe not utf-8", "umlaut-\u00e4".encode(),
         b"-rf", b"--delete", b"*", b"x" * 255, b"...", b"tab\t", b".hidden", b"\x01\x7f"]
# (access, modification) as (seconds, nanoseconds). A filesystem that has no such time sets the nearest it has.
TIMES = [((0, 0), (0, 0)), ((1, 1), (1, 999999999)), ((-1, 500000000), (-1, 1)), ((-86400 * 365, 7), (-86400 * 3650, 123456789)),
         ((1 << 31, 5), ((1 << 31) + 5, 250000000)), ((1 << 32, 0), (5_000_000_000, 17)), ((15_000_000_000, 1), (16_000_000_000, 2)),
         ((1 << 40, 3), (-(1 << 40), 4))]
SIZES = (0, 1, 4095, 4096, 4097, 65536, 1 << 20, (1 << 20) + 1, 3_000_001, 5 << 20)


def as_root(what, fn, *a, **kw):
    if ROOT:
        fn(*a, **kw)
    else:
        left_out.add(what)


def fill(path, data):
    with open(path, "wb") as f:
        f.write(data)


def build(d, R, huge=False, large=300):
    """Makes the tree in the empty directory `d`. huge: with a sparse file of 9 GiB, which few programs copy in time. large:
    entries of the largest directory."""
    D = os.fsencode(d)
    for k in range(4):
        os.mkdir(d + "/dir%d" % k)
    os.mkdir(d + "/dir0/sub")
    os.mkdir(d + "/empty")
    os.makedirs(d + "/deep/" + "/".join("level %d" % k for k in range(60)))
    fill(d + "/deep/" + "/".join("level %d" % k for k in range(60)) + "/bottom", b"of it all")
    os.mkdir(d + "/names")
    for n in NAMES:
        fill(D + b"/dir0/" + n, n)
        os.mkdir(D + b"/names/" + n)
    _sizes_and_holes(d, R, huge)
    _links(d)
    _special(d)
    _modes_and_attributes(d, R)
    for k in range(large):
        os.close(os.open(d + "/dir3/entry-%04d" % k, os.O_CREAT | os.O_WRONLY))
    _times(d)


def _sizes_and_holes(d, R, huge):
    for n in SIZES:
        fill(d + "/size-%d" % n, R.randbytes(n))
    with open(d + "/hole-start", "wb") as f:
        f.seek(1 << 20)
        f.write(b"end" * 3000)
    with open(d + "/hole-middle", "wb") as f:
        f.write(b"a" * 8192)
        f.seek(256 << 10)
        f.write(b"b" * 8192)
    with open(d + "/hole-end", "wb") as f:
        f.write(b"data" * 5000)
        f.truncate(700_001)
    with open(d + "/hole-only", "wb") as f:
        f.truncate((8 << 20) + 11)
    with open(d + "/hole-odd", "wb") as f:
        for at in (12_345, 777_777, 1_048_575, 5_000_001, 9_999_999):
            f.seek(at)
            f.write(R.randbytes(at % 7000 + 1))
        f.truncate((12 << 20) + 5)
    with open(d + "/hole-many", "wb") as f:
        for k in range(0, 600, 3):
            f.seek(k * 4096)
            f.write(R.randbytes(4096))
    with open(d + "/prealloc", "wb") as f:
        f.write(b"z" * 10000)
        fallocate(f.fileno(), KEEP_SIZE, 0, 1 << 20)
    if huge:
        with open(d + "/huge", "wb") as f:
            f.seek((4 << 30) + 5)
            f.write(R.randbytes(10_000))
            f.truncate((9 << 30) + 1)


def _links(d):
    D = os.fsencode(d)
    for k in range(5):
        os.link(d + "/size-65536", d + "/dir%d/hard-%d" % (k % 4, k))
    os.symlink("size-4096", d + "/link")
    os.symlink(b"\xffodd \n target", D + b"/link-odd")
    for n in (60, 1000, 3000, 4080):
        try:
            os.symlink("y" * n, d + "/link-%d" % n)
        except OSError as e:
            if n < 1024 or e.errno != errno.ENAMETOOLONG:  # xfs has 1024, btrfs less than a page
                raise
    os.symlink("../nowhere", d + "/dir1/dangling")
    os.link(d + "/link", d + "/dir1/hardlink-to-symlink", follow_symlinks=False)


def _special(d):
    os.mkfifo(d + "/fifo", 0o640)
    os.link(d + "/fifo", d + "/dir2/fifo-too")
    os.mknod(d + "/sock", stat.S_IFSOCK | 0o755)
    as_root("devices", os.mknod, d + "/char", stat.S_IFCHR | 0o620, os.makedev(1, 3))
    as_root("devices", os.mknod, d + "/block", stat.S_IFBLK | 0o660, os.makedev(7, 300))


def _modes_and_attributes(d, R):
    for k, mode in enumerate((0o000, 0o400, 0o644, 0o755, 0o4755, 0o2755, 0o1777, 0o7777, 0o2640)):
        fill(d + "/mode-%d" % k, R.randbytes(100))
        as_root("other owners", os.chown, d + "/mode-%d" % k, 1000 + k, 2000 + k)
        if mode & 0o400 or ROOT:
            os.chmod(d + "/mode-%d" % k, mode)
        else:
            left_out.add("mode 0000")
    os.chmod(d + "/dir2", 0o2775)
    os.chmod(d + "/dir3", 0o1777)
    as_root("other owners", os.chown, d + "/dir3", 4_000_000_000, 3_999_999_999)
    as_root("other owners", os.lchown, d + "/link", 77, 78)
    os.setxattr(d + "/size-4096", "user.small", b"small")
    os.setxattr(d + "/size-4096", "user.empty", b"")
    os.setxattr(d + "/size-4096", "user.binary", bytes(range(256)))
    os.setxattr(d + "/size-4096", "user.name of \u00e4 kind", b"odd")
    try:
        os.setxattr(d + "/size-4097", "user.big", R.randbytes(60_000))
    except OSError as e:
        if e.errno != errno.ENOSPC:  # ext4 has a block for all, btrfs a little less than a node
            raise
        os.setxattr(d + "/size-4097", "user.big", R.randbytes(3000))
    for k in range(20):
        os.setxattr(d + "/size-4095", "user.many-%d" % k, b"%d" % k * k)
    os.setxattr(d + "/dir1", "user.dir", b"on a directory")
    for p in ("size-4096", "dir1", "link", "fifo", "sock", "char", "block"):
        for n in ("trusted.", "security."):
            as_root("attributes in %s*" % n, os.setxattr, d + "/" + p, n + p, b"of " + p.encode(), follow_symlinks=False)
    fill(d + "/capable", R.randbytes(5000))
    os.chmod(d + "/capable", 0o755)
    as_root("capabilities", os.setxattr, d + "/capable", "security.capability", NET_RAW)
    fill(d + "/acl", R.randbytes(100))
    os.setxattr(d + "/acl", ACL_ACCESS, acl((1, 6, -1), (2, 4, 1234), (4, 4, -1), (8, 5, 4321), (16, 5, -1), (32, 0, -1)))
    os.setxattr(d + "/dir2", ACL_DEFAULT, acl((1, 7, -1), (2, 5, 1234), (4, 5, -1), (16, 5, -1), (32, 1, -1)))
    os.setxattr(d + "/dir2", ACL_ACCESS, acl((1, 7, -1), (2, 7, 1235), (4, 5, -1), (16, 7, -1), (32, 5, -1)))
    fill(d + "/dir2/inherits", b"the default ACL")
    os.mkdir(d + "/dir2/inherits-too")


def _times(d):
    for k, (a, m) in enumerate(TIMES):
        fill(d + "/time-%d" % k, b"a time")
        os.symlink("t", d + "/timelink-%d" % k)
        os.mkdir(d + "/timedir-%d" % k)
        for n in ("time-", "timelink-", "timedir-"):
            set_times(d + "/%s%d" % (n, k), a, m)


# ------------------------------------------------------------------------------------------ every way to change all of it


def everything(d, *kinds):
    """All paths below `d`, those of a directory after the directory's own."""
    out = []
    for p, dirs, files in os.walk(os.fsencode(d)):
        out += [os.path.join(p, n) for n in files + dirs]
    return [p for p in out if not kinds or stat.S_IFMT(os.lstat(p).st_mode) in kinds]


def _edit(d, change, every=1, flags=os.O_RDWR):
    """change(fd, size) on the regular files."""
    for p in everything(d, stat.S_IFREG)[::every]:
        if not ROOT:  # whom modes do not stop
            os.chmod(p, os.lstat(p).st_mode & 0o7777 | 0o600)
        fd = os.open(p, flags)
        try:
            change(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)


def overwrite(d, R):
    def change(fd, size):
        os.pwrite(fd, b"HEAD", 0)
        os.pwrite(fd, R.randbytes(5000), size // 2)
        os.pwrite(fd, b"LAST", max(0, size - 4))
    _edit(d, change)
    if os.path.exists(d + "/huge"):
        with open(d + "/huge", "r+b") as f:
            f.seek((4 << 30) - 4096)
            f.write(R.randbytes(20_000))
            f.seek(8 << 30)
            f.write(b"in the hole behind")


def append(d, R):
    _edit(d, lambda fd, size: os.write(fd, R.randbytes(size % 4500 + 1)), flags=os.O_WRONLY | os.O_APPEND)


def extend(d, R):
    _edit(d, lambda fd, size: os.ftruncate(fd, size + 10_000))
    _edit(d, lambda fd, size: os.pwrite(fd, b"far beyond", size + 100_000), every=3)


def punch(d, R):
    def change(fd, size):
        _allocate(fd, (PUNCH | KEEP_SIZE, size // 3, size // 4 + 1), (COLLAPSE, 4096, 8192), (INSERT, 0, 4096))
    _edit(d, change)


def allocate(d, R):
    """Leaves unwritten extents behind: no two readings need agree whether they are holes."""
    _edit(d, lambda fd, size: _allocate(fd, (ZERO, size // 2, 5000), (0, size, 100), (KEEP_SIZE, size + 5000, 9000)))
    _edit(d, lambda fd, size: os.ftruncate(fd, size + 5000))


def _allocate(fd, *calls):
    for mode, at, n in calls:
        try:
            fallocate(fd, mode, at, n)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def truncate(d, R):
    _edit(d, lambda fd, size: (os.ftruncate(fd, size // 3), os.ftruncate(fd, size // 2)))
    _edit(d, lambda fd, size: os.ftruncate(fd, 0), every=3)
    _edit(d, lambda fd, size: os.pwrite(fd, b"beyond", 20_000), every=6)


def modes(d, R):
    for p in everything(d):
        s = os.lstat(p)
        if not stat.S_ISLNK(s.st_mode):
            os.chmod(p, 0)
            os.chmod(p, (s.st_mode & 0o7777) ^ 0o021 | 0o600)


def owners(d, R):
    for k, p in enumerate(everything(d)):
        as_root("changes of owner", os.lchown, p, 5000 + k, 6000 + k)


def times(d, R):
    for k, p in enumerate(everything(d)):
        set_times(p, (k, k), (-k, k))


def attributes(d, R):
    spaces = ("user.", "trusted.", "security.") if ROOT else ("user.",)
    for k, p in enumerate(everything(d)):
        for n in [n for n in os.listxattr(p, follow_symlinks=False) if n.startswith(spaces)]:
            if n.startswith("trusted.SGI_ACL"):  # xfs shows its ACLs so as well; what is none would be damage
                continue
            if k % 2 and n != "security.capability":
                os.setxattr(p, n, b"changed", follow_symlinks=False)
            else:
                os.removexattr(p, n, follow_symlinks=False)
        for space in spaces:
            try:
                os.setxattr(p, space + "new", b"%d" % k, follow_symlinks=False)
            except OSError as e:
                if space != "user." or e.errno != errno.EPERM:  # xattr(7): only files and directories have user attributes
                    raise


def acls(d, R):
    for k, p in enumerate(everything(d, stat.S_IFREG, stat.S_IFDIR)):
        for n in (ACL_ACCESS, ACL_DEFAULT):
            if n in os.listxattr(p):
                os.removexattr(p, n)
        os.setxattr(p, ACL_ACCESS, acl((1, 7, -1), (2, k % 8, 77), (4, 5, -1), (16, 7, -1), (32, k % 8, -1)))
        if os.path.isdir(p):
            os.setxattr(p, ACL_DEFAULT, acl((1, 7, -1), (4, k % 8, -1), (8, 6, 99), (16, 7, -1), (32, 0, -1)))
        elif k % 2:
            as_root("capabilities", os.setxattr, p, "security.capability", NET_RAW)


def hard_links(d, R):
    D = os.fsencode(d)
    for k, p in enumerate(everything(d)):
        if not stat.S_ISDIR(os.lstat(p).st_mode):
            os.link(p, D + (b"/another-%d", b"/dir%d/another" % (k % 4) + b"-%d")[k % 2] % k, follow_symlinks=False)
            if k % 3 == 0:
                os.unlink(p)


def rename(d, R):
    D = os.fsencode(d)
    for k, p in enumerate(reversed(everything(d))):
        name = b"moved-%d" % k
        os.rename(p, os.path.join((D, os.path.dirname(p))[k % 2], name))


def exchange(d, R):
    left = everything(d, stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO)[:400]
    for a, b in zip(left[::2], left[1::2]):
        renameat2(a, b, EXCHANGE)
    dirs = [p for p in everything(d, stat.S_IFDIR) if os.path.dirname(p) == os.fsencode(d)]
    for a, b in zip(dirs, left):
        if not b.startswith(a + b"/"):
            renameat2(a, b, EXCHANGE)


def replace(d, R):
    """Renames over each object, a directory's emptied first."""
    for k, p in enumerate(reversed(everything(d))):
        q = os.fsencode(d) + b"/over-%d" % k
        if stat.S_ISDIR(os.lstat(p).st_mode):
            if os.listdir(p):
                continue
            os.mkdir(q)
        elif k % 2:
            os.symlink("replacement", q)
        else:
            fill(q, b"replacement %d" % k)
        os.rename(q, p)


def swap_kinds(d, R):
    """Each name gets an object of another kind."""
    for k, p in enumerate(reversed(everything(d))):
        if stat.S_ISDIR(os.lstat(p).st_mode):
            if os.listdir(p):
                continue
            os.rmdir(p)
            os.mkfifo(p) if k % 2 else fill(p, b"was a directory")
        else:
            os.unlink(p)
            os.mkdir(p)


def unlink(d, R):
    for p in everything(d)[::-1]:
        if not stat.S_ISDIR(os.lstat(p).st_mode):
            os.unlink(p)


def remove_all(d, R):
    for n in os.listdir(d):
        p = os.path.join(d, n)
        shutil.rmtree(p) if os.path.isdir(p) and not os.path.islink(p) else os.unlink(p)


# In an order in which each finds something to change; `build` fills the place anew.
WAYS = (overwrite, append, extend, punch, truncate, modes, owners, times, attributes, acls, hard_links, exchange, rename, swap_kinds,
        remove_all, build, allocate, replace, unlink, remove_all)


# ------------------------------------------------------------------------------------------ comparison


def relax(m, allocated=False):
    """A manifest without what no two readings need agree on. allocated: there are unwritten extents everywhere."""
    for p, e in m.items():
        if allocated or PREALLOCATED in p:
            e.pop("data", None)
    return m


class Frozen:
    """A copy made with `cp -a` while nobody writes, and an archive of it: what a snapshot is to equal."""

    # What a copier cannot set, and a directory's size, which tells how many entries it once had.
    IGNORED = ("ctime", "blocks")

    def __init__(self, source, at):
        self.at = at
        sync(os.path.dirname(at))
        command("cp", "-a", source, at)
        # before anything else reads the copy and sets its access times
        self.want = self.walk(at)
        # Where the data of a file lies is up to its filesystem, which may give a copy more than it was told to.
        for p, e in self.walk(source).items():
            self.want[p].update({"data": e["data"]} if "data" in e else {})
        self.archive = at + ".tar"
        command("tar", "--create", "--format=posix", "--sparse", "--xattrs", "--xattrs-include=*", "--acls", "--file", self.archive, "-C", at, ".")

    @staticmethod
    def walk(root):
        m = relax(manifest(root))
        for e in m.values():
            if e.get("kind") == stat.S_IFDIR:
                e.pop("size", None)
            # Copying sets it, in the source and in the copy, without a mount that sets none (py/unprivileged has the case).
            if e.get("kind") == stat.S_IFLNK and not ROOT:
                e.pop("atime", None)
        return m

    def check_walk(self, c, shown, when):
        c.same(self.want, self.walk(shown), "%s: a walk with statx, xattrs, maps of holes, content and hard links" % when, ignore=self.IGNORED)

    def check(self, c, shown, when):
        """The walk, and what rsync, diff and tar say."""
        self.check_walk(c, shown, when)
        for a, b, way in ((self.at, shown, "from the copy"), (shown, self.at, "from the snapshot")):
            # modify-window: without it nanoseconds do not count
            said = _said("rsync", "-aHAXS", "--checksum", "--modify-window=-1", "--delete", "--dry-run", "--itemize-changes", a + "/", b + "/")
            c.equal((0, ""), said, "%s: rsync %s finds no difference" % (when, way))
        status, text = _said("diff", "-r", "--no-dereference", self.at, shown)
        lines = [line for line in text.splitlines() if not _special_file(line)]
        c.ok(status in (0, 1) and not lines, "%s: diff finds no difference" % when, lines[:4])
        c.equal((0, ""), _said("tar", "--compare", "--xattrs", "--xattrs-include=*", "--acls", "--file", self.archive, "-C", shown),
                "%s: tar finds no difference" % when)

    def remove(self):
        shutil.rmtree(self.at)
        os.unlink(self.archive)


def _said(*words):
    r = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
                       env=dict(os.environ, LC_ALL="C"))
    return r.returncode, r.stdout.decode(errors="replace")


def _special_file(line):
    """diff does not compare special files, and says so of two that are alike."""
    words = line.rsplit(" is a ", 2)
    return len(words) == 3 and words[0].startswith("File ") and " while file " in words[1] and words[1].split(" while file ")[0] == words[2]
