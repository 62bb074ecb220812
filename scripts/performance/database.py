"""pgbench on the bare directory and on cowfs, in turn, each with its own server."""
import glob, os, pwd, re, shutil, subprocess, time

import sides as mounts
from sides import Failure, run
from speed import FLOOR, in_turn

CONFIG = """listen_addresses = ''
unix_socket_directories = '%s'
shared_buffers = 128MB
max_wal_size = 512MB
checkpoint_timeout = 60s
max_connections = 40
"""


class Server:
    def __init__(self, bin_dir, side, sockets, port):
        self.bin, self.side, self.sockets, self.port = bin_dir, side, sockets, port
        self.data = os.path.join(side.dir, "pgdata")
        self.running = False

    def words(self, tool, *arguments):
        user = pwd.getpwnam("postgres")
        return ["env", "-i", "PATH=/usr/bin:/bin", "LC_ALL=C", "HOME=/", "PGUSER=postgres", "PGHOST=" + self.sockets, "PGPORT=%d" % self.port, "setpriv",
                "--reuid=%d" % user.pw_uid, "--regid=%d" % user.pw_gid, "--clear-groups", "--", os.path.join(self.bin, tool), *map(str, arguments)]

    def create(self, scale):
        os.mkdir(self.data, 0o700)
        shutil.chown(self.data, "postgres")
        run(*self.words("initdb", "-D", self.data, "-A", "trust", "-U", "postgres", "--locale=C", "-E", "UTF8", "--no-sync"), limit=300)
        with open(os.path.join(self.data, "postgresql.conf"), "a") as f:
            f.write(CONFIG % self.sockets)
        self.start()
        run(*self.words("createdb", "bench"))
        run(*self.words("pgbench", "-i", "-q", "-s", scale, "bench"), limit=900)
        run(*self.words("psql", "-qXc", "checkpoint", "bench"), limit=300)

    def start(self):
        log = os.path.join(self.sockets, "log.%d" % self.port)
        # Not through a pipe, which the server would hold open.
        subprocess.run(self.words("pg_ctl", "-D", self.data, "-l", log, "-w", "-t", "60", "start"), check=True, stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
        self.running = True
        mounts.prefer(self.data)

    def stop(self):
        if self.running:
            subprocess.run(self.words("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop"), stdin=subprocess.DEVNULL, capture_output=True, timeout=120)

    def speed(self, seconds, meanwhile):
        """Transactions per second; `meanwhile` runs again and again until they end."""
        process = subprocess.Popen(self.words("pgbench", "-n", "-c", "4", "-j", "2", "-T", seconds, "bench"), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            end = time.monotonic() + seconds + 120
            while process.poll() is None:
                meanwhile(process)
                if time.monotonic() > end:
                    raise Failure("pgbench: not done within %d s" % (seconds + 120))
            said = process.stdout.read()
        finally:
            process.kill()
            process.wait()
        found = re.search(r"^tps = ([0-9.]+)", said, re.M)
        if process.returncode or not found:
            raise Failure("pgbench failed: %s" % said[-1000:])
        return float(found[1])


def copying(bench, source, process, at_least):
    """Copies a directory to another disk; stops when pgbench does. Takes `at_least` seconds."""
    to = os.path.join(bench.disk.root, "pgcopy")
    end = time.monotonic() + at_least
    copy = subprocess.Popen(["cp", "-a", source, to], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and (copy.poll() is None or time.monotonic() < end):
            time.sleep(0.05)
    finally:
        copy.kill()
        copy.wait()
        shutil.rmtree(to, ignore_errors=True)


def pgbench(bench):
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    if not found:
        raise Failure("PostgreSQL is not there (scripts/setup --bench installs it)")
    scale, seconds, rounds = bench.sizes["pg"]
    gigabytes = 4 + scale // 8
    sockets = os.path.join(bench.disk.root, "pg")
    os.mkdir(sockets)
    shutil.chown(sockets, "postgres")
    os.chmod(bench.disk.root, 0o755)
    disk = mounts.Disk(bench.work, bench.disk.kind, gigabytes)
    os.chmod(disk.root, 0o755)
    servers, sides = [], [mounts.Bare("bare", disk)] + [mounts.Cowfs(name, disk, bench.cowfs, options) for name, options, _ in bench.modes]
    sides.append(mounts.Cowfs("cowfs strict", disk, bench.cowfs, bench.modes[0][1] + ["durability=strict"]))
    if bench.sizes["peers"]:
        sides += [mounts.Bindfs("bindfs", disk), mounts.Mergerfs("mergerfs", disk), mounts.FuseOverlayfs("fuse-overlayfs", disk)]
    sides.append(mounts.FloorOnDisk(FLOOR, disk, bench.floor))
    try:
        for number, side in enumerate(sides):
            bench.say("pgbench: a database of scale %d on %s" % (scale, side.name))
            side.start()
            servers.append(Server(found[-1], side, sockets, 5500 + number))
            servers[-1].create(scale)
        for number in range(rounds):
            bench.say("pgbench, round %d" % (number + 1))
            for server in in_turn(servers, number, rounds):
                slice_of(bench, server, seconds)
    finally:
        for server in servers:
            server.stop()
        for side in sides:
            side.stop()
        disk.close()


def slice_of(bench, server, seconds):
    """Stretches of pgbench. In the first a copy runs all the time: of a snapshot, which is made anew every ten seconds, or of the
    bare directory as it is. In the second there is the snapshot, and nobody reads it; strict durability is measured here alone.
    In the third there is none, so that filesystems that have no snapshots compare. The bare directory is the same in the last two."""
    side = server.side

    def snapshot(process, then):
        path = side.snapshot("pg")
        os.mkdir(path)
        try:
            then(os.path.join(side.shows("pg"), "pgdata"), process)
        finally:
            os.rmdir(path)

    def copied(source, process):
        copying(bench, source, process, 10)

    def left(_, process):
        process.wait(seconds + 60)

    def stretch(rows, meanwhile):
        tps = server.speed(seconds, meanwhile)
        for row in rows:
            bench.results.speed("pgbench", row, side.name, tps, "tps")

    copy, kept, none = "pgbench", "pgbench, nobody copies", "pgbench, no snapshot"
    if side.name == "bare":
        stretch([copy], lambda process: copied(server.data, process))
        stretch([kept, none], lambda process: left(None, process))
        return
    with_copy = [FLOOR] + [name for name, _, _ in bench.modes]
    if side.name in with_copy:
        stretch([copy], lambda process: snapshot(process, copied))
    if isinstance(side, mounts.Cowfs):
        stretch([kept], lambda process: snapshot(process, left))
    if side.name in with_copy or not isinstance(side, mounts.Cowfs):
        stretch([none], lambda process: left(None, process))
