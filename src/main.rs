//! The `cowfs` command.

fn main() -> std::process::ExitCode {
    cowfs::cli::run(std::env::args_os())
}
