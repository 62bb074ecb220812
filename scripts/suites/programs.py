"""git and cargo."""
import os, random, subprocess
from lab import Cutter, Failure, Job, command

QUIET = dict(os.environ, GIT_CONFIG_GLOBAL="/dev/null", GIT_CONFIG_SYSTEM="/dev/null", GIT_CONFIG_COUNT="1",
             GIT_CONFIG_KEY_0="safe.directory", GIT_CONFIG_VALUE_0="*", LC_ALL="C")


def history(path, commits, files):
    """Makes a repository with two branches that part half-way, of random small files, by git fast-import."""
    r = random.Random(commits)
    command("git", "init", "-q", "--bare", "-b", "main", path, env=QUIET)
    out = [b"feature done\n"]
    for number in range(commits):
        branch = b"other" if number > commits // 2 and number % 2 else b"main"
        out.append(b"commit refs/heads/%s\nmark :%d\ncommitter A <a@example.org> %d +0000\ndata 6\nchange\n" % (branch, number + 1, 1500000000 + number))
        if branch == b"other" and number - 2 <= commits // 2:
            out.append(b"from :%d\n" % (commits // 2 + 1))
        for _ in range(files if number == 0 else 6):
            data = b"".join(b"line %d\n" % r.randrange(1000) for _ in range(r.randrange(200)))
            name = b"d%02d/e%d/f%d" % (r.randrange(40), r.randrange(5), r.randrange(40))
            out.append(b"M 100%s inline %s\ndata %d\n%s\n" % (r.choice((b"644", b"755")), name, len(data), data))
    out.append(b"done\n")
    done = subprocess.run(["git", "-C", path, "fast-import", "--quiet"], input=b"".join(out), capture_output=True, env=QUIET, timeout=120)
    if done.returncode:
        raise Failure("git fast-import: " + done.stderr.decode(errors="replace"))


def names_nothing(head):
    with open(head) as f:
        return ".invalid" in f.read()


def git(lab, options):
    """What git does to a repository, with `git fsck` in every snapshot: no object that a branch needs may be missing in any."""
    commits, files = (200, 300) if options.quick else (5000, 4000)
    origin, clone, fsck = os.path.join(lab.dir, "origin"), os.path.join(lab.mnt, "clone"), ["git", "fsck", "--full", "--strict"]
    history(origin, commits, files)
    cutter = Cutter(lab, 0.5)
    in_clone = lambda *words: ["git", "-C", clone] + list(words)
    steps = [["git", "clone", "-q", "--no-hardlinks", "file://" + origin, clone], in_clone("checkout", "-q", "other"),
             in_clone("checkout", "-q", "main"), in_clone("checkout", "-q", "HEAD~%d" % (commits // 4)), in_clone("checkout", "-q", "main"),
             in_clone("-c", "user.name=a", "-c", "user.email=a@example.org", "merge", "-q", "-s", "ours", "-m", "merge", "origin/other"),
             in_clone("repack", "-q", "-a", "-d", "-f"),
             in_clone("gc", "-q", "--prune=now"), in_clone("pack-refs", "--all"), ["git", "-C", clone, *fsck[1:]],
             in_clone("checkout", "-q", "other"), in_clone("checkout", "-q", "main")]
    for words in steps:
        code, said = cutter.beside(Job(words, 600, env=QUIET))
        if code:
            raise Failure("%s: exit code %d\n%s" % (" ".join(words), code, said[-3000:]))
    changed = command(*in_clone("status", "--porcelain"), env=QUIET)
    if changed:
        raise Failure("git status: the files are not those of the commit:\n" + changed[:2000])
    cutter.cut()
    searched = 0
    for name in cutter.names:
        inside = os.path.join(lab.snapshot(name), "clone")
        there = lambda path: os.path.exists(os.path.join(inside, ".git", path))
        # Before `git clone` has written a HEAD it is no repository yet; at first that names a branch that cannot be.
        if (there("packed-refs") or there("refs/heads/main")) and not names_nothing(os.path.join(inside, ".git/HEAD")):
            command("git", "-C", inside, *fsck[1:], env=QUIET)
            searched += 1
    if not searched:
        raise Failure("there was a repository in no snapshot")
    return "%d commits; git fsck in %d snapshots; %s" % (commits, searched, cutter.verify())


MAIN = """mod part;
fn main() { println!("{}", part::sum(%d)); }
"""


def cargo(lab, options):
    """Builds a crate, changes it and builds again; goes on building in copies of the snapshots."""
    crate, parts = os.path.join(lab.mnt, "crate"), 20 if options.quick else 150
    os.makedirs(os.path.join(crate, "src"))
    write = lambda path, text: open(os.path.join(crate, path), "w").write(text)
    write("Cargo.toml", '[package]\nname = "built"\nversion = "0.1.0"\nedition = "2021"\n[workspace]\n')
    write("src/part.rs", "".join("pub fn f%d(x: u64) -> u64 { let v: Vec<u64> = (0..x).map(|y| y * %d).collect(); v.iter().sum() }\n" % (k, k) for k in range(parts))
          + "pub fn sum(x: u64) -> u64 { %s }\n" % " + ".join("f%d(x)" % k for k in range(parts)))
    cutter = Cutter(lab, 0.15)
    weight = sum(range(parts))

    def build(directory, number, beside):
        job = Job(["cargo", "build", "--offline", "--quiet"], 300, cwd=directory, env=dict(os.environ, CARGO_TARGET_DIR=os.path.join(directory, "target")))
        code, said = cutter.beside(job) if beside else job.wait()
        if code:
            raise Failure("cargo build in %s: exit code %d\n%s" % (directory, code, said[-3000:]))
        got = command(os.path.join(directory, "target/debug/built")).strip()
        if got != str(weight * number * (number - 1) // 2):
            raise Failure("the program built in %s says %s" % (directory, got))

    for number in (10, 11, 12):
        write("src/main.rs", MAIN % number)
        build(crate, number, beside=True)
    for number, name in enumerate(cutter.names[:: max(1, len(cutter.names) // 4)]):
        copy = os.path.join(lab.dir, "copy%d" % number)
        command("cp", "-a", os.path.join(lab.snapshot(name), "crate"), copy)
        with open(os.path.join(copy, "src/main.rs"), "w") as f:
            f.write(MAIN % 20)
        build(copy, 20, beside=False)
    return "3 builds, and %d in copies of snapshots; %s" % (number + 1, cutter.verify())
