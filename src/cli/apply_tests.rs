use super::super::tests::{Ran, fcctl};
use super::super::workspace::tests::give_stream;
use crate::client::fake::Fake;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

const PATCH: &[u8] =
    b"diff --git a/a b/a\nindex 1..2 100644\n--- a/a\n+++ b/a\n@@ -1 +1 @@\n-one\n+two\n\
    diff --git a/new b/new\nnew file mode 100644\n--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+x\n";

fn daemon(patch: &'static [u8]) -> Fake {
    Fake::start(move |mut r| {
        assert_eq!(
            (r.method.as_str(), r.params["kind"].as_str()),
            ("workspace.export", Some("patch"))
        );
        give_stream(&mut r, patch);
        r.result(json!({"files_changed": 2, "bytes": patch.len()}));
    })
}

/// Creates a tree that is not a repository, with a file `a`.
fn tree(text: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), text).unwrap();
    dir
}

fn apply(fake: &Fake, dir: &Path, more: &[&str]) -> Ran {
    fcctl(
        fake,
        &[&["workspace", "apply", "-C", dir.to_str().unwrap()], more].concat(),
    )
}

#[test]
fn apply_changes_tree_and_lists_files() {
    let (fake, dir) = (daemon(PATCH), tree("one\n"));
    let ran = apply(&fake, dir.path(), &["web", "--dry-run"]);
    let place = fs::canonicalize(dir.path()).unwrap();
    let list = "  a (+1 -1)\n  new (+1 -0)\n";
    assert_eq!((ran.status, ran.err.as_str()), (0, ""));
    assert_eq!(
        String::from_utf8_lossy(&ran.out),
        format!("2 files would change in {}:\n{list}", place.display())
    );
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"one\n");

    let ran = apply(&fake, dir.path(), &["web"]);
    assert_eq!((ran.status, ran.err.as_str()), (0, ""));
    assert_eq!(
        String::from_utf8_lossy(&ran.out),
        format!("changed 2 files in {}:\n{list}", place.display())
    );
    assert_eq!(
        (
            fs::read(dir.path().join("a")).unwrap(),
            fs::read(dir.path().join("new")).unwrap()
        ),
        (b"two\n".into(), b"x\n".into())
    );
}

#[test]
fn apply_with_conflict_changes_nothing() {
    let (fake, dir) = (daemon(PATCH), tree("changed here\n"));
    for more in [&["web"][..], &["web", "--dry-run"][..]] {
        let ran = apply(&fake, dir.path(), more);
        assert_eq!(ran.status, 4, "{}", ran.err);
        assert!(
            ran.err.contains("a: patch does not apply")
                && ran.err.contains("hint: nothing was changed"),
            "{}",
            ran.err
        );
        assert!(!dir.path().join("new").exists());
    }
}

#[test]
fn apply_prints_one_document_with_json() {
    let (fake, dir) = (daemon(PATCH), tree("one\n"));
    let ran = apply(&fake, dir.path(), &["web", "--dry-run", "--json"]);
    assert_eq!(ran.status, 0, "{}", ran.err);
    let document: Value = serde_json::from_slice(&ran.out).unwrap();
    assert_eq!(document["applied"], false);
    assert_eq!(
        document["files"][0],
        json!({"path": "a", "lines_added": 1, "lines_removed": 1})
    );
}

#[test]
fn apply_patch_file_needs_no_daemon() {
    let (fake, dir) = (Fake::start(|_| unreachable!()), tree("one\n"));
    let file = fake.dir().join("p.patch");
    fs::write(&file, PATCH).unwrap();
    let ran = apply(&fake, dir.path(), &["--patch", file.to_str().unwrap()]);
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"two\n");
    assert_eq!(fake.methods(), "");
    for (args, status) in [
        (&["--patch", "/nonexistent/p"][..], 3),
        (&[][..], 2),
        (&["web", "--patch", "p"][..], 2),
    ] {
        assert_eq!(apply(&fake, dir.path(), args).status, status, "{args:?}");
    }
    assert_eq!(
        fcctl(
            &fake,
            &["workspace", "apply", "web", "-C", "/nonexistent/x"]
        )
        .status,
        3
    );
}

#[test]
fn apply_of_unchanged_workspace_reports_no_changes() {
    let (fake, dir) = (daemon(b""), tree("one\n"));
    let ran = apply(&fake, dir.path(), &["web"]);
    assert_eq!(
        (ran.status, ran.out.as_slice(), ran.err.as_str()),
        (0, &b""[..], "fcctl: nothing has changed in web\n")
    );
}
