//! Tests that man(1) can render the man pages of `scripts/package`.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes fcctl and fcd write all man pages to `dir`. Returns their paths.
fn pages(dir: &Path) -> Vec<PathBuf> {
    let status = Command::new(env!("CARGO_BIN_EXE_fcctl"))
        .arg("__package")
        .arg(dir)
        .status();
    assert!(status.unwrap().success());
    let of_fcd = Command::new(env!("CARGO_BIN_EXE_fcd"))
        .arg("--print-man-page")
        .output()
        .unwrap();
    assert!(of_fcd.status.success());
    std::fs::create_dir_all(dir.join("man/man8")).unwrap();
    std::fs::write(dir.join("man/man8/fcd.8"), of_fcd.stdout).unwrap();
    let mut pages = Vec::new();
    for section in ["man1", "man7", "man8"] {
        let entries = std::fs::read_dir(dir.join("man").join(section)).unwrap();
        pages.extend(entries.map(|entry| entry.unwrap().path()));
    }
    pages.sort();
    pages
}

#[test]
fn every_man_page_is_rendered_without_warnings() {
    let dir = tempfile::tempdir().unwrap();
    let pages = pages(dir.path());
    assert!(pages.len() > 100, "{}", pages.len());
    // Uses lintian's options, but one process for all pages.
    let out = Command::new("man")
        .args(["--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-P", "cat"])
        .args(&pages)
        .env("LC_ALL", "C.UTF-8")
        .env("MANWIDTH", "80")
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && err.is_empty(), "{err}");
    let text = String::from_utf8(out.stdout).unwrap();
    for expected in [
        "fcctl vm create",
        "fcctl-vm-create(1)",
        "FCD-NETWORKING(7)",
        "fcd(8)",
        "Directory for VMs, images and the database",
    ] {
        assert!(text.contains(expected), "{expected}");
    }
}
