//! One guest, from the start of qemu to the cut.

use super::disk::Disk;
use super::{Failure, option};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A guest that is not at work by then is stuck.
const PATIENCE: Duration = Duration::from_secs(180);

/// Ends qemu also when the round fails.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the guest, cuts its power at a random instant, and prints what the disk forgot.
pub fn run(args: &[String]) -> Result<(), Failure> {
    let (dir, image) = (option(args, "--dir")?, option(args, "--image")?);
    let seed: u64 = option(args, "--seed")?.parse()?;
    let dir = Path::new(&dir);
    let mut rng = SmallRng::seed_from_u64(seed);
    let (socket, report) = (dir.join("disk.sock"), dir.join("report"));
    for old in [&socket, &report] {
        match fs::remove_file(old) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    let lies = option(args, "--flushes")? == "ignored";
    let image = File::options().read(true).write(true).open(image)?;
    let disk = Arc::new(Disk::new(image, lies)?);
    let listener = UnixListener::bind(&socket)?;
    let served = Arc::clone(&disk);
    std::thread::spawn(move || match listener.accept() {
        Ok((client, _)) => {
            if let Err(error) = served.serve(client) {
                // After the cut that is how it must end.
                if served.has_power() {
                    eprintln!("power_cuts: the disk: {error}");
                }
            }
        }
        Err(error) => eprintln!("power_cuts: the disk: {error}"),
    });
    let mut guest = Guest(qemu(args, dir, &socket, &report)?);
    let begun = Instant::now();
    // A quarter of the cuts hit the start of the guest and the recovery from the last cut, a third a time of rest.
    let (awaited, least, most) = match rng.random_range(0..12) {
        0..3 => ("MOUNTING", 0, 4000),
        3..7 => ("REST", 1000, 15_000),
        _ => ("READY", 1000, 20_000),
    };
    let millis = rng.random_range(least..most);
    wait_for(awaited, &report, &mut guest, begun)?;
    std::thread::sleep(Duration::from_millis(millis));
    let flushes = disk.flushes();
    let lost = disk.cut(&mut rng)?;
    drop(guest);
    println!(
        "{:.1} s, {} ms after {awaited}; {flushes} flushes; of {} writes since the last, {} dropped, {} torn",
        begun.elapsed().as_secs_f64(),
        millis,
        lost.pending,
        lost.dropped,
        lost.torn
    );
    Ok(())
}

fn wait_for(line: &str, report: &Path, guest: &mut Guest, begun: Instant) -> Result<(), Failure> {
    loop {
        let said = fs::read_to_string(report).unwrap_or_default();
        if said.lines().any(|said| said.trim() == line) {
            return Ok(());
        }
        if let Some(failure) = said.lines().find(|line| line.starts_with("FAIL")) {
            return Err(format!("the guest says: {failure}").into());
        }
        if let Some(status) = guest.0.try_wait()? {
            return Err(format!("the guest ended by itself: {status}").into());
        }
        if begun.elapsed() > PATIENCE {
            return Err(format!("the guest never said {line}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn qemu(args: &[String], dir: &Path, socket: &Path, report: &Path) -> Result<Child, Failure> {
    let shown = |path: &Path| path.display().to_string();
    let console = File::create(dir.join("console"))?;
    let append = format!(
        "console=ttyS0 panic=-1 quiet cuts.round={} cuts.seed={} cuts.durability={}",
        option(args, "--round")?,
        option(args, "--seed")?,
        option(args, "--durability")?
    );
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg", "-cpu", "max", "-m", "768", "-smp", "2"])
        .args(["-nodefaults", "-no-reboot", "-display", "none"])
        .args(["-kernel", &option(args, "--kernel")?])
        .args(["-initrd", &option(args, "--initrd")?])
        .args(["-append", &append])
        .args(["-serial", "stdio"])
        .args(["-serial", &format!("file:{}", shown(report))])
        .arg("-drive")
        .arg(format!(
            "file=nbd+unix:///?socket={},format=raw,if=virtio,cache=writeback",
            shown(socket)
        ));
    let child = command
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console)
        .spawn()
        .map_err(|error| format!("cannot start qemu-system-x86_64: {error}"))?;
    Ok(child)
}
