//! Runs `scripts/commits` on a repository made for the test.

use std::path::Path;
use std::process::{Command, Output};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/commits");

fn git(dir: &Path, args: &[&str]) -> String {
    let mut git = Command::new("git");
    git.args([
        "-c",
        "user.name=n",
        "-c",
        "user.email=n@localhost",
        "-c",
        "commit.gpgsign=false",
    ]);
    let out = git
        .args(args)
        .current_dir(dir)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "git {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

/// Creates a repository with the script and one commit.
fn repository() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    git(dir.path(), &["init", "-q", "-b", "main"]);
    std::fs::create_dir(dir.path().join("scripts")).unwrap();
    std::fs::copy(SCRIPT, dir.path().join("scripts/commits")).unwrap();
    commit(dir.path(), "start: Begin", 0);
    dir
}

/// Commits a change of `lines` lines with this message.
fn commit(dir: &Path, message: &str, lines: usize) {
    let file = dir.join(format!("file{lines}"));
    std::fs::write(&file, "line\n".repeat(lines)).unwrap();
    git(dir, &["add", "-A"]);
    git(dir, &["commit", "-q", "--allow-empty", "-m", message]);
}

fn check(dir: &Path, range: &[&str]) -> Output {
    Command::new(dir.join("scripts/commits"))
        .args(range)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .unwrap()
}

#[test]
fn well_formed_commits_are_accepted() {
    let dir = repository();
    commit(
        dir.path(),
        "store: Reject a database newer than this build",
        20,
    );
    commit(
        dir.path(),
        "api, docs: Describe the command pipe\n\nNobody could guess it.",
        30,
    );
    let out = check(dir.path(), &["HEAD~2..HEAD"]);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn malformed_commits_are_all_reported() {
    let long = format!("store: Say {}", "very ".repeat(14));
    let wrong = [
        (long.trim_end(), 0, "at most 72"),
        ("Fix the store", 0, "area: Imperative summary"),
        ("store: fix it", 0, "area: Imperative summary"),
        ("store: Fix it.", 0, "full stop"),
        ("store: Fix it", 21, "no body says why"),
    ];
    for (message, lines, why) in wrong {
        let dir = repository();
        commit(dir.path(), message, lines);
        let out = check(dir.path(), &["HEAD~1..HEAD"]);
        let complaint = String::from_utf8_lossy(&out.stderr);
        assert!(
            !out.status.success() && complaint.contains(message) && complaint.contains(why),
            "{message}: {complaint}"
        );
    }
}

#[test]
fn shallow_clone_is_not_checked() {
    let dir = repository();
    commit(dir.path(), "Fix the store", 0);
    let out = check(dir.path(), &[]);
    assert!(
        out.status.success() && String::from_utf8_lossy(&out.stdout).contains("not checked"),
        "{out:?}"
    );
}
