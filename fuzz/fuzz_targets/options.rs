//! Mount options, orders to mount a snapshot, the mount table.
#![no_main]
use std::os::unix::ffi::OsStrExt;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let text = std::ffi::OsStr::from_bytes(data);
    let _ = cowfs::config::parse_options(&[text]);
    let _ = cowfs::control::MountOrder::parse(text);
    let _ = cowfs::mounts::parse(data);
});
