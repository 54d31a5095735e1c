//! Decides which parts of a tree are sent. [`Plan::inspect`] examines the tree, and [`Plan::send`]
//! streams the payload of an import. `api::workspace` documents the payload, and `plan/send.rs` the
//! files of its first archive.

mod send;

pub use send::Sent;

use super::beneath::Beneath;
use super::git::{self, Config, Git, Head, HistorySelection, IndexEntry};
use super::options::{History, Options};
use super::walk::{self, Apart, Entry, EntryKind, Walk};
use super::{encode, guest_path};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use std::collections::{HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeKind {
    /// A git repository, which will be a git repository in the guest.
    Git,
    /// A git repository of which only the files are sent (`--history none`).
    GitFiles,
    /// A directory that is not in a repository on its file system. Everything is sent as files.
    Plain,
}

/// The content to send and its place on the host. Making a plan reads only git's own files.
/// [`Plan::send`] reads the others.
pub struct Plan {
    pub(super) kind: TreeKind,
    root: PathBuf,
    subdir: String,
    entries: Vec<Entry>,
    repo: Option<Repo>,
    apart: Vec<Apart>,
    repositories: Vec<Vec<u8>>,
    warnings: Vec<String>,
    bytes_expected: u64,
}

/// The content of the guest's repository.
struct Repo {
    head: Head,
    format: String,
    index: Vec<IndexEntry>,
    intent_to_add: HashSet<Vec<u8>>,
    history: HistorySelection,
    pack: Option<git::Pack>,
    /// Text for the guest's `.git/config`.
    config: Vec<u8>,
    exclude: Vec<u8>,
    attributes: Vec<u8>,
    global_attributes: Vec<u8>,
    filtered: git::Filtered,
    /// The sparse-checkout patterns.
    sparse: Vec<u8>,
    partial: bool,
}

/// Resolves the path of a directory.
fn real_dir(path: &Path) -> Result<PathBuf> {
    let real = std::fs::canonicalize(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::new(
            Kind::PathNotFound,
            format!("{} does not exist", path.display()),
        )
        .hint("pass an existing directory, such as . for this one"),
        _ => Error::io(format!("inspect {}", path.display()), e),
    })?;
    if real.is_dir() {
        return Ok(real);
    }
    let e = Error::new(
        Kind::InvalidTree,
        format!("{} is not a directory", path.display()),
    );
    Err(e.hint("pass the project's directory, or use --tar - for a tar archive"))
}

impl Plan {
    /// Examines the tree that `path` belongs to. Errors: `path_not_found`, `invalid_tree` (git
    /// refuses the repository, a file cannot be read, a path is too long), `command_missing` (git),
    /// `cancelled`, `host`.
    pub fn inspect(path: &Path, options: &Options, cancel: &Cancel) -> Result<Self> {
        let real = real_dir(path)?;
        match git::find_top(&real)? {
            Some(top) => Self::of_repository(&top, &real, options, cancel),
            None => Self::of_plain(&real, cancel),
        }
    }

    /// Returns the top of the tree that `path` belongs to, without looking into the tree.
    pub fn top_of(path: &Path) -> Result<PathBuf> {
        let real = real_dir(path)?;
        Ok(git::find_top(&real)?.unwrap_or(real))
    }

    fn of_plain(root: &Path, cancel: &Cancel) -> Result<Self> {
        let mut walk = Walk::new(open_root(root)?, cancel);
        walk.everything()?;
        // The directory was not a repository a moment ago. Sending it as plain files would skip the
        // checks for repositories.
        if walk
            .entries
            .iter()
            .any(|entry| entry.path == b".git" || entry.path.starts_with(b".git/"))
        {
            return Err(Error::new(
                Kind::Conflict,
                format!(
                    "{} became a git repository while it was being read",
                    root.display()
                ),
            )
            .hint("wait until nothing writes to it, then run the command again"));
        }
        let mut plan = Self {
            kind: TreeKind::Plain,
            root: root.to_owned(),
            subdir: String::new(),
            entries: walk.entries,
            repo: None,
            apart: Vec::new(),
            repositories: walk.repositories,
            warnings: walk.warnings,
            bytes_expected: 0,
        };
        plan.bytes_expected = plan.estimate();
        Ok(plan)
    }

    fn of_repository(top: &Path, path: &Path, options: &Options, cancel: &Cancel) -> Result<Self> {
        let below = path.strip_prefix(top).unwrap_or(Path::new(""));
        if below.starts_with(".git") {
            return Err(Error::new(
                Kind::InvalidTree,
                format!("{} is inside git's own directory", path.display()),
            )
            .hint(format!("pass the repository: {}", top.display())));
        }
        let (git, config) = Git::open(top, options, cancel)?;
        let (mut repo, blobs) = Repo::look(&git, &config)?;
        let (exclude, note) = git.exclude_rules(&config)?;
        repo.exclude = exclude;
        let mut warnings: Vec<String> = note.into_iter().collect();
        if config.partial_clone {
            warnings.push("this is a partial clone: git in the guest must fetch the objects that are missing here".into());
        }
        let listed = git.listed()?;
        let mut walk = Walk::new(open_root(top)?, cancel);
        let submodules = repo
            .index
            .iter()
            .filter(|e| e.mode == IndexEntry::GITLINK)
            .map(|e| (e.path.as_slice(), e.oid.as_str()))
            .collect();
        walk.listed(&listed, &submodules)?;
        if options.history != History::None {
            let files: Vec<&[u8]> = walk
                .entries
                .iter()
                .filter(|e| e.kind == EntryKind::File)
                .map(|e| e.path.as_slice())
                .collect();
            repo.filtered = git.filtered(&files, &config.filters, &mut walk.beneath)?;
            warnings.extend(filter_warning(&repo.filtered));
            repo.pack_up(&git, options.history, &blobs)?;
            for what in git.operations_in_progress() {
                warnings.push(format!(
                    "{what} is in progress here: its state is not sent, so finish it here"
                ));
            }
        }
        warnings.append(&mut walk.warnings);
        let subdir = match below.to_str() {
            Some(text) if guest_path::validate_subdir(text).is_ok() => text.to_owned(),
            _ => {
                warnings.push("the subdirectory's name cannot be used in the guest: commands start at the top".into());
                String::new()
            }
        };
        let kind = if options.history == History::None {
            TreeKind::GitFiles
        } else {
            TreeKind::Git
        };
        let mut plan = Self {
            kind,
            root: top.to_owned(),
            subdir,
            entries: walk.entries,
            repo: Some(repo),
            apart: walk.apart,
            repositories: Vec::new(),
            warnings,
            bytes_expected: 0,
        };
        plan.bytes_expected = plan.estimate();
        Ok(plan)
    }

    /// Returns the top of the tree on this host.
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// Returns the directory in which commands start, relative to the workspace's directory. It
    /// becomes `PrepareRequest::subdir`.
    pub fn subdir(&self) -> &str {
        &self.subdir
    }
    /// Returns the name of the tree's directory, adapted to a guest path.
    pub fn guest_name(&self) -> String {
        guest_path::sanitise(self.root.file_name().unwrap_or_default().as_bytes())
    }
    /// Returns the default guest path, `/root/<name>`.
    pub fn guest_path(&self) -> String {
        guest_path::default_for(&self.guest_name())
    }
    /// Returns the approximate size of the payload.
    pub fn bytes_expected(&self) -> u64 {
        self.bytes_expected
    }
    /// Returns the warnings for the caller, one sentence each. Most of them say what is left out
    /// and why.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn estimate(&self) -> u64 {
        const BLOCK: u64 = super::tar_writer::BLOCK;
        let tree: u64 = self
            .entries
            .iter()
            .map(|e| BLOCK + e.bytes.next_multiple_of(BLOCK) + e.path.len() as u64)
            .sum();
        let repo = self.repo.as_ref().map_or(0, |repo| {
            let size = |f: &std::fs::File| f.metadata().map_or(0, |m| m.len());
            let index: u64 = repo
                .index
                .iter()
                .map(|e| 2 * (e.path.len() as u64 + 60))
                .sum();
            index
                + repo
                    .pack
                    .as_ref()
                    .map_or(0, |p| size(&p.pack) + size(&p.idx))
        });
        tree + repo
    }
}

/// Returns the warning that no filter runs on either side, or `None` if no file has a filter. The
/// caller must know this, because git would store other content for these files.
fn filter_warning(filtered: &git::Filtered) -> Option<String> {
    let of = |(name, count): (&Vec<u8>, &u64)| {
        let files = if *count == 1 { "file" } else { "files" };
        format!("{} ({count} {files})", encode::encode(name))
    };
    let list: Vec<String> = filtered.counts.iter().map(of).collect();
    (!list.is_empty()).then(|| {
        format!(
            "git's filters do not run in the guest: {}; these files are sent unchanged; git in the guest shows no difference for them, and refuses to \
             commit their content: bring it back and commit it here",
            list.join(", ")
        )
    })
}

fn open_root(root: &Path) -> Result<Beneath> {
    Beneath::open(root).map_err(|e| match e.kind() {
        std::io::ErrorKind::PermissionDenied => {
            walk::unreadable(&encode::encode(root.as_os_str().as_bytes()))
        }
        _ => Error::io(format!("open {}", root.display()), e),
    })
}

impl Repo {
    /// Collects everything except the history, the pack, the exclude rules and the files with
    /// filters. Also returns the blobs that are only in the index.
    fn look(git: &Git, config: &Config) -> Result<(Self, HashSet<String>)> {
        let (head, format, index) = (git.head()?, git.object_format()?, git.index()?);
        let staged = git.staged(&head, &format, false)?;
        let is_blob = |mode: u32| mode != 0 && mode != IndexEntry::GITLINK;
        let conflicts = index
            .iter()
            .filter(|e| e.stage > 0 && is_blob(e.mode))
            .map(|e| e.oid.clone());
        let added = staged
            .iter()
            .filter(|r| is_blob(r.new_mode) && r.new_oid.bytes().any(|b| b != b'0'));
        let blobs = added.map(|r| r.new_oid.clone()).chain(conflicts).collect();
        let intent_to_add = Self::intents(git, &head, &format, &index, &staged)?;
        let repo = Self {
            head,
            format,
            index,
            intent_to_add,
            history: HistorySelection::default(),
            pack: None,
            config: config.for_guest(),
            exclude: Vec::new(),
            attributes: git.info_file("attributes")?,
            global_attributes: git.global_attributes(config),
            filtered: git::Filtered::default(),
            sparse: if config.is_sparse() {
                git.sparse_patterns()?
            } else {
                Vec::new()
            },
            partial: config.partial_clone,
        };
        Ok((repo, blobs))
    }

    /// Finds the paths that were added with `git add --intent-to-add`. In the index, these paths
    /// look like empty files, and a diff shows them only on request.
    fn intents(
        git: &Git,
        head: &Head,
        format: &str,
        index: &[IndexEntry],
        staged: &[git::Record],
    ) -> Result<HashSet<Vec<u8>>> {
        const EMPTY: [&str; 2] = [
            "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
            "473a0f4c3be8a93681a267e3b1e9a7dcda1185436fe141f7749120a303721813",
        ];
        let empty: HashSet<&[u8]> = index
            .iter()
            .filter(|e| e.stage == 0 && EMPTY.contains(&e.oid.as_str()))
            .map(|e| e.path.as_slice())
            .collect();
        if empty.is_empty() {
            return Ok(HashSet::new());
        }
        let known: HashMap<&[u8], u32> = staged
            .iter()
            .map(|r| (r.path.as_slice(), r.new_mode))
            .collect();
        let visible = git.staged(head, format, true)?;
        let only_visible = visible
            .iter()
            .filter(|r| r.new_mode != 0 && known.get(r.path.as_slice()).is_none_or(|m| *m == 0));
        // A path that was removed from the index and added again with intent shows as a deletion of
        // a path that the index has.
        let again = staged.iter().filter(|r| r.new_mode == 0);
        Ok(only_visible
            .chain(again)
            .filter(|r| empty.contains(r.path.as_slice()))
            .map(|r| r.path.clone())
            .collect())
    }

    fn pack_up(&mut self, git: &Git, depth: History, blobs: &HashSet<String>) -> Result<()> {
        if let Some(head) = &self.head.oid {
            self.history = git.history(head, depth)?;
        }
        let dir = tempfile::Builder::new()
            .prefix("fcctl-pack-")
            .tempdir()
            .map_err(|e| Error::io("create a temporary directory", e))?;
        self.pack = git::pack(
            git,
            self.head.oid.as_deref(),
            &self.history,
            blobs,
            self.partial,
            dir.path(),
        )?;
        Ok(())
    }
}

impl Entry {
    /// Returns the mode that git records for this file or link.
    fn git_mode(&self) -> &'static str {
        match self.kind {
            EntryKind::Symlink => "120000",
            _ if self.mode & 0o100 != 0 => "100755",
            _ => "100644",
        }
    }
}
