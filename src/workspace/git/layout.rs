//! Finds the directories of a repository and checks that they belong to the tree.
//!
//! A hostile tree can claim any repository that the caller can read: with a link, a `.git` or
//! `commondir` file, or an alternate. Everything that git would read must be below the top of the
//! tree, below a repository that points back at it, or below a path that the caller allowed. This
//! is checked without git, before any git command runs there.

use crate::error::{Error, Kind, Result};
use crate::host::shell::quote;
use crate::host::time::since_epoch;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// Maximum size of a file that names a path. git does not read a longer `.git` file either.
const POINTER_BYTES_MAX: u64 = 1024 * 1024;
/// The coarsest clock from which a kernel takes the time of a change.
const CLOCK_TICK: Duration = Duration::from_millis(10);
/// How often to retry openat2(2), which fails with EAGAIN if something is renamed during the
/// lookup.
const OPEN_TRIES: usize = 64;
/// Maximum number of links to follow in one path, as in the kernel.
const LINKS_MAX: usize = 40;
/// Entries of a git directory that our git commands never read, so links among them may point
/// anywhere.
const NOT_READ: &[&[u8]] = &[
    b"branches",
    b"description",
    b"hooks",
    b"lfs",
    b"logs",
    b"rr-cache",
    b"svn",
    b"worktrees",
];
/// Subdirectories of a git directory that are checked recursively.
const DEEP: &[&[u8]] = &[b"info", b"objects", b"refs", b"reftable"];

/// The location of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub top: PathBuf,
    /// `top/.git`, or what it leads to.
    pub git_dir: PathBuf,
    /// The directory that all worktrees of a repository share, with its objects and refs.
    pub common: PathBuf,
}

/// How a repository outside the tree declares that the tree belongs to it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The repository is inside the tree.
    Inside,
    /// The repository lists the tree among its worktrees.
    Worktree,
    /// The repository has this worktree at another place. Holds the `.git` file that it names.
    OtherWorktree(PathBuf),
    /// Only `core.worktree` can show that the tree belongs to the repository.
    Setting,
    /// Nothing shows it, because the repository's common directory is not its own.
    None,
}

impl Layout {
    /// Follows `.git` and `commondir` as git does. `top` must not contain links.
    pub fn find(top: &Path) -> Result<Self> {
        let dot_git = top.join(".git");
        let target =
            real(&dot_git).map_err(|e| refusal(format!("follow {}", dot_git.display()), e))?;
        let git_dir = if target.is_dir() {
            target
        } else {
            Self::follow_file(top, &dot_git)?
        };
        let commondir = git_dir.join("commondir");
        let common = match read_pointer(&commondir) {
            Ok(None) => git_dir.clone(),
            Ok(Some(text)) => {
                let common = git_dir.join(OsStr::from_bytes(trim(&text)));
                real(&common).map_err(|e| refusal(format!("follow {}", commondir.display()), e))?
            }
            Err(e) => return Err(refusal(format!("read {}", commondir.display()), e)),
        };
        Ok(Self {
            top: top.to_owned(),
            git_dir,
            common,
        })
    }

    fn follow_file(top: &Path, dot_git: &Path) -> Result<PathBuf> {
        let shown = dot_git.display();
        let text = read_pointer(dot_git)
            .map_err(|e| refusal(format!("read {shown}"), e))?
            .unwrap_or_default();
        let Some(named) = text.strip_prefix(b"gitdir: ") else {
            return Err(Error::new(
                Kind::InvalidTree,
                format!("{shown} is not a directory and does not name one"),
            )
            .hint(look(top)));
        };
        let named = top.join(OsStr::from_bytes(trim(named)));
        let dir = real(&named).map_err(|e| refusal(format!("follow {shown}"), e))?;
        if dir.is_dir() {
            return Ok(dir);
        }
        let (what, hint) = if dir.exists() {
            ("not a directory", look(top))
        } else {
            let top = quoted(top);
            (
                "missing",
                format!("if the main repository was moved, run: git -C MAIN worktree repair {top}"),
            )
        };
        Err(Error::new(
            Kind::InvalidTree,
            format!("{shown} leads to {}, which is {what}", dir.display()),
        )
        .hint(hint))
    }

    /// Determines whether the repository belongs to the tree. Files inside the tree prove nothing
    /// about a repository outside it, so the main repository of a worktree must name the tree.
    pub fn claim(&self) -> Claim {
        let inside = |p: &Path| p.starts_with(&self.top);
        if inside(&self.git_dir) && inside(&self.common) {
            return Claim::Inside;
        }
        if self.git_dir == self.common {
            return Claim::Setting;
        }
        if self.git_dir.parent() != Some(&self.common.join("worktrees")) {
            return Claim::None;
        }
        let text = read_pointer(&self.git_dir.join("gitdir"))
            .ok()
            .flatten()
            .unwrap_or_default();
        let back = self.git_dir.join(OsStr::from_bytes(trim(&text)));
        let ours = back.file_name() == Some(OsStr::new(".git"))
            && back
                .parent()
                .is_some_and(|dir| real(dir).is_ok_and(|dir| dir == self.top));
        if ours {
            Claim::Worktree
        } else {
            Claim::OtherWorktree(back)
        }
    }

    /// Builds the error for a repository that does not belong to the tree.
    pub fn foreign(&self, claim: &Claim) -> Error {
        let dot_git = self.top.join(".git");
        let error = |text: String| Error::new(Kind::InvalidTree, text);
        match claim {
            Claim::OtherWorktree(back) => {
                let there = back.parent().unwrap_or(back);
                let e = error(format!(
                    "{} leads to {}, which does not belong to this tree but to {}",
                    dot_git.display(),
                    self.git_dir.display(),
                    there.display()
                ));
                // If the worktree still exists at its old place, this tree is a copy of it, and a
                // repair would detach the original.
                if back.symlink_metadata().is_ok() {
                    e.hint(format!("send that worktree instead: {}", quoted(there)))
                } else {
                    e.hint(format!(
                        "if you moved the worktree here, run: git -C {} worktree repair",
                        quoted(&self.top)
                    ))
                }
            }
            Claim::None => error(format!(
                "{} leads to {}, which does not name {} as its worktree",
                self.git_dir.join("commondir").display(),
                self.common.display(),
                self.top.display()
            ))
            .hint(look(&self.top)),
            _ => error(format!(
                "{} leads to {}, which does not belong to this tree",
                dot_git.display(),
                self.git_dir.display()
            ))
            .hint(format!(
                "if it does belong to this tree, pass --allow-alternate {}",
                quoted(&self.git_dir)
            )),
        }
    }

    /// Checks everything that git would read and rejects what leads out of the repository.
    /// `allowed` must not contain links. If two results are equal, nothing changed in between.
    pub fn check(&self, allowed: &[PathBuf]) -> Result<CheckedStores> {
        let own = BTreeSet::from([self.top.clone(), self.git_dir.clone(), self.common.clone()]);
        let mut check = Check {
            own,
            allowed,
            seen: BTreeMap::new(),
            ways: BTreeMap::new(),
        };
        // This comes first, so that the tree behind this descriptor is the one that is checked.
        let path = check.link(&self.common.join("objects"), true)?;
        let objects = Dir {
            fd: Rc::new(open_exactly(&path).map_err(|e| unreadable(&path, e))?),
            path,
        };
        check.walk(objects.clone(), true)?;
        for dir in BTreeSet::from([&self.git_dir, &self.common]) {
            check.first_level(dir)?;
        }
        let mut stores = BTreeMap::new();
        check.alternates(&objects, &mut stores)?;
        let own = stores.remove(&objects.path);
        let stores = own.into_iter().chain(stores.into_values()).collect();
        Ok(CheckedStores {
            stamps: check.seen,
            ways: check.ways,
            stores,
        })
    }
}

/// The state of the object and ref directories at one moment.
///
/// Everything in it was read through descriptors, starting at each store. A path could lead
/// somewhere else at each lookup, because another user may rename the directories above it.
#[derive(Debug)]
pub(super) struct CheckedStores {
    stamps: BTreeMap<PathBuf, Stamp>,
    ways: BTreeMap<PathBuf, Stamp>,
    stores: Vec<Rc<OwnedFd>>,
}

/// Identifies the state of a directory. Every change leaves a trace in it, because nobody can set a
/// ctime.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    dev: u64,
    ino: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn of(fd: impl AsFd, path: &Path) -> Result<Self> {
        let stat = rustix::fs::fstat(fd).map_err(|e| unreadable(path, e.into()))?;
        Ok(Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
            changed: (stat.st_ctime, stat.st_ctime_nsec as i64),
        })
    }
}

impl CheckedStores {
    /// The object directories that were checked: first the repository's own, then its alternates'.
    pub fn stores(&self) -> impl Iterator<Item = &OwnedFd> {
        self.stores.iter().map(|fd| &**fd)
    }

    /// True if nothing changed between the two checks.
    pub fn is_as(&self, other: &CheckedStores) -> bool {
        self.stamps == other.stamps && self.ways == other.ways
    }

    /// True if a change within the last clock tick might go unnoticed.
    pub fn is_fresh(&self) -> bool {
        let now = since_epoch();
        let age = |stamp: &Stamp| {
            let (s, ns) = stamp.changed;
            let at = Duration::new(
                u64::try_from(s).unwrap_or(0),
                u32::try_from(ns).unwrap_or(0),
            );
            now.saturating_sub(at)
        };
        self.stamps
            .values()
            .chain(self.ways.values())
            .any(|stamp| age(stamp) < CLOCK_TICK)
    }
}

/// An open directory and the path at which it was found.
#[derive(Clone)]
struct Dir {
    path: PathBuf,
    fd: Rc<OwnedFd>,
}

impl Dir {
    fn entries(&self) -> std::io::Result<std::fs::ReadDir> {
        std::fs::read_dir(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }

    fn open_dir(&self, name: &OsStr) -> std::io::Result<Dir> {
        let flags = DIR_FLAGS.union(OFlags::NOFOLLOW);
        let fd = rustix::fs::openat(&self.fd, name, flags, Mode::empty())?;
        Ok(Dir {
            path: self.path.join(name),
            fd: Rc::new(fd),
        })
    }
}

const DIR_FLAGS: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// Opens a directory at a path without links. If a component has become a link, it no longer leads
/// to what was checked.
fn open_exactly(path: &Path) -> std::io::Result<OwnedFd> {
    let resolve = ResolveFlags::NO_SYMLINKS.union(ResolveFlags::NO_MAGICLINKS);
    for _ in 0..OPEN_TRIES {
        match rustix::fs::openat2(rustix::fs::CWD, path, DIR_FLAGS, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
    Err(Errno::AGAIN.into())
}

struct Check<'a> {
    own: BTreeSet<PathBuf>,
    allowed: &'a [PathBuf],
    /// Directories that were checked, and lists of alternates.
    seen: BTreeMap<PathBuf, Stamp>,
    /// Directories on the way to the targets of links and alternates.
    ways: BTreeMap<PathBuf, Stamp>,
}

impl Check<'_> {
    fn first_level(&mut self, dir: &Path) -> Result<()> {
        for item in read_dir(dir)? {
            let name = item.file_name().unwrap_or_default().as_bytes().to_owned();
            if NOT_READ.contains(&name.as_slice()) {
                continue;
            }
            let is_link = item.symlink_metadata().is_ok_and(|m| m.is_symlink());
            if is_link {
                self.link(&item, name == b"objects")?;
            }
            if DEEP.contains(&name.as_slice()) {
                self.through(&item, name == b"objects")?;
            }
        }
        Ok(())
    }

    /// Checks that a link stays inside. Links in an object store may also lead to an allowed path.
    fn link(&self, path: &Path, of_objects: bool) -> Result<PathBuf> {
        let target = real(path).map_err(|e| refusal(format!("follow {}", path.display()), e))?;
        self.require_known(path, &target, of_objects)?;
        Ok(target)
    }

    /// Rejects `target`, which `path` leads to, unless it belongs to the repository or is allowed.
    fn require_known(&self, path: &Path, target: &Path, of_objects: bool) -> Result<()> {
        let allowed = if of_objects { self.allowed } else { &[] };
        if self
            .own
            .iter()
            .chain(allowed)
            .any(|dir| target.starts_with(dir))
        {
            return Ok(());
        }
        let text = format!(
            "{} leads to {}, which does not belong to this tree",
            path.display(),
            target.display()
        );
        let hint = if of_objects {
            format!(
                "if the repository may use it, pass --allow-alternate {}",
                quoted(target)
            )
        } else {
            format!("inspect it with: ls -ld {}", quoted(path))
        };
        Err(Error::new(Kind::InvalidTree, text).hint(hint))
    }

    /// Checks everything below the directory at `path`, which may be a link.
    fn through(&mut self, path: &Path, of_objects: bool) -> Result<()> {
        let Ok(target) = real(path) else {
            return Ok(());
        };
        self.require_known(path, &target, of_objects)?;
        match open_exactly(&target) {
            Ok(fd) => self.walk(
                Dir {
                    path: target,
                    fd: Rc::new(fd),
                },
                of_objects,
            ),
            // The path is a file or does not exist.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ENOENT)) => Ok(()),
            Err(e) => Err(unreadable(&target, e)),
        }
    }

    /// Checks everything below an open directory. Subdirectories are opened from it, so that all of
    /// them belong to the same tree.
    fn walk(&mut self, root: Dir, of_objects: bool) -> Result<()> {
        let mut links = Vec::new();
        // A directory is opened only when its turn comes, relative to its parent.
        let mut pending: Vec<(Dir, Option<OsString>)> = vec![(root, None)];
        while let Some((above, name)) = pending.pop() {
            let dir = match &name {
                None => above,
                Some(name) => above
                    .open_dir(name)
                    .map_err(|e| unreadable(&above.path.join(name), e))?,
            };
            if !self.is_new(&dir)? {
                continue;
            }
            for item in dir.entries().map_err(|e| unreadable(&dir.path, e))? {
                let item = item.map_err(|e| unreadable(&dir.path, e))?;
                let name = item.file_name();
                let path = dir.path.join(&name);
                let kind = item.file_type().map_err(|e| unreadable(&path, e))?;
                if kind.is_symlink() {
                    let to = rustix::fs::readlinkat(&dir.fd, &name, Vec::new())
                        .map_err(|e| unreadable(&path, e.into()))?;
                    let to = dir.path.join(OsStr::from_bytes(to.as_bytes()));
                    let target =
                        real(&to).map_err(|e| refusal(format!("follow {}", path.display()), e))?;
                    self.require_known(&path, &target, of_objects)?;
                    links.push(target);
                } else if kind.is_dir() {
                    pending.push((dir.clone(), Some(name)));
                }
            }
        }
        links.iter().try_for_each(|target| {
            self.stamp_way(target)?;
            self.through(target, of_objects)
        })
    }

    /// Records a directory before it is read, so that any later change is noticed. Returns false if
    /// it is already recorded.
    fn is_new(&mut self, dir: &Dir) -> Result<bool> {
        let stamp = Stamp::of(&dir.fd, &dir.path)?;
        match self.seen.insert(dir.path.clone(), stamp.clone()) {
            None => Ok(true),
            Some(known) if known == stamp => Ok(false),
            Some(_) => Err(Error::new(
                Kind::Conflict,
                format!("{} changed while it was checked", dir.path.display()),
            )
            .hint("wait until nothing writes to the repository, then run the command again")),
        }
    }

    /// Records the directories of the repository that lead to `target`. git follows links and
    /// alternates by path, so a rename above one of them must be noticed too.
    fn stamp_way(&mut self, target: &Path) -> Result<()> {
        let way: Vec<PathBuf> = target.ancestors().skip(1).map(Path::to_owned).collect();
        for dir in way
            .into_iter()
            .filter(|dir| self.own.iter().any(|own| dir.starts_with(own)))
        {
            let fd = open_exactly(&dir).map_err(|e| unreadable(&dir, e))?;
            let stamp = Stamp::of(&fd, &dir)?;
            self.ways.entry(dir).or_insert(stamp);
        }
        Ok(())
    }

    /// Finds the stores from which `objects` takes further objects, recursively.
    fn alternates(
        &mut self,
        objects: &Dir,
        stores: &mut BTreeMap<PathBuf, Rc<OwnedFd>>,
    ) -> Result<()> {
        if stores
            .insert(objects.path.clone(), objects.fd.clone())
            .is_some()
        {
            return Ok(());
        }
        let list = objects.path.join("info/alternates");
        // Opens the list through the directory's descriptor, because the path may lead elsewhere by
        // now.
        let by_fd = PathBuf::from(format!(
            "/proc/self/fd/{}/info/alternates",
            objects.fd.as_raw_fd()
        ));
        let text = match open_pointer(&by_fd) {
            Ok(None) => Vec::new(),
            Ok(Some(file)) => {
                self.seen.insert(list.clone(), Stamp::of(&file, &list)?);
                read_open_pointer(file)
                    .map_err(|e| refusal(format!("read {}", list.display()), e))?
            }
            Err(e) => return Err(refusal(format!("read {}", list.display()), e)),
        };
        for named in alternate_entries(&text) {
            let named = objects.path.join(OsStr::from_bytes(&named));
            // git ignores an alternate that does not exist.
            let Ok(target) = real(&named) else { continue };
            let fd = match open_exactly(&target) {
                Ok(fd) => Rc::new(fd),
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ENOENT)) => {
                    continue;
                }
                Err(e) => return Err(unreadable(&target, e)),
            };
            let known = self.own.iter().chain(self.allowed);
            if !known.into_iter().any(|dir| target.starts_with(dir)) {
                return Err(Error::new(
                    Kind::InvalidTree,
                    format!(
                        "the repository takes objects from {}, named in {}",
                        target.display(),
                        list.display()
                    ),
                )
                .hint(format!(
                    "if it may, pass --allow-alternate {}",
                    quoted(&target)
                )));
            }
            self.stamp_way(&target)?;
            let dir = Dir { path: target, fd };
            self.walk(dir.clone(), true)?;
            self.alternates(&dir, stores)?;
        }
        Ok(())
    }
}

/// Parses an alternates file as git does: one path per line, comments after `#`, C-style quotes.
/// After a quoted path git skips one byte, whatever it is, and continues.
fn alternate_entries(text: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = text.split(|b| *b == 0).next().unwrap_or_default();
    let mut out = Vec::new();
    while !rest.is_empty() {
        let line = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
        let (path, end) = match (rest[0], unquote(rest)) {
            (b'#', _) => (Vec::new(), line),
            (b'"', Some((path, end))) => (path, end),
            _ => (rest[..line].to_owned(), line),
        };
        rest = rest.get(end + 1..).unwrap_or_default();
        if !path.is_empty() {
            out.push(path);
        }
    }
    out
}

/// Parses a quoted path at the start of `text`. Returns it with the offset of its end.
fn unquote(text: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut out = Vec::new();
    let mut at = 1;
    loop {
        match *text.get(at)? {
            b'"' => return Some((out, at + 1)),
            b'\\' => {
                at += 1;
                let c = *text.get(at)?;
                out.push(match c {
                    b'a' => 7,
                    b'b' => 8,
                    b'f' => 12,
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'v' => 11,
                    b'\\' | b'"' => c,
                    b'0'..=b'3' => {
                        let digits = text.get(at..at + 3)?;
                        if !digits.iter().all(|d| (b'0'..=b'7').contains(d)) {
                            return None;
                        }
                        at += 2;
                        digits.iter().fold(0, |n, d| (n << 3) | (d - b'0'))
                    }
                    _ => return None,
                });
            }
            c => out.push(c),
        }
        at += 1;
    }
}

/// Like realpath(3), but also resolves paths that do not exist, because a dangling link may have a
/// target later.
pub(super) fn real(path: &Path) -> std::io::Result<PathBuf> {
    let mut links = 0;
    let mut done = PathBuf::from("/");
    let mut todo: Vec<PathBuf> = path
        .components()
        .rev()
        .map(|c| PathBuf::from(c.as_os_str()))
        .collect();
    while let Some(part) = todo.pop() {
        match part.components().next() {
            None | Some(Component::CurDir) => continue,
            Some(Component::ParentDir) => {
                done.pop();
                continue;
            }
            Some(Component::RootDir | Component::Prefix(_)) => {
                done = PathBuf::from("/");
                continue;
            }
            Some(Component::Normal(_)) => done.push(&part),
        }
        match std::fs::read_link(&done) {
            Ok(target) => {
                links += 1;
                if links > LINKS_MAX {
                    return Err(std::io::Error::from_raw_os_error(libc::ELOOP));
                }
                done.pop();
                todo.extend(
                    target
                        .components()
                        .rev()
                        .map(|c| PathBuf::from(c.as_os_str())),
                );
            }
            // The component is not a link, or does not exist.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EINVAL | libc::ENOENT | libc::ENOTDIR)
                ) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Opens a small file that names a path. Returns `None` if it does not exist.
fn open_pointer(path: &Path) -> std::io::Result<Option<std::fs::File>> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    // Without O_NONBLOCK, opening a FIFO would wait for its writer.
    match options
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
    {
        Ok(file) if file.metadata()?.is_file() => Ok(Some(file)),
        Ok(_) => Err(std::io::Error::from_raw_os_error(libc::EINVAL)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn read_open_pointer(file: std::fs::File) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.take(POINTER_BYTES_MAX).read_to_end(&mut text)?;
    Ok(text)
}

fn read_pointer(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    open_pointer(path)?.map(read_open_pointer).transpose()
}

fn read_dir(dir: &Path) -> Result<Vec<PathBuf>> {
    let items = std::fs::read_dir(dir).map_err(|e| unreadable(dir, e))?;
    items
        .map(|item| item.map(|i| i.path()).map_err(|e| unreadable(dir, e)))
        .collect()
}

fn trim(text: &[u8]) -> &[u8] {
    let end = text
        .iter()
        .rposition(|b| !matches!(b, b'\n' | b'\r'))
        .map_or(0, |at| at + 1);
    &text[..end]
}

fn quoted(path: &Path) -> String {
    quote(&path.to_string_lossy())
}

fn look(top: &Path) -> String {
    format!("look with: git -C {} status", quoted(top))
}

fn refusal(doing: String, e: std::io::Error) -> Error {
    Error::io(doing, e).with_kind(Kind::InvalidTree)
}

fn unreadable(path: &Path, e: std::io::Error) -> Error {
    refusal(format!("read {}", path.display()), e)
        .hint(format!("inspect it with: ls -ld {}", quoted(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_entries(text: &str, want: &[&str]) {
        let got = alternate_entries(text.as_bytes());
        let got: Vec<_> = got
            .iter()
            .map(|p| String::from_utf8_lossy(p).into_owned())
            .collect();
        assert_eq!(got, want, "{text:?}");
    }

    #[test]
    fn alternates_file_is_parsed_as_git_parses_it() {
        check_entries("", &[]);
        check_entries("/a\n/b", &["/a", "/b"]);
        check_entries("\n#/c\n../d e\n", &["../d e"]);
        check_entries("\"/a\\tb\\\"\\101\"\n/c", &["/a\tb\"A", "/c"]);
        check_entries("\"/a\"x/b\n", &["/a", "/b"]);
        check_entries("\"/a\n/b\n", &["\"/a", "/b"]);
        check_entries("\"/a\\q\"\n", &["\"/a\\q\""]);
        check_entries("/a\0/b\n", &["/a"]);
    }

    #[test]
    fn real_path_resolves_missing_components() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        std::fs::create_dir(dir.join("d")).unwrap();
        std::os::unix::fs::symlink("d/../gone/x", dir.join("l")).unwrap();
        std::os::unix::fs::symlink("loop", dir.join("loop")).unwrap();
        assert_eq!(real(&dir.join("l/y")).unwrap(), dir.join("gone/x/y"));
        assert_eq!(real(&dir.join("d/.././d")).unwrap(), dir.join("d"));
        assert!(real(&dir.join("loop")).is_err());
    }
}
