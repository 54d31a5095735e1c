//! `vm top`: the processes in a guest.
//!
//! A script reads them from /proc, because an image need not have ps. The guest may print anything,
//! so the output is bounded and is made harmless before it is shown.

use super::context::{Context, Stdio};
use super::exec::{self, Outcome, Spec};
use super::output::{size, span, table};
use super::signals::{Interrupts, interrupted};
use crate::api::exec::Exit;
use crate::client::Result;
use crate::error::{Error, Kind};
use crate::host::command::read_bounded;
use crate::host::text::{printable, printable_lines};
use crate::host::thread;
use serde::Serialize;
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;

/// Prints the uptime, its own pid, and three lines for each process: its status, its user and its
/// command line.
const SCRIPT: &str = r#"PATH=/.fcd/bin:$PATH; cd /proc || exit
read -r up idle <uptime; echo "T $up"; echo "I $$"
for p in [0-9]*; do
	read -r stat <"$p/stat" || continue
	uid=
	while read -r key value rest; do
		case $key in Uid:) uid=$value; break ;; esac
	done <"$p/status"
	printf 'S %s\nU %s\nC ' "$stat" "$uid"
	tr '\0\n' '  ' <"$p/cmdline"
	echo
done 2>/dev/null
exit 0"#;
/// The most bytes of the guest's output that are read. This is enough for ten thousand processes
/// with usual command lines.
const OUTPUT_BYTES_MAX: u64 = 8 << 20;
/// How many characters of the guest's error message are shown.
const ERROR_CHARS_MAX: usize = 200;
/// The kernel counts CPU time for programs in hundredths of a second (USER_HZ).
const TICKS_PER_S: u64 = 100;
const PAGE_BYTES: u64 = 4096;
/// The parent of the kernel's threads.
const KTHREADD: u64 = 2;
const INIT: u64 = 1;
/// How many characters of a command line the table shows.
const COMMAND_CHARS_MAX: usize = 100;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Name, ID, or ID prefix
    vm: String,
    /// Run the guest's ps with these options instead, such as aux
    #[arg(value_name = "PS OPTIONS", allow_hyphen_values = true)]
    options: Vec<OsString>,
}

/// A process of the guest.
#[derive(Debug, PartialEq, Serialize)]
struct Process {
    pid: u64,
    ppid: u64,
    uid: u64,
    /// One letter, such as `S` (proc(5)).
    state: String,
    memory_bytes: u64,
    cpu_s: u64,
    /// How long the process has existed.
    age_s: u64,
    command: String,
}

pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    if ctx.printer.json && !args.options.is_empty() {
        let text = "the output of the guest's ps cannot be one JSON document";
        return Err(Error::invalid(text).hint("leave out its options").into());
    }
    let argv = match args.options.is_empty() {
        true => ["sh", "-c", SCRIPT].map(OsString::from).to_vec(),
        false => std::iter::once("ps".into())
            .chain(args.options.clone())
            .collect(),
    };
    let text = capture(ctx, &args.vm, argv)?;
    let printer = &mut ctx.printer;
    if !args.options.is_empty() {
        printer.text(&printable_lines(&text))?;
        return Ok(0);
    }
    let processes = parse(&text);
    if printer.json {
        printer.document(&processes)?;
        return Ok(0);
    }
    let row = |process: &Process| {
        vec![
            process.pid.to_string(),
            process.ppid.to_string(),
            process.uid.to_string(),
            process.state.clone(),
            size(process.memory_bytes),
            span(process.cpu_s),
            format!("{} ago", span(process.age_s)),
            shortened(&process.command),
        ]
    };
    let rows: Vec<_> = processes.iter().map(row).collect();
    let headers = [
        "PID", "PPID", "UID", "STATE", "MEMORY", "CPU", "STARTED", "COMMAND",
    ];
    printer.text(&table(&headers, &rows))?;
    Ok(0)
}

fn shortened(command: &str) -> String {
    match command.char_indices().nth(COMMAND_CHARS_MAX) {
        None => command.to_owned(),
        Some((end, _)) => format!("{}...", &command[..end]),
    }
}

/// Runs a command as root, and returns what it prints.
fn capture(ctx: &mut Context, vm: &str, argv: Vec<OsString>) -> Result<String> {
    let io = |e| Error::io("read from the guest", e);
    let (reader, writer) = std::io::pipe().map_err(io)?;
    let writer = File::from(OwnedFd::from(writer));
    let stdio = Stdio {
        stdin: File::open("/dev/null").map_err(io)?,
        stdout: writer.try_clone().map_err(io)?,
        stderr: writer,
    };
    let reading = thread::spawn("top", move || read_bounded(reader, OUTPUT_BYTES_MAX))?;
    let interrupts = Interrupts::start(&ctx.signals, &ctx.stdio.stderr)?;
    let mut client = ctx.connector.connect(&mut ctx.printer)?;
    let spec = Spec {
        argv,
        env: Vec::new(),
        workdir: Some("/".into()),
        user: Some("0".to_owned()),
        stdin: false,
        term: None,
        no_wait_children: false,
        ssh_agent: None,
    };
    let outcome = exec::execute(&mut ctx.printer, &stdio, &interrupts, &mut client, vm, spec);
    drop(stdio);
    let text = reading
        .join()
        .map_err(|_| Error::internal("the thread that reads from the guest panicked"))?
        .map_err(io)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let failed = |why: String| {
        let last = text.lines().last().unwrap_or_default();
        let last: String = printable(last).chars().take(ERROR_CHARS_MAX).collect();
        let vm = printable(vm);
        let text = format!("list the processes of VM {vm}: {why}: {last}");
        Error::new(Kind::GuestCommandFailed, text).hint(format!("try it yourself: fcctl ssh {vm}"))
    };
    match outcome? {
        Outcome::Exit(Exit::Status(0)) => Ok(text),
        Outcome::Exit(exit) => {
            let why = format!("it ended with status {}", exit.shell_status());
            Err(failed(why).into())
        }
        Outcome::ReaderGone => Err(failed("the output is too long".to_owned()).into()),
        Outcome::Interrupted => Err(interrupted()),
    }
}

/// Parses the output of the script. Leaves out the kernel's threads and the script's own processes.
/// Skips malformed lines.
fn parse(text: &str) -> Vec<Process> {
    let (mut uptime_s, mut own) = (0, None::<u64>);
    let mut processes: Vec<Process> = Vec::new();
    for line in text.lines() {
        let Some((mark, rest)) = line.split_once(' ') else {
            continue;
        };
        match (mark, processes.last_mut()) {
            ("T", _) => {
                let whole = rest.split('.').next().unwrap_or_default();
                uptime_s = whole.parse().unwrap_or(0);
            }
            ("I", _) => own = rest.parse().ok(),
            ("S", _) => processes.extend(of_stat(rest, uptime_s)),
            ("U", Some(process)) => process.uid = rest.parse().unwrap_or(process.uid),
            ("C", Some(process)) if !rest.trim().is_empty() => {
                process.command = rest.trim_end().to_owned();
            }
            _ => {}
        }
    }
    let session = own.map_or_else(HashSet::new, |own| session_of(own, &processes));
    processes.retain(|process| {
        let is_own = session.contains(&process.pid) || own == Some(process.ppid);
        !is_own && process.pid != KTHREADD && process.ppid != KTHREADD
    });
    processes.sort_by_key(|process| process.pid);
    processes
}

/// Returns the script and the processes that fcd started to run it: its ancestors up to the SSH
/// server, which is a child of the init.
fn session_of(script: u64, processes: &[Process]) -> HashSet<u64> {
    let (mut session, mut next) = (HashSet::new(), script);
    while let Some(process) = processes.iter().find(|process| process.pid == next)
        && process.ppid > INIT
        && session.insert(next)
    {
        next = process.ppid;
    }
    session
}

/// Parses a line of /proc/PID/stat (proc(5)). The name in parentheses may contain parentheses.
fn of_stat(stat: &str, uptime_s: u64) -> Option<Process> {
    let (pid, rest) = stat.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    // The state is field 3 in the manual.
    let field = |number: usize| {
        fields
            .get(number - 3)
            .and_then(|text| text.parse::<u64>().ok())
    };
    let ticks = field(14)?.saturating_add(field(15)?);
    Some(Process {
        pid: pid.parse().ok()?,
        ppid: field(4)?,
        uid: 0,
        state: (*fields.first()?).to_owned(),
        memory_bytes: field(24)?.saturating_mul(PAGE_BYTES),
        cpu_s: ticks / TICKS_PER_S,
        age_s: uptime_s.saturating_sub(field(22)? / TICKS_PER_S),
        // A process without a command line, such as a zombie.
        command: format!("[{name}]"),
    })
}

#[cfg(test)]
mod tests {
    use super::super::exec::tests::{begin, status};
    use super::super::tests::{check, fcctl};
    use crate::client::fake::Fake;
    use expect_test::expect;
    use std::io::Write;

    const GUEST: &str = "T 3700.25\nI 900\n\
        S 1 (fcd-init) S 0 1 1 0 -1 4194560 9 9 9 9 120 80 0 0 20 0 1 0 10 999 256 1 1\nU 0\nC /sbin/init \n\
        S 2 (kthreadd) S 0 0 0 0 -1 1 0 0 0 0 0 0 0 0 20 0 1 0 10 0 0 1 1\nU 0\nC \n\
        S 9 (kworker/0:1) I 2 0 0 0 -1 1 0 0 0 0 0 0 0 0 20 0 1 0 10 0 0 1 1\nU 0\nC \n\
        S 100 (sshd) S 1 0 0 0 -1 1 0 0 0 0 0 0 0 0 20 0 1 0 10 0 9 1 1\nU 0\nC sshd: listener\n\
        S 800 (sshd) S 100 0 0 0 -1 1 0 0 0 0 0 0 0 0 20 0 1 0 370000 0 9 1 1\nU 0\nC sshd: root\n\
        S 900 (sh) S 800 0 0 0 -1 1 0 0 0 0 0 0 0 0 20 0 1 0 370000 0 9 1 1\nU 0\nC sh -c x\n\
        S 901 (tr) S 900 0 0 0 -1 1 0 0 0 0 0 0 0 0 20 0 1 0 370000 0 9 1 1\nU 0\nC tr\n\
        S 77 (a) b (c) Z 1 0 0 0 -1 1 0 0 0 0 0 0 0 0 20 0 1 0 368000 0 0 1 1\nU 1000\nC \n\
        S 50 (make) R 1 0 0 0 -1 1 0 0 0 0 6000 0 0 0 20 0 1 0 360000 0 2560 1 1\nU 1000\nC make \u{1b}[2J -j2 \n\
        nonsense\nS x (y) z\nC\n";

    fn guest(output: &'static str, exit: u8) -> Fake {
        Fake::start(move |mut r| {
            let mut guest = begin(&mut r);
            guest
                .stdout
                .take()
                .unwrap()
                .write_all(output.as_bytes())
                .unwrap();
            drop(guest);
            r.result(status(exit));
        })
    }

    #[test]
    fn processes_are_shown_without_kernel_threads() {
        let ran = fcctl(&guest(GUEST, 0), &["top", "web"]);
        expect![[r#"
            PID  PPID  UID   STATE  MEMORY  CPU  STARTED  COMMAND
            1    0     0     S      1 MiB   2s   1h ago   /sbin/init
            50   1     1000  R      10 MiB  1m   1m ago   make \u{1b}[2J -j2
            77   1     1000  Z      0 B     0s   20s ago  [a) b (c]
            100  1     0     S      36 KiB  0s   1h ago   sshd: listener
        "#]]
        .assert_eq(&String::from_utf8(ran.out).unwrap());
        let ran = fcctl(&guest(GUEST, 0), &["vm", "top", "web", "--json"]);
        let list: serde_json::Value = serde_json::from_slice(&ran.out).unwrap();
        assert_eq!(
            (list.as_array().unwrap().len(), list[1]["uid"].as_u64()),
            (4, Some(1000))
        );
    }

    #[test]
    fn options_are_for_the_ps_of_the_guest() {
        let fake = guest("PID CMD\n1 \u{1b}[31minit\n", 0);
        let ran = fcctl(&fake, &["top", "web", "-ef"]);
        assert_eq!(ran.out, b"PID CMD\n1 init\n");
        let calls = fake.calls();
        assert!(calls[0].contains(r#""argv":["ps","-ef"]"#), "{calls:?}");
        check(
            &fake,
            &["--json", "top", "web", "aux"],
            expect![[r#"
            ! {"error":{"code":"invalid_argument","exit_status":2,"hint":"leave out its options","kind":"invalid_argument","message":"the output of the guest's ps cannot be one JSON document","retryable":false}}
            status 2
        "#]],
        );
    }

    #[test]
    fn failure_in_guest_is_harmless_and_short() {
        check(
            &guest("sh: \u{1b}[2J not found\n", 127),
            &["top", "web", "aux"],
            expect![[r#"
                > exec.start {"argv":["ps","aux"],"env":[],"streams":["stdout","stderr"],"user":"0","vm":"web","workdir":"/"}
                ! fcctl: list the processes of VM web: it ended with status 127: sh: \u{1b}[2J not found
                ! hint: try it yourself: fcctl ssh web
                status 1
            "#]],
        );
    }
}
