//! The body of one record of the journal.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| cowfs::store::fuzz::record(data));
