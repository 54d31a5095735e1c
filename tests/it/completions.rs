//! Tests completions in the real bash, zsh and fish, with names from a daemon.

use crate::world::{World, soon};
use fcd::testing::api::vm::{VmCreate, VmCreateRequest};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const FCCTL: &str = env!("CARGO_BIN_EXE_fcctl");
/// The end of each prompt of a shell.
const PROMPT: &str = "READY> ";
/// Limit of the time that a shell waits for candidates such as names of VMs and images.
const ANSWER_MAX: Duration = Duration::from_millis(50);
const ANSWERS_MEASURED: usize = 15;

fn world() -> World {
    let world = World::new();
    world.running("web");
    let labels = serde_json::from_str(r#"{"owner":"ann"}"#).unwrap();
    let db = VmCreateRequest {
        name: Some("db".parse().unwrap()),
        labels,
        ..Default::default()
    };
    world.call::<VmCreate>(&db).unwrap();
    crate::world::make_image(&world.config.state_dir, "gcc:13");
    world
}

/// Makes a command find fcctl and the daemon.
fn with_fcctl(command: &mut Command, world: &World) {
    let dir = Path::new(FCCTL).parent().unwrap().display();
    // Shells write files to their home directory.
    let home = world.config.state_dir.parent().unwrap();
    command
        .env_clear()
        .env("PATH", format!("{dir}:/usr/bin:/bin"))
        .env("FCD_SOCKET", &world.config.socket)
        .env("HOME", home)
        .env("TERM", "dumb")
        .env("LANG", "C.UTF-8");
}

/// A shell on a terminal.
struct Shell {
    child: Child,
    terminal: File,
    seen: String,
}

impl Shell {
    fn start(world: &World, argv: &[&str]) -> Self {
        let pty = nix::pty::openpty(None, None).unwrap();
        let (terminal, theirs) = (File::from(pty.master), File::from(pty.slave));
        let stdio = || Stdio::from(theirs.try_clone().unwrap());
        let mut command = Command::new("setsid");
        command.arg("--ctty").args(argv);
        with_fcctl(&mut command, world);
        command
            .env("PS1", PROMPT)
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio());
        let child = command.spawn().unwrap();
        let seen = String::new();
        let mut shell = Self {
            child,
            terminal,
            seen,
        };
        shell.wait_for(PROMPT);
        shell
    }

    fn send(&mut self, keys: &str) {
        self.terminal.write_all(keys.as_bytes()).unwrap();
    }

    /// Reads until the text appears. The next wait begins after the text.
    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        let deadline = soon();
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let mut fds = [nix::poll::PollFd::new(
                self.terminal.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )];
            let left = deadline.saturating_duration_since(Instant::now());
            let left = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
            let ready = nix::poll::poll(&mut fds, left).unwrap();
            assert!(ready > 0, "no {text:?} in {:?}", self.seen);
            let mut piece = [0; 4096];
            let n = self.terminal.read(&mut piece).unwrap();
            self.seen += &String::from_utf8_lossy(&piece[..n]);
        }
    }

    fn run(&mut self, line: &str) {
        self.send(&format!("{line}\n"));
        self.wait_for(PROMPT);
    }

    /// Types a line and the tab key, and checks what the line has become. The test then runs
    /// `show`, which prints the line, because shells differ in what they display while they
    /// complete.
    #[track_caller]
    fn check(&mut self, typed: &str, expected: &str) {
        // Ctrl-A goes to the beginning of the line.
        self.send(&format!("{typed}\t\u{1}show \n"));
        self.wait_for(&format!("<{expected}>"));
        self.wait_for(PROMPT);
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A shell function that prints its arguments.
const SHOW: &str = "show() { printf '<%s>' \"$*\"; }";

/// Keys to type, and the command line that they become in bash and zsh.
const LINES: &[(&str, &str)] = &[
    ("fcctl st", "fcctl st"),
    ("fcctl snaps", "fcctl snapshot"),
    ("fcctl stop ", "fcctl stop web"),
    ("fcctl start ", "fcctl start db"),
    ("fcctl vm pause w", "fcctl vm pause web"),
    ("fcctl run --image gc", "fcctl run --image gcc:13"),
    ("fcctl run --image gcc:1", "fcctl run --image gcc:13"),
    ("fcctl run --net no", "fcctl run --net none"),
    ("fcctl create --publ", "fcctl create --publish"),
    ("fcctl rm -f d", "fcctl rm -f db"),
    // More of these words follows, so there is no space behind them.
    ("fcctl cp we", "fcctl cp web:"),
    ("fcctl cp a.txt we", "fcctl cp a.txt web:"),
    ("fcctl cp /proc/cpui", "fcctl cp /proc/cpuinfo"),
    ("fcctl ps --filter la", "fcctl ps --filter label="),
    (
        "fcctl ps --filter label=own",
        "fcctl ps --filter label=owner",
    ),
    (
        "fcctl ps --filter label=owner=",
        "fcctl ps --filter label=owner=ann",
    ),
    ("fcctl port d", "fcctl port db"),
    ("fcctl ssh-config w", "fcctl ssh-config web"),
];

#[test]
fn bash_completes_names() {
    let world = world();
    let mut bash = Shell::start(&world, &["bash", "--norc", "--noprofile", "-i"]);
    bash.run("bind 'set bell-style none'; bind 'set enable-bracketed-paste off'");
    bash.run(SHOW);
    bash.run("source <(fcctl completions bash)");
    for (typed, expected) in LINES {
        bash.check(typed, expected);
    }
}

#[test]
fn zsh_completes_names() {
    let world = world();
    let mut zsh = Shell::start(&world, &["zsh", "-f", "-i"]);
    zsh.run("unsetopt beep zle_bracketed_paste 2>/dev/null; bindkey -e; unset zle_bracketed_paste");
    zsh.run(SHOW);
    zsh.run("autoload -U compinit; compinit -u -D; source <(fcctl completions zsh)");
    // A completion with several candidates inserts nothing.
    zsh.run("unsetopt auto_menu menu_complete auto_list");
    for (typed, expected) in LINES {
        zsh.check(typed, expected);
    }
}

#[test]
fn fish_completes_names_with_descriptions() {
    let world = world();
    let complete = |line: &str| {
        let mut fish = Command::new("fish");
        let script = format!("fcctl completions fish | source; complete -C '{line}'");
        fish.args(["--no-config", "-c", &script]);
        with_fcctl(&mut fish, &world);
        let out = fish.output().unwrap();
        let err = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success() && err.is_empty(), "{err}");
        String::from_utf8(out.stdout).unwrap()
    };
    assert_eq!(complete("fcctl stop "), "web\trunning, default\n");
    assert_eq!(complete("fcctl start d"), "db\tcreated, default\n");
    assert!(complete("fcctl run --image gcc:").starts_with("gcc:13\t"));
    assert_eq!(complete("fcctl cp we"), "web:\trunning, default\n");
    assert_eq!(complete("fcctl ps --filter label="), "label=owner\n");
    assert_eq!(complete("fcctl port d"), "db\tcreated, default\n");
    assert_eq!(complete("fcctl ssh-config w"), "web\trunning, default\n");
    assert!(complete("fcctl snaps").starts_with("snapshot\tSave and restore"));
}

/// Uses the fastest of several answers, because other tests run at the same time.
#[test]
#[ignore = "a measurement that must run alone: scripts/test"]
fn names_are_answered_while_a_key_is_pressed() {
    let world = world();
    let ask = || {
        let begun = Instant::now();
        let mut command = Command::new(FCCTL);
        command.args(["__complete", "2", "--", "fcctl", "stop", ""]);
        with_fcctl(&mut command, &world);
        let out = command.output().unwrap();
        assert_eq!(out.stdout, b"web\trunning, default\n");
        begun.elapsed()
    };
    let took = (0..ANSWERS_MEASURED).map(|_| ask()).min().unwrap();
    println!("names in {took:?}");
    assert!(took < ANSWER_MAX, "{took:?}");
}
