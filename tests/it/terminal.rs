//! The built fcctl on terminals of several kinds and sizes, with a daemon that answers as the test
//! says.

use crate::world::soon;
use fcd::testing::api::vm::VmReply;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

const FCCTL: &str = env!("CARGO_BIN_EXE_fcctl");
const ESCAPE: char = '\u{1b}';

/// A daemon that answers `vm.start` with the progress that the test sends, and ends the call when
/// the test drops its sender.
struct Daemon {
    dir: tempfile::TempDir,
    progress: Sender<Value>,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("fcd.sock")).unwrap();
        let (progress, notes) = channel();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            serve(&stream, &notes);
        });
        Self { dir, progress }
    }

    fn copied(&self, done_mib: u64) {
        let progress = json!({"stage": "copy the disk", "done": done_mib << 20,
            "total": 64_u64 << 20, "unit": "bytes"});
        self.progress.send(progress).unwrap();
    }
}

fn serve(mut stream: &UnixStream, notes: &Receiver<Value>) {
    let lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut send = |message: Value| writeln!(stream, "{message}").unwrap();
    for line in lines {
        let request: Value = serde_json::from_str(&line.unwrap()).unwrap();
        let mut answer = |result: Value| {
            send(json!({"jsonrpc": "2.0", "id": request["id"], "result": result}));
        };
        match request["method"].as_str().unwrap() {
            "fcd.info" => answer(
                json!({"api": {"major": 1, "minor": 0}, "features": [], "uid": 0,
                "version": env!("CARGO_PKG_VERSION"), "pid": 1, "state_dir": "/s", "uptime_s": 1,
                "guest_roots": []}),
            ),
            "vm.start" => {
                for progress in notes {
                    send(json!({"jsonrpc": "2.0", "method": "progress", "params": progress}));
                }
                send(json!({"jsonrpc": "2.0", "id": request["id"], "result": {"vm": vm()}}));
            }
            other => panic!("{other}"),
        }
    }
}

fn vm() -> Value {
    let vm = json!({"id": "000000776562", "name": "web", "owner_uid": 0, "state": "running",
        "reason": null, "image": "default", "kernel": null, "init": "fcd", "vcpus": 1,
        "mem_mib": 1024, "disk_bytes": 4096, "work_disk_bytes": null, "disk_bytes_per_s": null,
        "disk_ops_per_s": null, "net_rx_bytes_per_s": null, "net_tx_bytes_per_s": null,
        "net": "nat", "ports": [], "pending": null, "rm": false, "restart": "no", "created_at": 1,
        "started_at": 2, "op": null, "pid": 3, "ip": null, "ssh_addr": null, "driver": null,
        "disk_driver": null, "synced": null, "unresponsive": false, "paused": false,
        "balloon_mib": null, "workspace": null, "host_name": null, "dns": []});
    serde_json::from_value::<VmReply>(json!({ "vm": vm })).expect("a VM");
    vm
}

/// The screen of a terminal. Understands text and the few sequences that programs draw with.
struct Screen {
    lines: Vec<Vec<char>>,
    row: usize,
    column: usize,
    columns: usize,
    /// The part of a sequence that has arrived.
    sequence: Option<String>,
    /// The most lines with text at any time.
    rows_max: usize,
    has_colours: bool,
}

impl Screen {
    fn new(columns: u16) -> Self {
        Self {
            lines: Vec::new(),
            row: 0,
            column: 0,
            columns: columns.into(),
            sequence: None,
            rows_max: 0,
            has_colours: false,
        }
    }

    fn line(&mut self) -> &mut Vec<char> {
        if self.lines.len() <= self.row {
            self.lines.resize(self.row + 1, Vec::new());
        }
        &mut self.lines[self.row]
    }

    fn put(&mut self, c: char) {
        if let Some(mut sequence) = self.sequence.take() {
            let is_end = c.is_ascii_alphabetic();
            sequence.push(c);
            if is_end {
                self.control(&sequence);
            } else {
                self.sequence = Some(sequence);
            }
            return;
        }
        match c {
            ESCAPE => self.sequence = Some(String::new()),
            '\r' => self.column = 0,
            '\n' => (self.row, self.column) = (self.row + 1, 0),
            c => {
                if self.column == self.columns {
                    (self.row, self.column) = (self.row + 1, 0);
                }
                let column = self.column;
                let line = self.line();
                if line.len() <= column {
                    line.resize(column + 1, ' ');
                }
                line[column] = c;
                self.column += 1;
                self.rows_max = self.rows_max.max(self.text().len());
            }
        }
    }

    fn control(&mut self, sequence: &str) {
        let (arguments, last) = sequence.split_at(sequence.len() - 1);
        let number = arguments.trim_start_matches('[').parse().unwrap_or(1_usize);
        let column = self.column;
        match last {
            "A" => self.row = self.row.saturating_sub(number),
            "B" => self.row += number,
            "C" => self.column += number,
            "D" => self.column = column.saturating_sub(number),
            "K" if arguments == "[2" => self.line().clear(),
            "K" => self.line().truncate(column),
            "m" => self.has_colours = true,
            "h" | "l" => {}
            _ => panic!("the sequence {sequence:?}"),
        }
    }

    /// Changes the size as xterm does, which cuts off what is too long.
    fn resize(&mut self, columns: u16) {
        self.columns = columns.into();
        self.lines
            .iter_mut()
            .for_each(|line| line.truncate(columns.into()));
        self.column = self.column.min(self.columns);
        self.rows_max = 0;
    }

    /// Returns the lines with text.
    fn text(&self) -> Vec<String> {
        let lines = self.lines.iter();
        let lines = lines.map(|line| line.iter().collect::<String>().trim_end().to_owned());
        lines.filter(|line| !line.is_empty()).collect()
    }
}

/// fcctl on a terminal.
struct Fcctl {
    child: Child,
    terminal: File,
    screen: Screen,
    /// Everything that was written.
    written: String,
}

impl Fcctl {
    fn start(daemon: &Daemon, columns: u16, env: &[(&str, &str)], args: &[&str]) -> Self {
        let pty = nix::pty::openpty(Some(&size(columns)), None).unwrap();
        let (terminal, theirs) = (File::from(pty.master), File::from(pty.slave));
        let stdio = || Stdio::from(theirs.try_clone().unwrap());
        let mut command = Command::new("setsid");
        command
            .args(["--ctty", FCCTL])
            .args(args)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("FCD_SOCKET", daemon.dir.path().join("fcd.sock"))
            .env("TERM", "xterm")
            .envs(env.iter().copied())
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio());
        Self {
            child: command.spawn().unwrap(),
            terminal,
            screen: Screen::new(columns),
            written: String::new(),
        }
    }

    /// Reads more. Returns false once fcctl has ended.
    fn read(&mut self, deadline: Instant) -> bool {
        assert!(Instant::now() < deadline, "{:?}", self.screen.text());
        let mut fds = [nix::poll::PollFd::new(
            self.terminal.as_fd(),
            nix::poll::PollFlags::POLLIN,
        )];
        let left = deadline.saturating_duration_since(Instant::now());
        let left = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        let ready = nix::poll::poll(&mut fds, left).unwrap();
        assert!(ready > 0, "nothing more: {:?}", self.screen.text());
        let mut piece = [0; 4096];
        // A terminal without a process fails.
        let n = self.terminal.read(&mut piece).unwrap_or(0);
        // The spinner is not ASCII, and may be cut in two.
        let text = String::from_utf8_lossy(&piece[..n]).replace('\u{fffd}', "");
        text.chars().for_each(|c| self.screen.put(c));
        self.written += &text;
        n > 0
    }

    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        let deadline = soon();
        while !self.screen.text().concat().contains(text) {
            assert!(
                self.read(deadline),
                "no {text:?} in {:?}",
                self.screen.text()
            );
        }
    }

    fn resize(&mut self, columns: u16) {
        let size = rustix::termios::Winsize {
            ws_row: 24,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&self.terminal, size).unwrap();
        self.screen.resize(columns);
    }

    /// Reads the rest, and returns the lines on the screen.
    fn end(mut self) -> Vec<String> {
        let deadline = soon();
        while self.read(deadline) {}
        assert!(self.child.wait().unwrap().success(), "{}", self.written);
        self.screen.text()
    }
}

impl Drop for Fcctl {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn size(columns: u16) -> nix::pty::Winsize {
    nix::pty::Winsize {
        ws_row: 24,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

#[test]
fn bar_is_drawn_in_one_line_and_cleared() {
    for (columns, shown) in [(100, "[=====>"), (40, "16 MiB of 64 MiB (25%)")] {
        let daemon = Daemon::start();
        let mut fcctl = Fcctl::start(&daemon, columns, &[], &["start", "web"]);
        daemon.copied(16);
        fcctl.wait_for(shown);
        assert_eq!(fcctl.screen.rows_max, 1, "{columns}: {:?}", fcctl.written);
        drop(daemon.progress);
        assert_eq!(fcctl.end(), ["web: running"], "{columns}");
    }
}

#[test]
fn bar_in_resized_window_leaves_nothing_behind() {
    let daemon = Daemon::start();
    let mut fcctl = Fcctl::start(&daemon, 100, &[], &["start", "web"]);
    daemon.copied(16);
    fcctl.wait_for("[=====>");
    fcctl.resize(40);
    daemon.copied(32);
    fcctl.wait_for("32 MiB of 64 MiB (50%)");
    // Nothing is left of the wide bar.
    assert_eq!(fcctl.screen.text().len(), 1, "{:?}", fcctl.screen.text());
    fcctl.resize(100);
    daemon.copied(48);
    fcctl.wait_for("[===============");
    assert_eq!(fcctl.screen.text().len(), 1, "{:?}", fcctl.screen.text());
    drop(daemon.progress);
    assert_eq!(fcctl.end(), ["web: running"]);
}

#[test]
fn dumb_terminal_gets_lines() {
    let daemon = Daemon::start();
    let fcctl = Fcctl::start(&daemon, 80, &[("TERM", "dumb")], &["start", "web"]);
    daemon.copied(16);
    daemon.copied(32);
    drop(daemon.progress);
    let lines = ["fcctl: start web: copy the disk", "web: running"];
    assert_eq!(fcctl.end(), lines);
}

#[test]
fn colours_follow_the_environment() {
    let daemon = Daemon::start();
    for (env, expected) in [
        (&[][..], true),
        (&[("NO_COLOR", "1")], false),
        (&[("TERM", "dumb")], false),
        (&[("CLICOLOR_FORCE", "1"), ("TERM", "dumb")], true),
    ] {
        let mut fcctl = Fcctl::start(&daemon, 80, env, &["start", "--help"]);
        fcctl.wait_for("Usage: fcctl");
        assert_eq!(fcctl.screen.has_colours, expected, "{env:?}");
        fcctl.end();
    }
    let in_pipe = |env: &[(&str, &str)]| {
        let mut command = Command::new(FCCTL);
        command.env_clear().envs(env.iter().copied()).arg("--help");
        let out = command.output().unwrap();
        String::from_utf8(out.stdout).unwrap().contains(ESCAPE)
    };
    assert!(!in_pipe(&[]) && in_pipe(&[("CLICOLOR_FORCE", "1")]));
}
