//! Queries git about a tree without running anything that the repository configures: no hook,
//! fsmonitor, filter, pager or fetch.

mod alternates;
mod commands;
mod config;
mod filters;
mod history;
mod layout;
mod open;
mod parse;
mod paths;
mod stores;

use commands::Commands;
pub(super) use config::Config;
pub(super) use filters::Filtered;
pub(super) use history::{HistorySelection, Pack, Tag, pack};
pub(super) use parse::{IndexEntry, Record};

use super::beneath::Beneath;
use crate::error::{Error, Kind, Result};
use layout::Layout;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Maximum number of bytes of an exclude or attributes file that are sent to the guest.
const RULES_BYTES_MAX: u64 = 1024 * 1024;
/// Files in a git directory that exist while an operation is in progress, each with a name for that
/// operation.
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
    pub commands: Commands,
    layout: Layout,
    /// Paths outside the repository that it may take objects from.
    allowed: Vec<PathBuf>,
}

/// The target of HEAD.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    /// A full ref name such as `refs/heads/main`, in any encoding. `None` if HEAD is detached.
    pub branch: Option<Vec<u8>>,
    /// The commit that HEAD leads to, or `None` if there is no commit yet.
    pub oid: Option<String>,
}

/// Finds the top of the repository that contains `path`: the closest ancestor with a `.git` on the
/// same file system. Returns `None` if there is no such ancestor.
pub(super) fn find_top(path: &Path) -> Result<Option<PathBuf>> {
    let device = |p: &Path| {
        std::fs::metadata(p)
            .map(|m| m.dev())
            .map_err(|e| Error::io(format!("inspect {}", p.display()), e))
    };
    let first = device(path)?;
    for dir in path.ancestors() {
        if device(dir)? != first {
            return Ok(None);
        }
        match std::fs::symlink_metadata(dir.join(".git")) {
            Ok(_) => return Ok(Some(dir.to_owned())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => {
                return Err(Error::io(
                    format!("inspect {}", dir.join(".git").display()),
                    e,
                ));
            }
        }
    }
    Ok(None)
}

impl Git {
    /// Returns the ignore file that the caller's git reads in addition to the repository's own.
    fn excludes_path(&self, config: &Config) -> Option<PathBuf> {
        match &config.excludes_file {
            Some((path, _)) if path.is_empty() => None,
            Some((path, _)) => Some(self.commands.env.expand(&self.commands.top, path)),
            None => self.commands.env.default_excludes(),
        }
    }

    /// Returns the attributes file that the caller's git uses for all repositories. A file that the
    /// repository names is ignored, because that could be any of the caller's files.
    fn attributes_path(&self, config: &Config) -> Option<PathBuf> {
        match &config.attributes_file {
            Some((path, own)) if *own || path.is_empty() => None,
            Some((path, _)) => Some(self.commands.env.expand(&self.commands.top, path)),
            None => self.commands.env.default_attributes(),
        }
    }

    /// Returns the text of the caller's attributes file. The text is empty if there is no such file
    /// or it cannot be read.
    pub(super) fn global_attributes(&self, config: &Config) -> Vec<u8> {
        let file = self
            .attributes_path(config)
            .and_then(|path| std::fs::File::open(path).ok());
        file.and_then(|f| crate::host::command::read_bounded(f, RULES_BYTES_MAX).ok())
            .unwrap_or_default()
    }

    pub(super) fn head(&self) -> Result<Head> {
        let (status, name) = self.commands.ask_status(
            &self.commands.command(&["symbolic-ref", "-q", "HEAD"]),
            &[0, 1],
        )?;
        let branch = (status == 0).then(|| name.trim_ascii_end().to_vec());
        let (status, _) = self.commands.ask_status(
            &self
                .commands
                .command(&["rev-parse", "-q", "--verify", "HEAD"]),
            &[0, 1],
        )?;
        if status == 1 {
            if branch.is_none() {
                return Err(self.commands.refused(Error::new(
                    Kind::InvalidTree,
                    "its HEAD does not name a commit",
                )));
            }
            return Ok(Head { branch, oid: None });
        }
        let oid = self
            .commands
            .text(&["rev-parse", "-q", "--verify", "HEAD^{commit}"])
            .map_err(|e| self.commands.refused(e))?;
        Ok(Head {
            branch,
            oid: Some(oid),
        })
    }

    /// Names the operations in progress, such as a merge. Their state is not sent.
    pub(super) fn operations_in_progress(&self) -> Vec<&'static str> {
        let is_there = |name: &str| self.layout.git_dir.join(name).symlink_metadata().is_ok();
        IN_PROGRESS
            .iter()
            .filter(|(file, _)| is_there(file))
            .map(|(_, what)| *what)
            .collect()
    }

    /// Returns the repository's object format: `sha1` or `sha256`.
    pub(super) fn object_format(&self) -> Result<String> {
        self.commands.text(&["rev-parse", "--show-object-format"])
    }

    /// Returns the directory that holds objects and refs.
    pub(super) fn common_dir(&self) -> &Path {
        &self.layout.common
    }

    pub(super) fn index(&self) -> Result<Vec<IndexEntry>> {
        parse::index(&self.commands.ask(&["ls-files", "-s", "-v", "-z"])?)
    }

    /// Lists tracked paths, including deleted ones, and untracked paths that are not ignored. A
    /// nested repository ends with a slash. The list is sorted and has no duplicates.
    pub(super) fn listed(&self) -> Result<Vec<Vec<u8>>> {
        let mut paths =
            parse::paths(
                &self
                    .commands
                    .ask(&["ls-files", "-z", "-co", "--exclude-standard"])?,
            );
        paths.sort_unstable();
        paths.dedup();
        Ok(paths)
    }

    /// Lists how the index differs from HEAD. With `visible`, entries from `git add
    /// --intent-to-add` are included.
    pub(super) fn staged(&self, head: &Head, format: &str, visible: bool) -> Result<Vec<Record>> {
        let empty = match format {
            "sha256" => "6ef19b41225c5369f1c104d45d8d85efa9b057b53b14b4b9b939dd74decc5321",
            _ => "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
        };
        let ita = if visible {
            "--ita-visible-in-index"
        } else {
            "--ita-invisible-in-index"
        };
        let tree = head.oid.as_deref().unwrap_or(empty);
        let args = [
            "diff-index",
            "--cached",
            "--raw",
            "-z",
            "--no-renames",
            "--no-abbrev",
            "--no-ext-diff",
            ita,
            tree,
        ];
        parse::raw_diff(
            &self
                .commands
                .ask(&args)
                .map_err(|e| self.commands.refused(e))?,
        )
    }

    /// Returns the ignore rules that are not in the tree, and a warning if some are not sent. The
    /// caller's own rules come first, because later rules win.
    pub(super) fn exclude_rules(&self, config: &Config) -> Result<(Vec<u8>, Option<String>)> {
        let mut rules = Vec::new();
        let mut note = None;
        if let Some(file) = self.excludes_path(config) {
            // If the repository names the file, it could be any of the caller's files, so its text
            // is not sent.
            let foreign = matches!(&config.excludes_file, Some((_, true)));
            if foreign {
                note = Some(format!(
                    "ignore rules of {} were applied here but are not sent",
                    file.display()
                ));
            } else if let Ok(file) = std::fs::File::open(file) {
                rules =
                    crate::host::command::read_bounded(file, RULES_BYTES_MAX).unwrap_or_default();
                rules.push(b'\n');
            }
        }
        rules.extend(self.info_file("exclude")?);
        Ok((rules, note))
    }

    /// Reads a file in `.git/info`. Returns no bytes if the file is missing or its path contains a
    /// link.
    pub(super) fn info_file(&self, name: &str) -> Result<Vec<u8>> {
        self.own_file(&format!("info/{name}"), RULES_BYTES_MAX)
    }

    /// Reads the sparse-checkout patterns. Each work tree has its own patterns.
    pub(super) fn sparse_patterns(&self) -> Result<Vec<u8>> {
        read_own(
            &self.layout.git_dir,
            "info/sparse-checkout",
            RULES_BYTES_MAX,
        )
    }

    /// Reads up to `bytes_max` bytes of a file in the repository. Returns no bytes if the file
    /// cannot be opened, is not a regular file, or has a link in its path.
    pub(super) fn own_file(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>> {
        read_own(self.common_dir(), name, bytes_max)
    }
}

fn read_own(dir: &Path, name: &str, bytes_max: u64) -> Result<Vec<u8>> {
    match Beneath::open(dir).and_then(|mut dir| dir.open_file(name.as_bytes())) {
        Ok(file) if file.metadata().is_ok_and(|m| m.is_file()) => {
            crate::host::command::read_bounded(file, bytes_max)
                .map_err(|e| Error::io(format!("read {name}"), e))
        }
        _ => Ok(Vec::new()),
    }
}
