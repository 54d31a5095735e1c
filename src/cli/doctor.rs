//! `doctor`: reports what fcd needs on this host, what it found, and how to fix what is missing.
//! Works without a daemon.

use super::context::{Context, Env, Stdio, may_colour};
use super::printer::Printer;
use crate::api::Empty;
use crate::api::daemon::{Check, Doctor, DoctorReply, Severity};
use crate::client::{Failure, Result};
use crate::error::{Error, Kind};
use crate::host::command::{Command, run_any_status};
use crate::host::plural::count;
use crate::host::text::printable;
use crate::locks::Cancel;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The daemon probes KVM and runs a few programs, which takes a while on a busy host.
const DEADLINE: Duration = Duration::from_secs(60);
/// The environment variables that decide where `fcd` keeps its files.
const PASSED: [&str; 8] = [
    "HOME",
    "XDG_CONFIG_HOME",
    "XDG_STATE_HOME",
    "XDG_RUNTIME_DIR",
    "FCD_CONFIG",
    "FCD_STATE_DIR",
    "FCD_SOCKET",
    "PATH",
];

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Exit with 1 if there is a warning, too
    #[arg(long, conflicts_with = "leaks")]
    strict: bool,
    /// List what fcd has left on this host that belongs to no VM
    #[arg(long)]
    leaks: bool,
    /// Remove what --leaks lists, after confirmation
    #[arg(long, requires = "leaks")]
    fix: bool,
    /// Do not ask for confirmation
    #[arg(long, requires = "fix")]
    yes: bool,
}

pub(super) fn run(ctx: &mut Context, args: &Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        env,
        ..
    } = ctx;
    if args.leaks {
        return super::leaks::run(connector, printer, stdio, args.fix, args.yes);
    }
    let mut checks = vec![];
    match connector.connect(printer) {
        Ok(mut client) => {
            checks.push(Check::ok(
                "daemon",
                format!("fcd answers on {}", connector.socket().display()),
            ));
            let answer = client.call_raw("fcd.doctor", &empty(), DEADLINE)?;
            checks.extend(parse(answer.get().as_bytes())?.checks);
        }
        Err(failure) => {
            checks.push(no_daemon(&failure));
            match without_daemon(env) {
                Ok(found) => checks.extend(found),
                Err(e) => checks.push(Check {
                    id: "fcd".to_owned(),
                    severity: Severity::Fail,
                    found: e.to_string(),
                    fix: e.hint_text().map(str::to_owned),
                }),
            }
        }
    }
    // fcd's own checks also include a `daemon` check. Keep only the first one, which is fcctl's own
    // check of the socket that it uses.
    let mut is_first = true;
    checks.retain(|c| c.id != "daemon" || std::mem::replace(&mut is_first, false));
    checks.extend(own_checks(env));
    report(printer, stdio, env, checks, args.strict)
}

fn empty() -> Box<serde_json::value::RawValue> {
    serde_json::value::to_raw_value(&Empty {}).expect("an empty struct")
}

fn parse(json: &[u8]) -> Result<<Doctor as crate::api::Call>::Reply> {
    serde_json::from_slice(json).map_err(|e| {
        Error::new(Kind::VersionMismatch, "read the daemon's checks")
            .with_source(e)
            .into()
    })
}

/// Returns the check for a daemon that does not answer. A missing daemon is only a warning, because
/// it can be started. A daemon that refuses the caller is a failure.
fn no_daemon(failure: &Failure) -> Check {
    let is_absent = failure.kind() == crate::client::ABSENT;
    Check {
        id: "daemon".to_owned(),
        severity: if is_absent {
            Severity::Warn
        } else {
            Severity::Fail
        },
        found: failure.to_string(),
        fix: failure.fault.hint.clone(),
    }
}

/// Runs `fcd doctor --json`. Prefers the fcd next to this program to the one in PATH.
fn without_daemon(env: &Env) -> crate::error::Result<Vec<Check>> {
    let neighbour = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("fcd")));
    let program = neighbour
        .filter(|p| p.is_file())
        .unwrap_or_else(|| PathBuf::from("fcd"));
    checks_of(&program, env)
}

fn checks_of(program: &Path, env: &Env) -> crate::error::Result<Vec<Check>> {
    let mut command = Command::new(program)
        .args(["doctor", "--json"])
        .deadline(DEADLINE);
    for name in PASSED {
        if let Some(value) = env(name) {
            command = command.env(name, value);
        }
    }
    let cancel = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
    let out = run_any_status(&command, &cancel, &mut |_| {}).map_err(|e| match e.kind() {
        Kind::CommandMissing => Error::new(
            Kind::CommandMissing,
            "fcd is neither next to fcctl nor in PATH",
        )
        .hint("install it: cargo install --locked --path ., or scripts/quickstart"),
        _ => e,
    })?;
    // The exit status repeats what the checks say. If no checks can be read, stderr says what went
    // wrong.
    serde_json::from_slice::<DoctorReply>(&out.stdout)
        .map(|r| r.checks)
        .map_err(|e| {
            let stderr = String::from_utf8_lossy(&out.stderr);
            let reason = stderr.lines().last().unwrap_or_default();
            Error::new(
                Kind::CommandFailed,
                format!(
                    "{} doctor --json ended with status {}: {reason}",
                    program.display(),
                    out.status
                ),
            )
            .with_source(e)
        })
}

/// Checks that only the client can do.
fn own_checks(env: &Env) -> Vec<Check> {
    let mut checks = vec![];
    for (program, why, fix) in [
        ("ssh", "for fcctl ssh", "apt install openssh-client"),
        ("git", "for sending repositories", "apt install git"),
    ] {
        checks.push(match find_on_path(program, env) {
            Some(path) => Check::ok(
                &format!("cli-{program}"),
                format!("{} {why}", path.display()),
            ),
            None => Check {
                id: format!("cli-{program}"),
                severity: Severity::Warn,
                found: format!("{program} was not found ({why})"),
                fix: Some(fix.to_owned()),
            },
        });
    }
    checks
}

fn find_on_path(program: &str, env: &Env) -> Option<PathBuf> {
    let path = env("PATH")?;
    let executable =
        |p: &PathBuf| p.is_file() && rustix::fs::access(p, rustix::fs::Access::EXEC_OK).is_ok();
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(executable)
}

fn report(
    printer: &mut Printer,
    stdio: &Stdio,
    env: &Env,
    checks: Vec<Check>,
    is_strict: bool,
) -> Result<u8> {
    let number = |severity| checks.iter().filter(|c| c.severity == severity).count() as u64;
    let (failed, warned) = (number(Severity::Fail), number(Severity::Warn));
    let status = u8::from(failed > 0 || is_strict && warned > 0);
    if printer.json {
        printer.document(&DoctorReply { checks })?;
        return Ok(status);
    }
    let colour = may_colour(stdio, env);
    let width = checks
        .iter()
        .map(|c| c.id.chars().count())
        .max()
        .unwrap_or(0);
    let text: String = checks.iter().map(|c| render(c, width, colour)).collect();
    let warnings = if warned > 0 {
        format!(", {}", count(warned, "warning"))
    } else {
        String::new()
    };
    let all = count(checks.len() as u64, "check");
    let verdict = if failed > 0 {
        format!("not ready: {failed} of {all} failed{warnings}")
    } else {
        format!("ready: {all}{warnings}")
    };
    printer.text(&format!("{text}{verdict}\n"))?;
    Ok(status)
}

fn render(check: &Check, width: usize, colour: bool) -> String {
    let (word, code) = match check.severity {
        Severity::Ok => ("PASS", 32),
        Severity::Warn => ("WARN", 33),
        Severity::Fail => ("FAIL", 31),
    };
    let word = if colour {
        format!("\u{1b}[{code}m{word}\u{1b}[0m")
    } else {
        word.to_owned()
    };
    let mut text = format!(
        "{word}  {:<width$}  {}\n",
        printable(&check.id),
        printable(&check.found)
    );
    for line in check
        .fix
        .iter()
        .filter(|_| check.severity != Severity::Ok)
        .flat_map(|f| f.lines())
    {
        text.push_str(&format!("      {:<width$}  fix: {}\n", "", printable(line)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn report_line_shows_fix() {
        let check = |id: &str, severity, fix: Option<&str>| Check {
            id: id.to_owned(),
            severity,
            found: "found\u{1b}".to_owned(),
            fix: fix.map(str::to_owned),
        };
        let all = [
            check("kvm", Severity::Warn, Some("modprobe kvm")),
            check("qemu-system", Severity::Ok, Some("x")),
            check("x", Severity::Fail, None),
        ];
        expect![[r"
            WARN  kvm          found\u{1b}
                               fix: modprobe kvm
            PASS  qemu-system  found\u{1b}
            FAIL  x            found\u{1b}
        "]]
        .assert_eq(&all.iter().map(|c| render(c, 11, false)).collect::<String>());
        assert!(render(&all[0], 0, true).starts_with("\u{1b}[33mWARN\u{1b}[0m"));
    }
}
