//! Shows what a `devcontainer.json` asks for, and asks the user to allow it. The same content is
//! asked about only once.

use super::super::context::{Env, Stdio};
use super::super::printer::Printer;
use super::super::signals::{Interrupts, interrupted};
use super::super::vm_text;
use super::file::ProjectFile;
use super::parse::Config;
use super::scripts;
use crate::api::vm::Pending;
use crate::client::Result;
use crate::error::Error;
use crate::host::wait::{WaitResult, wait_any};
use nix::poll::PollFlags;
use std::io::{BufRead, BufReader, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long to wait for an answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// The contents that the user has allowed, each recorded as an empty file that is named by the
/// content's hash.
pub(super) struct Confirmed {
    dir: Option<PathBuf>,
}

impl Confirmed {
    pub(super) fn of_user(env: &Env) -> Self {
        let dir = |name: &str| env(name).filter(|v| v.starts_with('/')).map(PathBuf::from);
        let state = dir("XDG_STATE_HOME").or_else(|| Some(dir("HOME")?.join(".local/state")));
        Self {
            dir: state.map(|state| state.join("fcctl/devcontainers")),
        }
    }

    fn has(&self, hash: &str) -> bool {
        self.dir
            .as_ref()
            .is_some_and(|dir| dir.join(hash).is_file())
    }

    fn add(&self, hash: &str) -> std::io::Result<()> {
        let Some(dir) = &self.dir else {
            return Ok(());
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
        std::fs::write(dir.join(hash), "")
    }
}

/// Returns what the file asks for, one line for each item.
pub(super) fn summary(file: &ProjectFile, config: &Config, guest_dir: &str) -> Vec<String> {
    let mut lines = vec![format!("{} asks for:", file.path.display())];
    let mut line = |text: String| lines.push(format!("  {text}"));
    match &config.image {
        Some(image) => line(format!("image {image}")),
        None => line("the default image".to_owned()),
    }
    let size = vm_text::settings(&Pending {
        vcpus: config.cpus,
        mem_mib: config.memory_mib,
        disk_bytes: config.disk_bytes,
        ..Pending::default()
    });
    if !size.is_empty() {
        line(size);
    }
    if !config.ports.is_empty() {
        let ports: Vec<String> = config.ports.iter().map(u16::to_string).collect();
        line(format!(
            "ports of the VM on 127.0.0.1: {}",
            ports.join(", ")
        ));
    }
    if !config.env.is_empty() {
        let names: Vec<&str> = config.env.iter().map(|(name, _)| name.as_str()).collect();
        line(format!("variables {}", names.join(", ")));
    }
    if let Some(user) = &config.user {
        line(format!("user {user}"));
    }
    line(format!("a copy of this directory at {guest_dir}"));
    for step in config.once.iter().chain(&config.at_start) {
        scripts::shown(step).into_iter().for_each(&mut line);
    }
    lines.extend(config.notes.iter().cloned());
    lines
}

/// True if the user allows what the file asks for, now or earlier. Fails without a terminal,
/// because the caller has already handled `--yes`.
pub(super) fn given(
    printer: &mut Printer,
    stdio: &Stdio,
    interrupts: &Interrupts,
    confirmed: &Confirmed,
    file: &ProjectFile,
) -> Result<bool> {
    let on_terminal = stdio.stdin_is_terminal() && stdio.stderr.is_terminal() && !printer.json;
    if !on_terminal {
        let text = "there is no terminal to ask whether the VM may have what the file asks for";
        return Err(Error::invalid(text)
            .hint(format!("read {}, then add --yes", file.path.display()))
            .into());
    }
    let hash = file.hash();
    if confirmed.has(&hash) {
        return Ok(true);
    }
    printer.note("may the VM have this? [y/N]");
    let ready = wait_any(
        &[(stdio.stdin.as_fd(), PollFlags::POLLIN)],
        Instant::now() + ANSWER_DEADLINE,
        interrupts.cancel(),
    )
    .map_err(|e| Error::io("wait for the answer", e))?;
    if ready != WaitResult::Ready {
        return Err(interrupted());
    }
    let mut answer = String::new();
    BufReader::new(&stdio.stdin)
        .read_line(&mut answer)
        .map_err(|e| Error::io("read the answer", e))?;
    if !matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(false);
    }
    if let Err(e) = confirmed.add(&hash) {
        printer.note(&format!("warning: the answer was not saved: {e}"));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::super::super::signals::SignalSource;
    use super::*;
    use std::fs::File;
    use std::io::Write;

    #[test]
    fn confirmed_content_is_remembered_in_a_private_directory() {
        use std::os::unix::fs::PermissionsExt;
        let home = tempfile::tempdir().unwrap();
        let path = home.path().display().to_string();
        let env: Box<Env> = Box::new(move |name| (name == "HOME").then(|| path.clone()));
        let of_user = || Confirmed::of_user(&*env);
        assert!(!of_user().has("a"));
        of_user().add("a").unwrap();
        assert!(of_user().has("a") && !of_user().has("b"));
        let dir = home.path().join(".local/state/fcctl/devcontainers");
        assert_eq!(dir.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        let none = Confirmed::of_user(&|_| None);
        assert!(none.add("a").is_ok() && !none.has("a"));
    }

    /// Answers on a terminal, and returns what `given` says.
    fn answer(confirmed: &Confirmed, text: &str, answer: &str) -> bool {
        let pty = nix::pty::openpty(None, None).unwrap();
        let (mut user, terminal) = (File::from(pty.master), File::from(pty.slave));
        user.write_all(answer.as_bytes()).unwrap();
        let stdio = Stdio {
            stdin: terminal.try_clone().unwrap(),
            stdout: terminal.try_clone().unwrap(),
            stderr: terminal.try_clone().unwrap(),
        };
        let signals = SignalSource::Channel(crossbeam_channel::never());
        let interrupts = Interrupts::start(&signals, &stdio.stderr).unwrap();
        let mut printer =
            Printer::new(terminal.try_clone().unwrap(), terminal.try_clone().unwrap());
        let file = ProjectFile {
            path: "/p/.devcontainer.json".into(),
            text: text.to_owned(),
        };
        given(&mut printer, &stdio, &interrupts, confirmed, &file).unwrap()
    }

    #[test]
    fn terminal_is_asked_once_for_each_content() {
        let home = tempfile::tempdir().unwrap();
        let confirmed = Confirmed {
            dir: Some(home.path().join("a/b")),
        };
        assert!(!answer(&confirmed, "{}", "n\n"));
        assert!(!answer(&confirmed, "{}", "\n"));
        assert!(answer(&confirmed, "{}", "y\n"));
        // There is no second question, so nobody reads this answer.
        assert!(answer(&confirmed, "{}", "n\n"));
        assert!(!answer(&confirmed, "{ }", "n\n"));
    }
}
