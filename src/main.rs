//! The `cowfs` command.
fn main() {}
