//! A segment of the journal, as it stands on a disk, and with good checksums around bad bodies.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    cowfs::store::fuzz::segment(data);
    cowfs::store::fuzz::framed(data);
});
