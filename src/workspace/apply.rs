//! Applies a patch from a guest to a tree on this host, byte for byte.
//!
//! The patch holds the bytes of a work tree. Inside a repository, `git apply` would take them for
//! stored content and convert them again: `working-tree-encoding` encodes twice, a filter smudges,
//! `ident` and line endings no longer match. Therefore git gets a scratch repository whose
//! attributes disable every conversion, with the caller's tree as its work tree. git reads nothing
//! from the caller's repository, so no filter or hook can run.
//!
//! git itself rejects paths that lead out of the tree, through a symbolic link or into a `.git`. It
//! checks the whole patch before it changes the first file, but it does not check everything that
//! can fail while it writes. [`Checked`] covers the rest.

use super::caller_env::CallerEnv;
use super::encode::encode;
use super::git::find_top;
use super::git_texts;
use crate::error::{Error, Kind, Result};
use crate::host::command::{Command, Output};
use crate::host::piped::run_piped;
use crate::host::shell::quote;
use crate::host::text::printable;
use crate::locks::Cancel;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Deadline of each of git's two passes over the patch.
const APPLY_DEADLINE: Duration = Duration::from_secs(1800);
/// Deadline of queries about the caller's configuration.
const ASK_DEADLINE: Duration = Duration::from_secs(30);
/// Maximum size of git's list of files.
const LIST_BYTES_MAX: usize = 1024 * 1024 * 1024;
/// Maximum number of reasons that an error quotes.
const NAMED_MAX: usize = 5;
const UNCHANGED: &str =
    "nothing was changed; move or commit your files, then run the command again";
/// Maximum number of bytes of the patch that are searched for the first object name.
const PROBE_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// The attributes that disable every conversion, including those that the tree's own attributes
/// request. The guest's private repository has the same attributes.
const NO_CONVERSION: &str = "* -text !eol -filter -ident -working-tree-encoding !diff\n";

/// A file that the patch changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub path: Vec<u8>,
    /// The number of added lines, or `None` for a binary file.
    pub added: Option<u64>,
    pub removed: Option<u64>,
}

/// A patch that fits the tree. git has checked all of it and changed nothing yet.
#[derive(Debug)]
pub struct Checked {
    scratch: tempfile::TempDir,
    top: PathBuf,
    patch: PathBuf,
    env: CallerEnv,
    pub changes: Vec<Change>,
}

/// Returns the tree to which a patch in `dir` applies: the top of the repository that contains
/// `dir`, or `dir` itself outside a repository. Returns `path_not_found` if `dir` is not a
/// directory.
pub fn top_of(dir: &Path) -> Result<PathBuf> {
    let real = std::fs::canonicalize(dir).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::new(
            Kind::PathNotFound,
            format!("{} does not exist", dir.display()),
        )
        .hint("pass the directory of the repository"),
        _ => Error::io(format!("inspect {}", dir.display()), e),
    })?;
    if !real.is_dir() {
        return Err(Error::new(
            Kind::PathNotFound,
            format!("{} is not a directory", dir.display()),
        )
        .hint("pass the directory of the repository"));
    }
    Ok(find_top(&real)?.unwrap_or(real))
}

/// Checks that the whole patch fits `top`, without changing anything. Errors: `conflict` (the tree
/// has other content there, or the patch has a path that may not be written), `command_missing`
/// (git), `cancelled`, `host`.
pub fn check(top: &Path, patch: &Path, env: &CallerEnv, cancel: &Cancel) -> Result<Checked> {
    let doing = || format!("inspect {}", patch.display());
    let patch = std::fs::canonicalize(patch).map_err(|e| Error::io(doing(), e))?;
    let file = File::open(&patch).map_err(|e| Error::io(doing(), e))?;
    let is_empty = file.metadata().map_err(|e| Error::io(doing(), e))?.len() == 0;
    let format = if is_sha256(file).map_err(|e| Error::io(doing(), e))? {
        "sha256"
    } else {
        "sha1"
    };
    let scratch = tempfile::Builder::new()
        .prefix("fcctl-apply-")
        .tempdir()
        .map_err(|e| Error::io("create a temporary directory", e))?;
    let mut checked = Checked {
        scratch,
        top: top.to_owned(),
        patch,
        env: env.clone(),
        changes: Vec::new(),
    };
    if !is_empty {
        checked.make_repository(format, cancel)?;
        let (output, list) = checked.apply(&["--check", "--numstat", "-z"], cancel)?;
        if output.status != 0 {
            return Err(checked.refusal(&output));
        }
        checked.changes = parse_changes(&list)?;
        checked.look_for_obstacles(cancel)?;
    }
    Ok(checked)
}

impl Checked {
    /// Applies the patch. This cannot be cancelled once it has started, so that an interruption
    /// leaves either all of the patch or nothing.
    pub fn apply_all(self) -> Result<Vec<Change>> {
        if self.changes.is_empty() {
            return Ok(self.changes);
        }
        let cancel = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
        let (output, _) = self.apply(&[], &cancel)?;
        if output.status != 0 {
            let e = self.refusal(&output);
            return Err(e.hint(format!(
                "the tree has changed since the check; inspect it with: git -C {} status",
                shown(&self.top)
            )));
        }
        Ok(self.changes)
    }

    fn git(&self) -> Command {
        let mut c = Command::new("git").cwd(&self.top).deadline(APPLY_DEADLINE);
        for (key, value) in [
            ("HOME", "/nonexistent"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_ATTR_NOSYSTEM", "1"),
            ("GIT_TERMINAL_PROMPT", "0"),
        ] {
            c = c.env(key, value);
        }
        match &self.env.path {
            Some(path) => c.env("PATH", path),
            None => c,
        }
    }

    fn make_repository(&self, format: &str, cancel: &Cancel) -> Result<()> {
        let scratch = self.scratch.path();
        let init = self
            .git()
            .args(["init", "-q", "--bare", "--template="])
            .arg(format!("--object-format={format}"))
            .arg(scratch);
        let output = run_piped(&init, cancel, &mut |_| Ok(()))?;
        if output.status != 0 {
            return Err(self.refusal(&output));
        }
        let info = scratch.join("info");
        std::fs::create_dir_all(&info)
            .and_then(|()| std::fs::write(info.join("attributes"), NO_CONVERSION))
            .map_err(|e| Error::io("create a scratch repository", e))
    }

    fn apply(&self, options: &[&str], cancel: &Cancel) -> Result<(Output, Vec<u8>)> {
        let command = self
            .git()
            .arg("--git-dir")
            .arg(self.scratch.path())
            .arg("--work-tree")
            .arg(&self.top)
            .args([
                "-c",
                "core.bare=false",
                "-c",
                "core.autocrlf=false",
                "-c",
                "core.attributesFile=/dev/null",
            ])
            .args(["apply", "--whitespace=nowarn"])
            .args(options)
            .arg(&self.patch);
        let mut list = Vec::new();
        let output = run_piped(&command, cancel, &mut |piece| {
            if list.len() + piece.len() > LIST_BYTES_MAX {
                return Err(Error::new(
                    Kind::InvalidTree,
                    "the patch has too many files",
                ));
            }
            list.extend_from_slice(piece);
            Ok(())
        })?;
        Ok((output, list))
    }

    /// Checks for three obstacles that git would find only after it has applied half of the patch:
    /// a directory with the user's files in place of a file, a user's file in place of a directory,
    /// and a directory that is not writable.
    fn look_for_obstacles(&self, cancel: &Cancel) -> Result<()> {
        let touched: HashSet<&[u8]> = self.changes.iter().map(|c| c.path.as_slice()).collect();
        let mut looked_at = HashSet::new();
        for change in &self.changes {
            if let Some(cause) = cancel.cause() {
                return Err(Error::new(
                    Kind::Cancelled,
                    format!("apply the patch: cancelled: {cause}"),
                ));
            }
            for (at, _) in change.path.iter().enumerate().filter(|(_, b)| **b == b'/') {
                let above = &change.path[..at];
                // If the patch changes a path and also has files below it, the patch removes the
                // file at that path.
                if looked_at.insert(above)
                    && !touched.contains(above)
                    && self.is(above, |m| !m.is_dir())
                {
                    return Err(self.conflict(above, "is a file here and a directory in the patch"));
                }
            }
            if self.is(&change.path, |m| m.is_dir()) && self.stays(&change.path, &touched)? {
                return Err(self.conflict(
                    &change.path,
                    "is a directory here, with content that the patch does not remove",
                ));
            }
            self.look_at_rights(&change.path)?;
        }
        Ok(())
    }

    fn is(&self, path: &[u8], what: impl Fn(&std::fs::Metadata) -> bool) -> bool {
        self.top
            .join(OsStr::from_bytes(path))
            .symlink_metadata()
            .is_ok_and(|m| what(&m))
    }

    /// True if a directory remains after the `touched` files in it are gone. git removes
    /// directories that become empty.
    fn stays(&self, dir: &[u8], touched: &HashSet<&[u8]>) -> Result<bool> {
        let mut pending = vec![dir.to_vec()];
        while let Some(at) = pending.pop() {
            let doing = || format!("read directory {}", encode(&at));
            let items = std::fs::read_dir(self.top.join(OsStr::from_bytes(&at)))
                .map_err(|e| Error::io(doing(), e))?;
            let mut is_empty = true;
            for item in items {
                let item = item.map_err(|e| Error::io(doing(), e))?;
                let path = [&at[..], b"/", item.file_name().as_bytes()].concat();
                is_empty = false;
                if item.file_type().is_ok_and(|t| t.is_dir()) {
                    pending.push(path);
                } else if !touched.contains(path.as_slice()) {
                    return Ok(true);
                }
            }
            if is_empty && at != dir {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Checks that the closest existing directory above `path` is writable, because git replaces
    /// every file that it changes.
    fn look_at_rights(&self, path: &[u8]) -> Result<()> {
        use rustix::fs::{Access, AtFlags, CWD, accessat};
        let full = self.top.join(OsStr::from_bytes(path));
        let closest = full
            .ancestors()
            .skip(1)
            .find(|a| a.is_dir())
            .unwrap_or(&self.top);
        match accessat(
            CWD,
            closest,
            Access::WRITE_OK | Access::EXEC_OK,
            AtFlags::EACCESS,
        ) {
            Ok(()) => Ok(()),
            Err(e) => Err(Error::io(
                format!("write to {} in {}", encode(path), closest.display()),
                e,
            )
            .hint("nothing was changed; you need write permission for that directory")),
        }
    }

    fn conflict(&self, path: &[u8], why: &str) -> Error {
        Error::new(
            Kind::Conflict,
            format!(
                "apply the patch to {}: {} {why}",
                self.top.display(),
                encode(path)
            ),
        )
        .hint(UNCHANGED)
    }

    /// Builds the error from git's first few reasons, on one line.
    fn refusal(&self, output: &Output) -> Error {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let said = stderr.lines().filter_map(|l| {
            l.strip_prefix("error: ")
                .or_else(|| l.strip_prefix("fatal: "))
        });
        // git reports each failure twice: first the hunk that fails, then the file that does not
        // apply. Skip the report of the hunk.
        let said: Vec<String> = said
            .filter(|l| !git_texts::is_hunk(l))
            .map(printable)
            .collect();
        let doing = format!("apply the patch to {}", self.top.display());
        if git_texts::is_disk_full(&stderr) {
            return Error::new(Kind::DiskFull, format!("{doing}: the disk is full")).hint(format!(
                "inspect what was written with: git -C {} status",
                shown(&self.top)
            ));
        }
        let more = match said.len().saturating_sub(NAMED_MAX) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        let reason = match said.is_empty() {
            true => format!("git ended with status {}", output.status),
            false => said[..said.len().min(NAMED_MAX)].join("; "),
        };
        Error::new(Kind::Conflict, format!("{doing}: {reason}{more}")).hint(UNCHANGED)
    }
}

fn shown(path: &Path) -> String {
    quote(&path.display().to_string())
}

/// Parses records `<added> TAB <removed> TAB <path> NUL`. A binary file has two dashes.
fn parse_changes(list: &[u8]) -> Result<Vec<Change>> {
    let bad = || {
        Error::new(
            Kind::CommandFailed,
            "git: unexpected form of its list of changed files",
        )
    };
    let mut out = Vec::new();
    for record in list.split(|b| *b == 0).filter(|r| !r.is_empty()) {
        let mut fields = record.splitn(3, |b| *b == b'\t');
        let mut number = || -> Result<Option<u64>> {
            match std::str::from_utf8(fields.next().ok_or_else(bad)?).map_err(|_| bad())? {
                "-" => Ok(None),
                n => n.parse().map(Some).map_err(|_| bad()),
            }
        };
        let (added, removed) = (number()?, number()?);
        let path = fields.next().ok_or_else(bad)?.to_vec();
        out.push(Change {
            path,
            added,
            removed,
        });
    }
    Ok(out)
}

/// True if the first object name in a patch has 64 digits. git applies a binary patch only in a
/// repository with the same object format.
fn is_sha256(patch: impl Read) -> std::io::Result<bool> {
    let mut lines = BufReader::new(patch.take(PROBE_BYTES_MAX));
    let mut line = Vec::new();
    loop {
        line.clear();
        if lines.read_until(b'\n', &mut line)? == 0 {
            return Ok(false);
        }
        if let Some(names) = line.strip_prefix(b"index ") {
            return Ok(names.iter().take_while(|b| b.is_ascii_hexdigit()).count() == 64);
        }
    }
}

/// Builds the shell command that applies a patch file to `top` from `cwd` without a repository. It
/// disables each conversion that the caller has configured for all repositories. Returns `None` if
/// only fcctl can apply the patch, or if the patch or the caller's settings cannot be read.
pub fn by_hand(
    top: &Path,
    cwd: &Path,
    patch: &Path,
    env: &CallerEnv,
    cancel: &Cancel,
) -> Option<String> {
    if File::open(patch).and_then(is_sha256).ok()? {
        return None;
    }
    let mut words = Vec::new();
    if Path::new("/etc/gitattributes").exists() {
        words.push("GIT_ATTR_NOSYSTEM=1".to_owned());
    }
    words.push("git".to_owned());
    let same = |a: &Path, b: &Path| std::fs::canonicalize(a).ok() == std::fs::canonicalize(b).ok();
    let is_here = same(top, cwd);
    if !is_here {
        words.extend(["-C".to_owned(), shown(top)]);
    }
    words.push("--git-dir=".to_owned());
    let settings = settings(env, cancel)?;
    let has = |key: &str| settings.iter().any(|k| k == key);
    if has("core.autocrlf") {
        words.extend(["-c", "core.autocrlf=false"].map(str::to_owned));
    }
    if has("core.attributesfile") || env.default_attributes().is_some() {
        words.extend(["-c", "core.attributesFile=/dev/null"].map(str::to_owned));
    }
    words.push("apply".to_owned());
    if has("apply.whitespace") {
        words.push("--whitespace=nowarn".to_owned());
    }
    if has("apply.ignorewhitespace") {
        words.push("--no-ignore-whitespace".to_owned());
    }
    // git changes to `top` before it opens the file.
    let patch = if is_here {
        patch.to_owned()
    } else {
        std::path::absolute(patch).ok()?
    };
    words.push(shown(&patch));
    Some(words.join(" "))
}

/// Lists the caller's settings for all repositories that change what `git apply` writes. Returns
/// `None` if git fails.
fn settings(env: &CallerEnv, cancel: &Cancel) -> Option<Vec<String>> {
    let keys = r"^(core\.(autocrlf|attributesfile)|apply\.(whitespace|ignorewhitespace))$";
    let mut c = Command::new("git").deadline(ASK_DEADLINE).cwd("/");
    for (key, value) in env.for_config() {
        c = c.env(key, value);
    }
    let c = c.args([
        "--git-dir=",
        "config",
        "--null",
        "--name-only",
        "--get-regexp",
        keys,
    ]);
    let mut list = Vec::new();
    let output = run_piped(&c, cancel, &mut |piece| {
        list.extend_from_slice(piece);
        Ok(())
    });
    // Status 1 means that none of the settings is set.
    if !matches!(output.ok()?.status, 0 | 1) {
        return None;
    }
    Some(
        list.split(|b| *b == 0)
            .map(|k| String::from_utf8_lossy(k).into_owned())
            .collect(),
    )
}
