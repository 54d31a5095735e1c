//! The `fcctl` program. Everything is in [`fcd::cli`].

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(fcd::cli::main())
}
