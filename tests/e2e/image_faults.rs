//! Tests of registrations, promotions, exports and commits that are killed at every step, or for
//! which the disk becomes full.

use crate::full_disk::files_below;
use crate::host::{Host, Spawned, text, wait_for_or};
use crate::pull_faults::{die_at_each_point, image_directories};
use crate::registered::{boot, root_file};
use std::fs;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

/// The names of the files in a directory.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn state_files(host: &Host) -> Vec<PathBuf> {
    let mut files = Vec::new();
    files_below(&host.state(), &mut files);
    files.sort();
    files
}

/// Returns the image as `image list` shows it, or null if there is none.
fn shown(host: &Host, image: &str) -> serde_json::Value {
    let all = host.json(&["image", "list"]);
    let mut all = all.as_array().unwrap().iter();
    let found = all.find(|found| found["name"] == image);
    found.cloned().unwrap_or_default()
}

#[test]
fn killed_register_promote_and_export_leave_nothing() {
    let mut host = Host::start();
    host.add_runtime();
    let dir = tempfile::tempdir().unwrap();
    let file = root_file(&host, dir.path());
    let register = ["image", "register", "mine", "--rootfs"];
    let register = [&register[..], &[file.to_str().unwrap()]].concat();
    let is_made = |host: &Host| !shown(host, "mine").is_null();
    let points = die_at_each_point(&mut host, &register, &is_made);
    assert!(points >= 4, "{points} points");

    let is_stored = |host: &Host| {
        let image = shown(host, "mine");
        assert!(image.is_object(), "the image is gone");
        image["file"].is_null()
    };
    let points = die_at_each_point(&mut host, &["image", "promote", "mine"], &is_stored);
    assert!(points >= 3, "{points} points");

    let files = state_files(&host);
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    for (image, format) in [("mine", "raw"), ("mine", "oci"), ("back", "oci")] {
        let to = out.join(format!("{image}.{format}"));
        if image == "back" {
            // This image has layers of its own.
            let from = format!("oci-archive:{}", out.join("mine.oci").display());
            host.ok(&["image", "pull", &from, "--name", "back"]);
        }
        let before = names(&out);
        let is_written = |host: &Host| {
            assert!(image == "back" || state_files(host) == files);
            let is_written = to.exists();
            assert!(is_written || names(&out) == before, "{:?}", names(&out));
            is_written
        };
        let export = ["image", "export", image, "--format", format, "-o"];
        let export = [&export[..], &[to.to_str().unwrap()]].concat();
        let points = die_at_each_point(&mut host, &export, &is_written);
        assert!(points >= 4, "{points} points");
    }
    // fcctl dies, not the daemon.
    let to = out.join("cut");
    let args = ["image", "export", "mine", "-o", to.to_str().unwrap()];
    let before = names(&out);
    let kill = |fcctl: &Spawned| fcctl.signal("KILL");
    host.interrupted(&args, "write the image", kill);
    assert_eq!(names(&out), before);
    host.ok(&args);
}

/// Checks that a call failed because the disk is full, and says which one.
#[track_caller]
fn require_full(ran: &mut Spawned, names: &str) {
    let (status, _) = ran.end();
    let stderr = ran.stderr();
    assert_eq!(status, Some(1), "{stderr}");
    // `fcctl rpc -m` prints progress before.
    let last = stderr.lines().last().unwrap_or_default();
    let error: serde_json::Value = serde_json::from_str(last).expect(&stderr);
    let error = &error["error"];
    assert_eq!(error["kind"], "disk_full", "{error}");
    let told = format!("{} {}", error["message"], error["hint"]);
    assert!(told.contains(names), "{error}");
    println!("{told}");
}

#[test]
fn full_disk_during_register_promote_export_and_commit_publishes_nothing() {
    // An export that makes a layer leaves 1 GiB free.
    let host = Host::on_small_disk(1800);
    host.add_runtime();
    let dir = tempfile::tempdir().unwrap();
    let file = root_file(&host, dir.path());
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    let archive = out.join("mine.tar").to_str().unwrap().to_owned();
    let state = host.state().display().to_string();
    let full = |args: &[&str], effect: &str| {
        let args = [&["--json"], args].concat();
        let before = (image_directories(&host), state_files(&host));
        let fill = |_: &Spawned| host.disk().fill(8 * MIB);
        let mut ran = host.interrupted(&args, effect, fill);
        require_full(&mut ran, &format!("{state} has "));
        assert_eq!((image_directories(&host), state_files(&host)), before);
        assert_eq!(names(&out), Vec::<String>::new());
        host.disk().free();
    };
    let works = |args: &[&str]| {
        let mut said = String::new();
        wait_for_or("it works with free space", &mut said, |said| {
            let ran = host.fcctl(args);
            *said = text(&ran).1;
            ran.status.success().then_some(())
        });
    };
    let rootfs = file.to_str().unwrap();
    let register = ["image", "register", "mine", "--rootfs", rootfs];
    full(&register, "copy the file");
    works(&register);
    let promote = ["image", "promote", "mine"];
    full(&promote, "copy the file");
    works(&promote);
    let export = ["image", "export", "mine", "-o", &archive];
    full(&export, "make the layer");

    // There is too little space from the beginning.
    host.disk().fill(900 * MIB);
    require_full(
        &mut host.spawn(&[&["--json"], &export[..]].concat()),
        &state,
    );
    host.disk().fill(100 * MIB);
    let again = ["--json", "image", "register", "again", "--rootfs", rootfs];
    require_full(&mut host.spawn(&again), &state);
    host.disk().free();
    works(&export);

    // The disk of the output is full, which is not the daemon's.
    let to = host.state().join("images/out.ext4");
    let raw = ["--json", "image", "export", "mine", "--format", "raw", "-o"];
    let raw = [&raw[..], &[to.to_str().unwrap()]].concat();
    let before = state_files(&host);
    host.disk().fill(8 * MIB);
    require_full(&mut host.spawn(&raw), "out.ext4");
    assert_eq!(state_files(&host), before);
    host.disk().free();

    boot(&host, "web", "mine");
    host.sh("web", "cp /data /more; sync");
    host.ok(&["stop", "web"]);
    fs::remove_file(&archive).unwrap();
    let request = r#"{"vm":"web","image":"saved"}"#;
    let commit = ["rpc", "-m", "image.commit", request];
    full(&commit, "read the disk");
    works(&commit);
    assert_eq!(image_directories(&host), ["default", "mine", "saved"]);
}
