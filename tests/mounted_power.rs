//! What a user sees after the machine went down, on a real mount. The power stays on: the session file is made to
//! name another boot. (`tests/power` cuts the power, without a mount.)

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use support::{Mount, cowfs_bin, run};

const LIMIT: Duration = Duration::from_secs(120);
/// Length of a slot of the session file without its checksum, and where in it are the boot's number and the last settled
/// snapshot (docs/FORMAT.md).
const SLOT: usize = 65;
const BOOT: usize = 32;
const SETTLED: usize = 48;
const DIRTY: usize = 56;

fn session(mount: &Mount) -> Vec<(usize, Vec<u8>)> {
    let bytes = fs::read(mount.backing.join(".cowfs/store/journal/session")).unwrap();
    let slot = |at: usize| Some((at, bytes.get(at..at + SLOT + 4)?.to_vec()));
    [0, 4096].into_iter().filter_map(slot).collect()
}

/// Makes the last session one of another boot.
fn machine_went_down(mount: &Mount) {
    let path = mount.backing.join(".cowfs/store/journal/session");
    let file = File::options().write(true).open(path).unwrap();
    for (at, mut slot) in session(mount) {
        slot[BOOT] ^= 1;
        let crc = crc32c::crc32c(&slot[..SLOT]);
        slot[SLOT..].copy_from_slice(&crc.to_le_bytes());
        file.write_all_at(&slot, at as u64).unwrap();
    }
}

/// How many snapshots are settled, and whether the session is dirty.
fn standing(mount: &Mount) -> (u64, bool) {
    let number = |slot: &[u8], at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().unwrap());
    let slots = session(mount);
    let newest = slots.iter().max_by_key(|(_, slot)| number(slot, 8));
    let newest = &newest.unwrap().1;
    (number(newest, SETTLED), newest[DIRTY] == 1)
}

fn cowfs(args: &[&str], path: &Path) -> String {
    let mut command = Command::new(cowfs_bin());
    let done = run(command.args(args).arg(path), LIMIT).success("cowfs");
    done.stdout
}

/// Name and state of each snapshot.
fn states(mount: &Mount) -> Vec<(String, String)> {
    let listed = cowfs(&["snapshot", "list", "--json"], &mount.mnt);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let text = |entry: &serde_json::Value, key: &str| entry[key].as_str().unwrap().to_owned();
    let row = |entry| (text(entry, "name"), text(entry, "state"));
    listed.as_array().unwrap().iter().map(row).collect()
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    for _ in 0..600 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{what}: not after a minute");
}

#[test]
fn snapshots_in_doubt_say_so_and_others_do_not() {
    let mount = Mount::new("power", LIMIT);
    fs::write(mount.mnt.join("file"), [1; 10_000]).unwrap();
    mount.snapshot("k");
    fs::write(mount.mnt.join("file"), [2; 10_000]).unwrap();
    assert!(standing(&mount).1);

    // A process that is killed loses nothing.
    mount.kill9();
    mount.recover();
    assert_eq!(states(&mount), [("k".into(), "ok".into())]);

    // When nobody writes the session becomes clean, and a machine that goes down then takes nothing.
    fs::write(mount.mnt.join("other"), "x").unwrap();
    wait_until("clean and settled", || standing(&mount) == (1, false));
    mount.kill9();
    machine_went_down(&mount);
    mount.recover();
    assert_eq!(states(&mount), [("k".into(), "ok".into())]);
    assert!(!cowfs(&["status"], &mount.mnt).contains("suspect"));

    // While somebody writes it may take a pre-image.
    mount.snapshot("l");
    fs::remove_file(mount.mnt.join("file")).unwrap();
    mount.kill9();
    machine_went_down(&mount);
    mount.recover();
    let suspect = |name: &str| (name.into(), "suspect".into());
    assert_eq!(states(&mount), [suspect("k"), suspect("l")]);
    assert!(cowfs(&["snapshot", "list"], &mount.mnt).contains("suspect"));
    let status = cowfs(&["status"], &mount.mnt);
    assert_eq!(
        status.matches("which may not be exact").count(),
        2,
        "{status}"
    );
    let get = ["--only-values", "-n", "user.cowfs.snapshot"];
    let shown = run(
        Command::new("getfattr")
            .args(get)
            .arg(mount.snapshot_path("k")),
        LIMIT,
    );
    let shown = shown.success("getfattr").stdout;
    assert!(shown.contains(r#""state":"suspect""#));
    // They can be read, and stay suspect; one that is cut later is not.
    assert_eq!(
        fs::read(mount.snapshot_path("k").join("file")).unwrap(),
        [1; 10_000]
    );
    mount.snapshot("m");
    mount.remount();
    let expected = [suspect("k"), suspect("l"), ("m".into(), "ok".into())];
    assert_eq!(states(&mount), expected);
}

/// A filesystem that fails loses what was not synced, and the machine stays up.
#[test]
fn a_filesystem_that_failed_and_was_mounted_anew() {
    for kind in ["ext4", "xfs"] {
        let mount = Mount::on_disk_of(&format!("failed-{kind}"), LIMIT, kind, 400);
        let tool = |program: &str, args: &[&str], path: &Path| {
            run(Command::new(program).args(args).arg(path), LIMIT).success(program);
        };
        let disk = mount.backing.parent().unwrap();
        // So that the directory itself is not lost.
        tool("sync", &["-f"], disk);
        fs::write(mount.mnt.join("file"), [1; 10_000]).unwrap();
        let other = File::create(mount.mnt.join("other")).unwrap();
        mount.snapshot("k");
        let cut = Instant::now();
        // By which its cut becomes durable, and the first file does not.
        other.write_all_at(b"x", 0).unwrap();
        other.sync_all().unwrap();
        drop(other);
        match kind {
            "xfs" => tool("xfs_io", &["-x", "-c", "shutdown"], disk),
            _ => tool("mount", &["-o", "remount,abort"], disk),
        }
        // All is made durable some seconds after it.
        let too_late = cut.elapsed() > Duration::from_secs(4);
        mount.umount();
        tool("umount", &[], disk);
        let image = mount.root.join("disk.img");
        let mut again = Command::new("mount");
        run(again.args(["-o", "loop"]).arg(image).arg(disk), LIMIT).success("mount");
        mount.mount();
        let found = states(&mount);
        let suspect = found == [("k".into(), "suspect".into())];
        assert!(suspect || too_late, "{kind}: {found:?}");
        // An orderly end leaves nothing in doubt, however often the filesystem is mounted.
        mount.snapshot("l");
        mount.umount();
        tool("umount", &[], disk);
        let mut again = Command::new("mount");
        let image = mount.root.join("disk.img");
        run(again.args(["-o", "loop"]).arg(image).arg(disk), LIMIT).success("mount");
        mount.mount();
        assert!(states(&mount).contains(&("l".into(), "ok".into())));
    }
}
