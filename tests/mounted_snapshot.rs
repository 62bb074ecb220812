//! A snapshot mounted by itself: how it comes to be mounted, what it keeps from happening, and how it ends. What it
//! shows is the case `alone` of tests/mounted_contract.rs.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::cut::remove_snapshot;
use support::{Mount, Outcome, cowfs_bin, daemons, mount_type, run, unmount_patiently};

const LIMIT: Duration = Duration::from_secs(60);

fn cowfs(line: &[&str], paths: &[&Path]) -> Outcome {
    let mut command = Command::new(cowfs_bin());
    command.args(line.iter().map(OsStr::new)).args(paths);
    run(&mut command, LIMIT)
}

#[track_caller]
fn refused(line: &[&str], paths: &[&Path], code: i32, says: &[&str]) {
    let outcome = cowfs(line, paths);
    assert_eq!(outcome.status.code(), Some(code), "{}", outcome.stderr);
    for part in says {
        let said = &outcome.stderr;
        assert!(said.contains(part), "{part:?} is not in {said:?}");
    }
}

/// A mount with a file, a snapshot `a` of it, and a place for the snapshot.
struct Scene {
    mount: Mount,
    place: PathBuf,
}

impl Scene {
    fn new(name: &str) -> Self {
        let mount = Mount::new(name, Duration::from_secs(120));
        fs::create_dir(mount.mnt.join("d")).unwrap();
        fs::write(mount.mnt.join("d/f"), "of the cut").unwrap();
        mount.snapshot("a");
        fs::write(mount.mnt.join("d/f"), "of now, longer").unwrap();
        let place = mount.root.join("place");
        fs::create_dir(&place).unwrap();
        Self { mount, place }
    }

    #[track_caller]
    fn mount_at(&self, name: &str, place: &Path) {
        let option = format!("snapshot={name}");
        cowfs(&["mount", "-o", &option], &[&self.mount.backing, place]).success("mount a snapshot");
        assert_eq!(mount_type(place).as_deref(), Some("fuse.cowfs"));
    }

    #[track_caller]
    fn mount_snapshot(&self) {
        self.mount_at("a", &self.place);
        assert_eq!(self.file(), "of the cut");
    }

    fn file(&self) -> String {
        fs::read_to_string(self.place.join("d/f")).unwrap()
    }

    #[track_caller]
    fn umount(&self) {
        cowfs(&["umount"], &[&self.place]).success("unmount the snapshot");
        assert_eq!(mount_type(&self.place), None);
    }

    fn status(&self, path: &Path) -> serde_json::Value {
        let said = cowfs(&["status", "--json"], &[path]).success("status");
        serde_json::from_str(&said.stdout).unwrap()
    }

    /// The deletion that is refused while the snapshot is mounted.
    fn delete(&self) -> Option<Errno> {
        let error = fs::remove_dir(self.mount.snapshot_path("a")).err()?;
        Some(Errno::from_io_error(&error).unwrap())
    }

    /// The snapshot is not in use any more, as soon as the daemon has heard of it.
    #[track_caller]
    fn goes(&self) {
        remove_snapshot(&self.mount.snapshot_path("a")).unwrap();
    }
}

#[test]
fn what_cannot_be_mounted_is_refused_and_nothing_is_left() {
    let scene = Scene::new("alone-refused");
    let (backing, mnt, place) = (&scene.mount.backing, &scene.mount.mnt, &scene.place);
    let a = ["mount", "-o", "snapshot=a"];
    let other = scene.mount.root.join("other");
    fs::create_dir(&other).unwrap();
    refused(
        &a,
        &[&other, place],
        3,
        &["not mounted by cowfs", "cowfs mount"],
    );
    refused(&a, &[&scene.mount.root.join("none"), place], 3, &["none"]);
    refused(
        &["mount", "-o", "snapshot=b"],
        &[backing, place],
        7,
        &["no snapshot \"b\""],
    );
    refused(
        &["mount", "-o", "snapshot=a/b"],
        &[backing, place],
        7,
        &["a/b"],
    );
    refused(
        &["mount", "-o", "snapshot"],
        &[backing, place],
        2,
        &["needs a value"],
    );
    refused(&a, &[backing], 2, &["place of its own"]);
    refused(
        &["mount", "-f", "-o", "snapshot=a"],
        &[backing, place],
        2,
        &["-f"],
    );
    refused(
        &["mount", "-o", "snapshot=a,store=/x"],
        &[backing, place],
        2,
        &["store"],
    );
    refused(&a, &[backing, &place.join("none")], 4, &["mkdir"]);
    refused(&a, &[backing, &mnt.join("d")], 4, &["inside the live tree"]);
    refused(&a, &[backing, backing], 4, &["inside the live tree"]);
    refused(
        &a,
        &[backing, &backing.join("d")],
        4,
        &["inside the source"],
    );
    refused(&a, &[backing, mnt], 4, &["there already"]);
    assert_eq!(mount_type(place), None);
    scene.mount_snapshot();
    refused(&a, &[backing, place], 4, &["there already"]);
    // Through the mount of a snapshot, the live mount is meant.
    scene.mount_at("a", &other);
    cowfs(&["umount"], &[&other]).success("umount");
    cowfs(&a, &[place, &other]).success("mount a snapshot by the mount of a snapshot");
    cowfs(&["umount"], &[&other]).success("umount");
    scene.umount();
    scene.mount.kill9();
    refused(&a, &[mnt, place], 3, &["dead", "umount -l"]);
    refused(&a, &[backing, place], 3, &["not mounted by cowfs"]);
    assert_eq!(mount_type(place), None);
    scene.mount.recover();
    scene.mount_snapshot();
    scene.umount();
}

#[test]
fn a_mounted_snapshot_is_in_use_until_its_last_user_is_gone() {
    let scene = Scene::new("alone-busy");
    let known = |scene: &Scene| {
        let status = scene.status(&scene.mount.mnt);
        status["known_objects"].as_u64().unwrap()
    };
    let before = known(&scene);
    scene.mount_snapshot();
    assert!(known(&scene) > before, "the mount is counted");
    assert_eq!(scene.delete(), Some(Errno::BUSY));
    let busy = "it is mounted by itself";
    refused(
        &["snapshot", "delete"],
        &[&scene.mount.mnt, Path::new("a")],
        7,
        &[busy],
    );
    // Renaming it does not disturb the mount.
    let names = ["a", "renamed"].map(|name| scene.mount.snapshot_path(name));
    fs::rename(&names[0], &names[1]).unwrap();
    assert_eq!(scene.file(), "of the cut");
    assert_eq!(scene.status(&scene.place)["snapshot"], "renamed");
    scene.mount.snapshot("a");
    assert_eq!(scene.file(), "of the cut");
    fs::remove_dir(&names[0]).unwrap();
    fs::rename(&names[1], &names[0]).unwrap();
    // Detached while a file is open, it is in use until that is closed.
    let open = File::open(scene.place.join("d/f")).unwrap();
    refused(&["umount"], &[&scene.place], 4, &["in use"]);
    cowfs(&["umount", "--lazy"], &[&scene.place]).success("umount --lazy");
    assert_eq!(mount_type(&scene.place), None);
    assert_eq!(std::io::read_to_string(&open).unwrap(), "of the cut");
    assert_eq!(scene.delete(), Some(Errno::BUSY));
    drop(open);
    scene.goes();
    let after = known(&scene);
    assert!(after <= before, "{after} objects known, {before} before");
}

#[test]
fn every_way_of_unmounting_lets_the_snapshot_go() {
    for way in ["umount", "umount -l", "umount -f"] {
        let scene = Scene::new("alone-ways");
        scene.mount_snapshot();
        let open = File::open(scene.place.join("d/f")).unwrap();
        let tool = |args: &[&str]| {
            run(Command::new("umount").args(args).arg(&scene.place), LIMIT).success("umount");
        };
        match way {
            "umount" => {
                drop(open);
                unmount_patiently(&scene.place);
            }
            "umount -l" => {
                tool(&["-i", "-l"]);
                drop(open);
            }
            _ => {
                // A forced unmount ends the connection under its users: no RELEASE and no FORGET comes. The mount
                // itself stays, as it is busy.
                let mut force = Command::new("umount");
                let forced = run(force.args(["-i", "-f"]).arg(&scene.place), LIMIT);
                assert!(!forced.status.success() && forced.stderr.contains("busy"));
                scene.goes();
                drop(open);
                unmount_patiently(&scene.place);
                continue;
            }
        }
        scene.goes();
        let status = scene.status(&scene.mount.mnt);
        assert_eq!(status["snapshot_mounts"], serde_json::json!([]), "{way}");
        assert_eq!(status["open_files"], 0, "{way}");
    }
}

#[test]
fn the_command_knows_a_mounted_snapshot() {
    let scene = Scene::new("alone-command");
    // As mount(8) calls its helper.
    let helper = scene.mount.root.join("mount.fuse.cowfs");
    std::os::unix::fs::symlink(cowfs_bin(), &helper).unwrap();
    let options = "rw,nosuid,nodev,noexec,noatime,fsname=nightly,snapshot=a";
    let mut command = Command::new(&helper);
    command.arg(&scene.mount.mnt).arg(&scene.place);
    run(command.args(["-o", options]), LIMIT).success("mount.fuse.cowfs");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let place = scene.place.to_str().unwrap();
    let line = table
        .lines()
        .find(|line| line.split(' ').nth(4) == Some(place));
    let line = line.unwrap();
    assert!(line.contains(" ro,nosuid,nodev,noexec,noatime "), "{line}");
    assert!(line.contains(" - fuse.cowfs nightly ro,"), "{line}");

    let (live, alone) = (scene.status(&scene.mount.mnt), scene.status(&scene.place));
    assert_eq!(live["snapshot"], serde_json::Value::Null);
    assert_eq!(alone["snapshot"], "a");
    assert_eq!(live["pid"], alone["pid"]);
    let mounts = live["snapshot_mounts"].as_array().unwrap();
    assert_eq!(mounts.len(), 1);
    assert_eq!(mounts[0]["snapshot"], "a");
    assert_eq!(mounts[0]["mountpoints"], serde_json::json!([place]));

    // The other commands mean the live mount.
    let inside = scene.place.join("d");
    let cut = cowfs(&["snapshot", "create"], &[&inside, Path::new("b")]).success("create");
    assert_eq!(
        cut.stdout.trim_end(),
        scene.mount.snapshot_path("b").to_str().unwrap()
    );
    let listed = cowfs(&["snapshot", "list"], &[&inside])
        .success("list")
        .stdout;
    let names: Vec<_> = listed
        .lines()
        .skip(1)
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(names, ["a", "b"]);
    assert!(!scene.place.join(".snapshots").exists());
    cowfs(&["snapshot", "delete"], &[&inside, Path::new("b")]).success("delete");
    refused(&["umount"], &[&inside], 4, &["inside a cowfs mount"]);
    scene.umount();
}

#[test]
fn the_order_to_serve_a_snapshot_is_for_the_daemons_user_and_takes_a_fuse_device() {
    let scene = Scene::new("alone-order");
    let snapshot = scene.mount.snapshot_path("a");
    let ask = |asker: &[&str], fd: u32| {
        let name = format!("user.cowfs.mount.{fd}.0:9999");
        let mut command = Command::new(asker[0]);
        command
            .args(&asker[1..])
            .args(["--only-values", "-n", &name]);
        let said = run(command.arg(&snapshot), LIMIT).success("getfattr");
        serde_json::from_str::<serde_json::Value>(&said.stdout).unwrap()
    };
    let root = ask(&["getfattr"], 1);
    assert_eq!(root["code"], 5, "{root}");
    assert!(
        root["message"].as_str().unwrap().contains("no /dev/fuse"),
        "{root}"
    );
    let none = ask(&["getfattr"], 999);
    assert_eq!(none["code"], 1, "{none}");
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "getfattr",
    ];
    let other = ask(&nobody, 1);
    assert_eq!(other["code"], 5, "{other}");
    assert!(
        other["message"].as_str().unwrap().contains("only root"),
        "{other}"
    );
    assert_eq!(
        scene.status(&scene.mount.mnt)["snapshot_mounts"],
        serde_json::json!([])
    );
    scene.goes();
}

#[track_caller]
fn wait_for_the_end(scene: &Scene) {
    let start = Instant::now();
    while !daemons(&cowfs_bin(), &scene.mount.mnt).is_empty() {
        assert!(start.elapsed() < LIMIT, "the daemon does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_live_mount_is_in_use_while_a_snapshot_is_mounted() {
    let scene = Scene::new("alone-live");
    let second = scene.mount.root.join("second");
    fs::create_dir(&second).unwrap();
    scene.mount_snapshot();
    scene.mount_at("a", &second);
    let place = scene.place.to_str().unwrap();
    refused(
        &["umount"],
        &[&scene.mount.mnt],
        4,
        &["in use", "a at", place],
    );
    assert_eq!(mount_type(&scene.mount.mnt).as_deref(), Some("fuse.cowfs"));
    assert_eq!(scene.file(), "of the cut");
    cowfs(&["umount", "--lazy"], &[&scene.mount.mnt]).success("umount --lazy");
    wait_for_the_end(&scene);
    for place in [&scene.place, &second, &scene.mount.mnt] {
        assert_eq!(mount_type(place), None, "{}", place.display());
    }
    scene.mount.mount();
    scene.mount_snapshot();
    scene.umount();
    // At once after the end of a mount the live one is not in use.
    scene.mount.umount();
    scene.mount.mount();
}

#[test]
fn a_signal_detaches_mounted_snapshots_too() {
    let scene = Scene::new("alone-signal");
    scene.mount_snapshot();
    let open = File::open(scene.place.join("d/f")).unwrap();
    let pid = scene.status(&scene.mount.mnt)["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let start = Instant::now();
    while mount_type(&scene.place).is_some() || mount_type(&scene.mount.mnt).is_some() {
        assert!(start.elapsed() < LIMIT, "still mounted");
        std::thread::sleep(Duration::from_millis(2));
    }
    // Who was reading may finish; the daemon ends with him.
    assert_eq!(std::io::read_to_string(&open).unwrap(), "of the cut");
    drop(open);
    wait_for_the_end(&scene);
    scene.mount.mount();
}

#[test]
fn a_killed_daemon_leaves_a_dead_mount_that_can_be_made_anew() {
    let scene = Scene::new("alone-kill");
    scene.mount_snapshot();
    let number = |path: &Path| path.symlink_metadata().unwrap().ino();
    let file = scene.place.join("d/f");
    let numbers = (number(&scene.place), number(&file));
    assert_eq!(
        numbers,
        (
            number(&scene.mount.mnt),
            number(&scene.mount.mnt.join("d/f"))
        )
    );
    scene.mount.kill9();
    let dead = File::open(&file).unwrap_err();
    assert_eq!(Errno::from_io_error(&dead), Some(Errno::NOTCONN));
    scene.umount();
    scene.mount.recover();
    scene.mount_snapshot();
    assert_eq!((number(&scene.place), number(&file)), numbers);
    scene.umount();
}

#[test]
fn a_comparison_of_the_live_tree_with_a_snapshot_sees_a_file_of_equal_size() {
    let scene = Scene::new("alone-diff");
    let live = &scene.mount.mnt;
    let snapshot = scene.mount.snapshot("b");
    let diff = || {
        run(
            Command::new("diff").arg("-r").arg(live).arg(&snapshot),
            LIMIT,
        )
    };
    let same = diff();
    assert_eq!(
        same.status.code(),
        Some(0),
        "{}{}",
        same.stdout,
        same.stderr
    );
    let data = fs::read(live.join("d/f")).unwrap();
    fs::write(live.join("d/f"), data.to_ascii_uppercase()).unwrap();
    let other = diff();
    assert_eq!(other.status.code(), Some(1), "{}", other.stderr);
    assert!(other.stdout.contains("d/f"), "{}", other.stdout);
}

/// Large enough that what a reader has passed is dropped from the cache (docs/ARCHITECTURE.md, "Drop-behind").
const LARGE: usize = 64 << 20;

/// Reads a file of [`LARGE`] bytes from one end to the other.
#[track_caller]
fn read_through(path: &Path) {
    let mut buffer = vec![0; 1 << 20];
    let mut file = File::open(path).unwrap();
    let mut left = LARGE;
    while left > 0 {
        let n = file.read(&mut buffer).unwrap();
        assert!(n > 0, "{} ends early", path.display());
        left -= n;
    }
}

/// Processes that the server has started.
fn children(server: Pid) -> Vec<i32> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid = entry.unwrap().file_name().to_str()?.parse().ok()?;
        // After the name of the program, which may contain anything: the state, then the parent (proc_pid_stat(5)).
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?;
        (parent == server.as_raw_nonzero().to_string()).then_some(pid)
    });
    processes.collect()
}

/// What a helper has open that is the server's, if anything.
fn inherited(pid: i32, mount: &Mount) -> Option<String> {
    let open = |pid: i32| {
        let entries = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten();
        // The standard streams are for it: stderr is the log.
        let own = |entry: &fs::DirEntry| !["0", "1", "2"].iter().any(|n| entry.file_name() == *n);
        let links = entries.flatten().filter(own);
        let links = links.filter_map(|entry| fs::read_link(entry.path()).ok());
        links.map(|link| link.to_str().unwrap().to_owned())
    };
    let servers: HashSet<String> = open(mount.server().as_raw_nonzero().get()).collect();
    let special = |link: &String| {
        [
            "/dev/fuse",
            "/memfd:",
            "socket:",
            mount.root.to_str().unwrap(),
        ]
        .iter()
        .any(|begin| link.starts_with(begin))
    };
    open(pid).find(|link| special(link) && servers.contains(link))
}

/// A helper outlives the server for a moment. If it had the device the kernel would not see that nobody answers any
/// more, and the helper itself would wait for an answer for ever.
#[test]
fn helpers_have_nothing_of_the_servers_open() {
    let scene = Scene::new("alone-helpers");
    let (mount, place) = (&scene.mount, &scene.place);
    fs::write(mount.mnt.join("large"), vec![1; LARGE]).unwrap();
    let snapshot = mount.snapshot("b");
    scene.mount_at("b", place);
    let check = || {
        for path in [snapshot.join("large"), place.join("large")] {
            read_through(&path);
        }
        let start = Instant::now();
        let children = children(mount.server());
        assert!(!children.is_empty());
        // One that is just being started has everything for a moment.
        while let Some((pid, what)) = children
            .iter()
            .find_map(|pid| Some((pid, inherited(*pid, mount)?)))
        {
            assert!(start.elapsed() < LIMIT / 2, "helper {pid} has {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    check();
    for pid in children(mount.server()) {
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
    mount.snapshot("c"); // another flush helper
    check();
    // The mount of the snapshot ends with the server.
    mount.kill_server();
    cowfs(&["umount", "-l"], &[place]).success("detach");
    scene.mount_at("b", place);
    check();
    scene.umount();
}

/// Stops helpers and lets them go on, until one of them is stopped in the middle of what it does for somebody who reads
/// `path`. Nobody reads any more when this returns which one.
#[track_caller]
fn stop_in_the_middle(helpers: &[i32], path: &Path) -> i32 {
    let start = Instant::now();
    loop {
        let mut reader = Command::new("cat")
            .arg(path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while reader.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < LIMIT, "no helper does anything");
            for pid in helpers {
                signal(*pid, Signal::STOP);
                if is_at_work(*pid) {
                    reader.kill().unwrap();
                    reader.wait().unwrap();
                    return *pid;
                }
                signal(*pid, Signal::CONT);
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    }
}

#[track_caller]
fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// Whether a process that is being stopped has a file `large` open.
fn is_at_work(pid: i32) -> bool {
    let stopped = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(')').unwrap().1.starts_with(" T")
    };
    while !stopped() {
        std::thread::yield_now();
    }
    let mut open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    open.any(|entry| {
        fs::read_link(entry.unwrap().path())
            .unwrap()
            .ends_with("large")
    })
}

/// Whoever has closed what he read can unmount at once, as restic(1) and umount(8) do one after the other in a script.
#[test]
fn a_helper_at_work_does_not_make_a_mount_busy() {
    let scene = Scene::new("alone-busy");
    let (mount, place) = (&scene.mount, &scene.place);
    fs::write(mount.mnt.join("large"), vec![1; LARGE]).unwrap();
    let snapshot = mount.snapshot("b");
    scene.mount_at("b", place);
    let helpers = children(mount.server());
    for (at, large) in [(place, place), (&mount.mnt, &snapshot)] {
        let stopped = stop_in_the_middle(&helpers, &large.join("large"));
        unmount_patiently(at);
        signal(stopped, Signal::CONT);
    }
    wait_for_the_end(&scene);
    mount.mount();
}

/// A snapshot whose files are all closed can be deleted, whatever is left to be dropped of them.
#[test]
fn a_helper_that_stands_still_does_not_keep_a_snapshot() {
    let scene = Scene::new("alone-stopped");
    let mount = &scene.mount;
    fs::write(mount.mnt.join("large"), vec![1; LARGE]).unwrap();
    let snapshot = mount.snapshot("b");
    let helpers = children(mount.server());
    helpers.iter().for_each(|pid| signal(*pid, Signal::STOP));
    read_through(&snapshot.join("large"));
    let deleted = remove_snapshot(&snapshot);
    helpers.iter().for_each(|pid| signal(*pid, Signal::CONT));
    deleted.unwrap();
}
