//! The requests that change attributes: times that the kernel tells, all that setattr sets, and extended attributes.

use super::Adapter;
use super::convert::{errno, file_attr, unprivileged};
use super::intent::{Before, Intended};
use super::reply::answer;
use super::writeback::Kind;
use crate::engine::attr::{CAPABILITIES, SetAttr, SetTime};
use crate::engine::handle::OpenFile;
use crate::engine::inventory::Intent;
use crate::error::Error;
use crate::store::Timestamp;
use fuser::{FileHandle, INodeNo, ReplyAttr, ReplyEmpty, Request};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// The extended attribute in which the kernel keeps a file's ACL (acl(5)).
const ACL_XATTR: &str = "system.posix_acl_access";

impl Adapter {
    /// Sets attributes: chmod(2), chown(2), truncate(2), utimensat(2), and the times of written files that the kernel
    /// tells by itself with the writeback cache. `ctime` comes with these alone.
    pub(super) fn set_attributes(
        &self,
        req: &Request,
        ino: INodeNo,
        set: SetAttr,
        ctime: Option<Timestamp>,
        fh: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let file = fh.and_then(|fh| self.reader.file(fh).ok());
        let times_alone = SetAttr {
            mtime: set.mtime,
            ..SetAttr::default()
        } == set;
        if let (Some(gate), Some(file), true) = (&self.gate, &file, times_alone)
            && let (OpenFile::Live(_), Some(SetTime::At(mtime))) = (&**file, set.mtime)
        {
            let times = (mtime, ctime.unwrap_or(mtime));
            return self.kernel_time(gate, file.clone(), times, reply);
        }
        let (engine, node, caller) = (
            self.engine.clone(),
            self.reader.node(ino),
            unprivileged(req),
        );
        // What is stored through a mapping and comes later would set the time anew.
        let comes_later = self.gate.is_none()
            && set.size.is_none()
            && matches!(set.mtime, Some(SetTime::At(_)))
            && node
                .as_ref()
                .is_ok_and(|node| self.engine.may_hold_changes(node, false));
        let ttl = self.unasked();
        let keeps_much = self.engine.keeps_much(&set);
        let noted = self.gate.clone().filter(|_| times_alone);
        let change = move || {
            let done = node.and_then(|node| engine.setattr(&node, &set, file.as_deref(), caller));
            drop(file);
            if let Some(gate) = noted {
                gate.note_change(ino.0);
            }
            answer!(reply, done, attr => reply.attr(&ttl, &file_attr(&attr, attr.shown)));
        };
        match &self.gate {
            None if comes_later => {
                let cleaner = self.cleaner.clone();
                self.cleaning.run(move || {
                    if let Err(error) = cleaner.clean(ino.0) {
                        log::warn!(
                            "a file that is mapped may not keep the time that is set: {error}"
                        );
                    }
                    change();
                });
            }
            None if keeps_much => self.blocking.run(change),
            None => self.dispatch(change),
            Some(gate) if times_alone && self.is_helper(req) => {
                gate.advance();
                self.dispatch(change);
            }
            Some(gate) if keeps_much => {
                let blocking = self.blocking.clone();
                let kind = || Kind::Locks(vec![ino.0]);
                gate.pass(kind, move |_| blocking.run(change));
            }
            Some(_) => self.change(
                || match times_alone {
                    true => Kind::Times,
                    false => Kind::Locks(vec![ino.0]),
                },
                change,
            ),
        }
    }

    /// Sets an extended attribute. That of an ACL may cost the file its setgid bit.
    pub(super) fn set_attribute(
        &self,
        req: &Request,
        ino: INodeNo,
        (name, value): (&OsStr, &[u8]),
        flags: i32,
        reply: ReplyEmpty,
    ) {
        let (engine, node, caller) = (
            self.engine.clone(),
            self.reader.node(ino),
            unprivileged(req),
        );
        let (name, value) = (name.to_os_string(), value.to_vec());
        let made_once = flags & libc::XATTR_CREATE != 0;
        let intent = made_once.then(|| self.intend(req, || self.attribute(ino, &name)));
        let made = intent.as_ref().and_then(Intended::earlier);
        let flags = match made {
            // Whether an earlier server has made it or not, it was not there before the request.
            Some(Intent { there: false, .. }) => flags & !libc::XATTR_CREATE,
            _ => flags,
        };
        // Any write takes the capabilities of a program away: also one that was made before they were given.
        let comes_later = name.as_bytes() == CAPABILITIES
            && node
                .as_ref()
                .is_ok_and(|node| self.engine.may_hold_changes(node, self.gate.is_some()));
        let change = move || {
            let caller = caller.filter(|_| name == ACL_XATTR);
            let done = node
                .and_then(|node| engine.setxattr(&node, name.as_bytes(), &value, flags, caller));
            answer!(reply, done, () => reply.ok());
            drop(intent);
        };
        let kind = move || Kind::Locks(vec![ino.0]);
        if !comes_later {
            return self.change(kind, change);
        }
        let (cleaner, passing) = (self.cleaner.clone(), self.passing());
        self.cleaning.run(move || {
            if let Err(error) = cleaner.clean(ino.0) {
                log::warn!("a file may lose the capabilities that are set: {error}");
            }
            passing.pass(kind, change);
        });
    }

    /// Removes an extended attribute.
    pub(super) fn remove_attribute(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        reply: ReplyEmpty,
    ) {
        let (engine, node) = (self.engine.clone(), self.reader.node(ino));
        let intent = self.intend(req, || self.attribute(ino, name));
        let name = name.as_bytes().to_vec();
        self.change(
            || Kind::Locks(vec![ino.0]),
            move || {
                let done = node.and_then(|node| match engine.removexattr(&node, &name) {
                    // An earlier server has removed it.
                    Err(Error::Os(rustix::io::Errno::NODATA))
                        if intent.earlier().is_some_and(|i| i.there) =>
                    {
                        Ok(())
                    }
                    done => done,
                });
                answer!(reply, done, () => reply.ok());
                drop(intent);
            },
        );
    }

    /// Whether an object has an attribute.
    fn attribute(&self, ino: INodeNo, name: &OsStr) -> Before {
        let found = self
            .reader
            .node(ino)
            .and_then(|node| self.engine.getxattr(&node, name.as_bytes()));
        Before {
            there: found.is_ok(),
            ..Before::default()
        }
    }
}
