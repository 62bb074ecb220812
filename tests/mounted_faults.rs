//! What goes wrong beside cowfs must not go wrong in it: operations that fail half-way, a helper that dies,
//! users that ask at the worst moment. Each case was a bug.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, XattrFlags};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::{Mount, cowfs_bin, daemons, mount_type, open_the_way, run};

const LIMIT: Duration = Duration::from_secs(90);

fn tool(name: &str, args: &[&str], path: &Path) {
    let program = if name == "cowfs" {
        cowfs_bin()
    } else {
        name.into()
    };
    run(Command::new(program).args(args).arg(path), LIMIT).success(name);
}

fn open_rw(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

/// A replacement that fails leaves no record that a later mount would act on.
#[test]
fn a_failed_replacement_leaves_nothing_behind() {
    let mount = Mount::new("replacement", LIMIT);
    let at = |name: &str| mount.mnt.join(name);
    for (one, other) in [("A", "B"), ("E", "F")] {
        fs::create_dir(at(one)).unwrap();
        fs::create_dir(at(other)).unwrap();
    }
    fs::write(at("x"), "x").unwrap();
    fs::write(at("y"), "y").unwrap();
    fs::write(at("z"), "z").unwrap();
    mount.snapshot("k");
    for name in ["B", "y", "z"] {
        tool("chattr", &["+i"], &mount.backing.join(name));
    }
    assert!(fs::rename(at("A"), at("B")).is_err());
    assert!(fs::rename(at("x"), at("y")).is_err());
    assert!(fs::remove_file(at("z")).is_err());
    for name in ["B", "y", "z"] {
        tool("chattr", &["-i"], &mount.backing.join(name));
    }
    let retained = || {
        fs::read_dir(mount.backing.join(".cowfs/retained"))
            .unwrap()
            .count()
    };
    assert_eq!(retained(), 0);
    // Now the directory that was to be replaced comes to stand where its successor stood.
    fs::rename(at("A"), at("C")).unwrap();
    fs::rename(at("B"), at("A")).unwrap();
    fs::write(at("A/file"), "precious").unwrap();
    mount.remount();
    assert_eq!(fs::read(at("A/file")).unwrap(), b"precious");
    assert_eq!(fs::read(at("y")).unwrap(), b"y");
    assert_eq!(retained(), 0);
    let seen = mount.snapshot_path("k");
    assert!(seen.join("B").is_dir() && !seen.join("C").exists());
}

/// Has the ext4 of a mount's own disk meet an error, after which it is read-only.
fn break_disk(mount: &Mount) {
    let on_disk = |column: &str| {
        let mut findmnt = Command::new("findmnt");
        let found = run(
            findmnt.args(["-no", column, "-T"]).arg(&mount.backing),
            LIMIT,
        );
        found.success("findmnt").stdout.trim().to_owned()
    };
    tool(
        "mount",
        &["-o", "remount,errors=remount-ro"],
        Path::new(&on_disk("TARGET")),
    );
    let device = on_disk("SOURCE").replace("/dev/", "");
    fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "1").unwrap();
}

/// A filesystem that has become read-only takes nothing that is written at the end. What has been unmounted stays so.
#[test]
fn a_server_that_fails_after_the_end_of_its_mount_is_not_replaced() {
    let mount = Mount::on_own_disk("aborted", LIMIT, 400);
    fs::write(mount.mnt.join("f"), "old").unwrap();
    mount.snapshot("s");
    fs::write(mount.mnt.join("f"), "new").unwrap();
    // What this server keeps is in a file of the journal that it made, and that of "f" in one that it has not opened yet.
    mount.remount();
    fs::write(mount.mnt.join("kept now"), "").unwrap();
    break_disk(&mount);
    assert!(fs::write(mount.mnt.join("g"), "too late").is_err());
    assert_eq!(
        fs::read(mount.snapshot_path("s").join("f")).unwrap(),
        b"old"
    );
    run(
        Command::new(cowfs_bin()).arg("umount").arg(&mount.mnt),
        LIMIT,
    )
    .success("umount");
    assert_eq!(mount_type(&mount.mnt), None);
    assert_eq!(daemons(&cowfs_bin(), &mount.mnt), []);
    let log = mount.log();
    assert!(!log.contains("starting another"), "{log}");
    assert!(!log.contains("/proc/self/fd"), "{log}");
    // sled's own panic is caught.
    assert!(log.contains("the index cannot be closed"), "{log}");
}

/// A server that was told to end and could not write what it has to says so.
#[test]
fn a_failure_after_a_signal_is_told() {
    let mount = Mount::on_own_disk("told", LIMIT, 400);
    mount.umount();
    let mut server = Command::new(cowfs_bin())
        .args(["mount", "-f"])
        .args([&mount.backing, &mount.mnt])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + LIMIT / 2;
    while mount_type(&mount.mnt).as_deref() != Some("fuse.cowfs") {
        assert!(Instant::now() < deadline, "not mounted");
        std::thread::sleep(Duration::from_millis(10));
    }
    fs::write(mount.mnt.join("f"), "old").unwrap();
    mount.snapshot("s");
    fs::write(mount.mnt.join("f"), "new").unwrap();
    break_disk(&mount);
    let pid = rustix::process::Pid::from_child(&server);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let ended = server.wait().unwrap();
    assert_eq!(ended.code(), Some(1), "{ended:?}");
    assert_eq!(mount_type(&mount.mnt), None);
}

/// xfs punches what it zeroes before it finds out that there is no room. What the kernel has of the file is no more then.
#[test]
fn zeroing_that_fails_half_way_is_seen() {
    let mount = Mount::on_disk_of("zeroing", LIMIT, "xfs", 320);
    let file = open_rw(&mount.mnt.join("f"));
    file.write_all_at(&[b'A'; 800_000], 0).unwrap();
    file.sync_all().unwrap();
    let filler = open_rw(&mount.backing.with_file_name("filler"));
    let mut size = 0;
    for piece in [64 << 20, 4 << 20, 1 << 18, 1 << 16, 4096] {
        while rustix::fs::fallocate(&filler, FallocateFlags::empty(), size, piece).is_ok() {
            size += piece;
        }
    }
    let mut seen = vec![0; 800_000];
    file.read_exact_at(&mut seen, 0).unwrap();
    let zeroed = rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 50_000, 3_000_000);
    assert_eq!(zeroed, Err(rustix::io::Errno::NOSPC));
    let there = fs::read(mount.backing.join("f")).unwrap();
    assert!(there.contains(&0), "it has not failed half-way");
    assert!(fs::read(mount.mnt.join("f")).unwrap() == there);
    filler.set_len(0).unwrap();
    let snapshot = mount.snapshot_when_there_is_room("s");
    assert!(fs::read(snapshot.join("f")).unwrap() == there);
}

/// What the root directory shows of itself, to the first who asks as well.
#[test]
fn the_root_belongs_to_its_owner_and_has_no_hidden_directory() {
    let mount = Mount::on_own_disk("owned", LIMIT, 200);
    mount.umount();
    std::os::unix::fs::chown(&mount.backing, Some(1001), Some(1001)).unwrap();
    open_the_way(&mount.backing);
    open_the_way(&mount.mnt);
    // Nobody has looked at it yet.
    tool(
        "cowfs",
        &["mount", mount.backing.to_str().unwrap()],
        &mount.mnt,
    );
    let mut user = Command::new("setpriv");
    user.args(["--reuid=1001", "--regid=1001", "--clear-groups"]);
    // Unlike chmod(1) it does not look at it first.
    user.args(["perl", "-e", "chmod(0711, $ARGV[0]) or die $!"]);
    run(user.arg(&mount.mnt), LIMIT).success("chmod");
    let root = fs::metadata(&mount.mnt).unwrap();
    assert_eq!((root.mode() & 0o777, root.nlink()), (0o711, 2));
    fs::create_dir(mount.mnt.join("d")).unwrap();
    assert_eq!(fs::metadata(&mount.mnt).unwrap().nlink(), 3);
    let snapshot = mount.snapshot("s");
    fs::create_dir(mount.mnt.join("e")).unwrap();
    assert_eq!(fs::metadata(snapshot).unwrap().nlink(), 3);
}

/// A name that cannot be removed costs nothing that lasts.
#[test]
fn what_is_not_removed_is_not_held() {
    let mount = Mount::new("immutable", LIMIT);
    let path = |n: u32| mount.mnt.join(format!("{n}"));
    (0..100).for_each(|n| fs::write(path(n), "").unwrap());
    let flags = |flag: &str| {
        for n in 0..100 {
            tool("chattr", &[flag], &mount.backing.join(format!("{n}")));
        }
    };
    flags("+i");
    let open = || {
        let pid = mount.server().as_raw_nonzero();
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    };
    let before = open();
    for n in 0..100 {
        assert!(fs::remove_file(path(n)).is_err());
        assert!(fs::rename(path(n), path((n + 1) % 100)).is_err());
    }
    let after = open();
    flags("-i");
    assert!(after < before + 50, "{before} and then {after} are open");
}

/// The space of a removed file is free once it is closed, whatever was asked of it in between.
#[test]
fn a_removed_file_gives_its_space_back() {
    let mount = Mount::on_own_disk("space", LIMIT, 400);
    let used = || {
        tool("sync", &["-f"], &mount.backing);
        let st = rustix::fs::statvfs(&mount.backing).unwrap();
        ((st.f_blocks - st.f_bfree) * st.f_frsize) >> 20
    };
    let before = used();
    let path = mount.mnt.join("big");
    let file = open_rw(&path);
    fs::remove_file(&path).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    for at in 0..100 {
        file.write_all_at(&vec![at as u8; 1 << 20], at << 20)
            .unwrap();
    }
    file.sync_all().unwrap();
    rustix::fs::fsetxattr(&file, "user.x", b"1", XattrFlags::empty()).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 100 << 20);
    assert!(used() >= before + 95);
    drop(file);
    for _ in 0..100 {
        if used() < before + 5 {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{} MiB used, {before} before", used());
}

/// A large file is on its way to the disk before anybody syncs it, and a small one is not.
#[test]
fn a_large_file_goes_to_the_disk_while_it_is_written() {
    const SMALL: u64 = 24;
    const LARGE: u64 = 64;
    let mount = Mount::on_own_disk("behind", LIMIT, 400);
    let device = fs::metadata(&mount.backing).unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    // Documentation/block/stat.rst: the seventh number is sectors written.
    let written = || {
        let stat = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).unwrap();
        let sectors: u64 = stat.split_whitespace().nth(6).unwrap().parse().unwrap();
        (sectors * 512) >> 20
    };
    let fill = |name: &str, mib: u64| {
        let file = open_rw(&mount.mnt.join(name));
        for at in 0..mib {
            file.write_all_at(&vec![at as u8; 1 << 20], at << 20)
                .unwrap();
        }
    };
    // Others sync the disk now and then: cowfs does, some seconds after it was mounted.
    for _ in 0..15 {
        tool("sync", &["-f"], &mount.backing);
        let before = written();
        fill("small", SMALL);
        fill("large", LARGE);
        for _ in 0..60 {
            let now = written() - before;
            if now > LARGE + SMALL / 2 {
                break; // all of it: somebody synced
            }
            if now >= LARGE / 2 {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    panic!("not a large file alone");
}

/// Anybody may ask for the status, and nobody can stop the mount with it.
#[test]
fn status_is_told_during_cuts() {
    let mount = Mount::new("asked", LIMIT);
    let files: Vec<File> = (0..20)
        .map(|n| open_rw(&mount.mnt.join(format!("x{n}"))))
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let mut json = Vec::with_capacity(64 << 10);
                    let into = rustix::buffer::spare_capacity(&mut json);
                    rustix::fs::getxattr(&mount.mnt, "user.cowfs.status", into).unwrap();
                    assert!(json.starts_with(b"{"));
                }
            });
        }
        for n in 0..30 {
            for file in &files {
                file.write_all_at(&[n], 0).unwrap();
            }
            mount.snapshot(&format!("s{n}"));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// The program may lie in the very directory that is mounted over itself.
#[test]
fn the_program_itself_may_be_beneath_the_mount() {
    let mount = Mount::new("beneath", LIMIT);
    let dir = mount.root.join("dir");
    fs::create_dir_all(dir.join("bin")).unwrap();
    let program = dir.join("bin/cowfs-beneath");
    // Not by this process: another test may start a program just then, which has the copy open for writing (ETXTBSY).
    let mut cp = Command::new("cp");
    run(cp.arg(cowfs_bin()).arg(&program), LIMIT).success("cp");
    run(Command::new(&program).arg("mount").arg(&dir), LIMIT).success("mount");
    let kind = mount_type(&dir);
    let _open = open_rw(&dir.join("f"));
    let made = fs::create_dir(dir.join(".snapshots/s"));
    drop(_open);
    run(Command::new(cowfs_bin()).arg("umount").arg(&dir), LIMIT).success("umount");
    made.unwrap();
    assert_eq!(kind.as_deref(), Some("fuse.cowfs"));
}

/// A helper that dies is replaced: cuts go on, and miss no store.
#[test]
fn a_dead_flush_helper_is_replaced() {
    let mount = Mount::new("helper", LIMIT);
    let file = open_rw(&mount.mnt.join("f"));
    file.set_len(4096).unwrap();
    mount.snapshot("a");
    let pattern = format!("flush-helper {}", mount.mnt.display());
    let killed = run(Command::new("pkill").args(["-9", "-f", &pattern]), LIMIT);
    killed.success("pkill");
    file.write_all_at(b"b", 0).unwrap();
    let snapshot = mount.snapshot("b");
    assert_eq!(fs::read(snapshot.join("f")).unwrap()[0], b'b');
}

/// A mount that lacks descriptors fails, and throws nothing away: the index in particular, which may have what the
/// journal has lost.
#[test]
fn a_lack_of_descriptors_costs_no_index() {
    let mount = Mount::new("lack", LIMIT);
    mount.snapshot("s");
    for number in 0..50 {
        fs::write(mount.mnt.join(format!("f{number}")), "f").unwrap();
    }
    mount.umount();
    let store = mount.backing.join(".cowfs/store");
    let index = || fs::metadata(store.join("index/db")).unwrap().ino();
    let (before, mut refused) = (index(), 0);
    let log = mount.root.join("cowfs.log");
    for limit in 12..30 {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={limit}:{limit}"));
        command.arg(cowfs_bin()).args(["mount", "--log"]).arg(&log);
        let outcome = run(command.args([&mount.backing, &mount.mnt]), LIMIT);
        match mount_type(&mount.mnt) {
            Some(_) => mount.umount_and_kill(Duration::ZERO),
            None => refused += 1,
        }
        let said = fs::read_to_string(&log).unwrap();
        assert!(
            !said.contains("rebuilt"),
            "{limit}: {}: {said}",
            outcome.stderr
        );
        assert_eq!(index(), before, "{limit}: the index is another one");
    }
    assert!(refused > 5, "only {refused} mounts lacked descriptors");
    mount.mount();
    assert!(mount.snapshot_path("s").is_dir());
}

/// The times of the root's snapshot folder, which the kernel keeps, change with the names in it, whichever folder these are
/// changed in.
#[test]
fn the_times_of_the_folder_change_with_its_names() {
    let mount = Mount::new("folder-times", LIMIT);
    fs::create_dir(mount.mnt.join("d")).unwrap();
    mount.snapshot("s");
    let other = mount.mnt.join("d/.snapshots");
    let times = || {
        let found = fs::metadata(mount.snapshot_path("")).unwrap();
        (found.modified().unwrap(), found.ctime_nsec())
    };
    let mut last = times();
    let mut changed = |what: &str| {
        let now = times();
        assert_ne!(now, last, "{what}");
        last = now;
    };
    fs::create_dir(other.join("t")).unwrap();
    changed("creation");
    fs::rename(other.join("t"), other.join("u")).unwrap();
    changed("renaming");
    fs::remove_dir(other.join("u")).unwrap();
    changed("deletion");
    mount.snapshot("v");
    changed("creation in the folder itself");
}

/// Names of the store's own mean nothing special among snapshots.
#[test]
fn a_snapshot_may_have_any_name() {
    let mount = Mount::new("anyname", LIMIT);
    for name in [".cowfs", ".snapshots", "-rf", "new\nline"] {
        let path = mount.snapshot(name);
        assert!(path.is_dir(), "{name:?}");
        fs::remove_dir(&path).unwrap();
    }
}

/// Attributes of the namespace trusted.* are root's business alone (xattr(7)).
#[test]
fn trusted_attributes_are_not_listed_to_others() {
    let mount = Mount::new("listed", LIMIT);
    let path = mount.mnt.join("f");
    fs::write(&path, "").unwrap();
    rustix::fs::setxattr(&path, "trusted.secret", b"1", XattrFlags::empty()).unwrap();
    rustix::fs::setxattr(&path, "user.open", b"1", XattrFlags::empty()).unwrap();
    let list = |uid: u32| {
        let mut command = Command::new("getfattr");
        command.args(["-d", "-m", "-"]).arg(&path).uid(uid).gid(uid);
        run(&mut command, LIMIT).success("getfattr").stdout
    };
    open_the_way(&mount.mnt);
    assert!(list(0).contains("trusted.secret"));
    let others = list(65534);
    assert!(
        others.contains("user.open") && !others.contains("trusted"),
        "{others}"
    );
}

/// On a full disk snapshots can still be deleted, which is how room is made, and the mount comes back.
#[test]
fn snapshots_are_deleted_on_a_full_disk() {
    let mount = Mount::on_own_disk("full", LIMIT, 96);
    mount.remount_with("on-full=enospc");
    let file = open_rw(&mount.mnt.join("f"));
    file.write_all_at(&vec![0; 16 << 20], 0).unwrap();
    let mut cuts = 0_u8;
    let full = 'fill: loop {
        mount.snapshot_when_there_is_room(&format!("s{cuts}"));
        cuts += 1;
        for at in 0..16 {
            if let Err(error) = file.write_all_at(&vec![cuts; 1 << 20], at << 20) {
                break 'fill error;
            }
        }
        assert!(cuts < 20, "the disk does not fill");
    };
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    drop(file);
    mount.remount();
    for cut in 0..cuts {
        let seen = fs::read(mount.snapshot_path(format!("s{cut}")).join("f")).unwrap();
        assert!(seen.iter().all(|byte| *byte == cut), "s{cut} changed");
        fs::remove_dir(mount.snapshot_path(format!("s{cut}"))).unwrap();
    }
    let file = open_rw(&mount.mnt.join("f"));
    for _ in 0..100 {
        mount.snapshot_when_there_is_room("after");
        if file.write_all_at(&vec![99; 16 << 20], 0).is_ok() {
            return;
        }
        fs::remove_dir(mount.snapshot_path("after")).unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("no room was made");
}

/// A hole of terabytes costs nothing to read from a snapshot, and stays a hole there.
#[test]
fn a_sparse_file_of_terabytes_is_kept() {
    let mount = Mount::new("sparse", LIMIT);
    let path = mount.mnt.join("f");
    let file = open_rw(&path);
    let size = 8 << 40;
    file.set_len(size).unwrap();
    file.write_all_at(b"end", size - 3).unwrap();
    let snapshot = mount.snapshot("s");
    file.write_all_at(b"middle", size / 2).unwrap();
    let flags = OFlags::RDONLY;
    let old = rustix::fs::openat(CWD, snapshot.join("f"), flags, Mode::empty()).unwrap();
    let data = rustix::fs::seek(&old, rustix::fs::SeekFrom::Data(0)).unwrap();
    assert_eq!(data / 4096, (size - 3) / 4096);
    let mut buf = [1; 6];
    File::from(old).read_exact_at(&mut buf, size / 2).unwrap();
    assert_eq!(buf, [0; 6]);
    fs::remove_file(&path).unwrap();
    assert_eq!(fs::metadata(snapshot.join("f")).unwrap().len(), size);
}

/// A mount goes along when a directory above it is renamed.
#[test]
fn a_directory_above_a_mount_may_be_renamed() {
    for cache in ["write-through", "writeback"] {
        let mount = Mount::new(&format!("renamed-{cache}"), LIMIT);
        let [source, old, new] = ["source", "old", "new"].map(|name| mount.root.join(name));
        fs::create_dir_all(old.join("m")).unwrap();
        fs::create_dir(&source).unwrap();
        let cowfs = |args: &[&str], paths: &[&Path]| {
            run(Command::new(cowfs_bin()).args(args).args(paths), LIMIT).success(args[0]);
        };
        let cache = format!("cache={cache}");
        cowfs(&["mount", "-o", &cache], &[&source, &old.join("m")]);
        assert_eq!(mount_type(&old.join("m")).as_deref(), Some("fuse.cowfs"));
        let file = open_rw(&old.join("m/f"));
        file.write_all_at(b"one", 0).unwrap();
        fs::create_dir(old.join("m/.snapshots/a")).unwrap();
        fs::rename(&old, &new).unwrap();
        let there = new.join("m");
        file.write_all_at(b"two", 0).unwrap();
        fs::create_dir(there.join(".snapshots/b")).unwrap();
        file.write_all_at(b"xxx", 0).unwrap();
        assert_eq!(fs::read(there.join(".snapshots/a/f")).unwrap(), b"one");
        assert_eq!(fs::read(there.join(".snapshots/b/f")).unwrap(), b"two");
        drop(file);
        let daemons = daemons(&cowfs_bin(), &old.join("m"));
        assert!(!daemons.is_empty());
        for pid in daemons {
            // A helper may have ended by now.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let start = std::time::Instant::now();
        while mount_type(&there).is_some() {
            assert!(start.elapsed() < LIMIT / 2, "still mounted");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Runs a program that cannot use one system call (seccomp(2)): it gives EPERM.
const WITHOUT: &str = r#"
import ctypes, os, struct, sys
number = int(sys.argv[1])
allow, refuse, load, equal = 0x7fff0000, 0x00050001, 0x20, 0x15
lines = [(load, 0, 0, 0), (equal, 0, 1, number), (6, 0, 0, refuse), (6, 0, 0, allow)]
program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
filter = struct.pack("@HP", len(lines), ctypes.addressof(program))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter) == 0, ctypes.get_errno()
os.execv(sys.argv[2], sys.argv[2:])
"#;

/// A container may forbid unshare(2), by which a thread gets a umask of its own.
#[test]
fn what_is_made_has_its_makers_umask_without_unshare_too() {
    let mount = Mount::new("no-unshare", LIMIT);
    for forbidden in [false, true] {
        mount.umount();
        let mut start = Command::new("python3");
        start.args(["-c", WITHOUT]);
        let number = if forbidden { libc::SYS_unshare } else { -1 };
        start.arg((number as u32).to_string()).arg(cowfs_bin());
        run(
            start.arg("mount").arg(&mount.backing).arg(&mount.mnt),
            LIMIT,
        )
        .success("mount");
        assert_eq!(mount_type(&mount.mnt).as_deref(), Some("fuse.cowfs"));
        let script = "umask 022; mkdir d; echo > f; mkfifo p; umask 077; echo > q; stat -c '%a %n' d f p q; rm -r d f p q";
        let made = run(
            Command::new("sh")
                .args(["-ec", script])
                .current_dir(&mount.mnt),
            LIMIT,
        );
        let made = made.success("sh").stdout;
        assert_eq!(made, "755 d\n644 f\n644 p\n600 q\n", "{forbidden}");
    }
}
