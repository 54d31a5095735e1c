//! The `fcctl` program. Everything is in [`fcd::program`].

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(fcd::program::fcctl())
}
