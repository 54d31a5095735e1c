//! Runs git in a work tree, with an environment and settings that let the repository run nothing.

use crate::error::{Error, Kind, Result};
use crate::host::command::{Command, Complaint};
use crate::host::piped::run_piped;
use crate::host::shell::quote;
use crate::host::text::printable;
use crate::locks::Cancel;
use crate::workspace::caller_env::CallerEnv;
use crate::workspace::git_texts;
use crate::workspace::walk::unreadable;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

/// Deadline of every git command except the one that makes the pack.
const ASK_DEADLINE: Duration = Duration::from_secs(120);
/// Maximum size of one answer from git. It is enough for some ten million paths.
const ANSWER_BYTES_MAX: usize = 1024 * 1024 * 1024;
/// Runs git commands in one work tree.
pub(in crate::workspace) struct Commands {
    /// The top of the work tree.
    pub top: PathBuf,
    pub env: CallerEnv,
    pub cancel: Cancel,
    /// The `-c` arguments that are added to every command, except for those of
    /// [`Commands::ask_config`].
    config: Vec<OsString>,
}

impl Commands {
    pub(crate) fn new(top: PathBuf, env: CallerEnv, cancel: Cancel) -> Self {
        Self {
            top,
            env,
            cancel,
            config: Vec::new(),
        }
    }

    pub(crate) fn quoted_top(&self) -> String {
        quote(&self.top.to_string_lossy())
    }

    pub(crate) fn set(&mut self, key: &[u8], value: &[u8]) {
        self.config.push("-c".into());
        self.config
            .push(OsString::from_vec([key, b"=", value].concat()));
    }

    pub(crate) fn refused(&self, e: Error) -> Error {
        if matches!(
            e.kind(),
            Kind::Cancelled | Kind::Timeout | Kind::CommandMissing | Kind::DiskFull
        ) {
            return e;
        }
        let top = self.quoted_top();
        let hint = if git_texts::is_dubious_ownership(Complaint::of(&e)) {
            format!("if you trust it, run: git config --global --add safe.directory {top}")
        } else {
            format!(
                "look with: git -C {top} status; to send only the files, copy the tree without its .git and send the copy"
            )
        };
        e.with_kind(Kind::InvalidTree)
            .context(format!(
                "{} has a .git that git refuses",
                self.top.display()
            ))
            .hint(hint)
    }

    pub(crate) fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut c = Command::new("git").deadline(ASK_DEADLINE).cwd(&self.top);
        for (key, value) in [
            ("HOME", "/nonexistent"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_OPTIONAL_LOCKS", "0"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_NO_LAZY_FETCH", "1"),
            ("GIT_NO_REPLACE_OBJECTS", "1"),
            // If git rejects a repository, it must not search the directories above it.
            (
                "GIT_CEILING_DIRECTORIES",
                &self.top.parent().unwrap_or(&self.top).to_string_lossy(),
            ),
            // Overrides every protocol.*.allow setting in the repository.
            ("GIT_ALLOW_PROTOCOL", "none"),
        ] {
            c = c.env(key, value);
        }
        if let Some(path) = &self.env.path {
            c = c.env("PATH", path);
        }
        if let Some(uid) = &self.env.sudo_uid {
            c = c.env("SUDO_UID", uid);
        }
        c.args([
            "-c",
            "core.fsmonitor=false",
            "-c",
            "core.hooksPath=/dev/null",
            "-c",
            "core.pager=cat",
        ])
        // A multi-pack index can name packs outside the repository, and git does not check the
        // names.
        .args(["-c", "core.multiPackIndex=false"])
        .args(&self.config)
        .args(args)
    }

    /// Runs git and returns its status and stdout. Statuses not listed in `accepted` are errors.
    pub(crate) fn ask_status(&self, command: &Command, accepted: &[i32]) -> Result<(i32, Vec<u8>)> {
        let mut answer = Vec::new();
        let output = run_piped(command, &self.cancel, &mut |piece| {
            if answer.len() + piece.len() > ANSWER_BYTES_MAX {
                return Err(Error::new(
                    Kind::InvalidTree,
                    "ask git: its answer is too large",
                ));
            }
            answer.extend_from_slice(piece);
            Ok(())
        })?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        if let Some(dir) = git_texts::unreadable_dir(&stderr) {
            return Err(unreadable(&printable(dir)));
        }
        if !accepted.contains(&output.status) {
            let mut lines = stderr.lines().filter(|l| !l.trim().is_empty());
            let said = lines
                .find(|l| l.starts_with("fatal:") || l.starts_with("error:"))
                .or_else(|| stderr.lines().next());
            let said = printable(
                said.unwrap_or("git printed no reason")
                    .trim_start_matches("fatal: "),
            );
            let full = git_texts::is_disk_full(&stderr);
            let kind = if full {
                Kind::DiskFull
            } else {
                Kind::CommandFailed
            };
            let e = Error::new(kind, "git").with_source(Complaint(said));
            return Err(if full {
                e.hint("free some space (df -h), or set TMPDIR to a directory with more space")
            } else {
                e
            });
        }
        Ok((output.status, answer))
    }

    pub(crate) fn ask<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Vec<u8>> {
        Ok(self.ask_status(&self.command(args), &[0])?.1)
    }

    /// Runs git and returns its output without the final newline. If the output is a path, it may
    /// contain other newlines.
    pub(crate) fn line(&self, args: &[&str]) -> Result<Vec<u8>> {
        let mut out = self.ask(args)?;
        out.pop_if(|b| *b == b'\n');
        Ok(out)
    }

    pub(crate) fn path(&self, args: &[&str]) -> Result<PathBuf> {
        Ok(self.top.join(OsString::from_vec(self.line(args)?)))
    }

    pub(crate) fn text(&self, args: &[&str]) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.line(args)?).into_owned())
    }

    /// Runs git with the caller's own environment. No other command reads the caller's global
    /// configuration.
    pub(crate) fn ask_config(&self, args: &[&str]) -> Result<(i32, Vec<u8>)> {
        let mut c = Command::new("git")
            .deadline(ASK_DEADLINE)
            .cwd(&self.top)
            .env("GIT_TERMINAL_PROMPT", "0");
        for (key, value) in self.env.for_config() {
            c = c.env(key, value);
        }
        let ceiling = self.top.parent().unwrap_or(&self.top);
        let c = c
            .env("GIT_CEILING_DIRECTORIES", ceiling)
            .args(["-c", "core.fsmonitor=false", "config"])
            .args(args);
        self.ask_status(&c, &[0, 1])
    }
}
