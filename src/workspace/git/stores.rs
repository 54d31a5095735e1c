//! Checks that everything git would read in a repository belongs to the tree; see `layout.rs`.

use super::alternates::alternate_entries;
use super::layout::Layout;
use super::paths::{open_pointer, quoted, read_open_pointer, real, refusal, unreadable};
use crate::error::{Error, Kind, Result};
use crate::host::time::since_epoch;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// Resolution of the coarsest clock that a kernel uses for the time of a change.
const CLOCK_TICK: Duration = Duration::from_millis(10);
/// Maximum number of calls of openat2(2) for one path. A call fails with EAGAIN if something is
/// renamed during the lookup.
const OPEN_TRIES: usize = 64;
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

impl Layout {
    /// Checks everything that git would read and rejects what leads out of the repository. The
    /// paths in `allowed` must not contain links. If two results are equal, nothing changed in
    /// between.
    pub(super) fn check(&self, allowed: &[PathBuf]) -> Result<CheckedStores> {
        let own = BTreeSet::from([self.top.clone(), self.git_dir.clone(), self.common.clone()]);
        let mut check = Check {
            own,
            allowed,
            seen: BTreeMap::new(),
            ways: BTreeMap::new(),
        };
        // Open the object directory first, so that the checks cover the tree behind this
        // descriptor.
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
/// All directories were read through descriptors, starting at each store. A path could lead
/// somewhere else at each lookup, because another user may rename the directories above it.
#[derive(Debug)]
pub(super) struct CheckedStores {
    stamps: BTreeMap<PathBuf, Stamp>,
    ways: BTreeMap<PathBuf, Stamp>,
    stores: Vec<Rc<OwnedFd>>,
}

/// Identifies the state of a directory. Every change alters the stamp, because no process can set a
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
    /// Returns the object directories that were checked: first the repository's own, then those of
    /// its alternates.
    pub(super) fn stores(&self) -> impl Iterator<Item = &OwnedFd> {
        self.stores.iter().map(|fd| &**fd)
    }

    /// True if nothing changed between the two checks.
    pub(super) fn is_as(&self, other: &CheckedStores) -> bool {
        self.stamps == other.stamps && self.ways == other.ways
    }

    /// True if something changed within the last clock tick. Another change in the same tick would
    /// go unnoticed.
    pub(super) fn is_fresh(&self) -> bool {
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

/// Opens a directory at a path without links. Fails if a component has become a link, because the
/// path then no longer leads to the directory that was checked.
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
    /// Stamps of the directories and the lists of alternates that were checked.
    seen: BTreeMap<PathBuf, Stamp>,
    /// Stamps of the repository's directories on the paths to the targets of links and alternates.
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

    /// Returns the target of a link, or `invalid_tree` if the link leads out of the repository.
    /// Links in an object store may also lead to an allowed path.
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

    /// Checks everything below the directory at `path`, which may be a link. Accepts a path that is
    /// a file or does not exist.
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

    /// Checks everything below an open directory. Each subdirectory is opened through its parent's
    /// descriptor, so that all of them belong to the same tree.
    fn walk(&mut self, root: Dir, of_objects: bool) -> Result<()> {
        let mut links = Vec::new();
        // Each directory is opened relative to its parent, and only when it is about to be read.
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
    /// the directory is already recorded, and `conflict` if it has changed since then.
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

    /// Checks the stores from which `objects` takes further objects, recursively, and adds
    /// `objects` and all of them to `stores`.
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
        // Open the list through the directory's descriptor, because the path may now lead
        // elsewhere.
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

fn read_dir(dir: &Path) -> Result<Vec<PathBuf>> {
    let items = std::fs::read_dir(dir).map_err(|e| unreadable(dir, e))?;
    items
        .map(|item| item.map(|i| i.path()).map_err(|e| unreadable(dir, e)))
        .collect()
}
