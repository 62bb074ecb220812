//! The requests that change names: carried out once, also if a server dies over one, and off the request threads
//! where they have to wait.

use super::convert::{caller, errno, file_attr};
use super::intent::Before;
use super::pool::Pool;
use super::reply::answer;
use super::writeback::{Gate, Kind};
use super::{Adapter, DELETE_PATIENCE, FOREVER, manages};
use crate::config::Durability;
use crate::engine::Engine;
use crate::engine::handle::OpenFile;
use crate::engine::names::Make;
use crate::engine::nodes::Node;
use crate::ids::Ino;
use crate::sync::Arc;
use fuser::{
    Errno, FileHandle, FopenFlags, Generation, INodeNo, RenameFlags, ReplyCreate, ReplyEmpty,
    ReplyEntry, Request,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// Whether a change that keeps something has to wait.
fn must_wait(engine: &Engine, durability: Durability) -> bool {
    let waits = durability == Durability::Strict || engine.is_short_of_space();
    waits && engine.snapshots().count() > 0
}

/// The way of a change to where it is carried out.
pub(super) struct Passing {
    gate: Option<Arc<Gate>>,
    changes: Arc<Pool>,
    engine: Arc<Engine>,
    durability: Durability,
}

impl Passing {
    /// As [`Adapter::change`].
    pub(super) fn pass(self, kind: impl FnOnce() -> Kind, change: impl FnOnce() + Send + 'static) {
        let gate = self.gate.clone();
        let go = move || match must_wait(&self.engine, self.durability) {
            true => self.changes.run(change),
            false => change(),
        };
        match gate {
            None => go(),
            Some(gate) => gate.pass(kind, move |_| go()),
        }
    }
}

impl Adapter {
    /// Runs a change of names or attributes, which keeps something nearly always: on a thread of its own if it has
    /// to wait for the journal then, or for space.
    pub(super) fn dispatch(&self, change: impl FnOnce() + Send + 'static) {
        match must_wait(&self.engine, self.durability) {
            true => self.changes.run(change),
            false => change(),
        }
    }

    /// As [`Self::dispatch`], for what a cut may wait for: not behind those who wait for space.
    pub(super) fn dispatch_for_cut(&self, change: impl FnOnce() + Send + 'static) {
        match self.durability {
            Durability::Strict => self.dispatch(change),
            Durability::Ordered => change(),
        }
    }

    /// Runs such a change, which is of this kind, when a cut allows it.
    pub(super) fn change(
        &self,
        kind: impl FnOnce() -> Kind,
        change: impl FnOnce() + Send + 'static,
    ) {
        match &self.gate {
            None => self.dispatch(change),
            Some(_) => self.passing().pass(kind, change),
        }
    }

    /// What [`Self::change`] does, for later.
    pub(super) fn passing(&self) -> Passing {
        Passing {
            gate: self.gate.clone(),
            changes: self.changes.clone(),
            engine: self.engine.clone(),
            durability: self.durability,
        }
    }

    /// The kind of a change for which the kernel locks the objects of these names.
    fn locks(&self, names: &[(&Node, &[u8])]) -> Kind {
        let found = names.iter().map(|(parent, name)| {
            // What cannot be looked at cannot be changed either.
            let ino = self.engine.peek(parent, name).ok().flatten();
            ino.map(|ino| self.engine.nodes.live_id(ino))
        });
        Kind::Locks(found.flatten().collect())
    }

    /// Makes a directory, special file or symlink.
    pub(super) fn make(
        &self,
        req: &Request,
        (parent, name): (INodeNo, &OsStr),
        target: Vec<u8>,
        make: impl FnOnce(&[u8]) -> Make<'_> + Send + 'static,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let (reader, caller) = (self.reader.clone(), caller(req, umask));
        let (parent, name) = (reader.node(parent), name.as_bytes().to_vec());
        let intent = self.intend(req, Before::default);
        let ttl = self.unasked();
        let kind = || Kind::Makes;
        self.change(kind, move || {
            let made = parent.and_then(|parent| {
                // An earlier server has made it: while the request lasts, nobody else makes or removes a name there.
                let there = intent.again() && reader.engine.peek(&parent, &name)?.is_some();
                let attr = match there {
                    true => reader.engine.lookup(&parent, &name)?,
                    false => reader.engine.make(&parent, &name, make(&target), caller)?,
                };
                Ok((parent, attr))
            });
            answer!(reply, made, (parent, attr) => {
                reader.reply_entry_for(reply, &parent, &attr, ttl);
            });
            drop(intent);
        });
    }

    /// unlink(2), or rmdir(2) when `directory`, of an object or a snapshot.
    pub(super) fn remove(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        directory: bool,
        reply: ReplyEmpty,
    ) {
        let parent = match self.reader.node(parent) {
            Ok(parent) => parent,
            Err(error) => return reply.error(errno(&error)),
        };
        let (engine, name) = (self.engine.clone(), name.as_bytes().to_vec());
        match parent {
            Node::Folder(_) if !manages(req) => reply.error(Errno::EPERM),
            Node::Folder(_) if directory => {
                let intent = self.intend(req, Before::default);
                self.deletions.run(move || {
                    let gone = intent.again() && engine.snapshots().named(&name).is_none();
                    let done = match gone {
                        true => Ok(()),
                        false => engine.delete_snapshot(&name, DELETE_PATIENCE),
                    };
                    answer!(reply, done, () => reply.ok());
                    drop(intent);
                });
            }
            Node::Folder(_) => reply.error(Errno::EISDIR),
            parent => {
                let intent = self.intend(req, Before::default);
                let (dir, entry) = (parent.clone(), name.clone());
                let kind = || match directory {
                    true => Kind::Makes,
                    false => self.locks(&[(&dir, &entry)]),
                };
                self.change(kind, move || {
                    let gone = intent.again() && matches!(engine.peek(&parent, &name), Ok(None));
                    let done = match gone {
                        true => Ok(()),
                        false => engine.remove(&parent, &name, directory),
                    };
                    answer!(reply, done, () => reply.ok());
                    drop(intent);
                });
            }
        }
    }

    /// Cuts a snapshot: mkdir(2) in a snapshot folder.
    pub(super) fn create_snapshot(
        &self,
        req: &Request,
        folder: Node,
        name: &OsStr,
        reply: ReplyEntry,
    ) {
        let (engine, name) = (self.engine.clone(), name.as_bytes().to_vec());
        let intent = self.intend(req, Before::default);
        self.cuts.run(move || {
            let there = intent.again() && engine.snapshots().named(&name).is_some();
            let made = match there {
                true => Ok(()),
                false => engine.snapshot(&name).map(drop),
            };
            let made = made.and_then(|()| engine.lookup(&folder, &name));
            answer!(reply, made, attr => {
                let attr = (file_attr(&attr, attr.node), Generation(0));
                reply.entry_with_ttls(&FOREVER, &Duration::ZERO, &attr.0, attr.1);
            });
            drop(intent);
        });
    }

    /// Renames an object or a snapshot.
    pub(super) fn move_name(
        &self,
        req: &Request,
        (parent, name): (INodeNo, &OsStr),
        (newparent, newname): (INodeNo, &OsStr),
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = match (self.reader.node(parent), self.reader.node(newparent)) {
            (Ok(from), Ok(to)) => (from, to),
            (Err(error), _) | (_, Err(error)) => return reply.error(errno(&error)),
        };
        let engine = self.engine.clone();
        let (name, newname) = (name.as_bytes().to_vec(), newname.as_bytes().to_vec());
        match (&from, &to) {
            (Node::Folder(_), Node::Folder(_)) if !manages(req) => reply.error(Errno::EPERM),
            (Node::Folder(_), Node::Folder(_))
                if (flags - RenameFlags::RENAME_NOREPLACE).is_empty() =>
            {
                let intent = self.intend(req, Before::default);
                self.cuts.run(move || {
                    let snapshots = engine.snapshots();
                    let renamed = intent.again()
                        && snapshots.named(&name).is_none()
                        && snapshots.named(&newname).is_some();
                    let done = match renamed {
                        true => Ok(()),
                        false => engine.rename_snapshot(&name, &newname),
                    };
                    answer!(reply, done, () => reply.ok());
                    drop(intent);
                });
            }
            (Node::Live(_), Node::Live(_)) => {
                let flags = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
                let caller = caller(req, 0);
                // Carried out, a name that was moved is absent, and one that was exchanged, or left to a whiteout, means
                // something else.
                let left = rustix::fs::RenameFlags::EXCHANGE | rustix::fs::RenameFlags::WHITEOUT;
                let left = flags.intersects(left);
                let intent = self.intend(req, || match left {
                    true => Before {
                        ino: engine.peek(&from, &name).ok().flatten().unwrap_or_default(),
                        there: true,
                    },
                    false => Before::default(),
                });
                let named = [(from.clone(), name.clone()), (to.clone(), newname.clone())];
                let kind = || {
                    let [(from, name), (to, newname)] = &named;
                    self.locks(&[(from, name), (to, newname)])
                };
                self.change(kind, move || {
                    let moved = intent.earlier().map_or(Ok(false), |before| {
                        let now = engine.peek(&from, &name)?.unwrap_or_default();
                        Ok(now == Ino(0) || (left && now != before.ino))
                    });
                    let done = match moved {
                        Ok(false) => engine.rename((&from, &name), (&to, &newname), flags, caller),
                        Ok(true) => Ok(()),
                        Err(error) => Err(error),
                    };
                    answer!(reply, done, () => reply.ok());
                    drop(intent);
                });
            }
            (Node::At(_), _) | (_, Node::At(_)) => reply.error(Errno::EROFS),
            _ => reply.error(Errno::EXDEV),
        }
    }

    /// Gives an object another name.
    pub(super) fn add_name(
        &self,
        req: &Request,
        ino: INodeNo,
        (newparent, newname): (INodeNo, &OsStr),
        reply: ReplyEntry,
    ) {
        let (reader, newname) = (self.reader.clone(), newname.as_bytes().to_vec());
        let intent = self.intend(req, Before::default);
        let nodes = reader
            .node(ino)
            .and_then(|node| Ok((node, reader.node(newparent)?)));
        let ttl = self.unasked();
        let kind = || Kind::Locks(vec![ino.0]);
        self.change(kind, move || {
            let made = nodes.and_then(|(node, parent)| {
                let there = intent.again() && reader.engine.peek(&parent, &newname)?.is_some();
                let attr = match there {
                    true => reader.engine.lookup(&parent, &newname)?,
                    false => reader.engine.link(&node, &parent, &newname)?,
                };
                Ok((parent, attr))
            });
            answer!(reply, made, (parent, attr) => {
                reader.reply_entry_for(reply, &parent, &attr, ttl);
            });
            drop(intent);
        });
    }

    /// Creates a file and opens it.
    pub(super) fn create_file(
        &self,
        req: &Request,
        (parent, name): (INodeNo, &OsStr),
        (mode, umask): (u32, u32),
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (reader, caller) = (self.reader.clone(), caller(req, umask));
        let (parent, name) = (reader.node(parent), name.as_bytes().to_vec());
        let (intent, unique) = (self.intend(req, Before::default), req.unique().0);
        // Made by an earlier server, it is there, and that is no error.
        let flags = match intent.again() {
            true => flags & !libc::O_EXCL,
            false => flags,
        };
        let opened = self.resent.opened(req);
        let (gate, ttl) = (self.gate.clone(), self.unasked());
        self.change(
            || Kind::Makes,
            move || {
                let made = parent.and_then(|parent| match opened {
                    Some(id) => Ok((reader.engine.lookup(&parent, &name)?, id)),
                    None => {
                        let (attr, file) =
                            reader.engine.create(&parent, &name, mode, flags, caller)?;
                        if gate.is_some() {
                            reader.engine.leave_time(&file, Some(attr.image.mtime))?;
                        }
                        Ok((attr, reader.handles.add_file(OpenFile::Live(file), unique)))
                    }
                });
                let answer = move |_| {
                    answer!(reply, made, (attr, id) => {
                        let fh = FileHandle(id);
                        let attr = file_attr(&attr, attr.node);
                        reply.created(&ttl, &attr, Generation(0), fh, FopenFlags::FOPEN_KEEP_CACHE);
                    });
                    drop(intent);
                };
                match gate {
                    Some(gate) => gate.opened(answer),
                    None => answer(FOREVER),
                }
            },
        );
    }
}
