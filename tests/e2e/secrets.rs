//! Values of variables stay between fcctl and the command in the guest.

use crate::host::{FCCTL, Host, processes, wait_for};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

/// Runs in the guest until the test ends it, so that the processes of the host can be searched
/// meanwhile.
const WAIT: &str = "printf %s \"$TOKEN\" | wc -c >/tmp/length; while ! [ -e /tmp/end ]; do sleep 0.1; done; rm /tmp/end /tmp/length";

/// Returns the processes whose arguments or environment have this value, without the shells and
/// programs that were given it.
fn processes_with(value: &str, given: &[u32]) -> Vec<String> {
    let mut found = Vec::new();
    for (pid, dir) in processes() {
        for file in ["cmdline", "environ"] {
            // A process may end meanwhile.
            let text = fs::read(dir.join(file)).unwrap_or_default();
            if contains(&text, value) && !given.contains(&pid) {
                let name = fs::read_to_string(dir.join("comm")).unwrap_or_default();
                found.push(format!("{file} of {pid} ({})", name.trim()));
            }
        }
    }
    found
}

fn contains(text: &[u8], value: &str) -> bool {
    text.windows(value.len())
        .any(|window| window == value.as_bytes())
}

/// Returns the files below a directory that have this value, except the disks of guests, which are
/// the guests' own, and images, which no test changes.
fn files_with(dir: &Path, value: &str) -> String {
    let out = Command::new("grep")
        .args(["-rlaF", "--exclude-dir=images", "--exclude-dir=runtimes"])
        .args([
            "--exclude=disk*",
            "--exclude=rootfs*",
            "--exclude=*.sock",
            "--",
            value,
        ])
        .arg(dir)
        .output()
        .unwrap();
    String::from_utf8(out.stdout).unwrap()
}

/// Checks that only the files that keep a VM's settings have a value of a devcontainer.json, which
/// holds for every later command, and that no other user can read them.
#[track_caller]
fn assert_only_files_of_settings(files: &str) {
    assert!(!files.is_empty());
    for file in files.lines().map(Path::new) {
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(["environment", "seed"].contains(&name), "{files}");
        let mode = fs::metadata(file).unwrap().mode();
        assert_eq!(mode & 0o077, 0, "{}: {mode:o}", file.display());
    }
}

#[test]
fn values_of_variables_are_in_no_process_no_log_and_no_readable_file_of_the_host() {
    let host = Host::with_full_log();
    let projects = tempfile::tempdir().unwrap();
    fs::write(projects.path().join("notes"), "hello\n").unwrap();
    // The values are in no source file's text, so that nothing else has them.
    let secret = |n: u32| format!("s3cret-{}-{n}", std::process::id());
    host.boot("box");
    let arguments = [
        // The caller's own arguments have this one, which nobody can prevent.
        vec![format!("-eTOKEN={}", secret(1))],
        vec!["-eTOKEN".to_owned()],
    ];
    for (value, arguments) in [secret(1), secret(2)].iter().zip(&arguments) {
        let mut command = Command::new(FCCTL);
        command
            .arg("--socket")
            .arg(host.socket())
            .args(["exec", "box"])
            .args(arguments)
            .args(["--", "sh", "-c", WAIT])
            .env("TOKEN", value);
        let mut child = command.spawn().unwrap();
        wait_for("the command runs", || {
            let length = host.fcctl(&["exec", "box", "--", "cat", "/tmp/length"]);
            let length = String::from_utf8(length.stdout).unwrap();
            (length.trim() == value.len().to_string()).then_some(())
        });
        assert_eq!(
            processes_with(value, &[child.id()]),
            [""; 0],
            "{arguments:?}"
        );
        host.sh("box", "touch /tmp/end");
        assert!(child.wait().unwrap().success());
    }
    let run = host
        .command(&["run", "--rm", "--name", "job", "-eTOKEN"])
        .arg(projects.path())
        .args(["--", "sh", "-c", "test -n \"$TOKEN\""])
        .env("TOKEN", secret(3))
        .output()
        .unwrap();
    assert!(run.status.success(), "{run:?}");
    let file = format!(
        r#"{{"remoteEnv": {{"TOKEN": "{}", "OTHER": "${{localEnv:MINE}}"}}, "postStartCommand": "test -n \"$OTHER\""}}"#,
        secret(4)
    );
    fs::write(projects.path().join(".devcontainer.json"), file).unwrap();
    let up = host
        .command(&["up", "--yes", "--allow-env", "MINE"])
        .arg(projects.path())
        .env("MINE", secret(5))
        .output()
        .unwrap();
    assert!(up.status.success(), "{up:?}");
    for n in 1..=5 {
        let value = secret(n);
        assert!(!host.log().contains(&value), "{n}: {}", host.log());
        let files = files_with(&host.state(), &value);
        if n < 4 {
            assert_eq!(files, "", "{n}");
        } else {
            assert_only_files_of_settings(&files);
        }
        assert_eq!(processes_with(&value, &[]), [""; 0], "{n}");
    }
    assert!(host.log().contains(" DEBUG "), "the log has details");
}
