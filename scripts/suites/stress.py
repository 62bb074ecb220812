"""stress-ng and fio."""
import os, re
from lab import Cutter, Failure, Job, command

# The exit codes of stress-ng that say "not here": no resource, not implemented.
ABSENT = (3, 4)


def stress_run(stressor, directory, seconds):
    job = Job(["stress-ng", "--" + stressor, "2", "-t", "%ds" % seconds, "--verify", "--temp-path", directory], seconds + 120, cwd=directory)
    return job.wait()


def stress_ng(lab, options):
    """Each stressor by itself. One that fails on the mount must fail on the bare directory too."""
    seconds = options.seconds or (1 if options.quick else 5)
    said = command("stress-ng", "--class", "filesystem?")
    stressors = said.partition("stressors:")[2].split()
    if len(stressors) < 30:
        raise Failure("stress-ng has no list of stressors: " + said)
    worse, here_too, absent = [], [], []
    cutter = Cutter(lab, 1.0)
    with cutter:
        for stressor in stressors:
            code, said = stress_run(stressor, lab.mnt, seconds)
            if code == 0:
                continue
            bare, bare_said = stress_run(stressor, lab.control, seconds)
            if code in ABSENT and bare in ABSENT:
                absent.append(stressor)
            elif bare not in (0,) + ABSENT:
                here_too.append(stressor)
            else:
                worse.append("%s: exit code %d (bare: %d)\n%s" % (stressor, code, bare, said[-1500:]))
    if worse:
        raise Failure("%d stressors fail that do not on the bare directory\n%s" % (len(worse), "\n".join(worse)))
    return "%d stressors of %d s, %d not available here (%s), %d fail on the bare directory too (%s); at most %d descriptors; %s" % (
        len(stressors), seconds, len(absent), " ".join(absent), len(here_too), " ".join(here_too), cutter.most_descriptors, cutter.verify())


FIO = """[global]
directory=%s
verify=crc32c
verify_fatal=1
do_verify=1
group_reporting=1
end_fsync=1
; as processes, jobs leave the session and could not be stopped for a cut
thread=1

[sequential]
rw=write
bs=128k
numjobs=2
size=%dm
ioengine=psync

[random]
rw=randwrite
bsrange=512-64k
bs_unaligned=0
numjobs=2
size=%dm
ioengine=libaio
iodepth=8

[mapped]
rw=randwrite
bs=4k
size=%dm
ioengine=mmap

[direct]
rw=randrw
bs=4k
direct=1
size=%dm
ioengine=psync
"""


def fio(lab, options):
    """Verified writes: buffered, asynchronous, mapped and direct. Later rounds overwrite what snapshots show."""
    size, least = (12, 2) if options.quick else (96, 3)
    config = os.path.join(lab.dir, "fio.conf")
    with open(config, "w") as f:
        f.write(FIO % (lab.mnt, 2 * size, size, size, size))
    cutter = Cutter(lab, 0.2 if options.quick else 0.7)
    rounds = 0
    while rounds < least or cutter.exact < least:
        rounds, exact = rounds + 1, cutter.exact
        if rounds > 20 * least:
            raise Failure("%d snapshots were cut while fio stood still in %d rounds" % (cutter.exact, rounds))
        code, said = cutter.beside(Job(["fio", "--randseed=%d" % rounds, config], 600, cwd=lab.dir))
        if code or re.search(r"verify: bad|err=[^ 0]", said):
            raise Failure("fio: exit code %d\n%s" % (code, said[-3000:]))
        if cutter.exact == exact:
            cutter.period /= 2  # it ends before the first cut is due
    return "%d rounds of 4 kinds of jobs; %s" % (rounds, cutter.verify())
