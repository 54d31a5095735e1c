//! Tests of file transfers with the VM's key, and of network files such as /etc/resolv.conf, in
//! images that contain only their own files.

use crate::host::{Host, text, wait_for};
use crate::runtime::{busybox, register};
use crate::terminal::{Person, SshAgent};
use serde_json::json;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

/// Writes the VM's key to `dir` and returns the options with which ssh, scp and sftp log in.
fn login(host: &Host, vm: &str, dir: &Path) -> Vec<String> {
    let config = host.rpc("vm.ssh_config", json!({ "vm": vm }))["result"].clone();
    let part = |name: &str| config[name].as_str().unwrap().to_owned();
    let (key, known) = (dir.join("key"), dir.join("known_hosts"));
    fs::write(&key, format!("{}\n", part("private_key").trim_end())).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&known, format!("{vm} {}\n", part("host_key"))).unwrap();
    let address: std::net::SocketAddr = part("addr").parse().unwrap();
    let options = [
        format!("HostName={}", address.ip()),
        format!("Port={}", address.port()),
        format!("User={}", part("user")),
        format!("HostKeyAlias={vm}"),
        format!("IdentityFile={}", key.display()),
        format!("UserKnownHostsFile={}", known.display()),
        "StrictHostKeyChecking=yes".to_owned(),
        "BatchMode=yes".to_owned(),
    ];
    let mut args = vec!["-F".to_owned(), "/dev/null".to_owned()];
    for option in options {
        args.extend(["-o".to_owned(), option]);
    }
    args
}

#[track_caller]
fn run(program: &str, options: &[String], args: &[&str]) -> String {
    let out = Command::new(program)
        .args(options)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (stdout, stderr) = text(&out);
    assert!(out.status.success(), "{program} {args:?}: {stdout}{stderr}");
    stdout
}

/// Copies files in both directions with scp and sftp. `user` is the uid that must own the copies.
fn check_transfers(host: &Host, vm: &str, options: &[String], user: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let content: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(path("sent"), &content).unwrap();
    let at = format!("/dev/shm/{user}");

    run("scp", options, &[&path("sent"), &format!("{vm}:{at}-scp")]);
    run(
        "scp",
        options,
        &[&format!("{vm}:{at}-scp"), &path("by-scp")],
    );
    assert!(fs::read(path("by-scp")).unwrap() == content);

    let batch = format!(
        "put {} {at}-draft\nrename {at}-draft {at}-sftp\nget {at}-sftp {}\nls -ln {at}-sftp\n",
        path("sent"),
        path("by-sftp")
    );
    fs::write(path("batch"), batch).unwrap();
    let said = run("sftp", options, &["-q", "-b", &path("batch"), vm]);
    assert!(said.contains("-rw-r--r--"), "{said}");
    assert!(fs::read(path("by-sftp")).unwrap() == content);
    for name in ["scp", "sftp"] {
        let script = format!("/.fcd/bin/stat -c '%u %s' {at}-{name}");
        assert_eq!(host.sh(vm, &script), format!("{user} {}\n", content.len()));
    }
}

/// A shell also has a terminal in a guest with a runtime, with and without a workspace.
fn a_shell_has_a_terminal(host: &Host, vm: &str) {
    let repo = tempfile::tempdir().unwrap();
    crate::first_light::repository(repo.path());
    for has_workspace in [false, true] {
        if has_workspace {
            host.ok(&["workspace", "prepare", vm, repo.path().to_str().unwrap()]);
        }
        let mut person = Person::sit_down(33, 99);
        let mut child = person.fcctl(host, &["ssh", vm]);
        person.type_in("test -t 0 && echo on a term\"\"inal; exit 6\n");
        person.sees("on a terminal");
        let status = wait_for("the shell's end", || child.try_wait().unwrap());
        assert_eq!(status.code(), Some(6));
    }
}

#[test]
fn files_are_copied_by_scp_and_sftp_as_root_and_as_the_images_user() {
    let host = Host::start();
    host.add_runtime();
    let tree = tempfile::tempdir().unwrap();
    let root = tree.path();
    busybox(&host, &root.join("app/busybox"));
    // Users without an entry in passwd can transfer files too.
    register(
        &host,
        "bare",
        root,
        json!({"env": ["PATH=/app"], "user": "4242"}),
    );
    fs::create_dir(root.join("etc")).unwrap();
    let users = "root:x:0:0::/:/app/none\ndev:x:1000:1000::/:/app/none\n";
    fs::write(root.join("etc/passwd"), users).unwrap();
    // Images with a resolver such as systemd-resolved have a link like this one.
    symlink("../run/stub.conf", root.join("etc/resolv.conf")).unwrap();
    register(
        &host,
        "named",
        root,
        json!({"env": ["PATH=/app"], "user": "dev"}),
    );

    for (vm, uid) in [("bare", "4242"), ("named", "1000")] {
        host.ok(&["vm", "create", "--name", vm, "--image", vm]);
        host.ok(&["start", vm]);
        assert_eq!(
            host.sh(
                vm,
                "cd /etc && head -n 1 resolv.conf && cat hostname && ls -l resolv.conf | cut -c 1-10"
            ),
            format!("nameserver 10.0.2.3\n{vm}\n-rw-r--r--\n"),
        );
        let dir = tempfile::tempdir().unwrap();
        let mut options = login(&host, vm, dir.path());
        check_transfers(&host, vm, &options, uid);
        a_shell_has_a_terminal(&host, vm);
        // The image's user can connect to the agent's socket.
        let agent = SshAgent::start();
        let look = "[ -S \"$SSH_AUTH_SOCK\" ] && [ -w \"$SSH_AUTH_SOCK\" ] && echo there";
        let out = host
            .command(&["exec", "--ssh-agent", vm, "--", "sh", "-c", look])
            .env("SSH_AUTH_SOCK", agent.socket())
            .output()
            .unwrap();
        assert_eq!(text(&out), ("there\n".to_owned(), String::new()));
        // `fcctl ssh --user 0` selects root with this variable, even if the image's passwd has no
        // root.
        options.extend(["-o".to_owned(), "SetEnv=FCD_USER=0".to_owned()]);
        check_transfers(&host, vm, &options, "0");
    }
}
