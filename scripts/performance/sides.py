"""The filesystems that scripts/bench compares: how each is mounted, that it is what it says, and how it goes away again."""
import atexit, contextlib, ctypes, json, os, shutil, subprocess, tempfile, time

MKFS = {"ext4": ["mkfs.ext4", "-qF"], "xfs": ["mkfs.xfs", "-qf"], "btrfs": ["mkfs.btrfs", "-qf"]}
#: The nice value of all that is measured, unless it is :func:`unpreferred`.
PRIORITY = -15


class Failure(Exception):
    """A measurement, or what it needs, does not work."""


def run(*words, limit=120):
    """Runs a command to its end; returns what it printed. Fails when it fails or takes longer than `limit` seconds."""
    process = subprocess.Popen([str(w) for w in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "RUST_BACKTRACE": "0"})
    try:
        out, error = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            pass  # it hangs in the filesystem; `abort` or `close` of the side ends it
        raise Failure("%s: not done within %d s" % (" ".join(map(str, words)), limit)) from None
    except BaseException:
        process.kill()
        raise
    if process.returncode:
        raise Failure("%s: exit code %d\n%s" % (" ".join(map(str, words)), process.returncode, (out + error)[-2000:]))
    return out


def mount_entry(path):
    """The last line of the mount table for this mount point: mount options, type, source, device number; None if there is none."""
    entry = None
    with open("/proc/self/mountinfo") as table:
        for line in table:
            fields = line.split()
            if fields[4] == path:
                entry = {"options": fields[5].split(","), "kind": fields[fields.index("-") + 1], "source": fields[fields.index("-") + 2], "device": fields[2]}
    return entry


@contextlib.contextmanager
def unpreferred():
    """What is measured has the nice value of everybody meanwhile: where it takes all processors, threads of the kernel that it
    waits for (of loop devices, of the journal of ext4) would come to run too rarely otherwise."""
    global PRIORITY
    before, PRIORITY = PRIORITY, 0
    prefer()
    try:
        yield
    finally:
        PRIORITY = before
        prefer()


def prefer(path=None):
    """Has other work on the machine disturb less: this process and its children, or those that serve `path` and have
    gone to the background. Where sessions share the processor (sched(7), autogroup) the nice value of a process counts
    only within its session, whose own value is what it was again at the end: a shell goes on in it."""
    def set_group(pid, value):
        try:
            with open("/proc/%s/autogroup" % pid, "w") as f:
                f.write(str(value))
        except OSError:
            pass  # it has ended, or the kernel has no groups

    if path is None:
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
        if os.path.exists("/proc/self/autogroup"):
            with open("/proc/self/autogroup") as f:
                atexit.register(set_group, "self", f.read().split()[-1])
        return set_group("self", PRIORITY)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/cmdline" % pid, "rb") as f:
                serves = path.encode() in f.read().split(b"\0")
        except OSError:
            continue
        if serves and int(pid) != os.getpid():
            set_group(pid, PRIORITY)


class Disk:
    """A fresh filesystem in an image file, with every side's directory on it, so that all stand on the same ground."""

    def __init__(self, work, kind, gigabytes):
        self.kind, self.root = kind, tempfile.mkdtemp(prefix="cowfs-bench.", dir=work)
        self.path, self.loop = os.path.join(self.root, "disk"), None
        image = os.path.join(self.root, "image")
        try:
            os.mkdir(self.path)
            with open(image, "wb") as f:
                f.truncate(gigabytes << 30)
            run(*MKFS[kind], image)
            # Past the page cache of the filesystem that holds the image: a cold read is one from the disk.
            self.loop = run("losetup", "--find", "--show", "--direct-io=on", image).strip()
            run("mount", "-o", "noatime", self.loop, self.path)
            if mount_entry(self.path)["kind"] != kind:
                raise Failure("%s is not %s" % (self.path, kind))
        except BaseException:
            self.close()
            raise

    def close(self):
        """Never raises: it may follow a failure."""
        for flags in [[]] * 20 + [["-l"]]:
            if not os.path.ismount(self.path) or subprocess.run(["umount", *flags, self.path], capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        if self.loop:
            subprocess.run(["losetup", "-d", self.loop], capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)


class Side:
    """One column of the table. `dir` is where it is measured, `backing` where its files really are."""
    kind = None
    #: What the mount table must show as its source, where the type does not tell.
    source = None
    #: Rows that it refuses.
    cannot = ()
    #: Of cowfs: how many snapshots there are before anything is measured.
    snapshots = 0

    def __init__(self, name, disk):
        # The mount table writes other characters than these as numbers.
        plain = "".join(c if c.isalnum() else "-" for c in name)
        self.name, self.home = name, os.path.join(disk.path, plain)
        self.backing = os.path.join(self.home, "backing")
        self.dir = os.path.join(disk.root, "mnt-" + plain)
        os.makedirs(self.backing)
        os.mkdir(self.dir)
        self.process = None

    def start(self):
        self.mount()
        end = time.monotonic() + 10
        while mount_entry(self.dir) is None and time.monotonic() < end:
            time.sleep(0.02)
        entry = mount_entry(self.dir)
        if entry is None or entry["kind"] != self.kind or self.source not in (None, entry["source"]):
            raise Failure("%s: the mount is not what it should be but %s" % (self.name, entry))
        prefer(self.dir)

    def forget(self):
        """Has the kernel forget the names and inodes of the mount, not those of the backing directory. Remounting with
        the same flags does just this (shrink_dcache_sb of fs/super.c)."""
        bits = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21}
        flags = sum(bits.get(option, 0) for option in mount_entry(self.dir)["options"]) | 32
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"none", self.dir.encode(), b"none", ctypes.c_ulong(flags), None):
            raise Failure("%s: remount: %s" % (self.name, os.strerror(ctypes.get_errno())))

    def abort(self):
        """Ends a FUSE connection, so that whatever hangs in it ends."""
        entry = mount_entry(self.dir)
        path = entry and "/sys/fs/fuse/connections/%s/abort" % entry["device"].split(":")[1]
        if path and os.path.exists(path):
            with open(path, "w") as f:
                f.write("1")

    def stop(self):
        """Never raises: it may follow a failure."""
        self.unmount()
        while mount_entry(self.dir) and subprocess.run(["umount", "-l", self.dir], capture_output=True).returncode == 0:
            pass
        if self.process:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def unmount(self):
        try:
            for _ in range(20):
                if not mount_entry(self.dir) or subprocess.run(["umount", self.dir], capture_output=True, timeout=60).returncode == 0:
                    return
                time.sleep(0.2)
        except subprocess.TimeoutExpired:
            self.abort()


class View(Side):
    """A snapshot of a cowfs side, to read from."""
    kind = "fuse.cowfs"

    def __init__(self, name, side, snapshot):
        self.name, self.side, self.process = name, side, None
        self.dir, self.backing = side.snapshot(snapshot), side.backing

    def start(self):
        pass

    def stop(self):
        pass

    def forget(self):
        self.side.forget()

    def abort(self):
        self.side.abort()


class Bare(Side):
    def __init__(self, name, disk):
        super().__init__(name, disk)
        self.dir = self.backing

    def start(self):
        pass

    def stop(self):
        pass

    def forget(self):
        pass  # the ground on which all stand is warm for all


class Cowfs(Side):
    kind = "fuse.cowfs"

    def __init__(self, name, disk, binary, options, snapshots=0):
        super().__init__(name, disk)
        self.binary, self.options, self.snapshots = binary, options, snapshots
        self.log = self.dir + ".log"

    def mount(self):
        words = ["mount", "--log", self.log] + (["-o", ",".join(self.options)] if self.options else [])
        run(self.binary, *words, self.backing, self.dir)

    def unmount(self):
        if mount_entry(self.dir):
            try:
                subprocess.run([self.binary, "umount", self.dir], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
            except subprocess.TimeoutExpired:
                self.abort()

    def snapshot(self, name):
        return os.path.join(self.dir, ".snapshots", name)

    shows = snapshot

    def status(self):
        return json.loads(run(self.binary, "status", "--json", self.dir))


class Floor(Side):
    kind, source = "fuse", "floor"

    def __init__(self, name, disk, binary, *flags):
        super().__init__(name, disk)
        self.words = [binary, self.dir, *flags]
        # It has no files but those in its memory.
        self.backing = self.dir

    def mount(self):
        self.process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


class FloorOnDisk(Floor):
    """Keeps bytes, and the old ones of what is overwritten while there is a snapshot. Nobody can read a snapshot."""

    def __init__(self, name, disk, binary, *flags):
        files = os.path.join(disk.path, "files")
        super().__init__(name, disk, binary, *flags, "--files", files)
        os.mkdir(files)

    def snapshot(self, name):
        return os.path.join(self.dir, ".snapshots", name)

    def shows(self, _):
        """What to copy in place of a snapshot."""
        return self.dir


class Bindfs(Side):
    kind = "fuse"

    @property
    def source(self):
        return self.backing

    def mount(self):
        run("bindfs", self.backing, self.dir)


class Mergerfs(Side):
    kind = "fuse.mergerfs"
    # It writes from a buffer that O_DIRECT of ext4 does not accept (EINVAL).
    cannot = ("direct write 4k",)

    def mount(self):
        # It keeps 4 GiB free by default, which is more than the smaller disks have.
        run("mergerfs", "-o", "allow_other,minfreespace=0", self.backing, self.dir)


class Overlay(Side):
    """All files are in the upper directory, so that nothing is measured of copying up."""
    kind = "overlay"
    command = ["mount", "-t", "overlay", "overlay"]

    def mount(self):
        lower, workdir = os.path.join(self.home, "lower"), os.path.join(self.home, "work")
        for path in (lower, workdir):
            os.mkdir(path)
        run(*self.command, "-o", "lowerdir=%s,upperdir=%s,workdir=%s" % (lower, self.backing, workdir), self.dir)


class FuseOverlayfs(Overlay):
    kind = "fuse.fuse-overlayfs"
    command = ["fuse-overlayfs"]


def accepts(binary, option):
    """Whether this cowfs knows a mount option: it looks at options before it looks at anything else."""
    done = subprocess.run([binary, "mount", "-o", option, "/nonexistent/source", "/nonexistent/mountpoint"], stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=60)
    return done.returncode != 2
