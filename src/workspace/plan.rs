//! What of a tree is sent. [`Plan::inspect`] looks, [`Plan::send`] streams the payload of an import
//! (`api::workspace` gives its format; `plan/send.rs` the files of its first part).

mod send;

pub use send::Sent;

use super::beneath::Beneath;
use super::git::{self, Config, Git, Head, History1, IndexEntry};
use super::walk::{Apart, Entry, EntryKind, Walk};
use super::{encode, guest_path};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Commits that go along when nothing is said.
pub const HISTORY_DEFAULT: u32 = 50;
/// Most commits back; more is `full`.
pub const HISTORY_MAX: u32 = 1_000_000;

/// How much history goes along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum History {
    /// So many commits deep, a shallow repository.
    Depth(u32),
    Full,
    /// Only the files: there is no repository in the guest.
    None,
}

impl Default for History {
    fn default() -> Self {
        History::Depth(HISTORY_DEFAULT)
    }
}

impl FromStr for History {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "full" => Ok(History::Full),
            "none" => Ok(History::None),
            _ => match text.parse() {
                Ok(depth @ 1..=HISTORY_MAX) => Ok(History::Depth(depth)),
                _ => Err(Error::invalid(format!("history {text:?} is no number of commits, nor full, nor none"))
                    .hint("say --history 50, --history full or --history none")),
            },
        }
    }
}

/// What the caller's git depends on.
#[derive(Clone, Debug, Default)]
pub struct CallerEnv {
    pub path: Option<OsString>,
    pub home: Option<PathBuf>,
    pub config_home: Option<PathBuf>,
    /// The variables that decide which settings git reads, and settings given as variables.
    pub git: Vec<(OsString, OsString)>,
    /// `GIT_AUTHOR_NAME`, `EMAIL` and the like, where they are set.
    pub identity: HashMap<OsString, OsString>,
    /// `SUDO_UID`: git lets root use a repository of the user who ran sudo.
    pub sudo_uid: Option<OsString>,
}

impl CallerEnv {
    pub fn from_process() -> Self {
        Self::from_vars(std::env::vars_os())
    }

    pub(super) fn from_vars(vars: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let mut env = Self::default();
        for (key, value) in vars {
            match key.as_bytes() {
                b"PATH" => env.path = Some(value),
                b"HOME" => env.home = Some(value.into()),
                b"XDG_CONFIG_HOME" if !value.is_empty() => env.config_home = Some(value.into()),
                b"SUDO_UID" => env.sudo_uid = Some(value),
                b"GIT_CONFIG_GLOBAL" | b"GIT_CONFIG_SYSTEM" | b"GIT_CONFIG_NOSYSTEM" => env.git.push((key, value)),
                // CI sets safe.directory so: GIT_CONFIG_COUNT, GIT_CONFIG_KEY_0, GIT_CONFIG_VALUE_0.
                b"GIT_CONFIG_COUNT" => env.git.push((key, value)),
                name if name.starts_with(b"GIT_CONFIG_KEY_") || name.starts_with(b"GIT_CONFIG_VALUE_") => {
                    env.git.push((key, value));
                }
                b"EMAIL" | b"GIT_AUTHOR_NAME" | b"GIT_AUTHOR_EMAIL" | b"GIT_COMMITTER_NAME" | b"GIT_COMMITTER_EMAIL" => {
                    env.identity.insert(key, value);
                }
                _ => {}
            }
        }
        env
    }

    pub(super) fn for_config(&self) -> Vec<(OsString, OsString)> {
        let mut out = self.git.clone();
        let mut add = |key: &str, value: Option<OsString>| out.extend(value.map(|v| (OsString::from(key), v)));
        add("PATH", self.path.clone());
        add("HOME", self.home.clone().map(Into::into));
        add("XDG_CONFIG_HOME", self.config_home.clone().map(Into::into));
        add("SUDO_UID", self.sudo_uid.clone());
        out
    }

    /// `~/x` is the caller's, anything else relative to `base`.
    pub(super) fn expand(&self, base: &Path, path: &[u8]) -> PathBuf {
        match (path.strip_prefix(b"~/"), &self.home) {
            (Some(rest), Some(home)) => home.join(std::ffi::OsStr::from_bytes(rest)),
            _ => base.join(std::ffi::OsStr::from_bytes(path)),
        }
    }

    /// Where git looks for ignore rules when nothing is configured.
    pub(super) fn default_excludes(&self) -> Option<PathBuf> {
        self.default_file("git/ignore")
    }

    /// Where git looks for attributes when nothing is configured.
    pub(super) fn default_attributes(&self) -> Option<PathBuf> {
        self.default_file("git/attributes")
    }

    fn default_file(&self, name: &str) -> Option<PathBuf> {
        let base = self.config_home.clone().or_else(|| Some(self.home.as_ref()?.join(".config")))?;
        Some(base.join(name)).filter(|p| p.is_file())
    }
}

#[derive(Clone, Debug, Default)]
pub struct Options {
    pub history: History,
    pub env: CallerEnv,
    /// Directories outside the tree that the caller lets the repository take objects from.
    pub allow_alternates: Vec<PathBuf>,
}

impl Options {
    /// Without links, so that they can be compared.
    pub(super) fn allowed_alternates(&self) -> Result<Vec<PathBuf>> {
        let real = |path: &PathBuf| {
            std::fs::canonicalize(path).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => {
                    Error::new(Kind::PathNotFound, format!("--allow-alternate {} is not there", path.display()))
                        .hint("name the directory of objects, or leave it out")
                }
                _ => Error::io(format!("look at {}", path.display()), e),
            })
        };
        self.allow_alternates.iter().map(real).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeKind {
    /// A git repository: it is one in the guest.
    Git,
    /// A git repository of which only the files are sent (`--history none`).
    GitFiles,
    /// No repository up to the mount boundary: everything is sent as files.
    Plain,
}

/// What is sent, and from where. Nothing has been read yet but git's own files.
pub struct Plan {
    kind: TreeKind,
    root: PathBuf,
    subdir: String,
    entries: Vec<Entry>,
    repo: Option<Repo>,
    apart: Vec<Apart>,
    repositories: Vec<Vec<u8>>,
    warnings: Vec<String>,
    bytes_expected: u64,
}

/// What the guest's repository is made of.
struct Repo {
    head: Head,
    format: String,
    index: Vec<IndexEntry>,
    intent_to_add: HashSet<Vec<u8>>,
    history: History1,
    pack: Option<git::Pack>,
    /// For the guest's `.git/config`.
    config: Vec<u8>,
    exclude: Vec<u8>,
    attributes: Vec<u8>,
    global_attributes: Vec<u8>,
    filtered: git::Filtered,
    /// The sparse-checkout patterns.
    sparse: Vec<u8>,
    partial: bool,
}

impl Plan {
    /// Looks at the tree that `path` belongs to. Errors: `path_not_found`, `invalid_tree` (git refuses the repository,
    /// a file cannot be read, a path is too long), `command_missing` (git), `cancelled`, `host`.
    pub fn inspect(path: &Path, options: &Options, cancel: &Cancel) -> Result<Self> {
        let real = std::fs::canonicalize(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::new(Kind::PathNotFound, format!("{} is not there", path.display()))
                .hint("name a directory that is there, as in fcctl run . -- CMD"),
            _ => Error::io(format!("look at {}", path.display()), e),
        })?;
        if !real.is_dir() {
            let e = Error::new(Kind::InvalidTree, format!("{} is no directory", path.display()));
            return Err(e.hint("give the directory of the project; for a tar use --tar -"));
        }
        match git::find_top(&real)? {
            Some(top) => Self::of_repository(&top, &real, options, cancel),
            None => Self::of_plain(&real, cancel),
        }
    }

    fn of_plain(root: &Path, cancel: &Cancel) -> Result<Self> {
        let mut walk = Walk::new(open_root(root)?, cancel);
        walk.everything()?;
        // There was none a moment ago. As a repository it would have been checked.
        if walk.entries.iter().any(|entry| entry.path == b".git" || entry.path.starts_with(b".git/")) {
            return Err(Error::new(Kind::Conflict, format!("{} became a repository while it was read", root.display()))
                .hint("wait until nothing writes to it any more, then run the command again"));
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
            return Err(Error::new(Kind::InvalidTree, format!("{} is inside git's own directory", path.display()))
                .hint(format!("give the repository: {}", top.display())));
        }
        let (git, config) = Git::open(top, options, cancel)?;
        let (mut repo, blobs, mut warnings) = Repo::look(&git, &config)?;
        let listed = git.listed()?;
        let mut walk = Walk::new(open_root(top)?, cancel);
        let submodules =
            repo.index.iter().filter(|e| e.mode == IndexEntry::GITLINK).map(|e| (e.path.as_slice(), e.oid.as_str())).collect();
        walk.listed(&listed, &submodules)?;
        if options.history != History::None {
            let files: Vec<&[u8]> =
                walk.entries.iter().filter(|e| e.kind == EntryKind::File).map(|e| e.path.as_slice()).collect();
            repo.filtered = git.filtered(&files, &config.filters, &mut walk.beneath)?;
            warnings.extend(filter_warning(&repo.filtered));
            repo.pack_up(&git, options.history, &blobs)?;
            for what in git.under_way() {
                warnings.push(format!("{what} is under way here: the guest's git does not know, so conclude it here"));
            }
        }
        warnings.append(&mut walk.warnings);
        let subdir = match below.to_str() {
            Some(text) if guest_path::validate_subdir(text).is_ok() => text.to_owned(),
            _ => {
                warnings.push("the subdirectory's name cannot be passed on: commands start at the top".into());
                String::new()
            }
        };
        let kind = if options.history == History::None { TreeKind::GitFiles } else { TreeKind::Git };
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

    pub fn kind(&self) -> TreeKind {
        self.kind
    }
    /// The top of the tree on this host.
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// Where commands start, below the workspace's directory: `PrepareRequest::subdir`.
    pub fn subdir(&self) -> &str {
        &self.subdir
    }
    /// The name of the tree's directory, fit for a guest path.
    pub fn guest_name(&self) -> String {
        guest_path::sanitise(self.root.file_name().unwrap_or_default().as_bytes())
    }
    /// Where the tree goes when nothing else is said: `/root/<name>`.
    pub fn guest_path(&self) -> String {
        guest_path::default_for(&self.guest_name())
    }
    /// About how many bytes the payload will have.
    pub fn bytes_expected(&self) -> u64 {
        self.bytes_expected
    }
    pub fn entries(&self) -> u64 {
        self.entries.len() as u64
    }
    /// What is left out and why, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn estimate(&self) -> u64 {
        const BLOCK: u64 = super::tar_writer::BLOCK;
        let tree: u64 = self.entries.iter().map(|e| BLOCK + e.bytes.next_multiple_of(BLOCK) + e.path.len() as u64).sum();
        let repo = self.repo.as_ref().map_or(0, |repo| {
            let size = |f: &std::fs::File| f.metadata().map_or(0, |m| m.len());
            let index: u64 = repo.index.iter().map(|e| 2 * (e.path.len() as u64 + 60)).sum();
            index + repo.pack.as_ref().map_or(0, |p| size(&p.pack) + size(&p.idx))
        });
        tree + repo
    }
}

/// No filter runs on either side, which the caller has to know: what git would store of such files is not what they hold.
fn filter_warning(filtered: &git::Filtered) -> Option<String> {
    let of = |(name, count): (&Vec<u8>, &u64)| {
        let files = if *count == 1 { "file" } else { "files" };
        format!("{} ({count} {files})", encode::encode(name))
    };
    let list: Vec<String> = filtered.counts.iter().map(of).collect();
    (!list.is_empty()).then(|| {
        format!(
            "git's filters do not run in the guest: {}; these files go as they are, git there shows no difference, and refuses to \
             commit their content: bring it back and commit it here",
            list.join(", ")
        )
    })
}

fn open_root(root: &Path) -> Result<Beneath> {
    Beneath::open(root).map_err(|e| match e.kind() {
        std::io::ErrorKind::PermissionDenied => git::unreadable(&encode::encode(root.as_os_str().as_bytes())),
        _ => Error::io(format!("open {}", root.display()), e),
    })
}

impl Repo {
    /// Everything but the pack; and the blobs that only the index has.
    fn look(git: &Git, config: &Config) -> Result<(Self, HashSet<String>, Vec<String>)> {
        let (head, format, index) = (git.head()?, git.object_format()?, git.index()?);
        let staged = git.staged(&head, &format, false)?;
        let is_blob = |mode: u32| mode != 0 && mode != IndexEntry::GITLINK;
        let conflicts = index.iter().filter(|e| e.stage > 0 && is_blob(e.mode)).map(|e| e.oid.clone());
        let added = staged.iter().filter(|r| is_blob(r.new_mode) && r.new_oid.bytes().any(|b| b != b'0'));
        let blobs = added.map(|r| r.new_oid.clone()).chain(conflicts).collect();
        let intent_to_add = Self::intents(git, &head, &format, &index, &staged)?;
        let (exclude, note) = git.exclude_rules(config)?;
        let mut warnings: Vec<String> = note.into_iter().collect();
        if config.partial_clone {
            warnings.push("this is a partial clone: git in the guest has to fetch what is not here either".into());
        }
        let repo = Self {
            head,
            format,
            index,
            intent_to_add,
            history: History1::default(),
            pack: None,
            config: config.for_guest(),
            exclude,
            attributes: git.info_file("attributes")?,
            global_attributes: git.global_attributes(config),
            filtered: git::Filtered::default(),
            sparse: if config.is_sparse() { git.sparse_patterns()? } else { Vec::new() },
            partial: config.partial_clone,
        };
        Ok((repo, blobs, warnings))
    }

    /// Paths of `git add --intent-to-add`: in the index they look like empty files, in a diff only on request.
    fn intents(git: &Git, head: &Head, format: &str, index: &[IndexEntry], staged: &[git::Record]) -> Result<HashSet<Vec<u8>>> {
        const EMPTY: [&str; 2] =
            ["e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", "473a0f4c3be8a93681a267e3b1e9a7dcda1185436fe141f7749120a303721813"];
        let empty: HashSet<&[u8]> =
            index.iter().filter(|e| e.stage == 0 && EMPTY.contains(&e.oid.as_str())).map(|e| e.path.as_slice()).collect();
        if empty.is_empty() {
            return Ok(HashSet::new());
        }
        let known: HashMap<&[u8], u32> = staged.iter().map(|r| (r.path.as_slice(), r.new_mode)).collect();
        let visible = git.staged(head, format, true)?;
        let only_visible = visible.iter().filter(|r| r.new_mode != 0 && known.get(r.path.as_slice()).is_none_or(|m| *m == 0));
        // Taken out of the index and intended again: a deletion of a path that the index has.
        let again = staged.iter().filter(|r| r.new_mode == 0);
        Ok(only_visible.chain(again).filter(|r| empty.contains(r.path.as_slice())).map(|r| r.path.clone()).collect())
    }

    fn pack_up(&mut self, git: &Git, depth: History, blobs: &HashSet<String>) -> Result<()> {
        if let Some(head) = &self.head.oid {
            self.history = git.history(head, depth)?;
        }
        let dir =
            tempfile::Builder::new().prefix("fcctl-pack-").tempdir().map_err(|e| Error::io("make a temporary directory", e))?;
        self.pack = git::pack(git, self.head.oid.as_deref(), &self.history, blobs, self.partial, dir.path())?;
        Ok(())
    }
}

impl Entry {
    /// As git records it.
    fn git_mode(&self) -> &'static str {
        match self.kind {
            EntryKind::Symlink => "120000",
            _ if self.mode & 0o100 != 0 => "100755",
            _ => "100644",
        }
    }
}
