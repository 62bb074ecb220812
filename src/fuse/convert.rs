//! Between the engine's values and fuser's.

use crate::engine::attr::{Attr, SetTime};
use crate::engine::backing::kind_of_mode;
use crate::engine::creds::{Caller, Unprivileged};
use crate::error::Error;
use crate::store::Timestamp;
use fuser::{Errno, FileAttr, FileType, INodeNo, Request, TimeOrNow};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The errno of an error; damage and refusals are logged, because an errno cannot say what they are.
pub(super) fn errno(error: &Error) -> Errno {
    match error {
        Error::Os(_) | Error::Stale | Error::ReadOnly => {}
        Error::Corrupt(_) | Error::Poisoned(_) | Error::Store { .. } => log::error!("{error}"),
        other => log::info!("{other}"),
    }
    Errno::from_i32(error.errno().raw_os_error())
}

/// The type of a directory entry; a filesystem that does not tell it gets a look-up from the kernel.
pub(super) fn file_type(kind: u8) -> FileType {
    match kind {
        libc::DT_DIR => FileType::Directory,
        libc::DT_LNK => FileType::Symlink,
        libc::DT_CHR => FileType::CharDevice,
        libc::DT_BLK => FileType::BlockDevice,
        libc::DT_FIFO => FileType::NamedPipe,
        libc::DT_SOCK => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

fn system_time(t: Timestamp) -> SystemTime {
    let nanos = Duration::from_nanos(u64::from(t.nsec));
    let seconds = Duration::from_secs(t.sec.unsigned_abs());
    let whole = if t.sec < 0 {
        UNIX_EPOCH.checked_sub(seconds)
    } else {
        UNIX_EPOCH.checked_add(seconds)
    };
    whole
        .and_then(|whole| whole.checked_add(nanos))
        .unwrap_or(UNIX_EPOCH)
}

/// fuser 0.18 turns `sec` seconds before 1970 and `nsec` nanoseconds after that into `sec` + `nsec` before
/// 1970; taking the parts apart again undoes it.
pub(super) fn timestamp(t: SystemTime) -> Timestamp {
    match t.duration_since(UNIX_EPOCH) {
        Ok(d) => Timestamp {
            sec: d.as_secs() as i64,
            nsec: d.subsec_nanos(),
        },
        Err(e) => {
            let d = e.duration();
            Timestamp {
                sec: -(d.as_secs() as i64),
                nsec: d.subsec_nanos(),
            }
        }
    }
}

/// A time of a SETATTR request.
pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(t) => SetTime::At(timestamp(t)),
    }
}

/// A device number as FUSE carries it: `new_encode_dev` of the kernel's `include/linux/kdev_t.h`.
fn encode_dev(dev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The inverse of [`encode_dev`].
pub(super) fn decode_dev(dev: u32) -> u64 {
    rustix::fs::makedev(
        (dev & 0xf_ff00) >> 8,
        (dev & 0xff) | ((dev >> 12) & 0xf_ff00),
    )
}

/// Attributes for the kernel. An entry's number is its node number; only the root, whose node number FUSE
/// prescribes, shows another.
pub(super) fn file_attr(attr: &Attr, ino: u64) -> FileAttr {
    let image = &attr.image;
    FileAttr {
        ino: INodeNo(ino),
        size: image.size,
        blocks: image.blocks,
        atime: system_time(image.atime),
        mtime: system_time(image.mtime),
        ctime: system_time(image.ctime),
        crtime: image.btime.map_or(UNIX_EPOCH, system_time),
        kind: file_type(kind_of_mode(image.mode)),
        perm: (image.mode & 0o7777) as u16,
        nlink: image.nlink,
        uid: image.uid,
        gid: image.gid,
        rdev: encode_dev(image.rdev),
        blksize: image.blksize,
        flags: 0,
    }
}

/// Who asks.
pub(super) fn caller(req: &Request, umask: u32) -> Caller {
    Caller {
        uid: req.uid(),
        gid: req.gid(),
        umask,
    }
}

/// The caller, if it lacks `CAP_FSETID` as far as its user tells: fuser 0.18 drops the kernel's own flag for SETATTR,
/// FALLOCATE and COPY_FILE_RANGE, and that for its groups (`FUSE_SETXATTR_EXT`).
pub(super) fn unprivileged(req: &Request) -> Option<Unprivileged> {
    (req.uid() != 0).then(|| Unprivileged {
        pid: req.pid(),
        gid: req.gid(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for dev in [
            rustix::fs::makedev(1, 3),
            rustix::fs::makedev(4095, 1_048_575),
            rustix::fs::makedev(259, 300),
        ] {
            assert_eq!(decode_dev(encode_dev(dev)), dev);
        }
    }

    #[test]
    fn times_before_1970_survive_what_fuser_does_to_them() {
        let t = Timestamp {
            sec: -2,
            nsec: 800_000_000,
        };
        assert_eq!(system_time(t), UNIX_EPOCH - Duration::from_millis(1200));
        let as_fuser_hands_it = UNIX_EPOCH - Duration::new(2, 800_000_000);
        assert_eq!(timestamp(as_fuser_hands_it), t);
        let later = Timestamp {
            sec: 1 << 33,
            nsec: 7,
        };
        assert_eq!(timestamp(system_time(later)), later);
    }
}
