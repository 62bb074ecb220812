"""What a cut costs those who write, and how long it takes: each against a control without a cut in the same run."""
import os, statistics

import sides as mounts
from sides import Failure, run
from speed import Copier, FLOOR, MIB

#: Goals, in milliseconds beyond the control: by the mode of the cache.
STALL = {"write-through": 1, "writeback": 5}
CREATE_IDLE, CREATE_LOADED = 2, 20
GROWTH = 1.2


def cowfs(bench, name, options, gigabytes):
    """A cowfs on a fresh disk of its own."""
    disk = mounts.Disk(bench.work, bench.disk.kind, gigabytes)
    side = mounts.Cowfs(name, disk, bench.cowfs, options)
    try:
        side.start()
    except BaseException:
        disk.close()
        raise
    return side, disk


def writers(bench, place, files, size, writers=2, pace=0, stretches=None, time=None, every=100):
    path, create, remove = place
    return bench.load("cut", dir=path, files=files, size=size, writers=writers, pace=pace, create=create, remove=remove, every=every,
                      time=time or bench.sizes["stretch_ms"], stretches=stretches or bench.sizes["rounds"], limit=300)


def report(bench, row, name, line, margin=None):
    """Medians over the stretches of the longest write in each, and over the cuts of their time."""
    control, cuts = line["control"], line["cuts"]
    quiet, loud = statistics.median(control["longest_ms"]), statistics.median(cuts["longest_ms"])
    figure = bench.results.figure
    figure("cut", row + ": longest write, control", name, quiet, "ms", None, control["longest_ms"])
    figure("cut", row + ": longest write, with cuts", name, loud, "ms", quiet + margin if margin is not None else None, cuts["longest_ms"])
    figure("cut", row + ": longest write that met a cut", name, max(cuts["at_a_cut_ms"], default=0), "ms", None, cuts["at_a_cut_ms"])
    figure("cut", row + ": 99.9 % of writes, control", name, control["p999_ms"], "ms")
    figure("cut", row + ": 99.9 % of writes, with cuts", name, cuts["p999_ms"], "ms")
    limit = CREATE_LOADED if margin is not None else None
    figure("cut", row + ": creation", name, statistics.median(cuts["create_ms"]), "ms", limit, cuts["create_ms"])


def label(files, size, pace):
    amount = "%d GiB" % (files * size >> 30) if files * size >> 30 else "%d KiB each" % (size >> 10)
    return "%s open file%s, %s, %s" % ("{:,}".format(files), "" if files == 1 else "s", amount, "1 kHz" if pace else "full speed")


@mounts.unpreferred()
def cut(bench):
    for name, options, cache in bench.modes:
        bench.say("cuts of %s" % name)
        side, disk = cowfs(bench, name, options, bench.sizes["cut_disk"])
        place = (side.dir, "mkdir " + side.snapshot("c%"), "rmdir " + side.snapshot("c%"))
        try:
            bench.load("fill", dir=side.dir, files=1, size=bench.sizes["file"])
            series(bench, side, name)
            for files, size, pace in bench.sizes["cut"]:
                # What writeback has to write out first grows with what is open: the goal is for up to 100 files.
                margin = STALL[cache] if cache == "write-through" or files <= 100 else None
                line = writers(bench, place, files, size, writers=1 if pace else 2, pace=1000 if pace else 0)
                report(bench, label(files, size, pace), name, line, margin)
                run("find", side.dir, "-name", "open.*", "-delete")
        except Failure as failure:
            bench.problem(side, "cuts", failure)
        finally:
            side.stop()
            disk.close()
    for _, _, cache in bench.modes:
        floor(bench, cache)
    others(bench)


def floor(bench, cache):
    """What a cut has to do at the least, on a filesystem that answers at once and keeps old bytes, but of which nobody can read a
    snapshot. Each file which could be mapped is opened, so that its pages come; where the kernel holds writes back, all
    of them are written back, and then, while writers are held, what they have written meanwhile. They are held by
    themselves."""
    name, flags, ask = (FLOOR + " writeback", ["--writeback"], "write-back") if cache == "writeback" else (FLOOR, [], "open-each")
    disk = mounts.Disk(bench.work, bench.disk.kind, bench.sizes["cut_disk"])
    side = mounts.FloorOnDisk(name, disk, bench.floor, *flags)
    try:
        side.start()
        place = (side.dir, "%s mkdir %s" % (ask, side.snapshot("c%")), "")
        for files, size, pace in bench.sizes["cut"]:
            if files > 1 and files * size < 2 << 30 and not pace:
                bench.say("cuts of %s, %s" % (name, label(files, size, pace)))
                report(bench, label(files, size, pace), name, writers(bench, place, files, size, stretches=2))
                # The number of the next snapshot, and the room of the old bytes.
                run("sh", "-c", 'rm -f "$0"/open.*; rmdir "$0"/.snapshots/*', side.dir)
    except Failure as failure:
        bench.problem(side, "cuts", failure)
    finally:
        side.stop()
        disk.close()


def others(bench):
    """The same on what else makes snapshots, and with the classic way: all writers held while everything is copied."""
    size, files = 10 * MIB, max(1, bench.sizes["others_mib"] // 10)
    for name, kind in (("btrfs snapshot", "btrfs"), ("XFS reflink", "xfs"), ("fsfreeze + cp", "ext4")):
        bench.say("cuts of %s" % name)
        other = Copier(bench, name, kind, 4 + 4 * files * 10 // 1024)
        try:
            line = writers(bench, (other.dir, other.create(), other.remove()), files, size, stretches=3, time=2000, every=1000)
            report(bench, label(files, size, 0) if files * size >> 30 else "%d MiB, full speed" % (files * 10), name, line)
        except Failure as failure:
            bench.results.problems.append("%s: %s" % (name, failure))
        finally:
            other.close()


def series(bench, side, name):
    """Many snapshots one after the other, none deleted."""
    count, some = bench.sizes["series"], bench.sizes["series"] // 20
    line = bench.load("series", dir=side.dir, snapshots=os.path.join(side.dir, ".snapshots"), count=count, size=bench.sizes["file"], limit=600)
    for what, values in (("creation, nobody writes", line["create_us"]), ("first write after it", line["first_write_us"])):
        first, last = statistics.median(values[:some]) / 1000, statistics.median(values[-some:]) / 1000
        limit = CREATE_IDLE if what.startswith("creation") else None
        bench.results.figure("cut", "%s, snapshots 1 to %d" % (what, some), name, first, "ms", limit)
        bench.results.figure("cut", "%s, snapshots %d to %d" % (what, count - some + 1, count), name, last, "ms", limit)
        bench.results.figure("cut", "%s, last / first" % what, name, last / first, "", GROWTH)
    for number in range(count):
        os.rmdir(side.snapshot("s%d" % number))
