//! Runs `scripts/install-firecracker` on release archives that the test builds.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/install-firecracker");

struct Made {
    dir: tempfile::TempDir,
}

impl Made {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn place(&self) -> PathBuf {
        self.dir.path().join("lib")
    }

    /// Builds a release whose programs print their name and `says`. Returns the archive and its
    /// checksum.
    fn release(&self, version: &str, says: &str) -> (PathBuf, String) {
        let top = self.dir.path().join(format!("release-v{version}-x86_64"));
        std::fs::create_dir_all(&top).unwrap();
        for (program, name) in [("firecracker", "Firecracker"), ("jailer", "Jailer")] {
            let path = top.join(format!("{program}-v{version}-x86_64"));
            std::fs::write(&path, format!("#!/bin/sh\necho '{name} {says}'\n")).unwrap();
            // The script must ignore the modes and owners in the archive.
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
        }
        let tarball = self.dir.path().join(format!("{version}.tgz"));
        let script = "cd \"$1\" && tar --owner=1000 --group=1000 -czf \"$2\" \"release-v$3-x86_64\" && sha256sum \"$2\" | cut -c-64";
        let mut made = Command::new("sh");
        made.args(["-c", script, "sh"])
            .args([self.dir.path(), &tarball])
            .arg(version);
        let out = made.output().unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        (
            tarball,
            String::from_utf8(out.stdout).unwrap().trim().to_owned(),
        )
    }

    fn install(&self, version: &str, tarball: &Path, sum: &str) -> Output {
        let mut command = Command::new(SCRIPT);
        command
            .arg(version)
            .arg("--from")
            .arg(tarball)
            .args(["--sha256", sum, "--into"])
            .arg(self.place());
        command.output().unwrap()
    }

    #[track_caller]
    fn refuses(&self, version: &str, tarball: &Path, sum: &str, said: &str) {
        let out = self.install(version, tarball, sum);
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            out.status.code() == Some(1) && stderr.contains(said),
            "{said:?} is not in {stderr:?}"
        );
        let left = std::fs::read_dir(self.place()).map_or(0, |entries| entries.flatten().count());
        assert_eq!(left, 0, "a refused installation leaves nothing behind");
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn install_keeps_versions_side_by_side_owned_by_root() {
    if !is_root() {
        eprintln!(
            "NOT RUN, because it is not run by root: install_keeps_versions_side_by_side_owned_by_root"
        );
        return;
    }
    let made = Made::new();
    for version in ["1.16.0", "1.16.1"] {
        let (tarball, sum) = made.release(version, &format!("v{version}"));
        // A second run succeeds.
        for said in ["installed", "already exists"] {
            let out = made.install(version, &tarball, &sum.to_uppercase());
            let (stdout, stderr) = (
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr),
            );
            assert!(
                out.status.success() && stdout.contains(said),
                "{stdout}{stderr}"
            );
            assert!(
                stdout.contains(&format!(
                    "binary = \"{}/v{version}/firecracker\"",
                    made.place().display()
                )),
                "{stdout}"
            );
        }
    }
    let mut found: Vec<_> = std::fs::read_dir(made.place())
        .unwrap()
        .flatten()
        .map(|e| e.file_name())
        .collect();
    found.sort();
    assert_eq!(found, ["v1.16.0", "v1.16.1"]);
    for path in ["v1.16.1", "v1.16.1/firecracker", "v1.16.1/jailer"] {
        let stat = std::fs::metadata(made.place().join(path)).unwrap();
        assert_eq!(
            (stat.uid(), stat.gid(), stat.mode() & 0o7777),
            (0, 0, 0o755),
            "{path}"
        );
    }
    // A different archive of the same version does not replace the installed programs.
    let (tarball, sum) = made.release("1.16.1", "v1.16.1'; echo 'more");
    let out = made.install("1.16.1", &tarball, &sum);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("differs"));
}

#[test]
fn install_of_wrong_archive_is_refused() {
    if !is_root() {
        eprintln!("NOT RUN, because it is not run by root: install_of_wrong_archive_is_refused");
        return;
    }
    let made = Made::new();
    let (tarball, sum) = made.release("1.16.1", "v1.16.1");
    made.refuses("1.16.1", &tarball, &"0".repeat(64), &sum);
    made.refuses("1.16.1", &tarball, "123", "is not a SHA-256 sum");
    made.refuses(
        "1.16.2",
        &tarball,
        &sum,
        "has no firecracker of version 1.16.2",
    );
    made.refuses("../1.16.1", &tarball, &sum, "is not a version");
    made.refuses(
        "1.16.1",
        &made.dir.path().join("none.tgz"),
        &sum,
        "there is no file",
    );
    let (lying, sum) = made.release("1.15.0", "v1.14.0");
    made.refuses("1.15.0", &lying, &sum, "not version 1.15.0");
    // The archive and its checksum are both required.
    let out = Command::new(SCRIPT)
        .arg("1.16.1")
        .arg("--from")
        .arg(&tarball)
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(2));
}
