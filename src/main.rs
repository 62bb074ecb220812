//! The `cowfs` command.

#[global_allocator]
static ALLOCATOR: cowfs::sys::RequestBuffersStay = cowfs::sys::RequestBuffersStay;

fn main() -> std::process::ExitCode {
    cowfs::cli::run(std::env::args_os())
}
