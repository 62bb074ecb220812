"""What the suites of scripts/conformance share: a disk with a cowfs mount of its own, programs that run on it with a time
limit, and snapshots that are cut meanwhile and verified."""
import glob, importlib.machinery, importlib.util, os, resource, shutil, signal, subprocess, tempfile, threading, time

HERE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def _load(name, path):
    loader = importlib.machinery.SourceFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


manifest = _load("tree_manifest", os.path.join(HERE, "tree-manifest")).manifest


class Failure(Exception):
    """A suite found something wrong."""


def command(*words, limit=120, **more):
    """Runs a command to its end. Returns what it said; fails when it fails."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit, **more)
    text = done.stdout.decode(errors="replace")
    if done.returncode:
        raise Failure("%s: exit code %d\n%s" % (" ".join(map(str, words)), done.returncode, text[-3000:]))
    return text


def difference(want, got, limit=6):
    """The first lines in which two manifests differ, as text."""
    lost, new = set(want) - set(got), set(got) - set(want)
    lines = ["- " + line for line in sorted(lost)] + ["+ " + line for line in sorted(new)]
    return "\n".join(lines[:limit] + ["(%d lines in all)" % len(lines)])


class Lab:
    """A loop-mounted filesystem with an empty directory on it (`backing`), that directory mounted with cowfs (`mnt`), and
    a second directory beside it (`control`) in which the same can be run without cowfs."""

    MKFS = {"ext4": ["mkfs.ext4", "-qF"], "xfs": ["mkfs.xfs", "-qf"], "btrfs": ["mkfs.btrfs", "-qf"]}

    # Larger than what a suite writes with all its snapshots: on a full disk the oldest of them would go.
    def __init__(self, name, kind, cowfs, work, gigabytes=12):
        self.name, self.kind, self.cowfs = name, kind, cowfs
        # Short names all the way: suites make sockets, whose paths can have 107 bytes (unix(7)).
        self.dir = tempfile.mkdtemp(prefix="%s." % name[:4], dir=work)
        os.chmod(self.dir, 0o755)
        self.disk, self.mnt, self.log = (os.path.join(self.dir, n) for n in ("d", "m", "cowfs.log"))
        self.backing, self.control = os.path.join(self.disk, "b"), os.path.join(self.disk, "c")
        os.mkdir(self.disk)
        os.mkdir(self.mnt)
        image = os.path.join(self.dir, "image")
        with open(image, "wb") as f:
            f.truncate(gigabytes << 30)
        command(*self.MKFS[kind], image)
        command("mount", "-o", "loop", image, self.disk)
        try:
            os.mkdir(self.backing)
            os.mkdir(self.control)
            self.mount()
        except BaseException:
            self.close(keep=False)
            raise

    def mount(self):
        command(self.cowfs, "mount", "--log", self.log, self.backing, self.mnt)
        if self.mount_type() != "fuse.cowfs":
            raise Failure("%s is not a cowfs mount" % self.mnt)

    def umount(self):
        command(self.cowfs, "umount", self.mnt)

    def mount_type(self):
        kind = None
        with open("/proc/self/mountinfo") as table:
            for line in table:
                fields = line.split()
                if fields[4] == self.mnt:
                    kind = fields[fields.index("-") + 1]
        return kind

    def daemons(self):
        """The processes of the mount: the daemon and its helper."""
        found = []
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            try:
                with open(path, "rb") as f:
                    words = f.read().split(b"\0")
            except OSError:
                continue
            if self.mnt.encode() in words and os.path.basename(words[0]) == os.path.basename(self.cowfs).encode():
                found.append(int(path.split("/")[2]))
        return found

    def descriptors(self):
        """How many the daemon has open."""
        return max((len(os.listdir("/proc/%d/fd" % pid)) for pid in self.daemons()), default=0)

    def snapshot(self, name):
        return os.path.join(self.mnt, ".snapshots", name)

    def close(self, keep):
        """Takes everything away; with `keep` leaves the files, without a mount. Never raises: it follows a failure."""
        if self.mount_type():
            subprocess.run([self.cowfs, "umount", self.mnt], stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
        while self.mount_type():
            subprocess.run(["umount", "-l", self.mnt], capture_output=True)
        for pid in self.daemons():
            print("%s: the daemon %d outlived its mount" % (self.name, pid), flush=True)
            os.kill(pid, signal.SIGKILL)
        if os.path.ismount(self.disk):
            for _ in range(50):
                if subprocess.run(["umount", self.disk], capture_output=True).returncode == 0:
                    break
                time.sleep(0.1)
            else:
                subprocess.run(["umount", "-l", self.disk], capture_output=True)
        if keep:
            print("%s: kept for a look: %s (image is the disk, cowfs.log the daemon's)" % (self.name, self.dir), flush=True)
        else:
            shutil.rmtree(self.dir, ignore_errors=True)


class Job:
    """A program that runs in a session of its own, so that it can be stopped and killed with its children."""

    def __init__(self, words, limit, **more):
        self.words, self.limit, self.output = words, limit, tempfile.TemporaryFile()
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT,
                                        start_new_session=True, **more)

    def wait(self):
        """Waits for the end. Returns the exit code and what the program said."""
        try:
            code = self.process.wait(self.limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failure("%s did not end within %d s\n%s" % (" ".join(self.words), self.limit, self.said()[-3000:])) from None
        return code, self.said()

    def kill(self):
        for pid in {pid for pid, _ in self._threads()}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()

    def said(self):
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

    def _threads(self):
        """The process and the state of each thread of the session."""
        threads = []
        for path in glob.glob("/proc/[0-9]*/task/*/stat"):
            try:
                with open(path) as f:
                    fields = f.read().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid:
                threads.append((int(path.split("/")[2]), fields[0]))
        return threads

    def freeze(self, patience=1.0):
        """Stops every thread. False, with all running on, if one cannot be stopped for now: one that waits in a system
        call for another that is stopped already, as vfork does."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                os.killpg(self.process.pid, signal.SIGSTOP)
            except ProcessLookupError:
                return False
            states = [state for _, state in self._threads()]
            if all(state in "TtZX" for state in states) and "T" in states:
                return True
            time.sleep(0.002)
        self.thaw()
        return False

    def thaw(self):
        try:
            os.killpg(self.process.pid, signal.SIGCONT)
        except ProcessLookupError:
            pass


class Cutter:
    """Cuts snapshots of a lab while something runs, and verifies them.

    What each snapshot shows is recorded the moment it exists. When the running program can be stopped for that moment,
    the snapshot must show what the live tree shows. All must show the same at the end, after a remount, and after the
    deletion of every second one (`verify`)."""

    def __init__(self, lab, period, job=None, cut=None):
        """`cut(name)` is called for each instead of plain mkdir, by suites that have something to note beside."""
        self.lab, self.period, self.job = lab, period, job
        self.make = cut or (lambda name: os.mkdir(lab.snapshot(name)))
        self.names, self.records, self.exact, self.most_descriptors = [], os.path.join(lab.dir, "records"), 0, 0
        os.makedirs(self.records, exist_ok=True)
        self._stop, self._problem, self._thread = threading.Event(), None, None

    def __enter__(self):
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def beside(self, job):
        """Cuts until `job` has ended, which is stopped for each cut; once afterwards if it ended before the first.
        Returns what `Job.wait` does."""
        self.job, before = job, len(self.names)
        try:
            with self:
                outcome = job.wait()
        finally:
            job.kill()
        if len(self.names) == before:
            self.cut()
        return outcome

    def __exit__(self, kind, *_):
        self._stop.set()
        self._thread.join()
        if self._problem and kind is None:
            raise self._problem

    def _run(self):
        try:
            while not self._stop.wait(self.period):
                self.cut()
        except BaseException as problem:
            self._problem = problem if isinstance(problem, Failure) else Failure("cutting: %r" % problem)
            self._problem.__cause__ = problem

    def _record(self, name):
        return os.path.join(self.records, name)

    def cut(self):
        name = "s%05d" % len(self.names)
        frozen = self.job is not None and self.job.freeze()
        try:
            self.make(name)
            lines = manifest(self.lab.snapshot(name))
            if frozen:
                live = manifest(self.lab.mnt)
                if live != lines:
                    raise Failure("%s is not the live tree, which stands still:\n%s" % (name, difference(live, lines)))
                self.exact += 1
        finally:
            if frozen:
                self.job.thaw()
        with open(self._record(name), "w") as f:
            f.write("\n".join(lines))
        self.names.append(name)
        self.most_descriptors = max(self.most_descriptors, self.lab.descriptors())
        return name

    def check(self, when):
        for name in self.names:
            with open(self._record(name)) as f:
                want = f.read().split("\n")
            got = manifest(self.lab.snapshot(name))
            if want != got:
                raise Failure("%s has changed %s:\n%s" % (name, when, difference(want, got)))

    def verify(self):
        """Checks all snapshots; deletes every second one. Returns a word on what was checked."""
        cut = len(self.names)
        if not cut:
            raise Failure("no snapshot was cut, so nothing is verified")
        self.check("since it was cut")
        live = manifest(self.lab.mnt)
        self.lab.umount()
        backing = [line for line in manifest(self.lab.backing) if not line.startswith(("b'' ", "b'.cowfs"))]
        if backing != live[1:]:
            raise Failure("the backing directory is not the live tree:\n%s" % difference(live[1:], backing))
        self.lab.mount()
        self.check("by a remount")
        for name in self.names[::2]:
            os.rmdir(self.lab.snapshot(name))
        self.names = self.names[1::2]
        self.check("by the deletion of others")
        self.lab.umount()
        self.lab.mount()
        self.check("by the deletion of others and a remount")
        return "%d snapshots stand still%s" % (cut, ", %d of them cut while all stood still and equal to the live tree" % self.exact if self.job else "")


def raise_limits():
    """As many descriptors as allowed: a manifest takes one for each level of a tree."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
