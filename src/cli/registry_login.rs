//! `image login` and `image logout`: store and remove the credential of a registry where docker
//! keeps it, so that both programs have the same ones.

use super::context::{Context, Stdio};
use super::printer::Printer;
use super::registry_auth::{self, Caller, Place};
use super::signals::Interrupts;
use super::terminal::NoEcho;
use crate::api::registry::Secret;
use crate::client::Result;
use crate::error::{Error, Kind};
use crate::host::command::read_bounded;
use crate::host::wait::{WaitResult, wait_any};
use crate::locks::Cancel;
use nix::poll::PollFlags;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

const DOCKER_HUB: &str = "docker.io";
const PASSWORD_BYTES_MAX: u64 = 64 << 10;
/// How long to wait for somebody to type.
const ANSWER_DEADLINE: Duration = Duration::from_secs(600);

#[derive(clap::Args, Debug)]
pub(super) struct LoginArgs {
    /// HOST or HOST:PORT
    #[arg(default_value = DOCKER_HUB)]
    registry: String,
    /// User name [default: ask]
    #[arg(short, long, visible_alias = "user", value_name = "NAME")]
    username: Option<String>,
    /// Read the password from stdin instead of the terminal
    #[arg(long)]
    password_stdin: bool,
}

#[derive(clap::Args, Debug)]
pub(super) struct LogoutArgs {
    /// HOST or HOST:PORT
    #[arg(default_value = DOCKER_HUB)]
    registry: String,
}

pub(super) fn login(ctx: &mut Context, args: LoginArgs) -> Result<u8> {
    let registry = host(&args.registry)?;
    let (printer, stdio) = (&mut ctx.printer, &ctx.stdio);
    let interrupts = Interrupts::start(&ctx.signals, &stdio.stderr)?;
    let stop = interrupts.cancel();
    let given = credential(printer, stdio, &args, registry, stop);
    let (user, password) = interrupts.or_interrupted(given)?;
    let caller = Caller::new(&ctx.env, std::env::vars_os().collect());
    let stored = registry_auth::store(registry, (&user, &password), &caller, stop);
    let place = interrupts.or_interrupted(stored.map_err(Into::into))?;
    match place {
        Place::Helper(program) => {
            printer.line(&format!("{registry}: stored by {program}"))?;
        }
        Place::File(path) => {
            printer.line(&format!("{registry}: stored in {}", path.display()))?;
            printer.note("the password is not encrypted there; a credential helper encrypts it");
        }
    }
    printer
        .note("the password was not checked: the next pull shows whether the registry accepts it");
    Ok(0)
}

pub(super) fn logout(ctx: &mut Context, args: &LogoutArgs) -> Result<u8> {
    let registry = host(&args.registry)?;
    let caller = Caller::new(&ctx.env, std::env::vars_os().collect());
    let interrupts = Interrupts::start(&ctx.signals, &ctx.stdio.stderr)?;
    let removed = registry_auth::remove(registry, &caller, interrupts.cancel());
    let text = match interrupts.or_interrupted(removed.map_err(Into::into))? {
        true => "removed",
        false => "not logged in",
    };
    ctx.printer.line(&format!("{registry}: {text}"))?;
    Ok(0)
}

/// Returns the host in the user's argument, which may be a URL as with docker.
fn host(text: &str) -> Result<&str> {
    let host = ["https://", "http://"]
        .iter()
        .find_map(|scheme| text.strip_prefix(scheme))
        .unwrap_or(text)
        .trim_end_matches('/');
    let is_host = |c: char| c.is_ascii_alphanumeric() || ".-:[]_".contains(c);
    if host.is_empty() || !host.chars().all(is_host) {
        let text = format!("{text:?} is not the name of a registry");
        let hint = "give HOST or HOST:PORT, such as ghcr.io";
        return Err(Error::invalid(text).hint(hint).into());
    }
    Ok(host)
}

fn credential(
    printer: &mut Printer,
    stdio: &Stdio,
    args: &LoginArgs,
    registry: &str,
    stop: &Cancel,
) -> Result<(String, Secret)> {
    let can_ask = stdio.stdin_is_terminal();
    let user = match &args.username {
        Some(user) => user.clone(),
        None if can_ask && !args.password_stdin => {
            printer.note(&format!("user name for {registry}:"));
            line(stdio, stop)?
        }
        None => {
            return Err(Error::invalid("no user name was given")
                .hint("use --username")
                .into());
        }
    };
    let password = if args.password_stdin {
        let bytes = read_bounded(&stdio.stdin, PASSWORD_BYTES_MAX)
            .map_err(|e| Error::io("read the password from stdin", e))?;
        let text = String::from_utf8(bytes)
            .map_err(|_| Error::invalid("the password on stdin is not UTF-8"))?;
        text.trim_end_matches(['\n', '\r']).to_owned()
    } else if can_ask {
        printer.note(&format!("password of {user} (not shown while you type):"));
        let _hidden = NoEcho::enter(&stdio.stdin)?;
        line(stdio, stop)?
    } else {
        let text = "there is no terminal to ask for the password";
        return Err(Error::invalid(text).hint("use --password-stdin").into());
    };
    if user.is_empty() || user.contains(':') || password.is_empty() {
        let text = "the user name or the password is empty, or the user name has a colon";
        return Err(Error::invalid(text).hint("nothing was stored").into());
    }
    Ok((user, Secret::new(password)))
}

/// Reads one line from the terminal, which delivers a line as a whole.
fn line(stdio: &Stdio, stop: &Cancel) -> Result<String> {
    let answer = (stdio.stdin.as_fd(), PollFlags::POLLIN);
    let waited = wait_any(&[answer], Instant::now() + ANSWER_DEADLINE, stop);
    match waited.map_err(|e| Error::io("wait for an answer", e))? {
        WaitResult::Ready => {}
        WaitResult::Cancelled | WaitResult::Deadline => {
            return Err(Error::new(Kind::Cancelled, "nobody answered; nothing was stored").into());
        }
    }
    let mut text = String::new();
    BufReader::new(&stdio.stdin)
        .read_line(&mut text)
        .map_err(|e| Error::io("read from the terminal", e))?;
    Ok(text.trim_end_matches(['\n', '\r']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registry_may_be_a_url() {
        for text in ["ghcr.io", "https://ghcr.io", "https://ghcr.io/"] {
            assert_eq!(host(text).unwrap(), "ghcr.io");
        }
        assert_eq!(host("localhost:5000").unwrap(), "localhost:5000");
        for text in ["", "https://", "ghcr.io/owner", "a b", "-;"] {
            assert!(host(text).is_err(), "{text}");
        }
    }
}
