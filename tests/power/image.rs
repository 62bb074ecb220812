//! Images of a history, and what must hold when cowfs recovers from one.

use crate::disk::{Disk, Event, Fate, Files, Pending};
use crate::live::{Since, State, Taste};
use crate::plain::copy_tree;
use crate::view;
use crate::world::{FIRST_BOOT, History, Mark, Opening, fresh};
use cowfs::config::Durability;
use cowfs::engine::Engine;
use cowfs::engine::handle::OpenFile;
use cowfs::engine::nodes::{Node, ROOT_NODE};
use cowfs::planted::{self, Bug};
use cowfs::store::{SnapshotInfo, SnapshotState};
use cowfs::sync::Arc;
use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

/// More images than this of one moment are drawn at random.
const MOST_OF_A_MOMENT: usize = 60;

/// What a run has seen.
#[derive(Debug, Default)]
pub struct Counts {
    pub histories: u64,
    pub images: u64,
    /// Of these, such where the process was killed and the machine went on.
    pub killed: u64,
    /// Recoveries that were cut short by a second power cut.
    pub twice: u64,
    /// Snapshots found exact.
    pub exact: u64,
    /// Snapshots found suspect, and how many of these were not exact.
    pub suspect: u64,
    pub inexact: u64,
    /// Moments at which nothing was in doubt, and nothing was suspect.
    pub quiet: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Self) {
        self.histories += other.histories;
        self.images += other.images;
        self.killed += other.killed;
        self.twice += other.twice;
        self.exact += other.exact;
        self.suspect += other.suspect;
        self.inexact += other.inexact;
        self.quiet += other.quiet;
    }

    /// A run in which nothing was ever at stake proves nothing.
    pub fn assert_telling(&self) {
        assert!(
            self.exact > self.images / 8,
            "few snapshots were compared: {self:?}"
        );
        assert!(self.inexact > 0, "no image lost anything: {self:?}");
        assert!(self.quiet > 0, "no image of a quiet moment: {self:?}");
        assert!(self.twice > 0 && self.killed > 0, "{self:?}");
    }
}

/// One history, with what is needed to rebuild images of it.
pub struct Trial<'a> {
    history: &'a History,
    events: Vec<Event>,
    states: Vec<Arc<State>>,
    label: String,
    root: u64,
    counts: Counts,
}

/// One disk and directory to recover from.
struct Image {
    files: Files,
    state: State,
    /// The index, if it is not lost.
    index: Option<usize>,
    killed: bool,
}

impl<'a> Trial<'a> {
    pub fn new(history: &'a History, label: String) -> Self {
        Self {
            events: history.events(),
            states: history.all_states(),
            label: format!("{label}, {:?}", history.durability),
            root: history.place.source.metadata().unwrap().ino(),
            counts: Counts {
                histories: 1,
                ..Counts::default()
            },
            history,
        }
    }

    /// What was promised when `at` events had happened.
    fn mark(&self, at: usize) -> &'a Mark {
        let marks = &self.history.marks;
        &marks[marks.partition_point(|mark| mark.at <= at) - 1]
    }

    /// Images drawn at random from random moments.
    pub fn sampled(mut self, rng: &mut SmallRng, count: u64) -> Counts {
        let mut moments: Vec<usize> = (0..count)
            .map(|_| rng.random_range(0..=self.events.len()))
            .collect();
        moments.sort_unstable();
        let (mut pending, mut since, mut done) = self.beginning();
        for at in moments {
            for event in &self.events[done..at] {
                pending.then(event);
                since.then(event);
            }
            done = at;
            let image = self.draw(at, &pending, &since, rng);
            self.check(at, image, rng);
        }
        self.counts
    }

    /// Every image of every moment, or a sample where there are many.
    pub fn every_image(mut self, rng: &mut SmallRng) -> Counts {
        let (mut pending, mut since, _) = self.beginning();
        for at in 0..=self.events.len() {
            if at > 0 {
                pending.then(&self.events[at - 1]);
                since.then(&self.events[at - 1]);
            }
            if at < self.history.prepared {
                continue;
            }
            let all = all_fates(pending.open(), rng);
            let tastes = [Taste::Oldest, Taste::Newest, Taste::Any];
            let mut images: Vec<(usize, Taste, usize)> = Vec::new();
            for fates in 0..all.len() {
                for names in since.choices() {
                    images.extend(tastes.map(|taste| (fates, taste, names)));
                }
            }
            while images.len() > MOST_OF_A_MOMENT {
                images.swap_remove(rng.random_range(0..images.len()));
            }
            for (fates, taste, names) in images {
                let image = Image {
                    files: pending.image(&all[fates]),
                    state: since.image(&self.states, names, taste, rng),
                    index: None,
                    killed: false,
                };
                self.check(at, image, rng);
            }
            self.check(at, self.killed(at, &since), rng);
        }
        self.counts
    }

    fn beginning(&self) -> (Pending, Since, usize) {
        (Pending::of(&self.history.begun), Since::default(), 0)
    }

    /// What is there when the process is killed: everything.
    fn killed(&self, at: usize, since: &Since) -> Image {
        let mut pending = Pending::of(&self.history.begun);
        self.events[..at]
            .iter()
            .for_each(|event| pending.then(event));
        let all = vec![Fate::Kept; pending.open()];
        Image {
            files: pending.image(&all),
            state: (*self.states[since.now]).clone(),
            index: None,
            killed: true,
        }
    }

    fn draw(&self, at: usize, pending: &Pending, since: &Since, rng: &mut SmallRng) -> Image {
        if rng.random_bool(0.05) {
            return self.killed(at, since);
        }
        let index = match self.mark(at).index {
            Some((copy, true)) if rng.random_bool(0.7) => Some(copy),
            _ => None,
        };
        let (first, last) = since.choices().into_inner();
        let names = match rng.random_range(0..4) {
            0 => first,
            1 | 2 => last,
            _ => rng.random_range(first..=last),
        };
        let taste = [Taste::Oldest, Taste::Newest, Taste::Any, Taste::Any];
        Image {
            files: pending.image(&draw_fates(pending.open(), rng)),
            state: since.image(&self.states, names, taste[rng.random_range(0..4)], rng),
            index,
            killed: false,
        }
    }

    /// Rebuilds the image, recovers, and looks.
    fn check(&mut self, at: usize, image: Image, rng: &mut SmallRng) {
        self.counts.images += 1;
        self.counts.killed += u64::from(image.killed);
        let boot = if image.killed {
            FIRST_BOOT
        } else {
            FIRST_BOOT + 1
        };
        let history = self.history;
        history.place.rebuild(&image.state);
        self.place_index(image.index);
        let (timeline, states) = fresh(history.place.scan(&image.state));
        let disk = Disk::new(image.files.clone(), timeline.clone());
        let recorded = !image.killed && !history.sled && rng.random_bool(0.1);
        let witness = match recorded {
            true => history.place.witness(states.clone(), timeline.clone()),
            false => history.place.keeper(image.state.clone()),
        };
        let opening = self.opening(&disk, boot, witness);
        let engine = self.opened(at, opening);
        let (events, states) = (timeline.lock().clone(), states.lock().clone());
        self.look(at, &engine, image.killed, Some(&image.state));
        // The planted bug is to be noticed by what is lost, and not by what it does to any tree.
        if !planted::has(Bug::ApplyBeforeJournal) && rng.random_bool(0.2) {
            self.go_on(at, &engine);
        }
        drop(engine);
        if recorded {
            // Power is lost again on the way.
            let cut = rng.random_range(0..=events.len());
            let (mut pending, mut since) = (Pending::of(&image.files), Since::default());
            for event in &events[..cut] {
                pending.then(event);
                since.then(event);
            }
            let (first, last) = since.choices().into_inner();
            let names = rng.random_range(first..=last);
            let state = since.image(&states, names, Taste::Any, rng);
            history.place.rebuild(&state);
            let files = pending.image(&draw_fates(pending.open(), rng));
            let disk = Disk::new(files, fresh(State::default()).0);
            let keeper = history.place.keeper(state);
            let engine = self.opened(at, self.opening(&disk, FIRST_BOOT + 2, keeper));
            self.look(at, &engine, false, None);
            self.counts.twice += 1;
        }
    }

    fn opening<'o>(
        &'o self,
        disk: &'o Arc<Disk>,
        boot: u128,
        witness: cowfs::engine::Witness,
    ) -> Opening<'o> {
        Opening {
            base: &self.history.base,
            place: &self.history.place,
            durability: self.history.durability,
            sled: self.history.sled,
            disk,
            boot,
            witness,
        }
    }

    fn place_index(&self, index: Option<usize>) {
        if self.history.sled {
            let path = self.history.base.join("store/index");
            let _ = std::fs::remove_dir_all(&path);
            if let Some(copy) = index {
                copy_tree(&self.history.base.join(format!("index.{copy}")), &path);
            }
        }
    }

    fn violation(&self, at: usize, what: &str) -> ! {
        let before: Vec<String> = self.events[at.saturating_sub(12)..at]
            .iter()
            .map(shown)
            .collect();
        panic!(
            "VIOLATION: {what}\n{}, after event {at} of {}:\n{}",
            self.label,
            self.events.len(),
            before.join("\n")
        );
    }

    fn opened(&self, at: usize, opening: Opening<'_>) -> Arc<Engine> {
        match opening.open() {
            Ok(engine) => engine,
            Err(error) => self.violation(at, &format!("cannot be opened: {error}")),
        }
    }

    /// Holds what is there against what was promised.
    fn look(&mut self, at: usize, engine: &Engine, killed: bool, state: Option<&State>) {
        let mark = self.mark(at);
        let damage = engine.store().damage();
        if !damage.is_empty() {
            self.violation(at, &format!("a power cut counts as damage: {damage:?}"));
        }
        let there: BTreeMap<Vec<u8>, SnapshotInfo> = engine
            .store()
            .snapshots()
            .iter()
            .filter(|info| info.state != SnapshotState::Deleting)
            .map(|info| (info.name.clone(), info.clone()))
            .collect();
        let strict = self.history.durability == Durability::Strict;
        // The events of this very moment may still be those of the operation that follows.
        let quiet = mark.quiet && mark.at == at;
        let nothing_lost = strict || killed || quiet;
        self.counts.quiet += u64::from(quiet);
        for (name, promise) in &mark.promises {
            let name_shown = String::from_utf8_lossy(name);
            let Some(info) = there.get(name) else {
                if promise.acknowledged && nothing_lost {
                    self.violation(at, &format!("snapshot {name_shown} is gone"));
                }
                continue;
            };
            let difference = match view::snapshot(engine, name) {
                Ok(found) => view::difference(&promise.view, &found),
                Err(error) => Some(format!("it cannot be read: {error}")),
            };
            match (info.state, difference) {
                (SnapshotState::Suspect, _) if promise.acknowledged && nothing_lost => {
                    self.violation(at, &format!("snapshot {name_shown} is suspect for nothing"));
                }
                (SnapshotState::Suspect, difference) => {
                    self.counts.suspect += 1;
                    self.counts.inexact += u64::from(difference.is_some());
                }
                (_, None) => self.counts.exact += 1,
                (_, Some(difference)) => {
                    self.violation(at, &format!("snapshot {name_shown} is wrong: {difference}"));
                }
            }
        }
        if let Some(unknown) = there.keys().find(|name| !mark.promises.contains_key(*name)) {
            let name = String::from_utf8_lossy(unknown);
            self.violation(at, &format!("snapshot {name} was never made, or deleted"));
        }
        if let Some(state) = state {
            self.look_at_live(at, state);
        }
    }

    /// Recovery takes nothing from the live tree but an empty directory that was being replaced.
    fn look_at_live(&self, at: usize, state: &State) {
        let before = state.shown(self.root);
        let after = self.history.place.scan(state).shown(self.root);
        for (path, (mode, data)) in &before {
            let replaced = mode & libc::S_IFMT == libc::S_IFDIR && !after.contains_key(path);
            if !replaced && after.get(path).map(|found| &found.1) != Some(data) {
                let path = String::from_utf8_lossy(path);
                self.violation(
                    at,
                    &format!("recovery has changed {path:?} in the live tree"),
                );
            }
        }
    }

    /// The recovered tree can be changed, and the snapshots that are not suspect stand still. (A suspect one need
    /// not: of a file whose beginning is lost it may show the end.)
    fn go_on(&self, at: usize, engine: &Engine) {
        let names: Vec<Vec<u8>> = engine
            .store()
            .snapshots()
            .iter()
            .filter(|info| info.state == SnapshotState::Ready)
            .map(|info| info.name.clone())
            .collect();
        let look = |name: &Vec<u8>| view::snapshot(engine, name).unwrap();
        let views: Vec<_> = names.iter().map(look).collect();
        engine.snapshot(b"after").unwrap();
        let new = view::snapshot(engine, b"after").unwrap();
        let root = engine.node(ROOT_NODE).unwrap();
        overwrite(engine, &root);
        for (name, before) in names.iter().zip(views) {
            if let Some(difference) = view::difference(&before, &look(name)) {
                let name = String::from_utf8_lossy(name);
                self.violation(
                    at,
                    &format!("snapshot {name} changes afterwards: {difference}"),
                );
            }
        }
        let found = view::snapshot(engine, b"after").unwrap();
        if let Some(difference) = view::difference(&new, &found) {
            self.violation(at, &format!("a later snapshot is wrong: {difference}"));
        }
    }
}

/// Writes to every file in `dir` and below.
fn overwrite(engine: &Engine, dir: &Node) {
    let mut names = Vec::new();
    let open = engine.open_dir(dir).unwrap();
    let lines = engine.read_dir(&open, 0, |line| {
        names.push((line.name.clone(), line.kind));
        Ok(true)
    });
    lines.unwrap();
    for (name, kind) in names {
        if name == b"." || name == b".." {
            continue;
        }
        let id = engine.lookup(dir, &name).unwrap().node;
        let node = engine.node(id).unwrap();
        match kind {
            libc::DT_DIR => overwrite(engine, &node),
            libc::DT_REG => {
                let Ok(OpenFile::Live(file)) = engine.open_file(&node, libc::O_RDWR) else {
                    unreachable!()
                };
                engine
                    .write(&file, 100, &[0xaa; 5000], None, false)
                    .unwrap();
            }
            _ => {}
        }
        drop(node);
        engine.nodes.forget(id, 1);
    }
}

/// Every combination, if they are few, each torn write in one way; else some.
fn all_fates(open: usize, rng: &mut SmallRng) -> Vec<Vec<Fate>> {
    if open > 3 {
        return (0..27).map(|_| draw_fates(open, rng)).collect();
    }
    let mut all = vec![Vec::new()];
    for _ in 0..open {
        let mut longer = Vec::new();
        for fates in all {
            for fate in [Fate::Lost, Fate::Kept, Fate::Torn(rng.random())] {
                let mut fates: Vec<Fate> = fates.clone();
                fates.push(fate);
                longer.push(fates);
            }
        }
        all = longer;
    }
    all
}

fn draw_fates(open: usize, rng: &mut SmallRng) -> Vec<Fate> {
    let lost = [0.0, 1.0, 0.5, 0.1, 0.9][rng.random_range(0..5)];
    let torn = [0.0, 0.2, 0.6][rng.random_range(0..3)];
    let one = |rng: &mut SmallRng| match (rng.random_bool(torn), rng.random_bool(lost)) {
        (true, _) => Fate::Torn(rng.random()),
        (_, true) => Fate::Lost,
        _ => Fate::Kept,
    };
    (0..open).map(|_| one(rng)).collect()
}

fn shown(event: &Event) -> String {
    match event {
        Event::Write(id, offset, bytes) => {
            format!("  write {id} at {offset}, {} bytes", bytes.len())
        }
        other => format!("  {other:?}"),
    }
}
