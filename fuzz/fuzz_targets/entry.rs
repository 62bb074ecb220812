//! An entry of the index.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| cowfs::store::fuzz::entry(data));
