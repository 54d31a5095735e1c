//! What git knows of a tree, asked so that nothing of the repository runs: no hook, fsmonitor, filter, pager, fetch.

mod history;
mod parse;

pub(super) use history::{History1, Pack, pack};
pub(super) use parse::{IndexEntry, Record};

use super::plan::CallerEnv;
use crate::error::{Error, Kind, Result};
use crate::host::command::Command;
use crate::host::piped::run_piped;
use crate::locks::Cancel;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// For anything but making the pack.
const ASK_DEADLINE: Duration = Duration::from_secs(120);
/// Most bytes that one answer of git may have: some ten million paths.
const ANSWER_BYTES_MAX: usize = 1024 * 1024 * 1024;
/// Most bytes of an exclude or attributes file that are passed on.
const RULES_BYTES_MAX: u64 = 1024 * 1024;
/// Settings that decide what `git status` says and that hold no secret. Values are words.
const CARRIED: &[&str] = &[
    "core.filemode",
    "core.symlinks",
    "core.autocrlf",
    "core.eol",
    "core.safecrlf",
    "core.ignorecase",
    "core.quotepath",
    "status.renames",
    "status.showuntrackedfiles",
    "diff.renames",
];

/// A repository and how its caller's git is set up.
pub(super) struct Git {
    /// The top of the work tree.
    pub top: PathBuf,
    env: CallerEnv,
    cancel: Cancel,
    /// `-c` settings for every command.
    config: Vec<OsString>,
}

/// What the caller's configuration says.
#[derive(Debug, Default)]
pub(super) struct Config {
    pub user_name: Option<Vec<u8>>,
    pub user_email: Option<Vec<u8>>,
    /// Of [`CARRIED`], in the order they were found.
    pub carried: Vec<(String, String)>,
    safe_directories: Vec<Vec<u8>>,
    /// And whether the repository itself said so.
    excludes_file: Option<(Vec<u8>, bool)>,
    pub partial_clone: bool,
    core_worktree: Option<Vec<u8>>,
}

/// Where HEAD is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    /// `refs/heads/main`; None: detached.
    pub branch: Option<String>,
    /// None: no commit yet.
    pub oid: Option<String>,
}

/// The top of the repository that `path` belongs to: the closest directory upwards that has a `.git`, on the same
/// file system.
pub(super) fn find_top(path: &Path) -> Result<Option<PathBuf>> {
    let device = |p: &Path| std::fs::metadata(p).map(|m| m.dev()).map_err(|e| Error::io(format!("look at {}", p.display()), e));
    let first = device(path)?;
    for dir in path.ancestors() {
        if device(dir)? != first {
            return Ok(None);
        }
        match std::fs::symlink_metadata(dir.join(".git")) {
            Ok(_) => return Ok(Some(dir.to_owned())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(format!("look at {}", dir.join(".git").display()), e)),
        }
    }
    Ok(None)
}

impl Git {
    /// Checks that git accepts `top` as the top of a work tree. `invalid_tree` with git's reason where it does not.
    pub fn open(top: &Path, env: &CallerEnv, cancel: &Cancel) -> Result<(Self, Config)> {
        let mut git = Self { top: top.to_owned(), env: env.clone(), cancel: cancel.clone(), config: Vec::new() };
        let config = git.read_config()?;
        for dir in &config.safe_directories {
            git.set(b"safe.directory", dir);
        }
        if let Some(file) = git.excludes_path(&config) {
            git.set(b"core.excludesFile", file.as_os_str().as_bytes());
        }
        let shown = git.line(&["rev-parse", "--show-toplevel"]).map_err(|e| git.refused(e))?;
        let same =
            |a: &Path, b: &Path| std::fs::canonicalize(a).ok().is_some_and(|a| std::fs::canonicalize(b).is_ok_and(|b| a == b));
        if !same(Path::new(OsStr::from_bytes(&shown)), top) {
            return Err(Error::new(Kind::InvalidTree, format!("{} has a .git that git does not use for it", top.display()))
                .hint(format!("look with: git -C {} status", top.display())));
        }
        git.check_link(&config)?;
        Ok((git, config))
    }

    fn set(&mut self, key: &[u8], value: &[u8]) {
        self.config.push("-c".into());
        self.config.push(OsString::from_vec([key, b"=", value].concat()));
    }

    fn refused(&self, e: Error) -> Error {
        if matches!(e.kind(), Kind::Cancelled | Kind::Timeout | Kind::CommandMissing | Kind::DiskFull) {
            return e;
        }
        let hint = if e.message().contains("dubious ownership") {
            format!("if you trust it, run: git config --global --add safe.directory {}", self.top.display())
        } else {
            format!(
                "mend it, or move the .git away to send everything as plain files; look with: git -C {} status",
                self.top.display()
            )
        };
        e.with_kind(Kind::InvalidTree).context(format!("{} has a .git that git refuses", self.top.display())).hint(hint)
    }

    /// A `.git` file or link leads elsewhere; a foreign tree could lead to any repository of the caller's. The
    /// repository has to point back: a worktree's `gitdir` does, a submodule's `core.worktree` does.
    fn check_link(&self, config: &Config) -> Result<()> {
        let dot_git = self.top.join(".git");
        let meta = std::fs::symlink_metadata(&dot_git).map_err(|e| Error::io(format!("look at {}", dot_git.display()), e))?;
        if meta.is_dir() {
            return Ok(());
        }
        let git_dir = self.path(&["rev-parse", "--absolute-git-dir"])?;
        let back = std::fs::read(git_dir.join("gitdir")).unwrap_or_default();
        let back = git_dir.join(OsStr::from_bytes(back.trim_ascii_end()));
        let real = |p: &Path| std::fs::canonicalize(p).ok();
        let top = real(&self.top);
        let worktree = config.core_worktree.as_ref().and_then(|w| real(&git_dir.join(OsStr::from_bytes(w))));
        let points_back = back.file_name() == Some(OsStr::new(".git")) && back.parent().and_then(real) == top;
        if points_back || (worktree.is_some() && worktree == top) {
            return Ok(());
        }
        Err(Error::new(
            Kind::InvalidTree,
            format!("{} leads to {}, which does not belong to this tree", dot_git.display(), git_dir.display()),
        )
        .hint(format!(
            "if it does, run: git --git-dir={} config core.worktree {}",
            git_dir.display(),
            self.top.display()
        )))
    }

    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut c = Command::new("git").deadline(ASK_DEADLINE).cwd(&self.top);
        for (key, value) in [
            ("HOME", "/nonexistent"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_OPTIONAL_LOCKS", "0"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_NO_LAZY_FETCH", "1"),
            ("GIT_NO_REPLACE_OBJECTS", "1"),
            // Settles the question whatever protocol.*.allow says in the repository.
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
        c.args(["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "core.pager=cat"])
            .args(&self.config)
            .args(args)
    }

    /// Runs git; `accepted` are the statuses that are an answer. Gives status and stdout.
    pub fn ask_status(&self, command: &Command, accepted: &[i32]) -> Result<(i32, Vec<u8>)> {
        let mut answer = Vec::new();
        let output = run_piped(command, &self.cancel, &mut |piece| {
            if answer.len() + piece.len() > ANSWER_BYTES_MAX {
                return Err(Error::new(Kind::InvalidTree, "ask git: its answer is too large"));
            }
            answer.extend_from_slice(piece);
            Ok(())
        })?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        if let Some(line) = stderr.lines().find(|l| l.starts_with("warning: could not open directory")) {
            let what = line.trim_start_matches("warning: could not open directory ").escape_debug().to_string();
            return Err(unreadable(&what));
        }
        if !accepted.contains(&output.status) {
            let mut lines = stderr.lines().filter(|l| !l.trim().is_empty());
            let said = lines.find(|l| l.starts_with("fatal:") || l.starts_with("error:")).or_else(|| stderr.lines().next());
            let said = said.unwrap_or("it said nothing").trim_start_matches("fatal: ").escape_debug().to_string();
            let full = stderr.contains("No space left on device");
            let kind = if full { Kind::DiskFull } else { Kind::CommandFailed };
            let e = Error::new(kind, format!("git: {said}"));
            return Err(if full { e.hint("free some space (df -h), or set TMPDIR to a larger place") } else { e });
        }
        Ok((output.status, answer))
    }

    pub fn ask<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Vec<u8>> {
        Ok(self.ask_status(&self.command(args), &[0])?.1)
    }

    /// One line, without its newline: a path may have some of its own.
    fn line(&self, args: &[&str]) -> Result<Vec<u8>> {
        let mut out = self.ask(args)?;
        out.pop_if(|b| *b == b'\n');
        Ok(out)
    }

    fn path(&self, args: &[&str]) -> Result<PathBuf> {
        Ok(self.top.join(OsString::from_vec(self.line(args)?)))
    }

    fn text(&self, args: &[&str]) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.line(args)?).into_owned())
    }

    /// With the caller's own surroundings: only this command looks at the global configuration.
    fn read_config(&self) -> Result<Config> {
        let mut c = Command::new("git").deadline(ASK_DEADLINE).cwd(&self.top).env("GIT_TERMINAL_PROMPT", "0");
        for (key, value) in self.env.for_config() {
            c = c.env(key, value);
        }
        let c = c.args(["-c", "core.fsmonitor=false", "config", "--null", "--show-scope", "--list"]);
        let (_, answer) = self.ask_status(&c, &[0]).map_err(|e| self.refused(e))?;
        Ok(Config::from_list(&answer))
    }

    /// The file of ignore rules that the caller's git uses beside the repository's own.
    fn excludes_path(&self, config: &Config) -> Option<PathBuf> {
        match &config.excludes_file {
            Some((path, _)) if path.is_empty() => None,
            Some((path, _)) => Some(self.env.expand(&self.top, path)),
            None => self.env.default_excludes(),
        }
    }

    pub fn head(&self) -> Result<Head> {
        let (status, name) = self.ask_status(&self.command(&["symbolic-ref", "-q", "HEAD"]), &[0, 1])?;
        let branch = (status == 0).then(|| String::from_utf8_lossy(name.trim_ascii_end()).into_owned());
        let (status, _) = self.ask_status(&self.command(&["rev-parse", "-q", "--verify", "HEAD"]), &[0, 1])?;
        if status == 1 {
            if branch.is_none() {
                return Err(self.refused(Error::new(Kind::InvalidTree, "its HEAD names no commit")));
            }
            return Ok(Head { branch, oid: None });
        }
        let oid = self.text(&["rev-parse", "-q", "--verify", "HEAD^{commit}"]).map_err(|e| self.refused(e))?;
        Ok(Head { branch, oid: Some(oid) })
    }

    /// `sha1` or `sha256`.
    pub fn object_format(&self) -> Result<String> {
        self.text(&["rev-parse", "--show-object-format"])
    }

    pub fn common_dir(&self) -> Result<PathBuf> {
        self.path(&["rev-parse", "--git-common-dir"])
    }

    pub fn index(&self) -> Result<Vec<IndexEntry>> {
        parse::index(&self.ask(&["ls-files", "-s", "-v", "-z"])?)
    }

    /// Tracked paths (also those that are gone) and untracked ones that are not ignored; a repository inside ends
    /// with a slash. Sorted, each once.
    pub fn listed(&self) -> Result<Vec<Vec<u8>>> {
        let mut paths = parse::paths(&self.ask(&["ls-files", "-z", "-co", "--exclude-standard"])?);
        paths.sort_unstable();
        paths.dedup();
        Ok(paths)
    }

    /// How the index differs from HEAD. `visible`: entries that are only intended to be added count.
    pub fn staged(&self, head: &Head, format: &str, visible: bool) -> Result<Vec<Record>> {
        let empty = match format {
            "sha256" => "6ef19b41225c5369f1c104d45d8d85efa9b057b53b14b4b9b939dd74decc5321",
            _ => "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
        };
        let ita = if visible { "--ita-visible-in-index" } else { "--ita-invisible-in-index" };
        let tree = head.oid.as_deref().unwrap_or(empty);
        let args = ["diff-index", "--cached", "--raw", "-z", "--no-renames", "--no-abbrev", "--no-ext-diff", ita, tree];
        parse::raw_diff(&self.ask(&args).map_err(|e| self.refused(e))?)
    }

    /// Ignore rules beside those in the tree, the caller's own first: later rules win. And what was left out.
    pub fn exclude_rules(&self, config: &Config) -> Result<(Vec<u8>, Option<String>)> {
        let mut rules = Vec::new();
        let mut note = None;
        if let Some(file) = self.excludes_path(config) {
            // Where the repository names the file, it could be any file of the caller's: its text stays here.
            let foreign = matches!(&config.excludes_file, Some((_, true)));
            if foreign {
                note = Some(format!("ignore rules of {} were applied here but are not sent", file.display()));
            } else if let Ok(file) = std::fs::File::open(file) {
                rules = crate::host::command::read_bounded(file, RULES_BYTES_MAX).unwrap_or_default();
                rules.push(b'\n');
            }
        }
        rules.extend(self.info_file("exclude")?);
        Ok((rules, note))
    }

    /// A file of `.git/info`, empty where there is none or it is a link.
    pub fn info_file(&self, name: &str) -> Result<Vec<u8>> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.common_dir()?.join("info").join(name);
        let mut options = std::fs::OpenOptions::new();
        options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        match options.open(path) {
            Ok(file) if file.metadata().is_ok_and(|m| m.is_file()) => {
                crate::host::command::read_bounded(file, RULES_BYTES_MAX).map_err(|e| Error::io(format!("read info/{name}"), e))
            }
            _ => Ok(Vec::new()),
        }
    }
}

pub(super) fn unreadable(what: &str) -> Error {
    Error::new(Kind::InvalidTree, format!("cannot read {what}"))
        .hint("make it readable, or have git ignore it (.gitignore), then try again")
}

impl Config {
    /// From `git config --null --show-scope --list`: scope NUL key LF value NUL.
    fn from_list(list: &[u8]) -> Self {
        let mut config = Config::default();
        let mut fields = list.split(|b| *b == 0);
        while let (Some(scope), Some(item)) = (fields.next(), fields.next()) {
            let (key, value) = match item.iter().position(|b| *b == b'\n') {
                Some(at) => (&item[..at], &item[at + 1..]),
                None => (item, &b"true"[..]),
            };
            let key = String::from_utf8_lossy(key).into_owned();
            let own = matches!(scope, b"local" | b"worktree");
            config.take(&key, value, own);
        }
        config
    }

    fn take(&mut self, key: &str, value: &[u8], own: bool) {
        match key {
            "user.name" => self.user_name = Some(value.to_vec()),
            "user.email" => self.user_email = Some(value.to_vec()),
            "safe.directory" if !own => self.safe_directories.push(value.to_vec()),
            "core.excludesfile" => self.excludes_file = Some((value.to_vec(), own)),
            "core.worktree" if own => self.core_worktree = Some(value.to_vec()),
            "extensions.partialclone" => self.partial_clone = true,
            _ if key.starts_with("remote.") && key.ends_with(".promisor") => self.partial_clone = true,
            _ if CARRIED.contains(&key) => {
                if let Ok(word) = std::str::from_utf8(value)
                    && word.len() <= 16
                    && !word.is_empty()
                    && word.bytes().all(|b| b.is_ascii_alphanumeric())
                {
                    self.carried.retain(|(k, _)| k != key);
                    self.carried.push((key.to_owned(), word.to_owned()));
                }
            }
            _ => {}
        }
    }

    /// Lines for the guest's `.git/config`.
    pub fn for_guest(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (key, value) in [("name", &self.user_name), ("email", &self.user_email)] {
            if let Some(value) = value {
                out.extend_from_slice(format!("[user]\n\t{key} = ").as_bytes());
                out.extend(quoted(value));
                out.push(b'\n');
            }
        }
        for (key, value) in &self.carried {
            if let Some((section, name)) = key.split_once('.') {
                out.extend_from_slice(format!("[{section}]\n\t{name} = {value}\n").as_bytes());
            }
        }
        out
    }
}

/// A value as git's configuration files write it.
fn quoted(value: &[u8]) -> Vec<u8> {
    let mut out = vec![b'"'];
    for &b in value {
        match b {
            b'"' | b'\\' => out.extend([b'\\', b]),
            b'\n' => out.extend(b"\\n"),
            b'\t' => out.extend(b"\\t"),
            0 => {}
            _ => out.push(b),
        }
    }
    out.push(b'"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_settings_are_carried() {
        let list =
            b"global\0user.name\nA \"B\"\0local\0user.email\na@b\0local\0core.autocrlf\ninput\0local\0core.sshcommand\nevil\0\
            local\0remote.o.url\nhttps://u:p@h\0local\0core.eol\n$(x)\0local\0safe.directory\n*\0global\0safe.directory\n/x\0\
            local\0core.excludesfile\n/etc/shadow\0local\0status.renames\0";
        let config = Config::from_list(list);
        assert_eq!(config.safe_directories, [b"/x".to_vec()]);
        assert_eq!(config.excludes_file, Some((b"/etc/shadow".to_vec(), true)));
        let text = String::from_utf8(config.for_guest()).unwrap();
        expect_test::expect![[r#"
            [user]
            	name = "A \"B\""
            [user]
            	email = "a@b"
            [core]
            	autocrlf = input
            [status]
            	renames = true
        "#]]
        .assert_eq(&text);
    }
}
