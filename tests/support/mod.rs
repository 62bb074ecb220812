//! What the tests of a mounted cowfs share: a mount that cleans up after itself, commands with a time
//! limit, and a watchdog that turns a hang into a failure.
//!
//! Environment: `COWFS_BIN` tests another binary, `COWFS_TEST_DIR` is where the backing directories go
//! (default: cargo's temporary directory for tests), `COWFS_SEED` repeats a randomised test, `COWFS_TEST_OPTIONS`
//! are mount options for every mount that the tests make.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

pub(crate) mod cut;
pub(crate) mod model;
pub(crate) mod user;

use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Lets everybody reach `path` and read directories on the way. What else they permit stays: the way may lead through
/// directories that are not the test's, as /tmp.
pub fn open_the_way(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    for dir in path.ancestors() {
        let mode = fs::metadata(dir).unwrap().permissions().mode();
        if mode & 0o055 != 0o055 {
            fs::set_permissions(dir, fs::Permissions::from_mode(mode & 0o7777 | 0o055)).unwrap();
        }
    }
}

/// The binary under test.
pub(crate) fn cowfs_bin() -> PathBuf {
    std::env::var_os("COWFS_BIN")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_cowfs")), PathBuf::from)
}

/// A number from the environment, or `default`.
pub(crate) fn env_number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text}: not a number")),
        Err(_) => default,
    }
}

/// The seed of a randomised test: `COWFS_SEED` (any text; the model test takes hexadecimal ones), or a new
/// one. Always printed.
pub(crate) fn seed(test: &str) -> u64 {
    let text = std::env::var("COWFS_SEED").unwrap_or_else(|_| {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap();
        (now.as_micros() % 1_000_000_007).to_string()
    });
    println!("{test}: COWFS_SEED={text} repeats this run");
    text.bytes().fold(0, |seed: u64, byte| {
        seed.wrapping_mul(257).wrapping_add(byte.into())
    })
}

/// A new empty directory for one test, on a real disk.
pub(crate) fn scratch(name: &str) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let base = std::env::var_os("COWFS_TEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = base.join(format!("{name}.{}.{number}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    dir.canonicalize().unwrap()
}

/// What a command left behind.
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// Panics with all the command said unless it succeeded.
    #[track_caller]
    pub(crate) fn success(self, what: &str) -> Self {
        assert!(
            self.status.success(),
            "{what}: {}\n--- stdout\n{}\n--- stderr\n{}",
            self.status,
            self.stdout,
            self.stderr
        );
        self
    }
}

/// Runs a command in a process group of its own. One that outlives `limit` is killed with its children,
/// and the test fails.
///
/// The output goes through files and not pipes, so that a daemon that inherits them keeps nobody waiting.
#[track_caller]
pub(crate) fn run(command: &mut Command, limit: Duration) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let (out, err) = (dir.path().join("out"), dir.path().join("err"));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(&err).unwrap())
        .process_group(0)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()));
    let text = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Outcome {
                status,
                stdout: text(&out),
                stderr: text(&err),
            };
        }
        if start.elapsed() > limit {
            let _ = kill_process_group(pid_of(child.id()), Signal::KILL);
            let _ = child.kill();
            panic!(
                "{command:?} did not end within {limit:?}\n--- stdout\n{}\n--- stderr\n{}",
                text(&out),
                text(&err)
            );
        }
        std::thread::sleep(Duration::from_millis(
            if start.elapsed().as_millis() < 200 {
                1
            } else {
                10
            },
        ));
    }
}

/// One of our own cases in Python.
pub(crate) fn own_script(name: &str) -> PathBuf {
    let scripts = std::env::var_os("COWFS_PY").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/py"),
        PathBuf::from,
    );
    scripts.join(format!("{name}.py"))
}

/// Runs a case in Python on a mount.
#[track_caller]
pub(crate) fn python(script: &Path, mount: &Mount, limit: Duration) {
    python_with(script, mount, limit, &[]);
}

/// The same with more environment.
#[track_caller]
pub(crate) fn python_with(
    script: &Path,
    mount: &Mount,
    limit: Duration,
    environment: &[(&str, &str)],
) {
    let own = mount.options.lock().unwrap().clone();
    let out = run(
        Command::new("python3")
            .arg("-B")
            .arg(script)
            .arg(&mount.mnt)
            .env("COWFS_BIN", cowfs_bin())
            .env("COWFS_PROC", cowfs_bin().file_name().unwrap())
            .env("COWFS_BACKING", &mount.backing)
            .env("COWFS_TEST_OPTIONS", joined(&own))
            .env("SNAPFS", "COWFS")
            .envs(environment.iter().copied()),
        limit,
    );
    println!("{}", out.stdout);
    out.success(&script.display().to_string());
}

/// The options of all mounts of this run, and a mount's own.
fn joined(own: &str) -> String {
    let all = std::env::var("COWFS_TEST_OPTIONS").unwrap_or_default();
    match (all.is_empty(), own.is_empty()) {
        (false, false) => format!("{all},{own}"),
        _ => all + own,
    }
}

fn pid_of(id: u32) -> Pid {
    Pid::from_raw(i32::try_from(id).unwrap()).unwrap()
}

/// Undoes the octal escapes of /proc/self/mountinfo.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\' && tail.len() >= 3)
            .then(|| {
                std::str::from_utf8(&tail[..3])
                    .ok()
                    .and_then(|t| u8::from_str_radix(t, 8).ok())
            })
            .flatten();
        out.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(out)
}

/// The mount table: mount point and type, in the order of mounting.
fn mounts() -> Vec<(PathBuf, String)> {
    let mut table = Vec::new();
    File::open("/proc/self/mountinfo")
        .unwrap()
        .read_to_end(&mut table)
        .unwrap();
    let mut mounts = Vec::new();
    for line in table.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let dash = fields.iter().position(|f| *f == b"-").unwrap();
        let kind = String::from_utf8_lossy(fields[dash + 1]).into_owned();
        mounts.push((PathBuf::from(unescape(fields[4])), kind));
    }
    mounts
}

/// The type of the topmost filesystem mounted exactly at `path`.
pub(crate) fn mount_type(path: &Path) -> Option<String> {
    mounts()
        .into_iter()
        .rev()
        .find(|(at, _)| at == path)
        .map(|(_, kind)| kind)
}

/// Detaches every mount below `dir` that something left there, and ends its daemon.
pub(crate) fn unmount_below(bin: &Path, dir: &Path) {
    for (at, _) in mounts()
        .into_iter()
        .rev()
        .filter(|(at, _)| at.starts_with(dir))
    {
        kill_daemons(bin, &at);
        detach(&at);
    }
}

/// umount(2), which does not wait for the daemon. A process that another test is about to start may have a file of the mount
/// open for a moment, and a command may be asking it what it is of.
#[track_caller]
pub(crate) fn unmount_patiently(mnt: &Path) {
    let start = Instant::now();
    while let Err(errno) = rustix::mount::unmount(mnt, UnmountFlags::empty()) {
        let busy = errno == Errno::BUSY && start.elapsed() < Duration::from_secs(30);
        assert!(busy, "{}: {errno}", mnt.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The processes that run `bin` and have `mnt` as an argument of its own, but for those by which commands ask it what it is.
pub(crate) fn daemons(bin: &Path, mnt: &Path) -> Vec<Pid> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<i32>().ok())
        else {
            continue;
        };
        let Ok(exe) = fs::read_link(entry.path().join("exe")) else {
            continue;
        };
        let same = exe.file_name().zip(bin.file_name()).is_some_and(|(a, b)| {
            a == b || a.as_bytes().strip_suffix(b" (deleted)") == Some(b.as_bytes())
        });
        if !same {
            continue;
        }
        let line = command_line(&entry.path());
        let words: Vec<&[u8]> = line.split(|b| *b == 0).collect();
        let asks = words.get(1) == Some(&&b"status"[..]);
        if !asks && words.contains(&mnt.as_os_str().as_bytes()) {
            pids.extend(Pid::from_raw(id));
        }
    }
    pids
}

/// The command line of a process, which has none for a moment in the middle of its execve(2), and none when it has ended.
fn command_line(process: &Path) -> Vec<u8> {
    let start = Instant::now();
    loop {
        match fs::read(process.join("cmdline")) {
            Ok(line) if line.is_empty() && start.elapsed() < Duration::from_millis(500) => {
                if fs::read_link(process.join("exe")).is_err() {
                    return line;
                }
                std::thread::sleep(Duration::from_micros(50));
            }
            line => return line.unwrap_or_default(),
        }
    }
}

/// Whether it is the daemon's helper, which works for it and serves nothing.
fn is_helper(pid: Pid) -> bool {
    fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()))
        .is_ok_and(|line| line.split(|b| *b == 0).any(|word| word == b"flush-helper"))
}

/// Kills the daemons of `mnt` with signal 9, and those that they have started just before, and waits until all are gone. A
/// process that waits for the disk ends after that. Returns how many there were at first.
pub(crate) fn kill_daemons(bin: &Path, mnt: &Path) -> usize {
    let (first, start) = (daemons(bin, mnt), Instant::now());
    let mut left = first.clone();
    while !left.is_empty() && start.elapsed() < Duration::from_secs(60) {
        for pid in left {
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(1));
        left = daemons(bin, mnt);
    }
    first.len()
}

/// Where each thread of a process that hangs is: its name, what it waits for in the kernel, and its system call
/// (proc(5), /proc/pid/wchan, stack and syscall).
fn where_threads_are(pid: Pid) -> String {
    let mut lines = format!("the threads of {}:", pid.as_raw_nonzero());
    let tasks = fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        lines += &format!(
            "\n{} {} {}\n{}",
            read("comm").trim(),
            read("wchan"),
            read("syscall").trim(),
            read("stack").trim_end()
        );
    }
    lines
}

/// Ends a test that takes too long: kills the daemon, so that whatever hangs in the mount fails; if the
/// test has not ended a minute later, ends the whole process.
struct Watchdog {
    state: Arc<(Mutex<bool>, Condvar)>,
    expired: Arc<AtomicBool>,
}

impl Watchdog {
    fn start(name: String, bin: PathBuf, mnt: PathBuf, limit: Duration) -> Self {
        let state = Arc::new((Mutex::new(false), Condvar::new()));
        let expired = Arc::new(AtomicBool::new(false));
        let (theirs, flag) = (Arc::clone(&state), Arc::clone(&expired));
        std::thread::spawn(move || {
            let wait = |limit: Duration| {
                let (lock, signal) = &*theirs;
                let ended = lock.lock().unwrap();
                *signal
                    .wait_timeout_while(ended, limit, |ended| !*ended)
                    .unwrap()
                    .0
            };
            if wait(limit) {
                return;
            }
            eprintln!(
                "{name}: time limit of {limit:?} reached: killing the daemon of {}",
                mnt.display()
            );
            flag.store(true, Ordering::SeqCst);
            kill_daemons(&bin, &mnt);
            detach(&mnt);
            if !wait(Duration::from_secs(60)) {
                eprintln!("{name}: still hanging after the daemon was killed");
                std::process::exit(101);
            }
        });
        Self { state, expired }
    }

    fn end(&self) {
        *self.state.0.lock().unwrap() = true;
        self.state.1.notify_all();
    }
}

/// `umount -l`, as a user does after a crash.
pub(crate) fn detach(mnt: &Path) {
    // A user other than root has the helper of FUSE do it.
    for (program, flag) in [("umount", "-l"), ("fusermount3", "-uzq")] {
        let done = Command::new(program)
            .arg(flag)
            .arg(mnt)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if done.is_ok_and(|status| status.success()) {
            break;
        }
    }
}

/// A cowfs mount of its own for one test.
///
/// A directory with `backing/`, `mnt/` and `cowfs.log`. When the test passes all of it goes; when it fails
/// the directory stays and is named.
pub(crate) struct Mount {
    pub(crate) root: PathBuf,
    pub(crate) backing: PathBuf,
    pub(crate) mnt: PathBuf,
    bin: PathBuf,
    /// The mount options.
    options: Mutex<String>,
    watchdog: Watchdog,
    _here: user::Here,
}

/// Mounts a new filesystem of `kind` on `disk`; its image, if it has one, is in `root`.
#[track_caller]
fn mount_disk(root: &Path, disk: &Path, kind: &str, mib: u64) {
    let limit = Duration::from_secs(60);
    let mut mount = Command::new("mount");
    if kind == "tmpfs" {
        let size = format!("size={mib}m");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(disk);
        run(&mut mount, limit).success("mount -t tmpfs");
        return;
    }
    let image = root.join("disk.img");
    File::create(&image).unwrap().set_len(mib << 20).unwrap();
    // What xfs allocates ahead of writes comes to be data in the eyes of lseek(2) by being read: with it, no two
    // maps of the holes of a quiet file need agree.
    let options = if kind == "xfs" {
        "loop,allocsize=4k"
    } else {
        "loop"
    };
    let mkfs = format!("mkfs.{kind}");
    // without a word, also where a filesystem of an earlier test was in these blocks
    let quietly = if kind == "ext4" { "-qF" } else { "-qf" };
    run(Command::new(&mkfs).arg(quietly).arg(&image), limit).success(&mkfs);
    mount.args(["-o", options]).arg(&image).arg(disk);
    run(&mut mount, limit).success("mount -o loop");
}

impl Mount {
    /// Mounts a new empty directory. Fails the test when the result is not a mounted cowfs.
    #[track_caller]
    pub(crate) fn new(name: &str, limit: Duration) -> Self {
        Self::build(name, limit, None, "")
    }

    /// The same with mount options, which later mounts have as well.
    #[track_caller]
    pub(crate) fn with(name: &str, limit: Duration, options: &str) -> Self {
        Self::build(name, limit, None, options)
    }

    /// The same, with the backing directory on an ext4 of its own of `mib` MiB, so that nobody else's
    /// files count in a measurement of space.
    #[track_caller]
    pub(crate) fn on_own_disk(name: &str, limit: Duration, mib: u64) -> Self {
        Self::on_disk_of(name, limit, "ext4", mib)
    }

    /// The same on a filesystem of another `kind`, by the name that mkfs(8) knows it by, or a tmpfs; that has no limit of
    /// size if `mib` is 0.
    #[track_caller]
    pub(crate) fn on_disk_of(name: &str, limit: Duration, kind: &str, mib: u64) -> Self {
        Self::build(name, limit, Some((kind, mib)), "")
    }

    #[track_caller]
    fn build(name: &str, limit: Duration, disk: Option<(&str, u64)>, options: &str) -> Self {
        let here = user::Here::new();
        let root = scratch(name);
        let (mut backing, mnt) = (root.join("backing"), root.join("mnt"));
        if let Some((kind, mib)) = disk {
            let disk = root.join("disk");
            fs::create_dir(&disk).unwrap();
            mount_disk(&root, &disk, kind, mib);
            backing = disk.join("backing");
        }
        fs::create_dir(&backing).unwrap();
        fs::create_dir(&mnt).unwrap();
        let bin = cowfs_bin();
        let watchdog = Watchdog::start(name.to_owned(), bin.clone(), mnt.clone(), limit);
        let mount = Self {
            root,
            backing,
            mnt,
            bin,
            options: Mutex::new(options.to_owned()),
            watchdog,
            _here: here,
        };
        mount.mount();
        mount
    }

    /// Mounts what is not mounted, and checks that a cowfs is there when the command says so.
    #[track_caller]
    pub(crate) fn mount(&self) {
        run(
            Command::new(&self.bin)
                .arg("mount")
                .arg("--log")
                .arg(self.root.join("cowfs.log"))
                .arg("-o")
                .arg(joined(&self.options.lock().unwrap()))
                .arg(&self.backing)
                .arg(&self.mnt),
            Duration::from_secs(60),
        )
        .success("cowfs mount");
        let kind = mount_type(&self.mnt);
        assert_eq!(
            kind.as_deref(),
            Some("fuse.cowfs"),
            "{} is not a cowfs mount",
            self.mnt.display()
        );
        fs::read_dir(&self.mnt)
            .unwrap_or_else(|error| panic!("the new mount does not answer: {error}"));
    }

    /// Unmounts in the clean way.
    #[track_caller]
    pub(crate) fn umount(&self) {
        run(
            Command::new(&self.bin).arg("umount").arg(&self.mnt),
            Duration::from_secs(60),
        )
        .success("cowfs umount");
        assert_eq!(
            mount_type(&self.mnt),
            None,
            "{} is still mounted",
            self.mnt.display()
        );
    }

    /// Mounts with these mount options, as do all later mounts.
    #[track_caller]
    pub(crate) fn mount_with(&self, options: &str) {
        *self.options.lock().unwrap() = options.to_owned();
        self.mount();
    }

    /// As [`Self::mount_with`], after unmounting.
    pub(crate) fn remount_with(&self, options: &str) {
        self.umount();
        self.mount_with(options);
    }

    /// Unmounts cleanly and mounts again.
    #[track_caller]
    pub(crate) fn remount(&self) {
        self.umount();
        self.mount();
    }

    /// The process that serves the mount.
    #[track_caller]
    pub(crate) fn server(&self) -> Pid {
        pid_of(self.status("pid").try_into().unwrap())
    }

    /// A number in what `cowfs status --json` says.
    #[track_caller]
    fn status(&self, field: &str) -> u64 {
        let status = self.full_status();
        status[field]
            .as_u64()
            .unwrap_or_else(|| panic!("no {field} in {status}"))
    }

    /// What `cowfs status` says of the last cut.
    #[track_caller]
    pub(crate) fn cut_report(&self) -> String {
        self.full_status()["last_cut"].to_string()
    }

    /// How the kernel caches writes, as `cowfs status` says.
    #[track_caller]
    pub(crate) fn cache(&self) -> String {
        self.full_status()["cache"].as_str().unwrap().to_owned()
    }

    /// What `cowfs status --json` says.
    #[track_caller]
    pub(crate) fn full_status(&self) -> serde_json::Value {
        let outcome = run(
            Command::new(&self.bin)
                .args(["status", "--json"])
                .arg(&self.mnt),
            Duration::from_secs(60),
        )
        .success("cowfs status");
        serde_json::from_str(&outcome.stdout).unwrap()
    }

    /// The names of the snapshots, and whether each is sound (`ok`).
    #[track_caller]
    pub(crate) fn snapshots(&self) -> Vec<(String, bool)> {
        let outcome = run(
            Command::new(&self.bin)
                .args(["snapshot", "list", "--json"])
                .arg(&self.mnt),
            Duration::from_secs(60),
        )
        .success("cowfs snapshot list");
        let rows: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
        let row = |row: &serde_json::Value| {
            (
                row["name"].as_str().unwrap().to_owned(),
                row["state"] == "ok",
            )
        };
        rows.as_array().unwrap().iter().map(row).collect()
    }

    /// How often another server took the mount over.
    #[track_caller]
    pub(crate) fn takeovers(&self) -> u64 {
        self.status("takeovers")
    }

    /// `kill -9` of the server alone; its keeper starts another.
    #[track_caller]
    pub(crate) fn kill_server(&self) {
        kill_process(self.server(), Signal::KILL).unwrap();
    }

    /// The processes that make the kernel give up what it holds back.
    pub(crate) fn helpers(&self) -> Vec<Pid> {
        let mut pids = daemons(&self.bin, &self.mnt);
        pids.retain(|pid| is_helper(*pid));
        pids
    }

    /// What the daemon has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.root.join("cowfs.log")).unwrap()
    }

    /// `kill -9` of the daemon and of its keeper, in one order or the other; the mount is dead afterwards. The helper
    /// process must end by itself.
    #[track_caller]
    pub(crate) fn kill9(&self) {
        let mut serving: Vec<Pid> = daemons(&self.bin, &self.mnt)
            .into_iter()
            .filter(|pid| !is_helper(*pid))
            .collect();
        assert_eq!(
            serving.len(),
            2,
            "one daemon and its keeper serve {}",
            self.mnt.display()
        );
        static TURN: AtomicBool = AtomicBool::new(false);
        if TURN.fetch_xor(true, Ordering::Relaxed) {
            serving.reverse();
        }
        for pid in serving {
            let _ = kill_process(pid, Signal::KILL);
        }
        let start = Instant::now();
        while !daemons(&self.bin, &self.mnt).is_empty() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "a process of the mount outlives its daemon"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Mounts what is not mounted, and kills whatever serves it, the command included, after a while: in the middle of
    /// recovery, or just after it. Nothing is mounted afterwards.
    #[track_caller]
    pub(crate) fn mount_and_kill(&self, after: Duration) {
        let mut command = Command::new(&self.bin);
        command
            .arg("mount")
            .arg("--log")
            .arg(self.root.join("cowfs.log"))
            .arg("-o")
            .arg(self.options.lock().unwrap().as_str())
            .args([&self.backing, &self.mnt]);
        self.begin_and_kill(command, after);
    }

    /// Unmounts in the clean way and kills the daemon meanwhile. Nothing is mounted afterwards.
    #[track_caller]
    pub(crate) fn umount_and_kill(&self, after: Duration) {
        let mut command = Command::new(&self.bin);
        command.arg("umount").arg(&self.mnt);
        self.begin_and_kill(command, after);
    }

    #[track_caller]
    fn begin_and_kill(&self, mut command: Command, after: Duration) {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(after);
        let start = Instant::now();
        // Nobody starts one behind the back of who looks for them.
        let _ = child.kill();
        child.wait().unwrap();
        // One that is killed may have started another just before.
        while kill_daemons(&self.bin, &self.mnt) > 0 {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "the daemons of {} do not end",
                self.mnt.display()
            );
        }
        while mount_type(&self.mnt).is_some() {
            assert!(start.elapsed() < Duration::from_secs(60), "not detached");
            detach(&self.mnt);
        }
    }

    /// What a user does after the daemon died: `umount -l`, mount again.
    #[track_caller]
    pub(crate) fn recover(&self) {
        detach(&self.mnt);
        self.mount();
    }

    /// As [`Self::snapshot`]. On a full store that may fail until the next round of upkeep.
    #[track_caller]
    pub(crate) fn snapshot_when_there_is_room(&self, name: &str) -> PathBuf {
        let path = self.snapshot_path(name);
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(error) = fs::create_dir(&path) {
            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{name}");
            assert!(Instant::now() < deadline, "{name}: no space came back");
            std::thread::sleep(Duration::from_millis(20));
        }
        path
    }

    /// Cuts a snapshot and returns its path.
    #[track_caller]
    pub(crate) fn snapshot(&self, name: &str) -> PathBuf {
        let path = self.snapshot_path(name);
        fs::create_dir(&path).unwrap_or_else(|error| panic!("mkdir {}: {error}", path.display()));
        path
    }

    /// Where the snapshot of that name is.
    pub(crate) fn snapshot_path(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.mnt.join(".snapshots").join(name.as_ref())
    }

    fn clean(&self) -> Result<(), String> {
        let mut result = Ok(());
        if mount_type(&self.mnt).is_some() {
            let out = Command::new(&self.bin)
                .arg("umount")
                .arg(&self.mnt)
                .stdin(Stdio::null())
                .output();
            match out {
                Ok(out) if out.status.success() => {}
                Ok(out) => {
                    result = Err(format!(
                        "cowfs umount: {}",
                        String::from_utf8_lossy(&out.stderr)
                    ));
                }
                Err(error) => result = Err(format!("cowfs umount: {error}")),
            }
        }
        detach(&self.mnt);
        if result.is_err() {
            for pid in daemons(&self.bin, &self.mnt) {
                eprintln!("{}", where_threads_are(pid));
            }
        }
        if kill_daemons(&self.bin, &self.mnt) > 0 && result.is_ok() {
            result = Err("the daemon outlived its mount".to_owned());
        }
        unmount_below(&self.bin, &self.root);
        result
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        let expired = self.watchdog.expired.load(Ordering::SeqCst);
        let cleaned = self.clean();
        self.watchdog.end();
        if failed || expired || cleaned.is_err() {
            eprintln!(
                "kept for a look: {} (cowfs.log is the daemon's)",
                self.root.display()
            );
        } else if let Err(error) = fs::remove_dir_all(&self.root) {
            eprintln!("{}: cannot remove: {error}", self.root.display());
        }
        if !failed {
            assert!(!expired, "the time limit was reached");
            if let Err(why) = cleaned {
                panic!("unmounting at the end: {why}");
            }
        }
    }
}
