//! Tests of commands in a guest: streams, exit statuses and signals.

use crate::host::{FCCTL, Host, text, wait_for};
use crate::terminal::{a_command_in_a_terminal_without_stdin, a_terminal, the_systems_ssh};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::Command;

const BLOB_BYTES: usize = 20 << 20;

/// These tests can share one VM because none of them affects the others.
#[test]
fn commands_in_a_guest() {
    let host = Host::start();
    let out = host.feed(
        &[
            "run",
            "--name",
            "box",
            "-i",
            "--",
            "sh",
            "-c",
            "cat; echo reported >&2; exit 4",
        ],
        b"piped\0in",
    );
    let (stdout, stderr) = text(&out);
    assert_eq!(
        (out.status.code(), stdout.as_str()),
        (Some(4), "piped\0in"),
        "{stderr}"
    );
    assert!(
        stderr.contains("reported\n") && stderr.contains("keeps running"),
        "{stderr}"
    );
    streams_are_apart_and_binary_safe(&host);
    stdin_is_read_only_when_asked(&host);
    statuses(&host);
    options(&host);
    reader_exit_ends_command(&host);
    a_tree_through_pipes(&host);
    a_terminal(&host);
    a_command_in_a_terminal_without_stdin(&host);
    the_systems_ssh(&host);
    many_at_once_and_long_ones(&host);
    bytes_that_are_not_utf8(&host);
    background_children_hold_output(&host);
    command_ends_with_client_and_vm(&host);
}

fn many_at_once_and_long_ones(host: &Host) {
    let mut all: Vec<_> = (0..12)
        .map(|n| host.spawn(&["exec", "box", "--", "echo", &format!("number {n}")]))
        .collect();
    for (n, one) in all.iter_mut().enumerate() {
        assert_eq!(
            (one.end().0, one.stdout()),
            (Some(0), format!("number {n}\n")),
            "{}",
            one.stderr()
        );
    }
    let long = "x".repeat(16 << 10);
    assert_eq!(host.ok(&["exec", "box", "--", "printf", "%s", &long]), long);
    long_commands(host);
}

/// Linux accepts arguments of up to 128 KiB each and 2 MiB in total.
fn long_commands(host: &Host) {
    let string = "x".repeat((128 << 10) - 32);
    let script = "printf %s \"$@$BIG\" | wc -c";
    let mut args = vec!["exec", "box", "-e"];
    let big = format!("BIG={}", "y".repeat(100 << 10));
    args.extend([big.as_str(), "--", "sh", "-c", script, "x"]);
    args.extend(std::iter::repeat_n(string.as_str(), 13));
    let wanted = format!("{}\n", 13 * string.len() + (100 << 10));
    assert_eq!(host.ok(&args), wanted);
    args.insert(2, "-t");
    assert_eq!(
        host.ok(&args),
        wanted.replace('\n', "\r\n"),
        "long arguments also work with a terminal, whose input is limited"
    );
    let small = "x".repeat(100 << 10);
    assert_eq!(
        host.ok(&["exec", "box", "--", "printf", "%s", &small]),
        small
    );
    assert_eq!(
        text(&host.feed(
            &[
                "exec",
                "-i",
                "box",
                "--",
                "sh",
                "-c",
                "cat; echo ${#1}",
                "x",
                &small
            ],
            b"in "
        ))
        .0,
        "in 102400\n"
    );
    assert_eq!(
        host.sh("box", "ls -A /tmp | grep -c fcd-exec || true"),
        "0\n",
        "nothing is left in the guest"
    );
    // The guest's shell reports arguments that are too long for Linux.
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("A={}\n", "x".repeat(200 << 10))).unwrap();
    let (status, said) = host.fails(&[
        "exec",
        "box",
        "--env-file",
        file.path().to_str().unwrap(),
        "--",
        "true",
    ]);
    assert!(
        status == 126 && said.contains("rgument list too long"),
        "{status} {said}"
    );
}

/// On Linux, file names and arguments may contain any bytes except NUL.
fn bytes_that_are_not_utf8(host: &Host) {
    let raw: Vec<u8> = (1..=255).collect();
    let word = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    let dir = word(b"/tmp/\xff'\xfe");
    let run = |how: &[OsString], argv: &[&[u8]]| {
        let argv: Vec<OsString> = argv.iter().map(|bytes| word(bytes)).collect();
        let mut command = host.command(&["exec", "box"]);
        command
            .args(how)
            .arg("--")
            .args(argv)
            .env("OWN", word(b"\xfd"))
            .output()
            .unwrap()
    };
    assert!(run(&[], &[b"mkdir", dir.as_bytes()]).status.success());
    let variable = word(&[b"A=".as_slice(), &raw].concat());
    let how = [
        "-w".into(),
        dir.clone(),
        "-e".into(),
        variable,
        "-e".into(),
        "OWN".into(),
    ];
    let out = run(
        &how,
        &[b"sh", b"-c", b"pwd; printf %s \"$1$A$OWN\"", b"x", &raw],
    );
    assert_eq!(
        out.stdout,
        [dir.as_bytes(), b"\n", &raw, &raw, b"\xfd"].concat(),
        "{:?}",
        text(&out)
    );
    assert!(run(&[], &[b"rmdir", dir.as_bytes()]).status.success());
    let out = run(&["-w".into(), dir], &[b"true"]);
    assert!(
        out.status.code() == Some(125) && text(&out).1.contains("cannot enter"),
        "{:?}",
        text(&out)
    );
}

/// A background program keeps the output open, as with ssh. To not wait for it, a caller uses
/// `--no-wait-children` or signals fcctl.
fn background_children_hold_output(host: &Host) {
    let script = "sleep 4322 & echo last words $$; exit 3";
    let out = host.fcctl(&[
        "exec",
        "--no-wait-children",
        "box",
        "--",
        "sh",
        "-c",
        script,
    ]);
    assert!(
        out.status.code() == Some(3) && text(&out).0.starts_with("last words"),
        "{:?}",
        text(&out)
    );
    // All output of the command itself must arrive, even a large amount.
    let much = format!("sleep 4322 & head -c {BLOB_BYTES} /dev/zero");
    let out = host.fcctl(&["exec", "--no-wait-children", "box", "--", "sh", "-c", &much]);
    assert_eq!((out.status.code(), out.stdout.len()), (Some(0), BLOB_BYTES));
    for signal in ["TERM", "INT"] {
        let mut one = host.spawn(&["exec", "box", "--", "sh", "-c", script]);
        one.says("last words");
        let pid = wait_for("the pid of the command", || {
            one.stdout()
                .trim()
                .rsplit(' ')
                .next()
                .and_then(|pid| pid.parse::<u32>().ok())
        });
        wait_for("the command's end", || {
            (host.sh("box", &format!("test -e /proc/{pid} || echo gone")) == "gone\n").then_some(())
        });
        one.signal(signal);
        assert_eq!(
            one.end().0,
            Some(3),
            "one {signal} ends it: {}",
            one.stderr()
        );
    }
    host.sh("box", "pkill -x sleep || kill $(pidof sleep)");
}

/// However the client or the VM ends, nothing keeps running in the guest, and waiting callers learn
/// the reason.
fn command_ends_with_client_and_vm(host: &Host) {
    let script = "echo ready; exec sleep 4321";
    let sleeping = || {
        let mut one = host.spawn(&["exec", "box", "--", "sh", "-c", script]);
        one.says("ready");
        one
    };
    let mut killed = sleeping();
    killed.signal("KILL");
    killed.end();
    wait_for("the command's end in the guest", || {
        (host.sh("box", "pidof sleep | wc -w") == "0\n").then_some(())
    });
    let mut stopped = sleeping();
    let mut stop = host.spawn(&["stop", "box"]);
    let (status, took) = stopped.end();
    assert!(
        status == Some(125) && took.as_secs() < 2,
        "{status:?} {took:?}"
    );
    assert!(
        stopped.stderr().contains("the VM was stopped"),
        "{}",
        stopped.stderr()
    );
    assert_eq!(stop.end().0, Some(0));
    // If a guest shuts itself down, its VM becomes `stopped` and not `failed`.
    host.ok(&["start", "box"]);
    let mut left = sleeping();
    host.fcctl(&["exec", "box", "--", "kill", "-TERM", "1"]);
    host.ok(&["vm", "wait", "--timeout", "20s", "box"]);
    assert_eq!(
        (host.show("box", "state"), host.show("box", "reason")),
        ("stopped".into(), "the guest shut itself down".into())
    );
    assert_eq!(left.end().0, Some(125), "{}", left.stderr());
}

fn streams_are_apart_and_binary_safe(host: &Host) {
    let out = host.fcctl(&[
        "exec",
        "box",
        "--",
        "sh",
        "-c",
        "printf 'a\\000\\377'; printf 'b\\r\\n' >&2",
    ]);
    assert_eq!(
        (out.status.code(), &out.stdout[..], &out.stderr[..]),
        (Some(0), &b"a\0\xff"[..], &b"b\r\n"[..])
    );
    let mut blob = vec![0; BLOB_BYTES];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut blob)
        .unwrap();
    let sum: String = Sha256::digest(&blob)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let out = host.feed(
        &[
            "exec",
            "box",
            "-i",
            "--",
            "sh",
            "-c",
            "tee /root/blob | sha256sum",
        ],
        &blob,
    );
    assert!(text(&out).0.starts_with(&sum), "{:?}", text(&out));
    let out = host.fcctl(&["exec", "box", "--", "cat", "/root/blob"]);
    assert!(
        out.status.success() && out.stdout == blob,
        "{} bytes came back",
        out.stdout.len()
    );
    // This command does not read its input.
    assert_eq!(
        host.feed(&["exec", "box", "-i", "--", "true"], &blob[..1 << 20])
            .status
            .code(),
        Some(0)
    );
}

fn stdin_is_read_only_when_asked(host: &Host) {
    let mut input = tempfile::tempfile().unwrap();
    input.write_all(b"mine").unwrap();
    input.rewind().unwrap();
    let out = host
        .command(&["exec", "box", "--", "wc", "-c"])
        .stdin(input.try_clone().unwrap())
        .output()
        .unwrap();
    assert_eq!(text(&out).0, "0\n");
    assert_eq!(input.stream_position().unwrap(), 0);
    let (status, said) = host.fails(&["exec", "box"]);
    assert!(status == 125 && said.contains("hint: "), "{said}");
}

fn statuses(host: &Host) {
    // Some of these signals have no name in sshd.
    for (signal, status) in [
        ("BUS", 135),
        ("SYS", 159),
        ("TRAP", 133),
        ("XCPU", 152),
        ("STKFLT", 144),
        ("35", 163),
        ("64", 192),
        ("SEGV", 139),
    ] {
        let out = host.fcctl(&[
            "exec",
            "box",
            "--",
            "bash",
            "-c",
            &format!("kill -{signal} $$"),
        ]);
        assert_eq!(
            (out.status.code(), text(&out).1.as_str()),
            (Some(status), ""),
            "{signal}"
        );
    }
    let cases: [(&[&str], i32); 9] = [
        (&["true"], 0),
        (&["false"], 1),
        (&["sh", "-c", "exit 7"], 7),
        (&["/etc/passwd"], 126),
        (&["no-such-command"], 127),
        (&["sh", "-c", "kill -9 $$"], 137),
        (&["sh", "-c", "kill -TERM $$"], 143),
        (&["sh", "-c", "exit 255"], 255),
        // Arguments arrive unchanged.
        (&["test", "a  b'\"$HOME\\*\n", "=", "a  b'\"$HOME\\*\n"], 0),
    ];
    for (argv, status) in cases {
        let out = host.fcctl(&[&["exec", "box", "--"], argv].concat());
        assert_eq!(
            out.status.code(),
            Some(status),
            "{argv:?}: {:?}",
            text(&out)
        );
    }
    host.ok(&["vm", "create", "--name", "idle"]);
    for (vm, hint) in [("nope", "fcctl ps"), ("idle", "fcctl start")] {
        let (status, said) = host.fails(&["exec", vm, "--", "true"]);
        assert!(
            status == 125 && said.contains("hint: ") && said.contains(hint),
            "{status} {said}"
        );
    }
    host.ok(&["rm", "idle"]);
    assert_eq!(host.fails(&["exec", "box", "--no-such-flag"]).0, 125);
}

fn options(host: &Host) {
    assert_eq!(
        host.ok(&["exec", "box", "-w", "/usr/share", "--", "pwd"]),
        "/usr/share\n"
    );
    let (status, said) = host.fails(&["exec", "box", "-w", "/not/there", "--", "pwd"]);
    assert!(
        status != 0 && said.contains("/not/there"),
        "{status} {said}"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        "# a comment\nA=from the file\nB=b ' \" $HOME\n",
    )
    .unwrap();
    let file = file.path().to_str().unwrap();
    let script = "printf '%s|' \"$A\" \"$B\" \"$OURS\"";
    let args = [
        "exec",
        "box",
        "--env-file",
        file,
        "-e",
        "A=x=y",
        "-e",
        "OURS",
        "--",
        "sh",
        "-c",
        script,
    ];
    let out = host
        .command(&args)
        .env("OURS", "caller's")
        .output()
        .unwrap();
    assert_eq!(text(&out).0, "x=y|b ' \" $HOME|caller's|");
    assert_eq!(
        host.fails(&["exec", "box", "-e", "1=2", "--", "true"]).0,
        125
    );
}

/// `yes | head -1` ends without an error message.
fn reader_exit_ends_command(host: &Host) {
    let line = format!(
        "'{FCCTL}' --socket '{}' exec box -- yes | head -n 1",
        host.socket().display()
    );
    let out = Command::new("sh").args(["-c", &line]).output().unwrap();
    assert_eq!(text(&out), ("y\n".to_owned(), String::new()));
    wait_for("the guest's end of it", || {
        host.fcctl(&["exec", "box", "--", "pidof", "yes"])
            .stdout
            .is_empty()
            .then_some(())
    });
}

fn a_tree_through_pipes(host: &Host) {
    let fcctl = format!("'{FCCTL}' --socket '{}'", host.socket().display());
    let script = format!(
        "set -e; mkdir in out; echo one > in/a; ln -s a in/link; tar -C in -c . | {fcctl} exec box -i -w /tmp -- tar -x; \
         {fcctl} exec box -w /tmp -- tar -c ./a ./link | tar -C out -x; diff -r in out; readlink out/link"
    );
    let dir = tempfile::tempdir().unwrap();
    let out = Command::new("sh")
        .args(["-c", &script])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(
        (out.status.code(), text(&out).0.as_str()),
        (Some(0), "a\n"),
        "{:?}",
        text(&out)
    );
}
