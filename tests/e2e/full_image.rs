//! Tests of the image that `fcctl image build` makes. All other tests use a minimal one.

use crate::host::{Host, full_image};
use std::process::Command;
use std::time::{Duration, Instant};

/// Creates a small C project in a repository.
fn c_project(dir: &std::path::Path) {
    let script = r#"git init -q -b main && git config user.name T && git config user.email t@example.invalid
        printf '#include <stdio.h>\nint main(void) { puts("built"); }\n' >hello.c
        printf 'all: hello\n\t./hello\n' >Makefile
        git add -A && git commit -qm 'First commit'"#;
    let status = Command::new("sh")
        .args(["-ec", script])
        .current_dir(dir)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn full_image_builds_c_and_has_tools() {
    let host = Host::start();
    host.add_image(&full_image());
    let repo = tempfile::tempdir().unwrap();
    c_project(repo.path());
    let path = repo.path().to_str().unwrap();
    let built = host.ok(&[
        "run", "--image", "full", "--name", "box", path, "--", "make",
    ]);
    assert!(built.ends_with("built\n"), "{built}");
    for script in [
        "python3 -m venv /tmp/venv && /tmp/venv/bin/pip --version",
        "cd / && for p in gcc make python3 pip3 git curl wget less vi nano ps ping sudo file unzip jq; do \
         command -v $p >/dev/null || exit 1; done",
        "[ \"$(locale charmap)\" = UTF-8 ]",
        "ping -c 1 127.0.0.1",
        "test -s /etc/ssl/certs/ca-certificates.crt",
    ] {
        host.sh("box", script);
    }
    dev_uses_exec_and_ssh(&host);
}

/// `dev` is an ordinary user who may become root.
fn dev_uses_exec_and_ssh(host: &Host) {
    let who = "id -un; id -gn; echo $HOME $USER $SHELL; pwd; touch mine; sudo id -un";
    let wanted = "dev\ndev\n/home/dev dev /bin/bash\n/home/dev\nroot\n";
    let exec = host.ok(&[
        "exec",
        "--user",
        "dev",
        "-w",
        "/home/dev",
        "box",
        "--",
        "sh",
        "-c",
        who,
    ]);
    assert_eq!(exec, wanted);
    assert_eq!(host.ok(&["ssh", "--user", "dev", "box", "--", who]), wanted);
    assert_eq!(
        host.ok(&["exec", "-u", "dev:adm", "box", "--", "id", "-gn"]),
        "adm\n"
    );
    assert_eq!(
        host.ok(&[
            "exec",
            "-u",
            "4242",
            "-w",
            "",
            "box",
            "--",
            "sh",
            "-c",
            "id -u; id -G; pwd"
        ]),
        "4242\n0\n/\n"
    );
    let (status, said) = host.fails(&["exec", "-u", "nobody-knows", "box", "--", "true"]);
    assert_eq!(
        (status, said.as_str()),
        (125, "fcd: the guest has no user nobody-knows\n")
    );
    // Root's home is closed to dev, who gets the terminal of the session all the same.
    let out = host.ok(&[
        "exec",
        "-t",
        "-u",
        "dev",
        "box",
        "--",
        "sh",
        "-c",
        "echo mine >$(tty)",
    ]);
    assert_eq!(out, "mine\r\n");
}

/// Compares the time to the first command of the full image with that of a minimal one.
#[test]
#[ignore = "a measurement: scripts/bench first"]
fn bench_first_command() {
    let host = Host::start();
    host.add_image(&full_image());
    let rounds = std::env::var("FCD_BENCH_ROUNDS").map_or(9, |n| n.parse().unwrap());
    let mut minimal: Vec<Duration> = Vec::new();
    let mut full: Vec<Duration> = Vec::new();
    for _ in 0..rounds {
        for (image, times) in [("default", &mut minimal), ("full", &mut full)] {
            let begun = Instant::now();
            host.ok(&["run", "--rm", "--image", image, "--", "true"]);
            times.push(begun.elapsed());
        }
    }
    for (image, times) in [("minimal", &mut minimal), ("full", &mut full)] {
        times.sort();
        println!(
            "{image}: p50 {:?}, least {:?}, most {:?}",
            times[times.len() / 2],
            times[0],
            times[times.len() - 1]
        );
    }
}
