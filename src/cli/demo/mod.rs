//! `cowfs demo`: the same tree, under the same writers, backed up in three ways in front of the user.

mod check;
mod interrupt;
mod layout;
mod tree;
mod writers;

use super::{Failure, mount, output, umount};
use crate::control;
use crate::error::{Error, Result};
use interrupt::Interrupt;
use layout::Layout;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use writers::Writers;

/// How long the writers run without any backup, to know what their writes take by themselves.
const CONTROL: Duration = Duration::from_secs(2);
/// A plain copy is right now and then by luck; this often it is tried.
const PLAIN_TRIES: usize = 3;
const SNAPSHOT: &str = "demo";
/// The file system type number of tmpfs, statfs(2).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Show what cowfs is for: back up a tree under load in three ways, and check each copy.
///
/// Builds a tree of real files in a temporary place, mounts it, and lets several writers keep files consistent
/// with one another without ever stopping. Then it copies the tree with plain `cp -a`, with the writers held
/// for as long as `cp -a` runs, and from a cowfs snapshot, and prints which copies are consistent and how long
/// any writer had to wait. Everything is removed at the end. It takes root or fusermount3, /dev/fuse, about
/// 600 MB of free space and less than a minute. The exit code is 0 if the plain copy was broken and the snapshot right.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Args {
    /// Also put a copy of this directory into the tree; the directory itself is only read.
    directory: Option<PathBuf>,
}

const EXAMPLE: &str = "\
EXAMPLE
  cowfs demo
  cowfs demo ~/src
  TMPDIR=/mnt/disk cowfs demo      use another disk";

pub(super) fn run(args: &Args) -> std::result::Result<(), Failure> {
    let interrupt = Interrupt::install()?;
    let stage = Stage::build(args.directory.as_deref(), &interrupt)?;
    let mut show = Show::open(stage, interrupt)?;
    let rows = show.play()?;
    show.close()?;
    report(&rows)?;
    Ok(verdict(&rows)?)
}

/// The temporary place; leaving it unmounts and removes everything.
struct Stage {
    base: TempDir,
    mounted: bool,
    layout: Layout,
}

impl Stage {
    fn build(directory: Option<&Path>, interrupt: &Interrupt) -> Result<Self> {
        let place = temporary_place();
        let own = directory
            .map(|directory| own_directory(directory, interrupt))
            .transpose()?;
        let own_bytes = own.as_ref().map_or(0, |(_, bytes)| *bytes);
        // The tree and one copy of it at a time.
        let needed = (tree::GENERATED_BYTES + own_bytes).saturating_mul(2) + (64 << 20);
        let remedy = "free some, set TMPDIR to another disk, or choose a smaller directory";
        tree::check_room(&place, needed, remedy)?;
        let base = tempfile::Builder::new()
            .prefix("cowfs-demo.")
            // With a copy of a directory that others may not read.
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir_in(&place)
            .map_err(|error| Error::io("cannot create a directory in", &place, &error))?;
        let mut stage = Self {
            base,
            mounted: false,
            layout: Layout::new(vec![PathBuf::new()]),
        };
        stage.fill(own.as_ref().map(|(path, _)| path.as_path()), interrupt)?;
        Ok(stage)
    }

    fn data(&self) -> PathBuf {
        self.base.path().join("data")
    }

    fn live(&self) -> PathBuf {
        self.base.path().join("live")
    }

    fn fill(&mut self, own: Option<&Path>, interrupt: &Interrupt) -> Result<()> {
        let base = self.base.path().display().to_string();
        output::line(format!("Building a tree in {base} (removed at the end)"))?;
        let data = self.data();
        for path in [&data, &self.live()] {
            std::fs::create_dir(path).map_err(|error| Error::io("cannot create", path, &error))?;
        }
        let own_copy = data.join("yours");
        if let Some(own) = own {
            output::line(format!("  copying {}", own.display()))?;
            copy(own, &own_copy, interrupt, Stdio::inherit())?;
        }
        tree::generate(&data, interrupt)?;
        let (extent, directories) = tree::measure(&data, interrupt)?;
        output::line(format!(
            "  {} files in {} directories, {}",
            extent.files,
            directories.len(),
            output::size(extent.bytes)
        ))?;
        let relative = directories
            .iter()
            .filter_map(|path| path.strip_prefix(&data).ok().map(Path::to_path_buf));
        self.layout = Layout::new(relative.collect());
        Ok(())
    }

    fn mount(&mut self) -> std::result::Result<(), Failure> {
        mount::run(&mount::Args::plain(self.data(), self.live()))?;
        self.mounted = true;
        // Not a word about snapshots unless this really is cowfs.
        let root = control::find_mount(&self.live())?;
        let live = canonical(&self.live())?;
        if root != live {
            return Err(Error::Check(format!("{} is not the mount", live.display())).into());
        }
        output::line(format!(
            "Mounted by cowfs at {} (type {})",
            live.display(),
            crate::mounts::FS_TYPE
        ))?;
        Ok(())
    }

    fn unmount(&mut self) -> Result<()> {
        if !self.mounted {
            return Ok(());
        }
        let live = self.live();
        let result = umount::unmount(&live, false).or_else(|_| umount::unmount(&live, true));
        self.mounted = result.is_err();
        if self.mounted {
            // What is mounted must not be removed as if it were plain files.
            self.base.disable_cleanup(true);
        }
        result
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            output::complain(&format!(
                "{error}; unmount it, then remove {}",
                self.base.path().display()
            ));
        }
    }
}

/// The running demo. Writers are dropped, that is stopped, before the stage.
struct Show {
    writers: Writers,
    interrupt: Interrupt,
    stage: Stage,
}

/// One line of the table.
struct Row {
    name: &'static str,
    /// Nothing for the control.
    violations: Option<Vec<String>>,
    /// The longest write while the backup was made, from its beginning to its end.
    longest: Duration,
    copy: Duration,
    /// How many writes were done meanwhile.
    writes: u64,
    /// Where the backup takes an instant of its own: how long that took, and the longest write meanwhile.
    instant: Option<(Duration, Duration)>,
}

impl Show {
    fn open(mut stage: Stage, interrupt: Interrupt) -> std::result::Result<Self, Failure> {
        stage.mount()?;
        let writers = Writers::start(&stage.live(), &stage.layout)?;
        output::line(format!(
            "{} writers move amounts between {} files and replace {} pairs of files, without a stop",
            writers.count(),
            layout::BANKS * layout::ACCOUNTS,
            2 * layout::PAIRS
        ))?;
        Ok(Self {
            writers,
            interrupt,
            stage,
        })
    }

    fn play(&mut self) -> Result<Vec<Row>> {
        let control = self.measure("no backup, to compare", || self.interrupt.sleep(CONTROL))?;
        let mut rows = vec![control];
        let live = self.stage.live();
        for attempt in 1..=PLAIN_TRIES {
            progress("1 of 3: cp -a of the live tree")?;
            let row = self.back_up("cp -a", |copy_to| self.copy(&live, copy_to, true))?;
            let broken = row
                .violations
                .as_ref()
                .is_some_and(|found| !found.is_empty());
            if broken || attempt == PLAIN_TRIES {
                rows.push(row);
                break;
            }
            output::line("  (right by luck; again)")?;
        }
        progress("2 of 3: hold all writers, cp -a, let them go")?;
        rows.push(self.back_up_frozen(&live)?);
        progress("3 of 3: cowfs snapshot, cp -a of the snapshot")?;
        rows.push(self.back_up_by_snapshot(&live)?);
        Ok(rows)
    }

    fn back_up_frozen(&self, live: &Path) -> Result<Row> {
        let mut instant = None;
        let mut row = self.back_up("freeze + cp -a", |copy_to| {
            let start = Instant::now();
            let hold = self.writers.gate.write();
            let copied = self.copy(live, copy_to, false);
            drop(hold);
            instant = Some((start, Instant::now()));
            copied
        })?;
        row.instant = instant.map(|span| self.during(span));
        Ok(row)
    }

    fn back_up_by_snapshot(&self, live: &Path) -> Result<Row> {
        let status = control::status(&canonical(live)?)?;
        let snapshot = live.join(status.snapshot_dir).join(SNAPSHOT);
        let mut instant = None;
        let mut row = self.back_up("cowfs snapshot + cp -a", |copy_to| {
            let start = Instant::now();
            std::fs::create_dir(&snapshot)
                .map_err(|error| Error::io("cannot create the snapshot", &snapshot, &error))?;
            instant = Some((start, Instant::now()));
            self.copy(&snapshot, copy_to, false)
        })?;
        row.instant = instant.map(|span| self.during(span));
        std::fs::remove_dir(&snapshot)
            .map_err(|error| Error::io("cannot delete the snapshot", &snapshot, &error))?;
        Ok(row)
    }

    fn during(&self, (start, end): (Instant, Instant)) -> (Duration, Duration) {
        (end - start, self.writers.gauge.longest(start, end))
    }

    /// Makes a copy, checks it, removes it.
    fn back_up(
        &self,
        name: &'static str,
        make: impl FnOnce(&Path) -> Result<Option<String>>,
    ) -> Result<Row> {
        let copy_to = self.stage.base.path().join("copy");
        let mut complaint = None;
        let mut row = self.measure(name, || {
            complaint = make(&copy_to)?;
            Ok(())
        })?;
        let mut violations = check::violations(&copy_to, &self.stage.layout);
        violations.extend(complaint);
        let seconds = row.copy.as_secs_f64();
        match violations.first() {
            None => output::line(format!("  {seconds:.2} s; consistent"))?,
            Some(first) => output::line(format!(
                "  {seconds:.2} s; BROKEN in {} ways, as: {first}",
                violations.len()
            ))?,
        }
        row.violations = Some(violations);
        std::fs::remove_dir_all(&copy_to)
            .map_err(|error| Error::io("cannot remove", &copy_to, &error))?;
        Ok(row)
    }

    /// Runs something and notes how long the writers' writes took meanwhile.
    fn measure(&self, name: &'static str, what: impl FnOnce() -> Result<()>) -> Result<Row> {
        self.writers.settle()?;
        let writes = self.writers.gauge.writes();
        let start = Instant::now();
        what()?;
        let end = Instant::now();
        let writes = self.writers.gauge.writes() - writes;
        self.writers.settle()?;
        Ok(Row {
            name,
            violations: None,
            longest: self.writers.gauge.longest(start, end),
            copy: end - start,
            writes,
            instant: None,
        })
    }

    /// Copies a tree. What cp complains of is an error, or part of the result if the tree changes meanwhile.
    fn copy(&self, from: &Path, to: &Path, changing: bool) -> Result<Option<String>> {
        if !changing {
            return copy(from, to, &self.interrupt, Stdio::inherit()).map(|()| None);
        }
        match copy(from, to, &self.interrupt, Stdio::null()) {
            Err(Error::Check(complaint)) => Ok(Some(complaint)),
            other => other.map(|()| None),
        }
    }

    fn close(mut self) -> Result<()> {
        self.writers.stop()?;
        self.stage.unmount()
    }
}

fn progress(text: &str) -> Result<()> {
    output::line(text)
}

fn copy(from: &Path, to: &Path, interrupt: &Interrupt, complaints: Stdio) -> Result<()> {
    let mut command = Command::new("cp");
    command.arg("-ax").arg("--").arg(from).arg(to);
    let status = interrupt.run(command.stdin(Stdio::null()).stderr(complaints))?;
    if !status.success() {
        return Err(Error::Check(format!(
            "cp -a {} could not copy everything ({status})",
            from.display()
        )));
    }
    Ok(())
}

fn canonical(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|error| Error::io("cannot find", path, &error))
}

/// $TMPDIR or /tmp; but /var/tmp if that would be memory and nobody asked for it.
fn temporary_place() -> PathBuf {
    let place = std::env::temp_dir();
    let in_memory = rustix::fs::statfs(&place).is_ok_and(|fs| fs.f_type as u64 == TMPFS_MAGIC);
    if in_memory && std::env::var_os("TMPDIR").is_none() {
        return "/var/tmp".into();
    }
    place
}

/// Looks at the user's directory before anything is built.
fn own_directory(path: &Path, interrupt: &Interrupt) -> Result<(PathBuf, u64)> {
    let refuse = |why: String| Error::Source {
        path: path.to_path_buf(),
        why,
    };
    let real = std::fs::canonicalize(path).map_err(|error| refuse(error.to_string()))?;
    if !real.is_dir() {
        return Err(refuse(
            "not a directory; name one to copy into the demo".into(),
        ));
    }
    let (extent, _) = tree::measure(&real, interrupt)?;
    Ok((real, extent.bytes))
}

fn report(rows: &[Row]) -> Result<()> {
    let heading = [
        "",
        "consistent?",
        "longest write stall",
        "copy time",
        "longest write of all",
        "writes meanwhile",
    ];
    let mut cells = vec![heading.map(String::from)];
    cells.extend(rows.iter().map(|row| {
        let consistent = match &row.violations {
            None => "-".into(),
            Some(found) if found.is_empty() => "yes".into(),
            Some(found) => format!("NO ({} violations)", found.len()),
        };
        let copy = match row.violations {
            None => "-".into(),
            Some(_) => format!("{:.2} s", row.copy.as_secs_f64()),
        };
        [
            row.name.into(),
            consistent,
            row.instant
                .map_or("-".into(), |(_, longest)| millis(longest)),
            copy,
            millis(row.longest),
            row.writes.to_string(),
        ]
    }));
    output::line("")?;
    output::table(&cells)?;
    output::line(
        "\nlongest write stall: the longest write that met the moment for which the backup needs the tree to stand\n\
         still. longest write of all: until the copy was done; there writers and cp share the disk and the CPUs.",
    )?;
    if let Some((took, _)) = rows.last().and_then(|row| row.instant) {
        output::line(format!("The snapshot was there after {}.", millis(took)))?;
    }
    Ok(())
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// Whether the demo has shown what it is to show.
fn verdict(rows: &[Row]) -> Result<()> {
    let [_, plain, frozen, snapshot] = rows else {
        return Err(Error::Check("the demo did not run to its end".into()));
    };
    let broken = |row: &Row| {
        row.violations
            .as_ref()
            .is_none_or(|found| !found.is_empty())
    };
    for row in [snapshot, frozen] {
        if broken(row) {
            return Err(Error::Check(format!(
                "the copy by {} is NOT consistent; please report this",
                row.name
            )));
        }
    }
    if !broken(plain) {
        return Err(Error::Check(format!(
            "the plain copy came out right {PLAIN_TRIES} times by luck, so nothing is shown; run the demo again"
        )));
    }
    Ok(())
}
