//! A mount that hangs holds up nobody who is not in it: neither other mounts, whose commands ask it what it is of when the
//! mount table does not say, nor its own unmounting. In a file of its own, because it holds up others for seconds.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use fuser::{
    BackgroundSession, Config, Filesystem, INodeNo, ReplyXattr, Request, Session, SessionACL,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{Mount, Outcome, cowfs_bin, mount_type, run, scratch};

const LIMIT: Duration = Duration::from_secs(180);

#[track_caller]
fn cowfs(arguments: &[&str], path: &Path) -> Outcome {
    let mut cowfs = Command::new(cowfs_bin());
    run(cowfs.args(arguments).arg(path), LIMIT / 2)
}

/// What another mount can be asked to do beside one that hangs.
#[track_caller]
fn try_beside(mount: &Mount) {
    cowfs(&["check"], &mount.backing).success("check");
    mount.mount();
    cowfs(&["umount"], &mount.mnt).success("umount");
}

/// Goes on when it goes out of scope, so that the mount can be cleaned up.
struct Stopped(Pid);

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

#[test]
fn a_daemon_that_is_stopped() {
    let mount = Mount::new("beside-stopped", LIMIT);
    let hangs = Mount::with("stopped", LIMIT, "fsname=word");
    mount.umount();
    let stopped = Stopped(hangs.server());
    kill_process(stopped.0, Signal::STOP).unwrap();
    try_beside(&mount);
    drop(stopped);
    mount.mount();
}

/// Takes every question and answers none, as a daemon does whose disk hangs: who asked cannot even be killed.
#[derive(Clone, Default)]
struct Hanging(Arc<Mutex<Vec<ReplyXattr>>>);

impl Filesystem for Hanging {
    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        self.0.lock().unwrap().push(reply);
    }
}

/// Ends when it goes out of scope.
struct HangingMount<'a> {
    at: &'a Path,
    questions: Hanging,
    _session: BackgroundSession,
}

impl<'a> HangingMount<'a> {
    fn new(at: &'a Path) -> Self {
        let questions = Hanging::default();
        let mut both = File::options();
        let device = both.read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let options = CString::new(options).unwrap();
        mount(
            "word",
            at,
            "fuse.cowfs",
            MountFlags::empty(),
            Some(options.as_c_str()),
        )
        .unwrap();
        let served = Session::from_fd(
            questions.clone(),
            device.into(),
            SessionACL::All,
            Config::default(),
        );
        let session = served.and_then(Session::spawn).unwrap();
        Self {
            at,
            questions,
            _session: session,
        }
    }
}

impl Drop for HangingMount<'_> {
    fn drop(&mut self) {
        // Unless the test has done it. What was asked is answered with an error.
        let _ = unmount(self.at, UnmountFlags::DETACH);
        self.questions.0.lock().unwrap().clear();
    }
}

#[test]
fn a_daemon_that_takes_questions_and_does_not_answer() {
    let mount = Mount::new("beside-hanging", LIMIT);
    mount.umount();
    let at = scratch("hanging");
    let hanging = HangingMount::new(&at);
    try_beside(&mount);
    let refused = cowfs(&["umount"], &at);
    assert_eq!(refused.status.code(), Some(4));
    assert!(
        refused.stderr.contains("does not answer"),
        "{}",
        refused.stderr
    );
    cowfs(&["umount", "--lazy"], &at).success("umount --lazy");
    assert_eq!(mount_type(&at), None);
    let asked = hanging.questions.0.lock().unwrap().len();
    assert!(asked >= 4, "it was asked {asked} times");
    drop(hanging);
    std::fs::remove_dir(&at).unwrap();
    mount.mount();
}
