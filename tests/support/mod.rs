//! What the tests of a mounted cowfs share: a mount that cleans up after itself, commands with a time
//! limit, and a watchdog that turns a hang into a failure.
//!
//! Environment: `COWFS_BIN` tests another binary, `COWFS_TEST_DIR` is where the backing directories go
//! (default: cargo's temporary directory for tests), `COWFS_SEED` repeats a randomised test.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

pub(crate) mod cut;
pub(crate) mod model;

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

/// The processes that run `bin` and have `mnt` as an argument of its own.
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
        let Ok(line) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let Ok(exe) = fs::read_link(entry.path().join("exe")) else {
            continue;
        };
        let same = exe.file_name().zip(bin.file_name()).is_some_and(|(a, b)| {
            a == b || a.as_bytes().strip_suffix(b" (deleted)") == Some(b.as_bytes())
        });
        if same
            && line
                .split(|b| *b == 0)
                .any(|word| word == mnt.as_os_str().as_bytes())
        {
            pids.extend(Pid::from_raw(id));
        }
    }
    pids
}

/// Whether it is the daemon's helper, which works for it and serves nothing.
fn is_helper(pid: Pid) -> bool {
    fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()))
        .is_ok_and(|line| line.split(|b| *b == 0).any(|word| word == b"flush-helper"))
}

/// Kills the daemons of `mnt` with signal 9 and waits until they are gone. Returns how many there were.
pub(crate) fn kill_daemons(bin: &Path, mnt: &Path) -> usize {
    let pids = daemons(bin, mnt);
    for pid in &pids {
        let _ = kill_process(*pid, Signal::KILL);
    }
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) && !daemons(bin, mnt).is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    pids.len()
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
    let _ = Command::new("umount")
        .arg("-l")
        .arg(mnt)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
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
    watchdog: Watchdog,
}

impl Mount {
    /// Mounts a new empty directory. Fails the test when the result is not a mounted cowfs.
    #[track_caller]
    pub(crate) fn new(name: &str, limit: Duration) -> Self {
        Self::build(name, limit, None)
    }

    /// The same, with the backing directory on an ext4 of its own of `mib` MiB, so that nobody else's
    /// files count in a measurement of space.
    #[track_caller]
    pub(crate) fn on_own_disk(name: &str, limit: Duration, mib: u64) -> Self {
        Self::build(name, limit, Some(mib))
    }

    #[track_caller]
    fn build(name: &str, limit: Duration, disk: Option<u64>) -> Self {
        let root = scratch(name);
        let (mut backing, mnt) = (root.join("backing"), root.join("mnt"));
        if let Some(mib) = disk {
            let (image, disk) = (root.join("disk.img"), root.join("disk"));
            File::create(&image).unwrap().set_len(mib << 20).unwrap();
            fs::create_dir(&disk).unwrap();
            run(
                Command::new("mkfs.ext4").arg("-qF").arg(&image),
                Duration::from_secs(60),
            )
            .success("mkfs.ext4");
            run(
                Command::new("mount")
                    .args(["-o", "loop"])
                    .arg(&image)
                    .arg(&disk),
                Duration::from_secs(30),
            )
            .success("mount -o loop");
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
            watchdog,
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

    /// Unmounts cleanly and mounts again.
    #[track_caller]
    pub(crate) fn remount(&self) {
        self.umount();
        self.mount();
    }

    /// `kill -9` of the daemon; the mount is dead afterwards. Its helper process must end by itself.
    #[track_caller]
    pub(crate) fn kill9(&self) {
        let serving: Vec<Pid> = daemons(&self.bin, &self.mnt)
            .into_iter()
            .filter(|pid| !is_helper(*pid))
            .collect();
        assert_eq!(serving.len(), 1, "one daemon serves {}", self.mnt.display());
        let _ = kill_process(serving[0], Signal::KILL);
        let start = Instant::now();
        while !daemons(&self.bin, &self.mnt).is_empty() {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "a process of the mount outlives its daemon"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What a user does after the daemon died: `umount -l`, mount again.
    #[track_caller]
    pub(crate) fn recover(&self) {
        detach(&self.mnt);
        self.mount();
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
