"""The groups in which every side is measured in turn, round by round: data, metadata, and the first write after a cut."""
import json, os, shutil, subprocess, sys, time

import sides as mounts
from results import PEERS
from sides import Failure, run

#: The column of a floor that keeps bytes.
FLOOR = "floor on disk"
HERE = os.path.dirname(os.path.realpath(__file__))
MIB = 1 << 20


def in_turn(which, number, rounds):
    """The order of a round. Each begins with another one, and all rounds together begin all over the list: with five rounds and
    eleven columns, one step at a time would leave most of these at the end of every round, or at its beginning."""
    shift = number * len(which) // rounds
    return which[shift:] + which[:shift]


class Bench:
    """What all groups share: the sizes of this run, the disk, the sides, the loops, the results."""

    def __init__(self, sizes, load, results, work):
        self.sizes, self.binary, self.results, self.work = sizes, load, results, work
        self.disk, self.sides, self.dead, self.skipped = None, [], set(), set()
        self.round = self.turns = 0

    def load(self, what, limit=120, **options):
        words = [self.binary, what]
        for name, value in options.items():
            words += ["--" + name, str(value)]
        return json.loads(run(*words, limit=limit))

    def say(self, text):
        print("[%s] %s" % (time.strftime("%H:%M:%S"), text), file=sys.stderr, flush=True)

    def each(self, group, row, which, measure, unit):
        """Measures a row on every side in turn, beginning with another one each round. `measure(side)` gives the speed."""
        which = [side for side in which if side.name not in self.dead and (row, side.name) not in self.skipped and row not in side.cannot]
        for side in in_turn(which, self.round, self.turns):
            settle(side)
            try:
                self.results.speed(group, row, side.name, measure(side), unit)
            except Failure as failure:
                self.problem(side, row, failure)

    def problem(self, side, row, failure):
        self.results.problems.append("%s, %s: %s" % (side.name, row, failure))
        self.say(self.results.problems[-1])
        self.skipped.add((row, side.name))
        if "not done within" in str(failure):
            self.dead.add(side.name)
            side.abort()

    def rounds(self, at_least=0):
        self.turns = max(self.sizes["rounds"], at_least)
        for self.round in range(self.turns):
            yield self.round

    # The tree and the files that all measurements use: the same way everywhere, and with the page cache filled the same way.
    def prepare(self, side):
        """Before the mount where there is a backing directory; the floor has its files in the mount alone."""
        floor = isinstance(side, mounts.Floor)
        if floor:
            side.start()
        os.mkdir(os.path.join(side.backing, "cold"))
        self.load("fill", dir=side.backing, files=4, size=self.sizes["file"])
        self.load("fill", dir=os.path.join(side.backing, "cold"), files=1, size=4 * self.sizes["file"])
        self.load("tree", dir=os.path.join(side.backing, "tree"), files=self.sizes["tree"])
        if not floor:
            side.start()
        if side.snapshots:
            os.mkdir(side.snapshot("tree"))
            self.load("series", dir=side.dir, snapshots=os.path.join(side.dir, ".snapshots"), count=side.snapshots - 1, size=self.sizes["file"], limit=300)
            # The first touch of everything is over.
            self.load("fill", dir=side.dir, files=4, size=self.sizes["file"])
        self.fill_cache(side)

    def refill_cache(self):
        """Has the page cache hold the files of data anew, in turn: whoever is first gets pages all over the memory, whoever is
        last pages that lie one after the other, and a warm read of these takes half the time."""
        for side in in_turn(self.sides, self.round, self.turns):
            if side.name not in self.dead:
                self.fill_cache(side)

    def fill_cache(self, side):
        """Reads through the mount twice: the first read of new pages takes a third longer than those after it."""
        self.load("sequential-read", dir=side.backing, cold=side.dir, files=4)
        for _ in range(2):
            self.load("sequential-read", dir=side.dir, files=4)


def settle(side):
    """Before a filesystem that does not ask for it itself: processors go on polling, as cowfs and the floor have them do, for a
    while after the last request (docs/PERFORMANCE.md, "What waking costs"), and whoever came next would profit."""
    if side.name in PEERS:
        time.sleep(0.15)


def rate(line):
    return line["operations"] / line["seconds"]


def megabytes(line):
    return line["bytes"] / line["seconds"] / MIB


def data(bench):
    size, time_ms = bench.sizes["file"], bench.sizes["cell_ms"]

    def loop(what, files, **more):
        return lambda side: rate(bench.load(what, dir=side.dir, files=files, size=size, time=time_ms, seed=bench.round, **more))

    def mapped(side):
        script = os.path.join(HERE, "mapped.py")
        return rate(json.loads(run(sys.executable, script, os.path.join(side.dir, "data.1"), size, bench.sizes["mapped"], bench.round)))

    def cold(side):
        return megabytes(bench.load("sequential-read", dir=os.path.join(side.dir, "cold"), cold=os.path.join(side.backing, "cold"), files=1))

    # What the kernel answers by itself depends on where its pages lie, so each side is once in each place of the order.
    kernel = [
        ("sequential read 1M, warm", lambda side: megabytes(bench.load("sequential-read", dir=side.dir, files=4)), "MiB/s"),
        ("random read 4k, 1 file", loop("random-read", 1), "/s"),
        ("random read 4k, 4 files", loop("random-read", 4), "/s"),
    ]
    asked = [
        ("sequential read 1M, cold", cold, "MiB/s"),
        ("sequential write 1M + fsync", lambda side: megabytes(bench.load("sequential-write", dir=side.dir, size=4 * size)), "MiB/s"),
        ("random write 4k, 1 file", loop("random-write", 1), "/s"),
        ("random write 4k, 4 files", loop("random-write", 4), "/s"),
        ("8k write + fsync each", loop("sync-write", 1), "/s"),
        ("direct read 4k", loop("random-read", 1, direct=1), "/s"),
        ("direct write 4k", loop("random-write", 1, direct=1), "/s"),
        ("append of 100 bytes", loop("append", 1), "/s"),
        ("mmap writes + msync", mapped, "/s"),
    ]
    for number in bench.rounds(len(bench.sides)):
        bench.say("data in the cache, round %d" % (number + 1))
        bench.refill_cache()
        for row, measure, unit in kernel:
            bench.each("data", row, bench.sides, measure, unit)
    for number in bench.rounds():
        bench.say("data, round %d" % (number + 1))
        bench.refill_cache()
        for row, measure, unit in asked:
            bench.each("data", row, bench.sides, measure, unit)
            # Direct I/O has emptied the page cache of that file.
            if row == "direct write 4k":
                for side in bench.sides:
                    if side.name not in bench.dead:
                        bench.load("sequential-read", dir=side.backing, files=1)
                        bench.load("sequential-read", dir=side.dir, files=1)


def metadata(bench):
    files, tree = bench.sizes["created"], bench.sizes["tree"]
    copied = ["%02d" % k for k in range(max(1, files // 1000))]
    readers = list(bench.sides)
    readers += [mounts.View("cowfs snapshot", side, "tree") for side in bench.sides if side.snapshots == 1]

    def timed(count, *words):
        began = time.monotonic()
        run("sh", "-ec", *words)
        return count / (time.monotonic() - began)

    def reading(what, **more):
        return lambda side: rate(bench.load(what, dir=os.path.join(side.dir, "tree"), files=tree, **more))

    def changing(what):
        return lambda side: rate(bench.load(what, dir=os.path.join(side.dir, "new"), files=files))

    def cold(measure):
        def measured(side):
            side.forget()
            return measure(side)
        return measured

    def copy(side):
        to = os.path.join(side.home, "copy") if isinstance(side, mounts.View) else os.path.join(side.dir, "copy")
        os.mkdir(to)
        try:
            side.forget()
            return timed(files, 'cd "$0/tree" && to=$1 && shift && cp -a "$@" "$to"', side.dir, to, *copied)
        finally:
            shutil.rmtree(to)

    first = [
        ("stat, first", cold(reading("stat")), "/s"),
        # It takes some milliseconds, so it is done ten times.
        ("stat, again", reading("stat", passes=10), "/s"),
        # The names are known by now, the bytes are not.
        ("open + read 4k + close", reading("open"), "/s"),
    ]
    second = [
        ("find -ls", cold(lambda side: timed(tree, 'exec find "$0/tree" -ls > /dev/null', side.dir)), "files/s"),
        ("tar", cold(lambda side: timed(tree, 'tar cf - -C "$0" tree | cat > /dev/null', side.dir)), "files/s"),
    ]
    changes = [
        ("cp -a", copy, "files/s"),
        ("create + write 4k + close", changing("create"), "/s"),
        ("rename", changing("rename"), "/s"),
        ("unlink", changing("unlink"), "/s"),
    ]
    for number in bench.rounds():
        bench.say("metadata, round %d" % (number + 1))

        def three(side):
            for row, measure, unit in first:
                bench.results.speed("metadata", row, side.name, measure(side), unit)
            return None
        # These three belong together on each side.
        which = [side for side in readers if side.name not in bench.dead]
        for side in in_turn(which, number, bench.turns):
            settle(side)
            try:
                three(side)
            except Failure as failure:
                bench.problem(side, "stat, open", failure)
        for row, measure, unit in second:
            bench.each("metadata", row, readers, measure, unit)
        for row, measure, unit in changes:
            bench.each("metadata", row, bench.sides, measure, unit)


class Copier:
    """A filesystem with snapshots, or copies, of its own, on a disk of its own."""

    def __init__(self, bench, name, kind, gigabytes):
        self.name, self.disk = name, mounts.Disk(bench.work, kind, gigabytes)
        self.dir = os.path.join(self.disk.path, "data")
        if kind == "btrfs":
            run("btrfs", "subvolume", "create", self.dir)
        else:
            os.mkdir(self.dir)

    #: Shell commands; % is the number of the snapshot.
    def create(self):
        to = os.path.join(self.disk.path, "copy%")
        return {
            "btrfs": "exec btrfs subvolume snapshot -r %s %s" % (self.dir, to),
            "xfs": "exec cp -a --reflink=always %s %s" % (self.dir, to),
            "ext4": "fsfreeze -f %s; cp -a %s %s; fsfreeze -u %s" % (self.disk.path, self.dir, os.path.join(self.disk.root, "copy%"), self.disk.path),
        }[self.disk.kind]

    def remove(self):
        return {
            "btrfs": "exec btrfs subvolume delete %s" % os.path.join(self.disk.path, "copy%"),
            "xfs": "exec rm -r %s" % os.path.join(self.disk.path, "copy%"),
            "ext4": "exec rm -r %s" % os.path.join(self.disk.root, "copy%"),
        }[self.disk.kind]

    def close(self):
        subprocess.run(["fsfreeze", "-u", self.disk.path], capture_output=True)
        self.disk.close()


def first_touch(bench):
    """Overwrites of 4 KiB after a cut: the first time and the second, on filesystems that have snapshots."""
    size, blocks = bench.sizes["file"], bench.sizes["touched"]
    ours = [side for side in bench.sides if side.name not in bench.dead and isinstance(side, mounts.Cowfs) and not side.snapshots]
    bare = [side for side in bench.sides if side.name == "bare"]
    floor, floors, others = mounts.FloorOnDisk(FLOOR, bench.disk, bench.floor), [], []
    try:
        try:
            floor.start()
            bench.load("fill", dir=floor.dir, files=1, size=size)
            bench.load("sequential-read", dir=floor.dir, files=1)
            floors.append(floor)
        except Failure as failure:
            bench.problem(floor, "first touch", failure)
        for name, kind in (("btrfs", "btrfs"), ("xfs reflink", "xfs")):
            others.append(Copier(bench, name, kind, 4))
            bench.load("fill", dir=others[-1].dir, files=1, size=size)
        quotients = {}
        for number in bench.rounds():
            for label, count, more in (("4k", blocks, {}), ("4k + fdatasync", max(20, blocks // 40), {"sync": 1})):
                for side in bare + ours + floors + others:
                    options = dict(dir=side.dir, size=size, blocks=count, seed=number, **more)
                    if isinstance(side, Copier):
                        tag = "%d%d" % (number, bool(more))
                        run("sh", "-ec", side.create().replace("%", tag))
                        line = bench.load("once", **options)
                        run("sh", "-ec", side.remove().replace("%", tag))
                    elif side in ours + floors:
                        name = side.snapshot("once-%d" % number)
                        line = bench.load("once", cut=name, **options)
                        os.rmdir(name)
                    else:
                        line = bench.load("once", **options)
                    for when in ("first", "second"):
                        bench.results.speed("first touch", "%s, %s" % (label, when), side.name, count / line[when], "/s")
                    quotients.setdefault((label, side.name), []).append(line["first"] / line["second"])
        for (label, name), values in quotients.items():
            values.sort()
            limit = 1.5 if label == "4k" and name.startswith("cowfs") else None
            bench.results.figure("first touch", "time of %s first / second" % label, name, values[len(values) // 2], "", limit, values)
    finally:
        floor.stop()
        for other in others:
            other.close()
