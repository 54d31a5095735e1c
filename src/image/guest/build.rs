//! Compiles the static program of guests, `enter`, with the compiler that cargo uses. The guest
//! runtime gets the program from the daemon, so `cargo build` makes everything that fcd needs.

#![allow(clippy::disallowed_methods)] // A build script cannot use the crate's functions.

use std::path::PathBuf;
use std::process::Command;

const SOURCE: &str = "src/image/guest/enter.rs";

fn main() {
    let variable = |name: &str| std::env::var_os(name).unwrap_or_else(|| panic!("no {name}"));
    println!("cargo::rerun-if-changed=src/image/guest/build.rs");
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=src/image/guest/enter");
    let program = PathBuf::from(variable("OUT_DIR")).join("enter");
    let mut command = Command::new(variable("RUSTC"));
    command
        .args(["--edition", "2024", "--crate-name", "enter"])
        .args(["--crate-type", "bin", "-D", "warnings"])
        .arg("--target")
        .arg(variable("TARGET"));
    let options = [
        "target-feature=+crt-static",
        "panic=abort",
        "opt-level=s",
        "strip=symbols",
    ];
    for option in options {
        command.args(["-C", option]);
    }
    command.arg("-o").arg(program).arg(SOURCE);
    let status = command.status();
    if !status.is_ok_and(|status| status.success()) {
        panic!("compile {SOURCE}: {command:?} failed");
    }
}
