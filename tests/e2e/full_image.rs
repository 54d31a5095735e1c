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
        // The bundle contains the host's certificates, if the host had any when the image was
        // built.
        "cd /usr/local/share/ca-certificates && for f in *.crt; do [ ! -e \"$f\" ] || \
         grep -qxF \"$(sed -n '/BEGIN/{n;n;p;q}' \"$f\")\" /etc/ssl/certs/ca-certificates.crt || exit 1; done",
    ] {
        host.sh("box", script);
    }
    dev_uses_exec_and_ssh(&host);
    let who = "make >/dev/null; ls -l hello | cut -d ' ' -f 3; pwd";
    let as_dev = [
        "run", "--rm", "--image", "full", "--user", "dev", path, "--", "sh", "-c", who,
    ];
    let out = host.ok(&as_dev);
    assert!(out.starts_with("dev\n/workspace/"), "{out}");
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
    // dev cannot enter root's home, but a session as dev still has a terminal.
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

/// Makes an image with a script, and another from a stopped VM. Neither contains what VMs must not
/// share, such as SSH host keys and the machine ID.
#[test]
fn script_and_stopped_vm_become_images() {
    let host = Host::start();
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("setup");
    let text = "#!/bin/sh\nset -e\necho setting up\necho built >/etc/made-by\nhead -c 3000000 /dev/urandom >/opt/blob\n\
                sha256sum /opt/blob >/opt/sum\ntouch /etc/ssh/ssh_host_rsa_key /var/log/noise\n";
    std::fs::write(&script, text).unwrap();
    let script = script.to_str().unwrap();
    let out = host.fcctl(&["image", "build", "--script", script, "mine"]);
    let (stdout, stderr) = crate::host::text(&out);
    assert!(
        out.status.success() && stderr.contains("setting up\n"),
        "{stderr}"
    );
    assert!(stdout.starts_with("mine: "), "{stdout}");
    let again = host.ok(&["image", "build", "--script", script, "mine"]);
    assert!(again.starts_with("mine: "), "{again}");
    assert_eq!(host.json(&["ps", "-a"]), serde_json::json!([]));

    host.ok(&["vm", "create", "--name", "box", "--image", "mine"]);
    host.ok(&["start", "box"]);
    let check = "cat /etc/made-by; sha256sum --quiet -c /opt/sum; ls /etc/ssh/ssh_host_* /var/log/noise 2>/dev/null; true";
    assert_eq!(host.sh("box", check), "built\n");
    let id = host.sh(
        "box",
        "cat /etc/machine-id; touch /etc/ssh/ssh_host_rsa_key /root/kept",
    );
    let (status, said) = host.fails(&["image", "commit", "box", "copy"]);
    assert!(status == 1 && said.contains("fcctl stop box"), "{said}");
    host.ok(&["stop", "box"]);
    host.ok(&["image", "commit", "box", "copy"]);
    assert_eq!(host.json(&["image", "list"]).as_array().unwrap().len(), 3);
    let check = format!("{check}; ls /root/kept; cat /etc/machine-id");
    let twin = host.ok(&["run", "--rm", "--image", "copy", "sh", "-c", &check]);
    assert!(twin.starts_with("built\n/root/kept\n"), "{twin}");
    assert!(!twin.ends_with(&id), "{twin}");

    std::fs::write(script, "#!/bin/sh\nexit 3\n").unwrap();
    let (status, said) = host.fails(&["image", "build", "--script", script, "broken"]);
    assert!(
        status == 1 && said.contains("ended with status 3"),
        "{said}"
    );
    host.ok(&["rm", "box"]);
    assert_eq!(host.census(), Vec::<String>::new());
}

/// Compares the times to the first command with the full image and with a minimal one.
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
