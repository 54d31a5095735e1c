//! Runs whole command lines against a fake daemon and checks requests, output and exit status.

use super::context::{Context, Stdio};
use super::signals::SignalSource;
use crate::api::vm::{Vm, VmState};
use crate::client::fake::{Fake, Request};
use crate::error::{Error, Kind};
use crossbeam_channel::Receiver;
use expect_test::{Expect, expect};
use serde_json::json;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, Write};

/// The current time in all tests, in seconds since the epoch.
pub(super) const NOW_S: u64 = 1_800_000_000;

pub(super) struct Ran {
    pub(super) status: u8,
    pub(super) out: Vec<u8>,
    pub(super) err: String,
}

/// The streams and signals that a command line starts with.
pub(super) struct Start {
    pub(super) stdin: File,
    pub(super) stdout: File,
    pub(super) signals: Receiver<i32>,
}

pub(super) fn file_with(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

impl Default for Start {
    fn default() -> Self {
        Self {
            stdin: file_with(b""),
            stdout: tempfile::tempfile().unwrap(),
            signals: crossbeam_channel::never(),
        }
    }
}

pub(super) fn fcctl_from(fake: &Fake, start: Start, args: &[&str]) -> Ran {
    let mut read_back = [
        start.stdout.try_clone().unwrap(),
        tempfile::tempfile().unwrap(),
    ];
    let stdio = Stdio {
        stdin: start.stdin,
        stdout: start.stdout,
        stderr: read_back[1].try_clone().unwrap(),
    };
    let state = fake.dir().to_str().map(str::to_owned);
    let env = Box::new(move |name: &str| match name {
        "PATH" => std::env::var("PATH").ok(),
        "XDG_STATE_HOME" => state.clone(),
        "MINE" => Some("from me".to_owned()),
        "TZ" => Some("UTC".to_owned()),
        _ => None,
    });
    let mut ctx = Context::new(stdio, SignalSource::Channel(start.signals), env, NOW_S).unwrap();
    let socket = fake.socket();
    let mut words: Vec<OsString> = vec!["fcctl".into(), "--socket".into(), socket.clone().into()];
    words.extend(args.iter().map(Into::into));
    let status = super::command(&mut ctx, &words);
    let [out, err] = read_back.each_mut().map(|file| {
        let mut bytes = Vec::new();
        // Pipes and terminals are left for the test to read.
        if file.metadata().unwrap().is_file() {
            file.rewind().unwrap();
            file.read_to_end(&mut bytes).unwrap();
        }
        bytes
    });
    let hide = |text: String| text.replace(fake.dir().to_str().unwrap(), "DIR");
    Ran {
        status,
        out,
        err: hide(String::from_utf8(err).unwrap()),
    }
}

pub(super) fn fcctl(fake: &Fake, args: &[&str]) -> Ran {
    fcctl_from(fake, Start::default(), args)
}

/// Runs fcctl, and compares its status, calls, stdout and stderr as one text.
#[track_caller]
pub(super) fn check(fake: &Fake, args: &[&str], expected: Expect) {
    let ran = fcctl(fake, args);
    let calls: String = fake.calls().iter().map(|c| format!("> {c}\n")).collect();
    let out = String::from_utf8(ran.out)
        .unwrap()
        .replace(fake.dir().to_str().unwrap(), "DIR");
    let mark = |text: &str, mark: &str| -> String {
        text.lines().map(|l| format!("{mark}{l}\n")).collect()
    };
    expected.assert_eq(&format!(
        "{calls}{}{}status {}\n",
        mark(&out, ""),
        mark(&ran.err, "! "),
        ran.status
    ));
}

pub(super) fn vm(name: &str, state: VmState) -> Vm {
    Vm {
        id: format!(
            "{:0>12.12}",
            name.bytes().map(|b| format!("{b:02x}")).collect::<String>()
        )
        .parse()
        .unwrap(),
        name: name.parse().unwrap(),
        owner_uid: 1000,
        state,
        reason: None,
        image: "default".parse().unwrap(),
        image_digest: None,
        kernel: None,
        init: crate::api::vm::Init::Fcd,
        vcpus: 1,
        mem_mib: 1024,
        disk_bytes: 4 << 30,
        work_disk_bytes: None,
        disk_bytes_per_s: None,
        disk_ops_per_s: None,
        net_rx_bytes_per_s: None,
        net_tx_bytes_per_s: None,
        net: crate::api::vm::Net::Nat,
        ports: Vec::new(),
        auto_ports: None,
        pending: None,
        rm: false,
        restart: crate::api::vm::Restart::No,
        created_at: NOW_S - 3700,
        started_at: None,
        op: None,
        pid: None,
        ip: None,
        ip6: None,
        ssh_addr: None,
        driver: None,
        disk_driver: None,
        synced: None,
        unresponsive: false,
        paused: false,
        balloon_mib: None,
        workspace: None,
        host_name: None,
        commands: Default::default(),
        dns: Vec::new(),
        labels: crate::ids::Labels::default(),
    }
}

/// Starts a daemon with the VMs `web` and `db`. Every call on them succeeds and changes nothing.
/// Other names are not found.
pub(super) fn two_vms() -> Fake {
    Fake::start(|r: Request| {
        if r.method == "vm.list" {
            return r
                .result(json!({"vms": [vm("web", VmState::Running), vm("db", VmState::Stopped)]}));
        }
        let name = r.params["vm"].as_str().unwrap_or_default().to_owned();
        if name != "web" && name != "db" {
            return r
                .fault(Error::new(Kind::VmNotFound, format!("no VM {name}")).hint("fcctl ps -a"));
        }
        r.result(
            json!({"vm": vm(&name, VmState::Stopped), "deleted": vm(&name, VmState::Stopped).id}),
        );
    })
}

#[test]
fn for_each_continues_after_failure() {
    check(
        &two_vms(),
        &["stop", "web", "nope", "db"],
        expect![[r#"
        > vm.stop {"force":false,"vm":"web"}
        > vm.stop {"force":false,"vm":"nope"}
        > vm.stop {"force":false,"vm":"db"}
        web: stopped
        db: stopped
        ! fcctl: no VM nope
        ! hint: fcctl ps -a
        status 3
    "#]],
    );
}

#[test]
fn json_prints_one_document_and_json_errors() {
    let fake = two_vms();
    let ran = fcctl(&fake, &["--json", "stop", "web", "nope", "db"]);
    let document: serde_json::Value = serde_json::from_slice(&ran.out).unwrap();
    assert_eq!(document.as_array().unwrap().len(), 2);
    assert_eq!((ran.status, document[1]["name"].as_str()), (3, Some("db")));
    let error: serde_json::Value = serde_json::from_str(&ran.err).unwrap();
    expect![[r#"{"error":{"code":"not_found","exit_status":3,"hint":"fcctl ps -a","kind":"vm_not_found","message":"no VM nope","retryable":false}}"#]]
        .assert_eq(&error.to_string());
    // With one target, `--json` prints an object.
    let ran = fcctl(&fake, &["vm", "show", "web", "--json"]);
    assert_eq!(
        serde_json::from_slice::<Vm>(&ran.out)
            .unwrap()
            .name
            .as_str(),
        "web"
    );
    let ran = fcctl(&fake, &["--json", "rm", "-f", "nope"]);
    assert_eq!((ran.status, ran.out.as_slice()), (3, &b""[..]));
}

#[test]
fn usage_error_in_exec_and_run_exits_125() {
    let fake = two_vms();
    for (args, status) in [
        (&["stop"][..], 2),
        (&["frobnicate"][..], 2),
        (&["exec"][..], 125),
        (&["run", "--memory", "5x", "--", "true"][..], 125),
        (&["run", "--rm"][..], 125),
        (&["exec", "web"][..], 125),
        (&["vm", "set", "web"][..], 2),
        (&["vm", "set", "web", "--memory", "1000K"][..], 2),
        (&["vm", "create", "--name", "Bad_Name"][..], 2),
    ] {
        let ran = fcctl(&fake, args);
        assert_eq!(
            (ran.status, ran.out.len()),
            (status, 0),
            "{args:?} {}",
            ran.err
        );
        assert!(ran.err.starts_with("fcctl: "), "{}", ran.err);
    }
    assert_eq!(fake.methods(), "");
    let ran = fcctl(&fake, &["--json", "stop"]);
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&ran.err).unwrap()["error"]["exit_status"],
        2
    );
    for args in [
        &["--help"][..],
        &["run", "--help"][..],
        &["--version"][..],
        &["completions", "bash"][..],
    ] {
        let ran = fcctl(&fake, args);
        assert_eq!((ran.status, ran.err.as_str()), (0, ""), "{args:?}");
        assert!(String::from_utf8(ran.out).unwrap().contains("fcctl"));
    }
}

#[test]
fn absent_daemon_suggests_starting_it() {
    let fake = two_vms();
    for (args, status) in [
        (&["ps"][..], 5),
        (&["stop", "web"][..], 5),
        (&["exec", "web", "--", "true"][..], 125),
    ] {
        let mut words = args.to_vec();
        words.insert(0, "/nonexistent/fcd.sock");
        words.insert(0, "--socket");
        let ran = fcctl_other_socket(&words);
        assert_eq!(ran.status, status, "{args:?}");
        assert!(
            ran.err.contains("no daemon at /nonexistent/fcd.sock") && ran.err.contains("\nhint: "),
            "{}",
            ran.err
        );
    }
    drop(fake);
}

/// Runs fcctl like [`fcctl`], but `words` includes `--socket`.
fn fcctl_other_socket(words: &[&str]) -> Ran {
    let mut err = tempfile::tempfile().unwrap();
    let stdio = Stdio {
        stdin: file_with(b""),
        stdout: tempfile::tempfile().unwrap(),
        stderr: err.try_clone().unwrap(),
    };
    let mut ctx = Context::new(
        stdio,
        SignalSource::Channel(crossbeam_channel::never()),
        Box::new(|_| None),
        NOW_S,
    )
    .unwrap();
    let words: Vec<OsString> = ["fcctl"].iter().chain(words).map(Into::into).collect();
    let status = super::command(&mut ctx, &words);
    err.rewind().unwrap();
    Ran {
        status,
        out: vec![],
        err: std::io::read_to_string(err).unwrap(),
    }
}

#[test]
fn error_code_decides_exit_status() {
    for kind in Kind::ALL {
        let fake = Fake::start(move |r| r.fault(Error::new(*kind, "no")));
        assert_eq!(
            fcctl(&fake, &["vm", "show", "x"]).status,
            kind.code().exit_status(),
            "{}",
            kind.name()
        );
        assert_eq!(
            fcctl(&fake, &["exec", "x", "--", "true"]).status,
            125,
            "{}",
            kind.name()
        );
    }
}

#[test]
fn stdout_reader_exits_without_error() {
    let fake = two_vms();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let start = Start {
        stdout: File::from(std::os::fd::OwnedFd::from(writer)),
        ..Start::default()
    };
    // The calls are made although nobody reads the output.
    let ran = fcctl_from(&fake, start, &["stop", "web", "db"]);
    assert_eq!(
        (ran.status, ran.err.as_str(), fake.methods().as_str()),
        (0, "", "vm.stop vm.stop")
    );
}

#[test]
fn stdout_full_disk_fails() {
    let start = Start {
        stdout: File::options().write(true).open("/dev/full").unwrap(),
        ..Start::default()
    };
    let ran = fcctl_from(&two_vms(), start, &["ps"]);
    assert_eq!(ran.status, 1);
    assert!(
        ran.err.starts_with("fcctl: write to stdout: "),
        "{}",
        ran.err
    );
}

#[test]
fn rpc_passes_params_and_result() {
    let fake = Fake::start(|r| {
        let echo = json!({"got": r.params, "more": r.more});
        r.result(echo);
    });
    check(
        &fake,
        &["rpc", "any.thing", r#"{"a":[1,2]}"#],
        expect![[r#"
        > any.thing {"a":[1,2]}
        {"got":{"a":[1,2]},"more":false}
        status 0
    "#]],
    );
    check(
        &fake,
        &["rpc", "any.thing", "--more"],
        expect![[r#"
        > any.thing {}
        {"got":{},"more":true}
        status 0
    "#]],
    );
    check(
        &fake,
        &["rpc", "any.thing", "{"],
        expect![[r#"
        ! fcctl: the parameters are not JSON: EOF while parsing an object at line 1 column 1
        ! hint: quote them: '{"vm":"web"}'
        status 2
    "#]],
    );
}

#[test]
fn op_verbs_call_the_daemon() {
    let op = |state: &str| {
        json!({"op": {"id": "0123456789ab", "method": "vm.start", "vm": null, "owner_uid": 0, "state": state, "may_cancel": true,
            "progress": {"stage": "boot", "done": 1, "total": 4}, "started_at": NOW_S - 5, "ended_at": null,
            "error": {"code": "timeout", "kind": "boot_timeout", "message": "late", "retryable": true}}})
    };
    let fake = Fake::start(move |r| match r.method.as_str() {
        "op.list" => r.result(json!({"ops": [op("running")["op"]]})),
        "op.wait" => r.result(op("failed")),
        _ => r.result(op("cancelling")),
    });
    check(
        &fake,
        &["op", "list"],
        expect![[r#"
        > op.list {"all":false}
        ID            METHOD    VM  STATE    STARTED  PROGRESS
        0123456789ab  vm.start      running  5s ago   boot: 1 of 4 (25%)
        status 0
    "#]],
    );
    check(
        &fake,
        &["op", "wait", "01", "--timeout", "2s"],
        expect![[r#"
        > op.wait {"op":"01","timeout_ms":2000}
        ! fcctl: vm.start 0123456789ab: late
        status 124
    "#]],
    );
    check(
        &fake,
        &["op", "cancel", "01"],
        expect![[r#"
        > op.cancel {"op":"01"}
        0123456789ab: cancelling
        status 0
    "#]],
    );
}

#[test]
fn doctor_includes_daemons_checks() {
    let fake = Fake::start(|r| {
        r.result(json!({"checks": [
            {"id": "kvm", "severity": "warn", "found": "no /dev/kvm: software emulation", "fix": "modprobe kvm_intel"},
            {"id": "qemu", "severity": "fail", "found": "not installed", "fix": "apt install qemu-system-x86"}]}));
    });
    let ran = fcctl(&fake, &["doctor"]);
    assert_eq!((ran.status, ran.err.as_str()), (1, ""));
    let text = String::from_utf8(ran.out).unwrap();
    for line in [
        "PASS  daemon",
        "WARN  kvm ",
        "FAIL  qemu ",
        "fix: apt install qemu-system-x86",
        "not ready: 1 of ",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    let ran = fcctl(&fake, &["doctor", "--json"]);
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&ran.out).unwrap()["checks"][1]["id"],
        "kvm"
    );
}

#[test]
fn doctor_fails_at_warnings_only_if_it_is_strict() {
    let fake = Fake::start(|r| {
        r.result(json!({"checks": [{"id": "kvm", "severity": "warn", "found": "none"}]}));
    });
    for (args, status) in [(&["doctor"][..], 0), (&["doctor", "--strict"], 1)] {
        let ran = fcctl(&fake, args);
        assert_eq!(ran.status, status, "{}", String::from_utf8_lossy(&ran.out));
    }
}

#[test]
fn vm_that_is_named_twice_is_meant_once() {
    let fake = two_vms();
    fcctl(&fake, &["start", "web", "web"]);
    assert_eq!(fake.methods(), "vm.start");
}

#[test]
fn leaks_are_removed_only_when_asked() {
    let fake = Fake::start(|r| {
        let fix = r.params["fix"].as_bool().unwrap();
        let leak = |name: &str, removed: bool| json!({"kind": "process", "name": name, "why": "it is not in the ledger", "removed": removed});
        r.result(json!({"leaks": [leak("fc-1-2-3", fix), leak("fc-1-2-4", false)]}));
    });
    check(
        &fake,
        &["doctor", "--leaks"],
        expect![[r#"
        > fcd.leaks {"fix":false}
        KIND     NAME      WHY
        process  fc-1-2-3  it is not in the ledger
        process  fc-1-2-4  it is not in the ledger
        status 1
    "#]],
    );
    let unasked = fcctl(&fake, &["doctor", "--leaks", "--fix"]);
    assert!(
        unasked.status == 2 && unasked.err.contains("--yes"),
        "{} {}",
        unasked.status,
        unasked.err
    );
    let fixed = fcctl(&fake, &["doctor", "--leaks", "--fix", "--yes"]);
    let said = String::from_utf8(fixed.out).unwrap();
    assert!(
        fixed.status == 1
            && said.contains("1 leftover removed")
            && said.contains("fc-1-2-4 is still there"),
        "{said}"
    );
}

#[test]
fn version_difference_is_reported_once() {
    let fake = Fake::with_version(
        crate::api::VERSION_MAJOR,
        crate::api::VERSION_MINOR + 1,
        |r| {
            r.result(json!({"vms": []}));
        },
    );
    let ran = fcctl(&fake, &["ps"]);
    assert_eq!(
        (ran.status, ran.err.matches("warning: ").count()),
        (0, 1),
        "{}",
        ran.err
    );
    let fake = Fake::with_version(crate::api::VERSION_MAJOR + 1, 0, |_| unreachable!());
    assert_eq!(fcctl(&fake, &["ps"]).status, 5);
    assert_eq!(fcctl(&fake, &["exec", "x", "--", "true"]).status, 125);
}

/// Splits a line of the README into commands, and each command into words. Two spaces begin the
/// explanation, and quotes group words.
fn commands(line: &str) -> Vec<Vec<String>> {
    let (mut all, mut words, mut word, mut is_quoted) =
        (Vec::new(), Vec::new(), String::new(), false);
    let line = line.trim_start().trim_start_matches("$ ");
    let shown = line.split("  ").next().unwrap_or_default();
    for c in shown.chars().chain([' ', ';']) {
        match c {
            '\'' => is_quoted = !is_quoted,
            ' ' | ';' | '|' if !is_quoted => {
                words.extend(Some(std::mem::take(&mut word)).filter(|w| !w.is_empty()));
                if c != ' ' {
                    all.push(std::mem::take(&mut words));
                }
            }
            c => word.push(c),
        }
    }
    all
}

#[test]
fn commands_in_readme_and_help_pages_parse() {
    let mut syntax = super::syntax();
    syntax.build();
    use clap::Parser;
    use std::ffi::OsString;
    let pages = super::help::TOPICS
        .iter()
        .map(|(name, _, page)| (*name, *page));
    let (mut count, mut wrong) = (0, Vec::new());
    for (place, text) in [("README.md", include_str!("../../README.md"))]
        .into_iter()
        .chain(pages)
    {
        let lines = text
            .lines()
            .filter(|l| l.starts_with("    ") && !l.contains(": "));
        for words in lines
            .flat_map(commands)
            .filter(|words| words.first().is_some_and(|w| w == "fcctl"))
        {
            let arguments: Vec<_> = words.iter().map(OsString::from).collect();
            let arguments = super::short_forms::expand(&syntax, &arguments);
            let arguments = super::words::with_separator(&syntax, &arguments);
            if let Err(e) = super::Cli::try_parse_from(&arguments) {
                wrong.push(format!("{place}: {}: {e}", words.join(" ")));
            }
            count += 1;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count > 40, "only {count} commands found");
}
