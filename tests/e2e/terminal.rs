//! Commands at a terminal of the host: its size, its keys, `fcctl ssh` and the caller's ssh-agent.

use crate::host::{FCCTL, Host, Spawned, text, wait_for};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

/// A person at a terminal: the keyboard, the terminal device, and the text seen so far.
pub struct Person {
    keyboard: File,
    terminal: File,
    seen: String,
}

impl Person {
    pub fn sit_down(rows: u16, cols: u16) -> Self {
        let pty = nix::pty::openpty(None, None).unwrap();
        let keyboard = File::from(pty.master);
        let flags = rustix::fs::fcntl_getfl(&keyboard).unwrap();
        rustix::fs::fcntl_setfl(&keyboard, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
        let person = Self {
            keyboard,
            terminal: File::from(pty.slave),
            seen: String::new(),
        };
        person.resize(rows, cols);
        person
    }

    fn resize(&self, rows: u16, cols: u16) {
        tcsetwinsize(
            &self.terminal,
            Winsize {
                ws_row: rows,
                ws_col: cols,
                ws_xpixel: 0,
                ws_ypixel: 0,
            },
        )
        .unwrap();
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal)
            .unwrap()
            .local_modes
            .contains(LocalModes::ICANON)
    }

    /// Starts `fcctl` in a new session with this terminal.
    pub fn fcctl(&self, host: &Host, args: &[&str]) -> std::process::Child {
        let end = || Stdio::from(self.terminal.try_clone().unwrap());
        let mut command = Command::new("setsid");
        command
            .args(["--ctty", FCCTL, "--socket"])
            .arg(host.socket())
            .args(args)
            .env("TERM", "vt100");
        command
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap()
    }

    pub fn type_in(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    fn look(&mut self) {
        let mut piece = [0; 4096];
        while let Ok(n @ 1..) = self.keyboard.read(&mut piece) {
            self.seen.push_str(&String::from_utf8_lossy(&piece[..n]));
        }
    }

    /// Returns what has appeared since the last look.
    pub fn shown(&mut self) -> String {
        self.look();
        std::mem::take(&mut self.seen)
    }

    #[track_caller]
    pub fn sees(&mut self, wanted: &str) {
        wait_for(&format!("{wanted:?} on the screen"), || {
            self.look();
            self.seen.contains(wanted).then_some(())
        });
        self.seen.clear();
    }
}

pub(crate) fn a_terminal(host: &Host) {
    let mut person = Person::sit_down(30, 100);
    let mut child = person.fcctl(host, &["exec", "-it", "box", "--", "sh"]);
    person.type_in("stty size; tty; echo $TERM\n");
    person.sees("30 100\r\n/dev/pts/");
    assert!(person.is_raw());
    person.resize(41, 123);
    // The guest does not acknowledge a resize, so this polls.
    wait_for("the new size", || {
        person.type_in("stty size\n");
        person.look();
        person.seen.contains("41 123").then_some(())
    });
    person.type_in("echo sle\"\"eping; sleep 1000\n");
    person.sees("sleeping");
    // Until the command runs in the foreground, the signal would go to the shell.
    wait_for("the command in the foreground", || {
        (host.sh("box", "pidof sleep | wc -w") == "1\n").then_some(())
    });
    // fcctl sends Ctrl-C as a byte here, and the guest's terminal turns it into a signal.
    person.type_in("\x03");
    person.type_in("echo status=$?\n");
    person.sees("status=130");
    person.type_in("exit 6\n");
    let status = wait_for("the shell's end", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(6));
    assert!(!person.is_raw());
}

/// With only `-t`, Ctrl-C is a signal on the host, and fcctl forwards it to the guest.
pub(crate) fn a_command_in_a_terminal_without_stdin(host: &Host) {
    let mut person = Person::sit_down(24, 80);
    let mut child = person.fcctl(
        host,
        &[
            "exec",
            "-t",
            "box",
            "--",
            "sh",
            "-c",
            "test -t 1 && echo here; exec sleep 1000",
        ],
    );
    person.sees("here");
    person.type_in("\x03");
    let status = wait_for("the command's end", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(130));
    // The command has a terminal in the guest even if its output goes to a file.
    let mut file = Spawned::start(&mut host.command(&["exec", "-t", "box", "--", "tty"]));
    assert_eq!(file.end().0, Some(0));
    assert!(file.stdout().starts_with("/dev/pts/"), "{}", file.stdout());
}

pub(crate) fn the_systems_ssh(host: &Host) {
    let out = host.fcctl(&["ssh", "box", "--", "echo out; echo err >&2; exit 5"]);
    assert_eq!(
        (out.status.code(), text(&out)),
        (Some(5), ("out\n".to_owned(), "err\n".to_owned()))
    );
    assert_eq!(host.fails(&["ssh", "nope", "--", "true"]).0, 3);
    for args in [
        &["ssh", "--user", "ghost", "box", "--", "true"][..],
        &["ssh-config", "-u", "ghost", "box"],
    ] {
        let (status, said) = host.fails(args);
        assert!(
            status == 2 && said.contains("VM box: the guest has no user ghost"),
            "{said}"
        );
    }
    let mut person = Person::sit_down(24, 80);
    let mut child = person.fcctl(host, &["ssh", "-t", "box", "tty"]);
    person.sees("/dev/pts/");
    assert!(wait_for("the end of fcctl ssh", || child.try_wait().unwrap()).success());
    the_agent_of_the_caller(host);
    a_shell_in_the_workspace(host);
}

/// Programs in the guest use the caller's keys only if asked to, and no longer than the command.
fn the_agent_of_the_caller(host: &Host) {
    let agent = SshAgent::start();
    let list = |args: &[&str]| {
        let mut command = host.command(args);
        text(
            &command
                .env("SSH_AUTH_SOCK", agent.socket())
                .output()
                .unwrap(),
        )
    };
    let (out, err) = list(&["exec", "--ssh-agent", "box", "--", "ssh-add", "-L"]);
    assert_eq!((out.trim(), err.as_str()), (agent.key.as_str(), ""));
    let (out, err) = list(&["ssh", "--ssh-agent", "box", "--", "ssh-add -L"]);
    assert_eq!((out.trim(), err.as_str()), (agent.key.as_str(), ""));
    let (out, _) = list(&["exec", "box", "--", "sh", "-c", "echo \"<$SSH_AUTH_SOCK>\""]);
    assert_eq!(out, "<>\n");
    wait_for("the sockets are gone", || {
        host.sh("box", "ls -A /dev/.fcd-agents")
            .is_empty()
            .then_some(())
    });
    let out = host
        .command(&["exec", "--ssh-agent", "box", "--", "true"])
        .env_remove("SSH_AUTH_SOCK")
        .output()
        .unwrap();
    assert!(
        out.status.code() == Some(125) && text(&out).1.contains("SSH_AUTH_SOCK is not set"),
        "{out:?}"
    );
}

/// An ssh-agent of this host with one key.
pub struct SshAgent {
    dir: tempfile::TempDir,
    agent: std::process::Child,
    /// The public key.
    pub key: String,
}

impl SshAgent {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let agent = Command::new("ssh-agent")
            .arg("-D")
            .arg("-a")
            .arg(path("agent"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the agent's socket", || {
            path("agent").exists().then_some(())
        });
        let make = "ssh-keygen -q -t ed25519 -N '' -C mine -f key && ssh-add -q key";
        let status = Command::new("sh")
            .args(["-c", make])
            .current_dir(dir.path())
            .env("SSH_AUTH_SOCK", path("agent"))
            .status()
            .unwrap();
        assert!(status.success());
        let key = std::fs::read_to_string(path("key.pub")).unwrap();
        let key = key.trim().to_owned();
        Self { dir, agent, key }
    }

    pub fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("agent")
    }
}

impl Drop for SshAgent {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

/// A shell has a terminal, also when it starts in a workspace, but not if stdin is not a terminal.
fn a_shell_in_the_workspace(host: &Host) {
    let repo = tempfile::tempdir().unwrap();
    crate::first_light::repository(repo.path());
    host.ok(&["workspace", "prepare", "box", repo.path().to_str().unwrap()]);
    let mut person = Person::sit_down(33, 99);
    let mut child = person.fcctl(host, &["ssh", "box"]);
    person.type_in("stty size; tty; cat hello.txt; exit 6\n");
    person.sees("33 99\r\n/dev/pts/");
    let status = wait_for("the shell's end", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(6));
    let out = host.feed(&["ssh", "box"], b"tty; cat hello.txt; exit 7\n");
    assert_eq!(
        (out.status.code(), text(&out).0.as_str()),
        (Some(7), "not a tty\nhello\n"),
        "{:?}",
        text(&out)
    );
}
