use super::super::tests::{NOW_S, Start, check, fcctl, fcctl_from, file_with, vm};
use super::*;
use crate::api::frame::Note;
use crate::api::stream::{ChunkReader, ChunkWriter};
use crate::api::vm::{Vm, VmState, WorkspaceInfo, WorkspaceState};
use crate::api::workspace::Ready;
use crate::client::fake::{Fake, Request};
use crate::error::Kind;
use expect_test::expect;
use serde_json::{Value, json};
use std::io::{Read, Write};

pub(crate) fn with_workspace(name: &str) -> Vm {
    let workspace = WorkspaceInfo {
        guest_path: "/root/app".to_owned(),
        workdir: "/root/app".to_owned(),
        state: WorkspaceState::Complete,
        readonly: false,
        entries: 2,
        bytes: 2048,
        prepared_at: NOW_S,
    };
    Vm {
        workspace: Some(workspace),
        ..vm(name, VmState::Running)
    }
}

/// Plays the daemon's side of a prepare. Reads the stream to its end and returns its payload and
/// its number of entries, or `None` if the stream was cut off.
pub(crate) fn take_stream(r: &mut Request, keep: &[&str]) -> Option<(Vec<u8>, u64)> {
    // Notes of other kinds arrive first.
    r.note(Note::Op {
        op: "0123456789ab".parse().unwrap(),
    });
    r.note(Note::Progress(crate::api::op::Progress::default()));
    r.note(Note::Ready(Ready {
        keep: keep.iter().map(|k| (*k).to_owned()).collect(),
    }));
    let mut reader = ChunkReader::new(File::from(r.fds.pop().expect("one descriptor")));
    let mut payload = Vec::new();
    reader.read_to_end(&mut payload).ok()?;
    Some((payload, reader.finish().unwrap().entries))
}

/// Plays the daemon's side of an export of this payload.
pub(crate) fn give_stream(r: &mut Request, payload: &[u8]) {
    let mut writer = ChunkWriter::new(File::from(r.fds.pop().expect("one descriptor")));
    writer.write_all(b"fcd-export 1 0 0\n").unwrap();
    writer.write_all(payload).unwrap();
    writer.finish(1).unwrap();
}

/// Plays the daemon's side of an export that lists paths which could not be brought back.
pub(crate) fn give_stream_without(r: &mut Request, left: &[u8], payload: &[u8]) {
    let mut writer = ChunkWriter::new(File::from(r.fds.pop().expect("one descriptor")));
    let count = left.iter().filter(|b| **b == 0).count();
    writer
        .write_all(format!("fcd-export 1 {count} {}\n", left.len()).as_bytes())
        .unwrap();
    writer.write_all(left).unwrap();
    writer.write_all(payload).unwrap();
    writer.finish(1).unwrap();
}

fn prepare_reply(entries: u64, kept: &[&str]) -> Value {
    json!({"vm": with_workspace("web"), "kept": kept, "entries": entries, "bytes": 2048})
}

/// Returns the daemon's description of an image whose commands run as root.
pub(crate) fn shown() -> Value {
    json!({
        "image": {
            "name": "big", "disk_bytes": 1, "allocated_bytes": 1, "kernel": "", "os": "",
            "built_at": 1, "vms": 0, "owner_uid": null, "digest": null, "source": null,
        },
        "config": {}, "layers": [], "history": [],
    })
}

/// Starts a daemon that describes VM web, whose image has this user, and leaves other calls to
/// `serve`.
fn daemon_with_user(user: &'static str, serve: impl Fn(Request) + Send + Sync + 'static) -> Fake {
    Fake::start(move |r| match r.method.as_str() {
        "vm.show" => r.result(json!({"vm": vm("web", VmState::Running)})),
        "image.show" => {
            let mut shown = shown();
            shown["config"]["user"] = json!(user);
            r.result(shown);
        }
        _ => serve(r),
    })
}

fn daemon(serve: impl Fn(Request) + Send + Sync + 'static) -> Fake {
    daemon_with_user("", serve)
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

/// Creates a plain tree outside any repository.
fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("one.txt"), "the first file").unwrap();
    std::fs::write(dir.path().join("two.txt"), "the second file").unwrap();
    dir
}

#[test]
fn prepare_skips_files_kept_by_guest() {
    let fake = daemon(|mut r| {
        assert_eq!(
            (
                r.params["guest_path"].as_str(),
                r.params["readonly"].as_bool()
            ),
            (Some("/root/app"), Some(true))
        );
        let (payload, entries) = take_stream(&mut r, &["two.txt"]).unwrap();
        assert!(payload.starts_with(b"fcd-import 1 "));
        assert!(contains(&payload, b"the first file") && !contains(&payload, b"the second file"));
        r.result(prepare_reply(entries, &["two.txt"]));
    });
    let dir = tree();
    let args = [
        "workspace",
        "prepare",
        "web",
        dir.path().to_str().unwrap(),
        "--guest-path",
        "/root/app",
        "--readonly",
    ];
    let ran = fcctl(&fake, &args);
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert!(ran.out.starts_with(b"web: ") && ran.out.ends_with(b"2 KiB, in /root/app\n"));
    assert!(
        ran.err.contains("kept 1 file that changed in the guest")
            && ran.err.contains("  two.txt\n"),
        "{}",
        ran.err
    );
}

#[test]
fn workspace_invalid_arguments_make_no_call() {
    let fake = Fake::start(|_| unreachable!());
    let dir = tree();
    let path = dir.path().to_str().unwrap();
    let there = dir.path().join("one.txt").display().to_string();
    for (args, status) in [
        (vec!["workspace", "prepare", "web", "/nonexistent/x"], 3),
        (
            vec!["workspace", "prepare", "web", path, "--guest-path", "/etc"],
            2,
        ),
        (
            vec!["workspace", "prepare", "web", path, "--guest-path", "../x"],
            2,
        ),
        (
            vec!["workspace", "prepare", "web", path, "--history", "some"],
            2,
        ),
        (vec!["workspace", "prepare", "web"], 2),
        (
            vec!["workspace", "prepare", "web", "--tar", "/nonexistent/x"],
            3,
        ),
        (vec!["workspace", "export", "web", "--patch", &there], 4),
        (
            vec!["workspace", "export", "web", "--patch", "/nonexistent/x/p"],
            3,
        ),
        (vec!["workspace", "export", "web", "--tree", path], 4),
        (vec!["workspace", "export", "web", "--json"], 2),
    ] {
        let ran = fcctl(&fake, &args);
        assert_eq!(ran.status, status, "{args:?} {}", ran.err);
        assert!(
            ran.err.starts_with("fcctl: ") || args.contains(&"--json"),
            "{}",
            ran.err
        );
    }
    assert_eq!(fake.methods(), "");
}

#[test]
fn prepare_reports_daemons_error_not_broken_pipe() {
    let fake = daemon(|mut r| {
        r.note(Note::Ready(Ready::default()));
        r.fds.clear();
        r.fault(Error::new(
            Kind::Cancelled,
            "VM web was stopped after 0 bytes",
        ));
    });
    let dir = tree();
    std::fs::write(dir.path().join("big"), vec![1; 4 << 20]).unwrap();
    let ran = fcctl(
        &fake,
        &["workspace", "prepare", "web", dir.path().to_str().unwrap()],
    );
    assert_eq!(
        (ran.status, ran.err.as_str()),
        (130, "fcctl: VM web was stopped after 0 bytes\n")
    );
}

#[test]
fn prepare_reports_own_error_not_broken_stream() {
    let fake = daemon(|mut r| {
        assert!(take_stream(&mut r, &[]).is_none());
        r.fault(Error::new(Kind::StreamIncomplete, "the stream broke off"));
    });
    // This tar archive ends in the middle of a file.
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(2000);
    header.set_cksum();
    tar.append_data(&mut header, "x", &[7; 2000][..]).unwrap();
    let whole = tar.into_inner().unwrap();
    let start = Start {
        stdin: file_with(&whole[..1024]),
        ..Start::default()
    };
    let ran = fcctl_from(&fake, start, &["workspace", "prepare", "web", "--tar", "-"]);
    assert_eq!(ran.status, 4, "{}", ran.err);
    assert!(ran.err.starts_with("fcctl: the tar"), "{}", ran.err);
}

#[test]
fn prepare_tar_from_stdin_is_sent_unchanged() {
    let fake = daemon(|mut r| {
        assert_eq!(
            (
                r.params["raw_tar"].as_bool(),
                r.params["guest_path"].as_str()
            ),
            (Some(true), Some("/root/workspace"))
        );
        let (payload, entries) = take_stream(&mut r, &[]).unwrap();
        assert!(contains(&payload, b"seven"));
        r.result(prepare_reply(entries, &[]));
    });
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_cksum();
    tar.append_data(&mut header, "x", &b"seven"[..]).unwrap();
    let start = Start {
        stdin: file_with(&tar.into_inner().unwrap()),
        ..Start::default()
    };
    let ran = fcctl_from(
        &fake,
        start,
        &["workspace", "prepare", "web", "--tar", "-", "--json"],
    );
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert_eq!(
        serde_json::from_slice::<Value>(&ran.out).unwrap()["entries"],
        1
    );
}

#[test]
fn prepare_stalled_ends_at_signal() {
    let (signal, signals) = crossbeam_channel::unbounded();
    let fake = daemon(move |mut r| {
        // Keeps the descriptor but does not read from it.
        r.note(Note::Ready(Ready::default()));
        signal.send(signal_hook::consts::SIGINT).unwrap();
        r.wait_for_hangup();
    });
    let dir = tree();
    std::fs::write(dir.path().join("big"), vec![1; 4 << 20]).unwrap();
    let start = Start {
        signals,
        ..Start::default()
    };
    let ran = fcctl_from(
        &fake,
        start,
        &["workspace", "prepare", "web", dir.path().to_str().unwrap()],
    );
    assert_eq!(
        (ran.status, ran.err.as_str()),
        (130, "fcctl: interrupted\n")
    );
}

/// `fcctl run` chooses the same place and the same owner.
#[test]
fn prepare_gives_copy_to_user_of_image() {
    for (user, path, owner) in [
        ("app", "/workspace/app", Some("app:")),
        ("1000:1000", "/workspace/app", Some("1000:1000")),
        ("root", "/root/app", None),
    ] {
        let fake = daemon_with_user(user, move |mut r| match r.method.as_str() {
            "workspace.prepare" => {
                assert_eq!(r.params["guest_path"], path);
                let (_, entries) = take_stream(&mut r, &[]).unwrap();
                r.result(prepare_reply(entries, &[]));
            }
            _ => {
                assert_eq!(r.params["user"], "0");
                drop(super::super::exec::tests::begin(&mut r));
                r.result(super::super::exec::tests::status(0));
            }
        });
        let dir = tree();
        let tree = dir.path().join("app");
        std::fs::create_dir(&tree).unwrap();
        let ran = fcctl(
            &fake,
            &["workspace", "prepare", "web", tree.to_str().unwrap()],
        );
        assert_eq!(ran.status, 0, "{}", ran.err);
        let calls = fake.calls().join("\n");
        let chown = owner.map(|owner| format!(r#""sh","{owner}","{path}"]"#));
        assert_eq!(calls.contains("chown"), owner.is_some(), "{calls}");
        assert!(chown.is_none_or(|chown| calls.contains(&chown)), "{calls}");
    }
}

#[test]
fn export_patch_is_complete() {
    let fake = Fake::start(|mut r| {
        assert_eq!(r.params["kind"], "patch");
        give_stream(&mut r, b"diff --git a/x b/x\n\0binary");
        r.result(json!({"bytes": 26}));
    });
    for args in [
        &["workspace", "export", "web"][..],
        &["workspace", "export", "web", "--patch", "-"][..],
    ] {
        let ran = fcctl(&fake, args);
        assert_eq!(
            (ran.status, ran.out.as_slice()),
            (0, &b"diff --git a/x b/x\n\0binary"[..]),
            "{}",
            ran.err
        );
        assert_eq!(ran.err, "fcctl: 1 file changed, 26 B\n");
    }
    let file = fake.dir().join("p.patch");
    fake.calls();
    check(
        &fake,
        &[
            "workspace",
            "export",
            "web",
            "--patch",
            file.to_str().unwrap(),
        ],
        expect![[r#"
        > workspace.export {"kind":"patch","no_wait":false,"vm":"web"}
        ! fcctl: 1 file changed, 26 B: git --git-dir= apply DIR/p.patch
        status 0
    "#]],
    );
    assert_eq!(
        std::fs::read(&file).unwrap(),
        b"diff --git a/x b/x\n\0binary"
    );
}

#[test]
fn export_truncated_patch_writes_nothing() {
    let fake = Fake::start(|mut r| {
        let mut half = File::from(r.fds.pop().unwrap());
        half.write_all(&[0, 0, 0, 4, b'd', b'i']).unwrap();
        drop(half);
        r.fault(Error::new(Kind::GuestLost, "the guest went away"));
    });
    let file = fake.dir().join("p.patch");
    let ran = fcctl(
        &fake,
        &[
            "workspace",
            "export",
            "web",
            "--patch",
            file.to_str().unwrap(),
        ],
    );
    assert_eq!(
        (ran.status, ran.err.as_str()),
        (1, "fcctl: the guest went away\n")
    );
    assert_eq!(fcctl(&fake, &["workspace", "export", "web"]).out, b"");
    // Only the socket is left in the directory.
    assert_eq!(std::fs::read_dir(fake.dir()).unwrap().count(), 1);
}

#[test]
fn export_reply_without_complete_stream_fails() {
    let fake = Fake::start(|mut r| {
        drop(r.fds.pop());
        r.result(json!({"bytes": 26}));
    });
    let target = fake.dir().join("new").display().to_string();
    for args in [
        &["--patch", "-"][..],
        &["--patch", &target][..],
        &["--tree", &target][..],
    ] {
        let ran = fcctl(&fake, &[&["workspace", "export", "web"], args].concat());
        assert_eq!(
            (ran.status, ran.out.as_slice()),
            (4, &b""[..]),
            "{args:?} {}",
            ran.err
        );
        assert!(
            ran.err.contains("the stream broke off after 0 bytes"),
            "{}",
            ran.err
        );
    }
    assert_eq!(std::fs::read_dir(fake.dir()).unwrap().count(), 1);
}

#[test]
fn export_tree_creates_directory() {
    let fake = Fake::start(|mut r| {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append_data(&mut header, "x", &b"seven"[..]).unwrap();
        give_stream(&mut r, &tar.into_inner().unwrap());
        r.result(json!({"bytes": 5}));
    });
    let target = fake.dir().join("out");
    let ran = fcctl(
        &fake,
        &[
            "workspace",
            "export",
            "web",
            "--tree",
            target.to_str().unwrap(),
        ],
    );
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert_eq!(std::fs::read(target.join("x")).unwrap(), b"seven");
}

const NEW_FILE: &[u8] =
    b"diff --git a/x b/x\nnew file mode 100644\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+x\n";

#[test]
fn export_counts_files_itself() {
    let fake = Fake::start(|mut r| {
        give_stream(&mut r, NEW_FILE);
        r.result(json!({"bytes": NEW_FILE.len()}));
    });
    let file = fake.dir().join("p.patch");
    for args in [&["--patch", "-"][..], &["--patch", file.to_str().unwrap()]] {
        let ran = fcctl(&fake, &[&["workspace", "export", "web"], args].concat());
        assert!(
            ran.err.starts_with("fcctl: 1 file changed, 79 B"),
            "{}",
            ran.err
        );
    }
}

#[test]
fn export_over_limit_fails_and_leaves_nothing() {
    let fake = Fake::start(|mut r| {
        let mut writer = ChunkWriter::new(File::from(r.fds.pop().expect("one descriptor")));
        writer.write_all(b"fcd-export 1 0 0\n").unwrap();
        while writer.write_all(&[b'x'; 1 << 16]).is_ok() {}
        r.fault(Error::new(Kind::Cancelled, "nobody takes the stream"));
    });
    let target = fake.dir().join("new").display().to_string();
    for args in [&["--patch", "-"][..], &["--patch", &target]] {
        let ran = fcctl(
            &fake,
            &[&["workspace", "export", "web", "--max-bytes", "3M"], args].concat(),
        );
        let said = "fcctl: receive the patch: the guest sends more than 3145728 bytes\n\
                    hint: if you trust the guest, allow more with --max-bytes SIZE\n";
        assert_eq!(
            (ran.status, ran.out.as_slice(), ran.err.as_str()),
            (1, &b""[..], said),
            "{args:?}"
        );
    }
    assert_eq!(std::fs::read_dir(fake.dir()).unwrap().count(), 1);
}

/// `prepare` and `run` both pass the flag to the plan.
#[test]
fn allow_alternate_reaches_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let git = |at: &Path, args: &[&str]| {
        let c = crate::host::command::Command::new("git")
            .args(args)
            .cwd(at)
            .env("HOME", dir.path());
        let out = crate::host::command::run_any_status(
            &c,
            &crate::locks::Cancel::try_new().unwrap(),
            &mut |_| {},
        )
        .unwrap();
        assert_eq!(out.status, 0, "{}", String::from_utf8_lossy(&out.stderr));
    };
    git(dir.path(), &["init", "-q", "main"]);
    let main = dir.path().join("main");
    git(
        &main,
        &[
            "-c",
            "user.name=x",
            "-c",
            "user.email=x@y",
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "one",
        ],
    );
    git(dir.path(), &["clone", "-q", "--shared", "main", "clone"]);
    let clone = dir.path().join("clone");
    let clone = clone.to_str().unwrap();
    let none = Fake::start(|_| unreachable!());
    for args in [
        &["workspace", "prepare", "web", clone][..],
        &["run", clone, "--", "true"],
    ] {
        let ran = fcctl(&none, args);
        assert!(
            ran.status != 0 && ran.err.contains("--allow-alternate "),
            "{}",
            ran.err
        );
        assert!(ran.err.contains("main/.git/objects"), "{}", ran.err);
    }
    let fake = daemon(|mut r| {
        let (_, entries) = take_stream(&mut r, &[]).unwrap();
        r.result(prepare_reply(entries, &[]));
    });
    let ran = fcctl(
        &fake,
        &[
            "workspace",
            "prepare",
            "web",
            clone,
            "--allow-alternate",
            main.to_str().unwrap(),
        ],
    );
    assert_eq!(ran.status, 0, "{}", ran.err);
    let ran = fcctl(
        &none,
        &[
            "run",
            "--allow-alternate",
            main.to_str().unwrap(),
            "--",
            "true",
        ],
    );
    assert!(ran.err.contains("need a PATH"), "{}", ran.err);
}

#[test]
fn export_lists_paths_left_in_guest() {
    let fake = Fake::start(|mut r| {
        give_stream_without(&mut r, b"r svc it's/.git\0s sub\x1b[2J\0", b"");
        r.result(json!({"bytes": 0}));
    });
    let file = fake.dir().join("p.patch");
    check(
        &fake,
        &[
            "workspace",
            "export",
            "web",
            "--patch",
            file.to_str().unwrap(),
        ],
        expect![[r#"
            > workspace.export {"kind":"patch","no_wait":false,"vm":"web"}
            ! fcctl: nothing has changed; DIR/p.patch is empty
            ! fcctl: warning: not everything could be brought back; these exist only in VM web:
            ! fcctl:   svc it's/.git: the history of a repository created in the guest (its files were brought back)
            ! fcctl:   sub%1B[2J: files in a submodule, or in a repository that was not sent
            ! fcctl: to fetch them: fcctl exec web -- tar c 'svc it'\''s/.git' > left.tar
            status 0
        "#]],
    );
    let other = fake.dir().join("q.patch");
    let ran = fcctl(
        &fake,
        &[
            "workspace",
            "export",
            "web",
            "--json",
            "--patch",
            other.to_str().unwrap(),
        ],
    );
    let left = &serde_json::from_slice::<Value>(&ran.out).unwrap()["left_behind"];
    assert_eq!(
        *left,
        json!({"named": [{"path": "svc it's/.git", "why": "repository"}, {"path": "sub%1B[2J", "why": "submodule"}], "total": 2})
    );
}
