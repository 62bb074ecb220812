"""How cost grows: with known files, with pre-images; mounting after a crash; deleting a large snapshot under load."""
import json, os, shutil, signal, subprocess, threading, time

from cuts import cowfs, writers
from sides import Failure, run

HERE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
MEMORY, DESCRIPTORS = 300, 4096


def growth(bench):
    memory(bench)
    index(bench)
    name, options, _ = bench.modes[0]
    side, disk = cowfs(bench, name, options, 8 + 12 * bench.sizes["touched_blocks"] // (1 << 18))
    try:
        touched(bench, side)
    finally:
        side.stop()
        disk.close()


def memory(bench):
    for count in bench.sizes["known"]:
        bench.say("memory with %d known files" % count)
        path = os.path.join(bench.disk.root, "memory.json")
        try:
            run(os.path.join(HERE, "memory"), "--files", count, "--json", path, "--dir", bench.work, limit=900)
        except Failure as failure:
            bench.results.problems.append("memory: %s" % failure)
            if not os.path.exists(path):
                continue
        with open(path) as f:
            steps = json.load(f)
        row = "%s known files: " % "{:,}".format(count)
        limits = (MEMORY, DESCRIPTORS) if count <= 10 ** 6 else (None, None)
        bench.results.figure("growth", row + "memory", "cowfs", max(step["mib"] for step in steps), "MiB", limits[0])
        bench.results.figure("growth", row + "descriptors", "cowfs", max(step["descriptors"] for step in steps), "", limits[1])


def index(bench):
    for count in bench.sizes["pre_images"]:
        bench.say("a store of %d pre-images" % count)
        path = os.path.join(bench.disk.path, "index")
        line = bench.load("index", dir=path, count=count, limit=1800)
        shutil.rmtree(path)
        row = "%s pre-images: " % "{:,}".format(count)
        for what, key, unit, factor in (("keeping one", "keep_us", "µs", 1), ("look-up, found", "found_us", "µs", 1), ("look-up, absent", "absent_us", "µs", 1),
                                        ("index", "index_bytes", "MiB", 2 ** -20), ("journal without data", "journal_bytes", "MiB", 2 ** -20),
                                        ("opening", "open_s", "s", 1), ("rebuilding the index", "rebuild_s", "s", 1)):
            bench.results.figure("growth", row + what, "cowfs", line[key] * factor, unit)


def touched(bench, side):
    """A snapshot with many pre-images: mounting after a crash, then deletion while others write."""
    blocks = bench.sizes["touched_blocks"]
    size = blocks * 4096
    bench.say("a snapshot with %d pre-images" % blocks)
    bench.load("fill", dir=side.dir, files=1, size=size, limit=600)
    bench.load("once", dir=side.dir, size=size, blocks=blocks, seed=1, cut=side.snapshot("large"), limit=900)
    row = "%s pre-images: " % "{:,}".format(blocks)
    status = side.status()
    bench.results.figure("growth", row + "store", "cowfs", status["store_bytes"] / 2 ** 20, "MiB")
    os.kill(status["keeper"], signal.SIGKILL)
    # The kernel kills the server when its keeper is gone (PR_SET_PDEATHSIG).
    end = time.monotonic() + 30
    while os.path.exists("/proc/%d" % status["pid"]) and time.monotonic() < end:
        time.sleep(0.02)
    run("umount", "-l", side.dir)
    began = time.monotonic()
    side.start()
    bench.results.figure("growth", row + "mounting after a crash", "cowfs", time.monotonic() - began, "s")
    deletion(bench, side, row)


def deletion(bench, side, row):
    end, gone = time.monotonic() + 300, []

    def watch():
        # The first stretch is the control.
        time.sleep(2)
        began = time.monotonic()
        os.rmdir(side.snapshot("large"))
        gone.append(time.monotonic() - began)
        while side.status()["preimage_bytes"] > 0 and time.monotonic() < end:
            time.sleep(0.05)
        gone.append(time.monotonic() - began)

    control = writers(bench, (side.dir, "true", "true"), 10, 1 << 20, stretches=1, time=2000)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    loud = writers(bench, (side.dir, "true", "true"), 10, 1 << 20, stretches=3, time=2000)
    watcher.join(max(1, end - time.monotonic()))
    figure = bench.results.figure
    figure("growth", row + "deletion, rmdir returns", "cowfs", gone[0] if gone else None, "s")
    figure("growth", row + "deletion, space is back", "cowfs", gone[1] if len(gone) > 1 else None, "s")
    figure("growth", row + "longest write, control", "cowfs", max(control["control"]["longest_ms"]), "ms")
    longest = loud["control"]["longest_ms"] + loud["cuts"]["longest_ms"]
    figure("growth", row + "longest write while it is deleted", "cowfs", max(longest), "ms", None, longest)
