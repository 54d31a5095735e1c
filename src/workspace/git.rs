//! Queries git about a tree without running anything that the repository configures: no hook,
//! fsmonitor, filter, pager or fetch.

mod config;
mod filters;
mod history;
mod layout;
mod parse;

pub(super) use config::Config;
pub(super) use filters::Filtered;
pub(super) use history::{HistorySelection, Pack, Tag, pack};
pub(super) use parse::{IndexEntry, Record};

use super::beneath::Beneath;
use super::caller_env::CallerEnv;
use super::git_texts;
use super::options::Options;
use super::walk::unreadable;
use crate::error::{Error, Kind, Result};
use crate::host::command::{Command, Complaint};
use crate::host::piped::run_piped;
use crate::host::shell::quote;
use crate::locks::Cancel;
use layout::{Claim, Layout};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Deadline of every git command except the one that makes the pack.
const ASK_DEADLINE: Duration = Duration::from_secs(120);
/// Maximum size of one answer from git. It is enough for some ten million paths.
const ANSWER_BYTES_MAX: usize = 1024 * 1024 * 1024;
/// Maximum size of an exclude or attributes file that is sent to the guest.
const RULES_BYTES_MAX: u64 = 1024 * 1024;
/// Files in a git directory that exist while an operation is in progress.
const IN_PROGRESS: &[(&str, &str)] = &[
    ("MERGE_HEAD", "a merge"),
    ("CHERRY_PICK_HEAD", "a cherry-pick"),
    ("REVERT_HEAD", "a revert"),
    ("rebase-merge", "a rebase"),
    ("rebase-apply", "a rebase"),
    ("BISECT_LOG", "a bisection"),
];

/// A repository, and the configuration of its caller's git.
pub(super) struct Git {
    /// The top of the work tree.
    pub top: PathBuf,
    layout: Layout,
    /// Paths outside the repository that it may take objects from.
    allowed: Vec<PathBuf>,
    env: CallerEnv,
    cancel: Cancel,
    /// `-c` settings for every command.
    config: Vec<OsString>,
}

/// What HEAD points to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    /// A full ref name such as `refs/heads/main`, in any encoding. `None` if HEAD is detached.
    pub branch: Option<Vec<u8>>,
    /// `None` if there is no commit yet.
    pub oid: Option<String>,
}

/// Finds the top of the repository that contains `path`: the closest ancestor with a `.git`, on the
/// same file system.
pub(super) fn find_top(path: &Path) -> Result<Option<PathBuf>> {
    let device = |p: &Path| std::fs::metadata(p).map(|m| m.dev()).map_err(|e| Error::io(format!("inspect {}", p.display()), e));
    let first = device(path)?;
    for dir in path.ancestors() {
        if device(dir)? != first {
            return Ok(None);
        }
        match std::fs::symlink_metadata(dir.join(".git")) {
            Ok(_) => return Ok(Some(dir.to_owned())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(format!("inspect {}", dir.join(".git").display()), e)),
        }
    }
    Ok(None)
}

impl Git {
    /// Checks that the repository belongs to the tree and that git accepts `top` as the top of its
    /// work tree. Returns `invalid_tree` with git's reason otherwise.
    pub fn open(top: &Path, options: &Options, cancel: &Cancel) -> Result<(Self, Config)> {
        let env = options.env.clone();
        let layout = Layout::find(top)?;
        let allowed = options.allowed_alternates()?;
        let mut git = Self { top: top.to_owned(), layout, allowed, env, cancel: cancel.clone(), config: Vec::new() };
        git.check_claim()?;
        git.layout.check(&git.allowed)?;
        let mut config = git.read_config()?;
        config.add_identity(&git.env);
        for dir in git.safe_directories(&config)? {
            git.set(b"safe.directory", &dir);
        }
        if let Some(file) = git.excludes_path(&config) {
            git.set(b"core.excludesFile", file.as_os_str().as_bytes());
        }
        if let Some(file) = git.attributes_path(&config) {
            git.set(b"core.attributesFile", file.as_os_str().as_bytes());
        }
        git.check_answers()?;
        Ok((git, config))
    }

    /// Checks that git finds the same repository that was checked.
    fn check_answers(&self) -> Result<()> {
        let shown = self.path(&["rev-parse", "--show-toplevel"]).map_err(|e| self.refused(e))?;
        if !layout::real(&shown).is_ok_and(|shown| shown == self.top) {
            return Err(self.unused());
        }
        for (args, want) in [("--absolute-git-dir", &self.layout.git_dir), ("--git-common-dir", &self.layout.common)] {
            let said = self.path(&["rev-parse", args]).map_err(|e| self.refused(e))?;
            if !layout::real(&said).is_ok_and(|said| said == *want) {
                return Err(self.unused());
            }
        }
        Ok(())
    }

    fn unused(&self) -> Error {
        Error::new(Kind::InvalidTree, format!("{} has a .git that git does not use for this directory", self.top.display()))
            .hint(format!("look with: git -C {} status", self.quoted_top()))
    }

    fn quoted_top(&self) -> String {
        quote(&self.top.to_string_lossy())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) {
        self.config.push("-c".into());
        self.config.push(OsString::from_vec([key, b"=", value].concat()));
    }

    fn refused(&self, e: Error) -> Error {
        if matches!(e.kind(), Kind::Cancelled | Kind::Timeout | Kind::CommandMissing | Kind::DiskFull) {
            return e;
        }
        let top = self.quoted_top();
        let hint = if git_texts::is_dubious_ownership(Complaint::of(&e)) {
            format!("if you trust it, run: git config --global --add safe.directory {top}")
        } else {
            format!("look with: git -C {top} status; to send only the files, copy them without .git elsewhere and send that")
        };
        e.with_kind(Kind::InvalidTree).context(format!("{} has a .git that git refuses", self.top.display())).hint(hint)
    }

    /// Checks that a repository outside the tree points back at the tree. A hostile tree could name
    /// any repository that the caller can read.
    fn check_claim(&self) -> Result<()> {
        let claim = self.layout.claim();
        let is_own = match claim {
            Claim::Inside | Claim::Worktree => true,
            Claim::Setting => {
                self.allowed.iter().any(|dir| self.layout.git_dir.starts_with(dir)) || self.is_named_by_setting()?
            }
            Claim::OtherWorktree(_) | Claim::None => false,
        };
        if is_own { Ok(()) } else { Err(self.layout.foreign(&claim)) }
    }

    /// True if the repository's `core.worktree` names the tree, as it does for a submodule.
    fn is_named_by_setting(&self) -> Result<bool> {
        for name in ["config", "config.worktree"] {
            let file = self.layout.git_dir.join(name);
            if !file.is_file() {
                continue;
            }
            // Runs outside the tree, so that nothing in the tree can influence the answer.
            let c = self.command(&["config", "--null", "--no-includes", "--file"]);
            let c = c.arg(&file).args(["--get-all", "core.worktree"]).cwd("/");
            let (_, values) = self.ask_status(&c, &[0, 1])?;
            let named = values.split(|b| *b == 0).rfind(|v| !v.is_empty()).map(OsStr::from_bytes);
            let named = named.and_then(|v| layout::real(&self.layout.git_dir.join(v)).ok());
            if named.is_some_and(|dir| dir == self.top) {
                return Ok(true);
            }
        }
        Ok(false)
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
            // If git rejects a repository, it must not search the directories above it.
            ("GIT_CEILING_DIRECTORIES", &self.top.parent().unwrap_or(&self.top).to_string_lossy()),
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
        c.args(["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "core.pager=cat"])
            // A multi-pack index can name packs outside the repository, and git does not check the
            // names.
            .args(["-c", "core.multiPackIndex=false"])
            .args(&self.config)
            .args(args)
    }

    /// Runs git and returns its status and stdout. Statuses not listed in `accepted` are errors.
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
        if let Some(dir) = git_texts::unreadable_dir(&stderr) {
            return Err(unreadable(&dir.escape_debug().to_string()));
        }
        if !accepted.contains(&output.status) {
            let mut lines = stderr.lines().filter(|l| !l.trim().is_empty());
            let said = lines.find(|l| l.starts_with("fatal:") || l.starts_with("error:")).or_else(|| stderr.lines().next());
            let said = said.unwrap_or("it said nothing").trim_start_matches("fatal: ").escape_debug().to_string();
            let full = git_texts::is_disk_full(&stderr);
            let kind = if full { Kind::DiskFull } else { Kind::CommandFailed };
            let e = Error::new(kind, "git").with_source(Complaint(said));
            return Err(if full { e.hint("free some space (df -h), or set TMPDIR to a larger place") } else { e });
        }
        Ok((output.status, answer))
    }

    pub fn ask<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Vec<u8>> {
        Ok(self.ask_status(&self.command(args), &[0])?.1)
    }

    /// Runs git and returns one line without its final newline. A path may contain newlines.
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

    /// Runs git with the caller's own environment. No other command reads the caller's global
    /// configuration.
    fn ask_config(&self, args: &[&str]) -> Result<(i32, Vec<u8>)> {
        let mut c = Command::new("git").deadline(ASK_DEADLINE).cwd(&self.top).env("GIT_TERMINAL_PROMPT", "0");
        for (key, value) in self.env.for_config() {
            c = c.env(key, value);
        }
        let ceiling = self.top.parent().unwrap_or(&self.top);
        let c = c.env("GIT_CEILING_DIRECTORIES", ceiling).args(["-c", "core.fsmonitor=false", "config"]).args(args);
        self.ask_status(&c, &[0, 1])
    }

    fn read_config(&self) -> Result<Config> {
        let args = ["--null", "--show-scope", "--show-origin", "--list"];
        let (_, answer) = self.ask_config(&args).map_err(|e| self.refused(e))?;
        Ok(Config::from_list(&answer, &|origin| self.is_own_file(origin)))
    }

    /// True if the configuration file belongs to the repository. A repository's configuration can
    /// include files that belong to anybody.
    fn is_own_file(&self, origin: &[u8]) -> bool {
        let Some(file) = origin.strip_prefix(b"file:") else { return false };
        let Ok(file) = layout::real(&self.top.join(OsStr::from_bytes(file))) else { return false };
        [&self.top, &self.layout.git_dir, &self.layout.common].into_iter().any(|dir| file.starts_with(dir))
    }

    /// Resolves the values as git does: `~/proj` is relative to the caller's home, not to the home
    /// that our git commands get.
    fn safe_directories(&self, config: &Config) -> Result<Vec<Vec<u8>>> {
        let given = &config.safe_directories;
        if !given.iter().any(|dir| dir.starts_with(b"~") || dir.starts_with(b"%(")) {
            return Ok(given.clone());
        }
        let args = ["--null", "--show-scope", "--type=path", "--get-all", "safe.directory"];
        match self.ask_config(&args) {
            Ok((_, answer)) => Ok(Config::values(&answer)),
            Err(e) if e.kind() == Kind::CommandFailed => Ok(given.clone()),
            Err(e) => Err(e),
        }
    }

    /// The ignore file that the caller's git reads in addition to the repository's own.
    fn excludes_path(&self, config: &Config) -> Option<PathBuf> {
        match &config.excludes_file {
            Some((path, _)) if path.is_empty() => None,
            Some((path, _)) => Some(self.env.expand(&self.top, path)),
            None => self.env.default_excludes(),
        }
    }

    /// The attributes file that the caller's git uses for all repositories. A file that the
    /// repository names is ignored, because that could be any of the caller's files.
    fn attributes_path(&self, config: &Config) -> Option<PathBuf> {
        match &config.attributes_file {
            Some((path, own)) if *own || path.is_empty() => None,
            Some((path, _)) => Some(self.env.expand(&self.top, path)),
            None => self.env.default_attributes(),
        }
    }

    /// The text of the caller's attributes file.
    pub fn global_attributes(&self, config: &Config) -> Vec<u8> {
        let file = self.attributes_path(config).and_then(|path| std::fs::File::open(path).ok());
        file.and_then(|f| crate::host::command::read_bounded(f, RULES_BYTES_MAX).ok()).unwrap_or_default()
    }

    pub fn head(&self) -> Result<Head> {
        let (status, name) = self.ask_status(&self.command(&["symbolic-ref", "-q", "HEAD"]), &[0, 1])?;
        let branch = (status == 0).then(|| name.trim_ascii_end().to_vec());
        let (status, _) = self.ask_status(&self.command(&["rev-parse", "-q", "--verify", "HEAD"]), &[0, 1])?;
        if status == 1 {
            if branch.is_none() {
                return Err(self.refused(Error::new(Kind::InvalidTree, "its HEAD does not name a commit")));
            }
            return Ok(Head { branch, oid: None });
        }
        let oid = self.text(&["rev-parse", "-q", "--verify", "HEAD^{commit}"]).map_err(|e| self.refused(e))?;
        Ok(Head { branch, oid: Some(oid) })
    }

    /// Names the operations in progress, such as a merge. Their state is not sent.
    pub fn operations_in_progress(&self) -> Vec<&'static str> {
        let is_there = |name: &str| self.layout.git_dir.join(name).symlink_metadata().is_ok();
        IN_PROGRESS.iter().filter(|(file, _)| is_there(file)).map(|(_, what)| *what).collect()
    }

    /// Returns `sha1` or `sha256`.
    pub fn object_format(&self) -> Result<String> {
        self.text(&["rev-parse", "--show-object-format"])
    }

    /// The directory that holds objects and refs.
    pub fn common_dir(&self) -> &Path {
        &self.layout.common
    }

    pub fn index(&self) -> Result<Vec<IndexEntry>> {
        parse::index(&self.ask(&["ls-files", "-s", "-v", "-z"])?)
    }

    /// Lists tracked paths, including deleted ones, and untracked paths that are not ignored. A
    /// nested repository ends with a slash. Sorted, without duplicates.
    pub fn listed(&self) -> Result<Vec<Vec<u8>>> {
        let mut paths = parse::paths(&self.ask(&["ls-files", "-z", "-co", "--exclude-standard"])?);
        paths.sort_unstable();
        paths.dedup();
        Ok(paths)
    }

    /// Lists how the index differs from HEAD. With `visible`, entries from `git add
    /// --intent-to-add` are included.
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

    /// Returns the ignore rules that are not in the tree, and a warning if some are not sent. The
    /// caller's own rules come first, because later rules win.
    pub fn exclude_rules(&self, config: &Config) -> Result<(Vec<u8>, Option<String>)> {
        let mut rules = Vec::new();
        let mut note = None;
        if let Some(file) = self.excludes_path(config) {
            // If the repository names the file, it could be any of the caller's files, so its text
            // is not sent.
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

    /// Reads a file in `.git/info`. Returns nothing if it is missing or a link.
    pub fn info_file(&self, name: &str) -> Result<Vec<u8>> {
        self.own_file(&format!("info/{name}"), RULES_BYTES_MAX)
    }

    /// Reads the sparse-checkout patterns. Each work tree has its own.
    pub fn sparse_patterns(&self) -> Result<Vec<u8>> {
        read_own(&self.layout.git_dir, "info/sparse-checkout", RULES_BYTES_MAX)
    }

    /// Reads up to `bytes_max` bytes of a file in the repository. Returns nothing if it is missing
    /// or a link is on the way.
    pub fn own_file(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>> {
        read_own(self.common_dir(), name, bytes_max)
    }
}

fn read_own(dir: &Path, name: &str, bytes_max: u64) -> Result<Vec<u8>> {
    match Beneath::open(dir).and_then(|mut dir| dir.open_file(name.as_bytes())) {
        Ok(file) if file.metadata().is_ok_and(|m| m.is_file()) => {
            crate::host::command::read_bounded(file, bytes_max).map_err(|e| Error::io(format!("read {name}"), e))
        }
        _ => Ok(Vec::new()),
    }
}
