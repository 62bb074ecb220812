"""pjdfstest and fsx."""
import contextlib, os, random, re
from lab import Cutter, Failure, Job

PJDFSTEST = """[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}

[settings]
naptime = 0.02
allow_remount = %s

[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"""


def pjdfstest_run(lab, options, name, directory, cases=(), remount=False, cutter=None):
    """Runs cases in a directory, all if none are named. Returns {case: ok, FAILED or skipped} and what was said."""
    config, other = os.path.join(lab.dir, name + ".toml"), os.path.join(lab.dir, name + ".other")
    with open(config, "w") as f:
        f.write(PJDFSTEST % ("true" if remount else "false"))
    # What tests of EXDEV go to: another filesystem than that of the directory.
    os.mkdir(other)
    job = Job([options.tool("pjdfstest"), "-c", config, "-p", directory, "-s", other, *cases], 300, cwd=directory)
    if cutter:
        with cutter:
            _, said = job.wait()
    else:
        _, said = job.wait()
    results = dict(re.findall(r"^(\S+::\S+)\s+(ok|FAILED|skipped)", said, re.M))
    total = re.search(r"(\d+) total", said)
    if not total or int(total[1]) != len(results) or len(results) < (10 if cases else 390):
        raise Failure("pjdfstest did not run to its end:\n" + said[-2000:])
    return results, said


@contextlib.contextmanager
def helper(lab):
    """The helper of mount(8) in its place (docs/CLI.md), for as long as it takes if there is none."""
    path = "/sbin/mount.fuse.cowfs"
    ours = not os.path.lexists(path)
    if ours:
        os.symlink(lab.cowfs, path)
    try:
        yield
    finally:
        if ours:
            os.unlink(path)


def pjdfstest(lab, options):
    """All cases on the mount and on the bare directory. Those that remount the filesystem read-only run by themselves, on
    the mount alone: nobody may write meanwhile."""
    bare, said = pjdfstest_run(lab, options, "bare", lab.control)
    # A case that fails here would hide the same failure of the mount. btrfs has one of its own.
    if "FAILED" in bare.values() and lab.kind != "btrfs":
        raise Failure("pjdfstest fails on the bare directory:\n" + "\n".join(re.findall(r"^\S+\s+FAILED\n\s.*", said, re.M)))
    cutter = Cutter(lab, 0.3)
    through, said = pjdfstest_run(lab, options, "mount", lab.mnt, cutter=cutter)
    cutter.cut()
    with helper(lab):
        remounting, more = pjdfstest_run(lab, options, "remount", lab.mnt, cases=["erofs"], remount=True)
    through.update(remounting)
    worse = [case for case, result in sorted(through.items())
             if result == "FAILED" and bare[case] != "FAILED" or result == "skipped" and bare[case] == "ok"]
    # FUSE gives a filesystem no way to tell its limit of links (pathconf(3)).
    worse = [case for case in worse if not (through[case] == "skipped" and case == "link::link_count_max")]
    if worse:
        raise Failure("worse than on the bare directory: %s\n%s" % (" ".join(worse), "\n".join(re.findall(r"^\S+\s+(?:FAILED|skipped)\n\s.*", said + more, re.M))))
    count = lambda results: "%d passed, %d failed, %d skipped" % tuple(list(results.values()).count(r) for r in ("ok", "FAILED", "skipped"))
    return "%s (bare, without remounting: %s); %s" % (count(through), count(bare), cutter.verify())


FSX = """nomsyncafterwrite = %s
flen = 400000

[opsize]
# posix_fallocate(3) refuses a length of 0, which fsx takes for a failure.
min = 1
max = 70000

[weights]
close_open = 1
read = 10
write = 10
mapread = 10
mapwrite = 10
invalidate = 1
truncate = 5
fsync = 0.1
fdatasync = 0.1
posix_fallocate = 2
punch_hole = 4
sendfile = 3
posix_fadvise = 1
copy_file_range = 4
"""


def fsx(lab, options):
    """Each seed with many snapshots, each cut while fsx is stopped, so that it must be equal to the live file."""
    seeds = options.seeds or [random.randrange(1 << 30) for _ in range(1 if options.quick else 4)]
    operations = options.operations or (10_000 if options.quick else 200_000)
    # fsx stands still for most of the time if a snapshot is cut and read every 50 ms: too long for many operations.
    cutter = Cutter(lab, 0.05 if operations <= 20_000 else 0.5)
    for number, seed in enumerate(seeds):
        config = os.path.join(lab.dir, "fsx.toml")
        with open(config, "w") as f:
            f.write(FSX % ("true" if number % 2 else "false"))
        print("fsx: seed %d, %d operations" % (seed, operations), flush=True)
        code, said = cutter.beside(Job([options.tool("fsx"), "-f", config, "-N", str(operations), "-S", str(seed), "-P", lab.dir,
                                        os.path.join(lab.mnt, "file.%d" % number)], 3600))
        if code:
            raise Failure("seed %d: exit code %d\n%s" % (seed, code, said[-3000:]))
    if not cutter.exact:
        raise Failure("no snapshot was cut while fsx stood still")
    return "seeds %s, %d operations each; %s" % (",".join(map(str, seeds)), operations, cutter.verify())
