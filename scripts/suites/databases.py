"""SQLite, LMDB and Tokyo Cabinet."""
import multiprocessing, os, random, shutil, sqlite3, time
from lab import Cutter, Failure, Job, command

ACCOUNTS, BALANCE = 200, 1000
# Fork, so that writers inherit the shared counters; no thread is running yet when they are started.
fork = multiprocessing.get_context("fork")


class Writers:
    """Processes that commit transactions, numbered for each writer, until told to stop. `begun[w]` and `done[w]` are the
    numbers of the last transaction that writer w has begun to commit and has committed."""

    def __init__(self, count, work, *arguments):
        self.begun, self.done = fork.Array("q", count, lock=False), fork.Array("q", count, lock=False)
        self.stop = fork.Event()
        self.processes = [fork.Process(target=work, args=(self, w, *arguments), daemon=True) for w in range(count)]
        for process in self.processes:
            process.start()

    def check(self):
        for process in self.processes:
            if process.exitcode is not None:
                raise Failure("a writer ended with exit code %d" % process.exitcode)

    def end(self):
        self.stop.set()
        for process in self.processes:
            process.join(60)
            if process.exitcode != 0:
                process.kill()
                raise Failure("a writer ended with exit code %s" % process.exitcode)


class Noted(Cutter):
    """A cutter that notes, before and after each cut, what the writers had committed."""

    def __init__(self, lab, period, writers):
        super().__init__(lab, period, cut=self.noting)
        self.writers, self.bounds = writers, {}

    def noting(self, name):
        self.writers.check()
        before = list(self.writers.done)
        os.mkdir(self.lab.snapshot(name))
        self.bounds[name] = before, list(self.writers.begun)

    def within(self, name, numbers):
        """Whether a snapshot has all that was committed before it was asked for, and nothing begun after it existed."""
        before, after = self.bounds[name]
        for w, number in enumerate(numbers):
            if not before[w] <= number <= after[w]:
                raise Failure("%s: writer %d is at transaction %d, not within %d and %d" % (name, w, number, before[w], after[w]))


def loaded(lab, writers, seconds, period=0.35):
    cutter = Noted(lab, period, writers)
    try:
        with cutter:
            time.sleep(seconds)
    finally:
        writers.end()
    return cutter


# ------------------------------------------------------------------------------------------ SQLite


def sqlite_writer(writers, w, path, synchronous):
    r = random.Random(w)
    db = sqlite3.connect(path, timeout=60, isolation_level=None)
    db.execute("pragma synchronous=%s" % synchronous)
    db.execute("pragma cache_size=20")
    number = 0
    while not writers.stop.is_set():
        number += 1
        a, b, amount = r.randrange(ACCOUNTS), r.randrange(ACCOUNTS), r.randrange(100)
        db.execute("begin immediate")
        db.execute("update account set balance = balance - ? where id = ?", (amount, a))
        db.execute("update account set balance = balance + ? where id = ?", (amount, b))
        db.execute("insert into log (writer, number, note) values (?, ?, ?)", (w, number, os.urandom(r.randrange(3000))))
        if number % 5 == 0:
            db.execute("delete from log where writer = ? and number < ?", (w, number - 40))
        writers.begun[w] = number
        db.execute("commit")
        writers.done[w] = number
        time.sleep(0.002)
    db.close()


def sqlite_check(path, cutter, name, count):
    db = sqlite3.connect(path)
    answer = db.execute("pragma integrity_check").fetchall()
    if answer != [("ok",)]:
        raise Failure("%s: integrity_check: %s" % (name, answer[:5]))
    total, = db.execute("select sum(balance) from account").fetchone()
    if total != ACCOUNTS * BALANCE:
        raise Failure("%s: the accounts hold %s, not %d" % (name, total, ACCOUNTS * BALANCE))
    numbers = dict(db.execute("select writer, max(number) from log group by writer"))
    cutter.within(name, [numbers.get(w, 0) for w in range(count)])
    db.close()


def sqlite(lab, options):
    """Transfers between accounts. In a copy of each snapshot the database must be whole, the sum the same, and every
    transaction there that was committed before the snapshot."""
    seconds, words = options.seconds or (3 if options.quick else 30), []
    for mode, synchronous in (("wal", "normal"), ("delete", "full"), ("persist", "off"), ("truncate", "normal")):
        directory = os.path.join(lab.mnt, mode)
        os.mkdir(directory)
        path = os.path.join(directory, "db")
        db = sqlite3.connect(path)
        got, = db.execute("pragma journal_mode=%s" % mode).fetchone()
        if got != mode:
            raise Failure("journal mode %s is refused: %s" % (mode, got))
        db.execute("create table account (id integer primary key, balance integer)")
        db.execute("create table log (writer integer, number integer, note blob, primary key (writer, number))")
        db.executemany("insert into account values (?, ?)", [(k, BALANCE) for k in range(ACCOUNTS)])
        db.commit()
        db.close()
        count = 3
        cutter = loaded(lab, Writers(count, sqlite_writer, path, synchronous), seconds)
        for name in cutter.names:
            copy = os.path.join(lab.dir, "copy")
            shutil.copytree(os.path.join(lab.snapshot(name), mode), copy)
            sqlite_check(os.path.join(copy, "db"), cutter, name, count)
            shutil.rmtree(copy)
        words.append("%s: %d transactions, %d databases opened, %s" % (mode, sum(cutter.writers.done), len(cutter.names), cutter.verify()))
        for name in cutter.names:
            os.rmdir(lab.snapshot(name))
    return "; ".join(words)


# ------------------------------------------------------------------------------------------ LMDB


def lmdb_writer(writers, w, path, sync):
    import lmdb
    r = random.Random(1)
    env = lmdb.open(path, map_size=64 << 20, writemap=True, sync=sync, max_dbs=2)
    accounts, log = env.open_db(b"account"), env.open_db(b"log")
    number = 0
    while not writers.stop.is_set():
        number += 1
        with env.begin(write=True) as txn:
            for _ in range(r.randrange(1, 20)):
                a, b, amount = b"%d" % r.randrange(ACCOUNTS), b"%d" % r.randrange(ACCOUNTS), r.randrange(100)
                if a != b:
                    txn.put(a, b"%d" % (int(txn.get(a, db=accounts)) - amount), db=accounts)
                    txn.put(b, b"%d" % (int(txn.get(b, db=accounts)) + amount), db=accounts)
            txn.put(b"%010d" % number, os.urandom(r.randrange(6000)), db=log)
            if number > 100:
                txn.delete(b"%010d" % (number - 100), db=log)
            txn.put(b"last", b"%d" % number)
            writers.begun[w] = number
        writers.done[w] = number
    env.close()


def lmdb_check(path, cutter, name):
    import lmdb
    env = lmdb.open(path, map_size=64 << 20, max_dbs=2, readonly=True, lock=False)
    accounts, log = env.open_db(b"account", create=False), env.open_db(b"log", create=False)
    with env.begin() as txn:
        last = int(txn.get(b"last"))
        total = sum(int(value) for _, value in txn.cursor(db=accounts))
        logged = [int(key) for key, _ in txn.cursor(db=log)]
    env.close()
    if total != ACCOUNTS * BALANCE:
        raise Failure("%s: the accounts hold %d, not %d" % (name, total, ACCOUNTS * BALANCE))
    if logged != list(range(max(1, last - 99), last + 1)):
        raise Failure("%s: the log is not that of transaction %d: %s" % (name, last, logged[-5:]))
    cutter.within(name, [last])


def lmdb(lab, options):
    """Transactions written by stores to a shared mapping (MDB_WRITEMAP), which LMDB orders by msync. In a copy of each
    snapshot everything must be as of one transaction, and not an older one than the last committed before the snapshot."""
    import lmdb as library
    seconds = options.seconds or (6 if options.quick else 40)
    path = os.path.join(lab.mnt, "lmdb")
    env = library.open(path, map_size=64 << 20, max_dbs=2)
    accounts, _ = env.open_db(b"account"), env.open_db(b"log")
    with env.begin(write=True) as txn:
        for k in range(ACCOUNTS):
            txn.put(b"%d" % k, b"%d" % BALANCE, db=accounts)
        txn.put(b"last", b"0")
    env.close()
    cutter = loaded(lab, Writers(1, lmdb_writer, path, True), seconds, period=0.1)
    for name in cutter.names:
        copy = os.path.join(lab.dir, "copy")
        shutil.copytree(os.path.join(lab.snapshot(name), "lmdb"), copy)
        lmdb_check(copy, cutter, name)
        shutil.rmtree(copy)
    return "%d transactions, %d databases opened, %s" % (cutter.writers.done[0], len(cutter.names), cutter.verify())


# ------------------------------------------------------------------------------------------ Tokyo Cabinet


def tokyocabinet(lab, options):
    """The library's own tests of its hash and B+ tree databases, which write through a shared mapping; each is stopped
    for each cut. After each the closed database is read in a copy of a snapshot, and must hold what the live one holds."""
    records = 20_000 if options.quick else 300_000
    # All databases are read for each cut, while the test is stopped: it has to come to something in between.
    cutter, read = Cutter(lab, 0.25 if options.quick else 2), 0
    at = lambda name: os.path.join(lab.mnt, name)
    steps = [
        (["tchtest", "write", at("a.tch"), str(records)], "tchmgr", "a.tch"),
        (["tchtest", "read", at("a.tch")], None, None),
        (["tchtest", "remove", at("a.tch")], "tchmgr", "a.tch"),
        (["tchtest", "misc", at("b.tch"), str(records // 20)], "tchmgr", "b.tch"),
        (["tchtest", "wicked", at("c.tch"), str(records // 2)], "tchmgr", "c.tch"),
        (["tchmttest", "write", at("d.tch"), "3", str(records // 4)], "tchmgr", "d.tch"),
        (["tchmttest", "typical", at("e.tch"), "3", str(records // 8)], "tchmgr", "e.tch"),
        (["tcbtest", "write", at("f.tcb"), str(records)], "tcbmgr", "f.tcb"),
        (["tcbtest", "misc", at("g.tcb"), str(records // 20)], "tcbmgr", "g.tcb"),
        (["tcbtest", "wicked", at("h.tcb"), str(records // 2)], "tcbmgr", "h.tcb"),
        (["tcbmttest", "typical", at("i.tcb"), "3", str(records // 8)], "tcbmgr", "i.tcb"),
        (["tcftest", "write", at("j.tcf"), str(records)], "tcfmgr", "j.tcf"),
        (["tcftest", "wicked", at("k.tcf"), str(records // 2)], "tcfmgr", "k.tcf"),
    ]
    for words, manager, file in steps:
        code, said = cutter.beside(Job(words, 600, cwd=lab.mnt))
        if code or "ok" not in said.split()[-3:]:
            raise Failure("%s: exit code %d\n%s" % (" ".join(words), code, said[-2000:]))
        if manager:
            copy = os.path.join(lab.dir, "copy")
            shutil.copy(os.path.join(lab.snapshot(cutter.cut()), file), copy)
            if command(manager, "list", "-pv", copy) != command(manager, "list", "-pv", at(file)):
                raise Failure("%s in the snapshot does not hold what it holds in the live tree" % file)
            read += 1
    return "%d of its tests, %d databases read in copies of snapshots; %s" % (len(steps), read, cutter.verify())
