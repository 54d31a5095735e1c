use super::super::exec::tests::{begin, status};
use super::super::tests::{Ran, Start, fcctl, fcctl_from, vm};
use super::super::workspace::tests::{
    give_stream, give_stream_without, shown, take_stream, with_workspace,
};
use crate::api::event::Snapshot;
use crate::api::frame::Note;
use crate::api::port::{AutoPorts, Port, Protocol, loopback};
use crate::api::vm::VmState;
use crate::client::fake::{Fake, Request};
use crate::error::{Error, Kind};
use crossbeam_channel::unbounded;
use serde_json::json;
use signal_hook::consts::signal::SIGINT;
use std::fs::File;
use std::io::Write;

const LAST_LINE: &str =
    "VM web keeps running. Enter: fcctl ssh web, stop: fcctl stop web, delete: fcctl rm -f web\n";

/// Starts a daemon on which every call succeeds. `special` may handle a request itself and then
/// returns `None`.
fn daemon(special: impl Fn(Request) -> Option<Request> + Send + Sync + 'static) -> Fake {
    Fake::start(move |r| {
        let Some(mut r) = special(r) else { return };
        match r.method.as_str() {
            "vm.create" if r.params["hold"] == true => {
                r.note(Note::Created(Box::new(vm("web", VmState::Created))));
                r.wait_for_hangup();
            }
            "vm.create" | "vm.start" => r.result(json!({"vm": vm("web", VmState::Running)})),
            "image.show" => r.result(shown()),
            "workspace.prepare" => {
                let (_, entries) = take_stream(&mut r, &[]).unwrap();
                r.result(json!({"vm": with_workspace("web"), "kept": [], "entries": entries, "bytes": 1}));
            }
            "exec.start" => {
                let mut guest = begin(&mut r);
                guest
                    .stdout
                    .take()
                    .unwrap()
                    .write_all(b"from the guest\n")
                    .unwrap();
                drop(guest);
                r.result(status(7));
            }
            "workspace.export" => {
                give_stream(&mut r, b"the patch");
                r.result(json!({"bytes": 9}));
            }
            "vm.delete" => r.result(json!({"deleted": vm("web", VmState::Stopped).id})),
            _ => r.result(json!({})),
        }
    })
}

fn fail_at(method: &'static str) -> Fake {
    daemon(move |r| {
        if r.method != method {
            return Some(r);
        }
        r.fault(Error::new(Kind::Host, format!("{method} did not work")));
        None
    })
}

/// Runs fcctl, and sends it SIGINT as soon as it calls `method`, which is never answered. Returns
/// the result and the methods that were called.
fn interrupted_at(method: &'static str, args: &[&str]) -> (Ran, String) {
    let (signal, signals) = unbounded();
    let fake = daemon(move |mut r| {
        if r.method != method {
            return Some(r);
        }
        signal.send(SIGINT).unwrap();
        r.wait_for_hangup();
        None
    });
    let ran = fcctl_from(
        &fake,
        Start {
            signals,
            ..Start::default()
        },
        args,
    );
    (ran, fake.methods())
}

fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "text").unwrap();
    dir
}

#[test]
fn run_creates_copies_runs_and_keeps() {
    let fake = daemon(Some);
    let (dir, patch) = (tree(), fake.dir().join("p"));
    let args = [
        "run",
        dir.path().to_str().unwrap(),
        "--export-patch",
        patch.to_str().unwrap(),
        "--",
        "make",
    ];
    let ran = fcctl(&fake, &args);
    assert_eq!(
        (ran.status, ran.out.as_slice()),
        (7, &b"from the guest\n"[..]),
        "{}",
        ran.err
    );
    assert_eq!(
        fake.methods(),
        "vm.create image.show vm.start workspace.prepare exec.start workspace.export"
    );
    // stderr begins with the VM's name and ends with how to continue.
    assert!(
        ran.err.starts_with("fcctl: VM web\n") && ran.err.ends_with(LAST_LINE),
        "{}",
        ran.err
    );
    assert_eq!(std::fs::read(patch).unwrap(), b"the patch");
}

#[test]
fn new_forwards_are_reported_while_the_command_runs() {
    let (sent, noted) = unbounded();
    let fake = daemon(move |mut r| {
        let mut web = vm("web", VmState::Running);
        let auto = web.auto_ports.insert(AutoPorts::default());
        match r.method.as_str() {
            "vm.create" => r.result(json!({ "vm": web })),
            "events.watch" => {
                auto.open.push(Port {
                    host_addr: loopback(),
                    host_port: 3000,
                    guest_port: 3000,
                    protocol: Protocol::Tcp,
                });
                r.note(Note::Snapshot(Snapshot {
                    seq: 1,
                    at: 1,
                    resync: false,
                    more: false,
                    vms: vec![web],
                }));
                sent.send(()).unwrap();
                r.wait_for_hangup();
            }
            "exec.start" => {
                noted.recv().unwrap();
                return Some(r);
            }
            _ => return Some(r),
        }
        None
    });
    let ran = fcctl(&fake, &["run", "-p", "auto", "--", "make"]);
    let line = "fcctl: forwarding 127.0.0.1:3000 to port 3000 of VM web\n";
    assert!(ran.status == 7 && ran.err.contains(line), "{}", ran.err);
    assert_eq!(
        fake.calls()[0],
        r#"vm.create {"auto_ports":true,"hold":false,"rm":false}"#
    );
}

#[test]
fn run_with_rm_deletes_vm() {
    let fake = daemon(Some);
    let ran = fcctl(&fake, &["run", "--rm", "--name", "web", "--", "make"]);
    assert_eq!((ran.status, ran.err.as_str()), (7, "fcctl: VM web\n"));
    let calls = fake.calls();
    assert_eq!(
        calls[0],
        r#"vm.create {"hold":true,"name":"web","rm":true}"#
    );
    assert_eq!(
        calls.last().unwrap(),
        r#"vm.delete {"force":true,"if_exists":true,"vm":"000000776562"}"#
    );
}

#[test]
fn run_with_invalid_arguments_creates_nothing() {
    let fake = daemon(Some);
    let dir = tree();
    let path = dir.path().to_str().unwrap();
    let there = dir.path().join("file").display().to_string();
    for args in [
        &["run", "/nonexistent/x", "--", "make"][..],
        &["run", path, "--export-patch", &there, "--", "make"][..],
        &["run", "--export-patch", "/tmp/p", "--", "make"][..],
        &["run", "--readonly", "--", "make"][..],
        &["run", "--env-file", "/nonexistent/x", "--", "make"][..],
        &["run", path][..],
    ] {
        let ran = fcctl(&fake, args);
        assert_eq!(ran.status, 125, "{args:?} {}", ran.err);
    }
    assert_eq!(fake.methods(), "");
}

#[test]
fn run_failure_before_command_deletes_vm() {
    let dir = tree();
    for (method, methods) in [
        ("vm.create", "vm.create"),
        ("vm.start", "vm.create image.show vm.start vm.delete"),
        (
            "workspace.prepare",
            "vm.create image.show vm.start workspace.prepare vm.delete",
        ),
        (
            "exec.start",
            "vm.create image.show vm.start workspace.prepare exec.start vm.delete",
        ),
    ] {
        let fake = fail_at(method);
        let ran = fcctl(&fake, &["run", dir.path().to_str().unwrap(), "--", "make"]);
        assert_eq!((ran.status, fake.methods().as_str()), (125, methods));
        assert!(
            ran.err.contains(&format!("fcctl: {method} did not work\n"))
                && !ran.err.contains("keeps running"),
            "{}",
            ran.err
        );
    }
}

#[test]
fn run_interrupted_before_command_deletes_vm() {
    let dir = tree();
    for (method, methods) in [
        ("vm.start", "vm.create image.show vm.start vm.delete"),
        (
            "workspace.prepare",
            "vm.create image.show vm.start workspace.prepare vm.delete",
        ),
        (
            "exec.start",
            "vm.create image.show vm.start workspace.prepare exec.start vm.delete",
        ),
    ] {
        for rm in [&["--rm"][..], &[]] {
            let args = [&["run", dir.path().to_str().unwrap()], rm, &["--", "make"]].concat();
            let (ran, called) = interrupted_at(method, &args);
            assert_eq!((ran.status, called.as_str()), (130, methods), "{}", ran.err);
            assert!(
                ran.err.ends_with("fcctl: interrupted\n")
                    || ran.err.contains("fcctl: interrupted\n"),
                "{}",
                ran.err
            );
        }
    }
}

#[test]
fn run_interrupted_during_export_keeps_vm() {
    let fake_dir = tempfile::tempdir().unwrap();
    let (dir, patch) = (tree(), fake_dir.path().join("p"));
    let args = [
        "run",
        dir.path().to_str().unwrap(),
        "--export-patch",
        patch.to_str().unwrap(),
        "--",
        "make",
    ];
    let (ran, _) = interrupted_at("workspace.export", &args);
    assert_eq!(ran.status, 130);
    assert!(ran.err.ends_with(LAST_LINE), "{}", ran.err);
    assert!(!patch.exists());
}

#[test]
fn run_lost_guest_keeps_vm_and_exits_125() {
    let fake = daemon(|mut r| {
        if r.method != "exec.start" {
            return Some(r);
        }
        drop(begin(&mut r));
        r.fault(Error::new(Kind::GuestLost, "the guest went away"));
        None
    });
    let ran = fcctl(&fake, &["run", "--", "make"]);
    assert_eq!(
        (ran.status, fake.methods().as_str()),
        (125, "vm.create vm.start exec.start")
    );
    assert!(
        ran.err.contains("fcctl: the guest went away\n") && ran.err.ends_with(LAST_LINE),
        "{}",
        ran.err
    );
}

#[test]
fn run_failed_export_exits_125() {
    let fake = fail_at("workspace.export");
    let (dir, patch) = (tree(), fake.dir().join("p"));
    let args = [
        "run",
        dir.path().to_str().unwrap(),
        "--export-patch",
        patch.to_str().unwrap(),
        "--",
        "make",
    ];
    let ran = fcctl(&fake, &args);
    assert_eq!(ran.status, 125);
    assert!(
        ran.err
            .contains("fcctl: export the changes: workspace.export did not work\n"),
        "{}",
        ran.err
    );
}

#[test]
fn run_name_taken_suggests_three_commands() {
    let fake = daemon(|r| {
        if r.method != "vm.create" {
            return Some(r);
        }
        r.fault(Error::new(Kind::NameTaken, "a VM web exists already").hint("the daemon's own"));
        None
    });
    let ran = fcctl(&fake, &["run", "--name", "web", "--", "make"]);
    assert_eq!(ran.status, 125);
    let hints: Vec<&str> = ran
        .err
        .lines()
        .filter(|l| l.starts_with("hint: "))
        .collect();
    assert_eq!(hints.len(), 3, "{}", ran.err);
    for (hint, command) in hints.iter().zip([
        "fcctl exec web -- CMD",
        "fcctl rm -f web",
        "fcctl run --name web-2",
    ]) {
        assert!(hint.contains(command), "{hint}");
    }
}

#[test]
fn run_without_i_does_not_pass_stdin() {
    let fake = daemon(|mut r| {
        if r.method != "exec.start" {
            return Some(r);
        }
        let mut guest = begin(&mut r);
        let input = std::io::read_to_string(guest.stdin.take().expect("-i")).unwrap();
        guest
            .stdout
            .take()
            .unwrap()
            .write_all(input.to_uppercase().as_bytes())
            .unwrap();
        r.result(status(0));
        None
    });
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"piped").unwrap();
    drop(writer);
    let start = Start {
        stdin: File::from(std::os::fd::OwnedFd::from(reader)),
        ..Start::default()
    };
    let ran = fcctl_from(&fake, start, &["run", "-i", "--", "tr"]);
    assert_eq!((ran.status, ran.out.as_slice()), (0, &b"PIPED"[..]));
}

/// Starts a daemon whose guest has created a repository that a patch cannot contain.
fn with_a_repository_in_the_guest() -> Fake {
    daemon(|mut r| {
        if r.method == "vm.set" {
            r.result(json!({"vm": vm("web", VmState::Running)}));
            return None;
        }
        if r.method != "workspace.export" {
            return Some(r);
        }
        give_stream_without(&mut r, b"r svc/.git\0", b"the patch");
        r.result(json!({"bytes": 9}));
        None
    })
}

#[test]
fn run_with_rm_keeps_vm_with_unexported_changes() {
    let fake = with_a_repository_in_the_guest();
    let (dir, patch) = (tree(), fake.dir().join("p"));
    let path = dir.path().to_str().unwrap();
    let ran = fcctl(
        &fake,
        &[
            "run",
            "--rm",
            path,
            "--export-patch",
            patch.to_str().unwrap(),
            "--",
            "make",
        ],
    );
    assert_eq!(ran.status, 125, "{}", ran.err);
    assert!(
        ran.err.contains("  svc/.git: ") && ran.err.contains("VM web is kept despite --rm"),
        "{}",
        ran.err
    );
    assert!(ran.err.ends_with(LAST_LINE), "{}", ran.err);
    let calls = fake.calls();
    assert!(
        calls
            .iter()
            .any(|c| c == r#"vm.set {"rm":false,"vm":"000000776562"}"#),
        "{calls:?}"
    );
    assert!(
        !calls.iter().any(|c| c.starts_with("vm.delete")),
        "{calls:?}"
    );
    assert_eq!(std::fs::read(patch).unwrap(), b"the patch");
}

#[test]
fn run_without_rm_or_export_exits_with_command_status() {
    let fake = with_a_repository_in_the_guest();
    let (dir, patch) = (tree(), fake.dir().join("p"));
    let path = dir.path().to_str().unwrap();
    let ran = fcctl(
        &fake,
        &[
            "run",
            path,
            "--export-patch",
            patch.to_str().unwrap(),
            "--",
            "make",
        ],
    );
    assert_eq!(ran.status, 7, "{}", ran.err);
    assert!(
        ran.err.contains("  svc/.git: ") && ran.err.ends_with(LAST_LINE),
        "{}",
        ran.err
    );
    let ran = fcctl(&fake, &["run", "--rm", path, "--", "make"]);
    assert_eq!(ran.status, 7, "{}", ran.err);
    assert!(
        fake.calls().last().unwrap().starts_with("vm.delete"),
        "--rm alone always deletes"
    );
}

#[test]
fn run_with_image_takes_first_word_as_command() {
    let fake = daemon(Some);
    let ran = fcctl(&fake, &["run", "--image", "alpine", "ls", "-l", "/"]);
    assert_eq!(ran.status, 7, "{}", ran.err);
    let calls = fake.calls();
    let start = calls.iter().find(|c| c.starts_with("exec.start")).unwrap();
    assert!(start.contains(r#""argv":["ls","-l","/"]"#), "{start}");
}

#[test]
fn run_with_image_and_directory_without_slash_names_the_fix() {
    let fake = daemon(Some);
    let ran = fcctl(&fake, &["run", "--image", "big", "src", "--", "make"]);
    assert_eq!(ran.status, 125);
    assert_eq!(
        ran.err,
        "fcctl: src after --image is a command, not a directory\n\
         hint: to copy the directory, write ./src\n"
    );
    assert_eq!(fake.methods(), "");
}

/// Other users cannot enter root's home, and could not change a copy that belongs to root.
#[test]
fn run_as_user_gives_copy_to_user() {
    for (user, owner) in [("dev", "dev:"), ("1000", "1000"), ("dev:adm", "dev:adm")] {
        let fake = daemon(|mut r| {
            if r.method != "exec.start" || r.params["argv"][0] != "sh" {
                return Some(r);
            }
            drop(begin(&mut r));
            r.result(status(0));
            None
        });
        let dir = tree();
        let path = dir.path().join("app");
        std::fs::create_dir(&path).unwrap();
        let ran = fcctl(
            &fake,
            &["run", path.to_str().unwrap(), "-u", user, "--", "make"],
        );
        assert_eq!(ran.status, 7, "{}", ran.err);
        let calls = fake.calls();
        let of = |method: &str| {
            calls
                .iter()
                .filter(|c| c.starts_with(method))
                .collect::<Vec<_>>()
        };
        assert!(of("workspace.prepare")[0].contains(r#""guest_path":"/workspace/app""#));
        let chown = format!(r#""sh","{owner}","/workspace/app"]"#);
        assert!(of("exec.start")[0].contains(&chown), "{calls:?}");
        assert!(of("exec.start")[1].contains(&format!(r#""user":"{user}""#)));
    }
}

/// The copy belongs to the user that the image names, as it does with `--user`. This also holds for
/// the daemon's default image.
#[test]
fn run_gives_copy_to_user_of_image() {
    for (user, owner) in [
        ("1000:1000", Some("1000:1000")),
        ("app", Some("app:")),
        ("", None),
        ("root", None),
        ("0:0", None),
    ] {
        for image in [&["--image", "big"][..], &[]] {
            let fake = daemon(move |mut r| match r.method.as_str() {
                "image.show" => {
                    let mut shown = shown();
                    shown["config"]["user"] = json!(user);
                    r.result(shown);
                    None
                }
                "exec.start" if r.params["argv"][0] == "sh" => {
                    drop(begin(&mut r));
                    r.result(status(0));
                    None
                }
                _ => Some(r),
            });
            let dir = tree();
            let path = dir.path().join("app");
            std::fs::create_dir(&path).unwrap();
            let args = [&["run"], image, &[path.to_str().unwrap(), "--", "make"]];
            let ran = fcctl(&fake, &args.concat());
            assert_eq!(ran.status, 7, "{}", ran.err);
            let calls = fake.calls().join("\n");
            let chown = owner.map(|owner| format!(r#""sh","{owner}","/workspace/app"]"#));
            let is_given = chown.is_some_and(|chown| calls.contains(&chown));
            assert_eq!(is_given, owner.is_some(), "{user}: {calls}");
            let is_in_root = calls.contains(r#""guest_path":"/root/app""#);
            assert_eq!(is_in_root, owner.is_none(), "{user}: {calls}");
            // fcctl does not send the user, because the daemon takes it from the image.
            assert!(!calls.contains(&format!(r#""user":"{user}""#)), "{calls}");
        }
    }
}

/// Starts a daemon whose guest runs a command until it gets a signal.
fn with_endless_command() -> Fake {
    let (signalled, signals) = unbounded();
    daemon(move |mut r| match r.method.as_str() {
        "exec.start" => {
            let guest = begin(&mut r);
            let signal: String = signals.recv().unwrap();
            assert_eq!(signal, "TERM");
            drop(guest);
            r.result(status(143));
            None
        }
        "exec.signal" => {
            let signal = r.params["signal"].as_str().unwrap().to_owned();
            signalled.send(signal).unwrap();
            r.result(json!({}));
            None
        }
        _ => Some(r),
    })
}

#[test]
fn run_with_timeout_stops_command_and_exits_with_124() {
    let fake = with_endless_command();
    let ran = fcctl(
        &fake,
        &["run", "--rm", "--timeout", "50ms", "--", "sleep", "60"],
    );
    assert_eq!(ran.status, 124, "{}", ran.err);
    let text = "fcctl: the command ran for too long, so it was stopped (--timeout)\n";
    assert!(ran.err.contains(text), "{}", ran.err);
    assert!(
        fake.calls().iter().any(|c| c.starts_with("vm.delete ")),
        "--rm deletes the VM"
    );
    let fake = with_endless_command();
    let ran = fcctl(&fake, &["run", "--timeout", "50ms", "--", "sleep", "60"]);
    assert_eq!(ran.status, 124, "{}", ran.err);
    assert!(ran.err.ends_with(LAST_LINE), "{}", ran.err);
}

#[test]
fn run_that_ends_within_timeout_has_its_own_status() {
    let ran = fcctl(
        &daemon(Some),
        &["run", "--rm", "--timeout", "1h", "--", "true"],
    );
    assert_eq!(ran.status, 7, "{}", ran.err);
}
