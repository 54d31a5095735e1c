//! Writes the payload of an import. Its first archive has these files, of which only `kind` is
//! required:
//!
//! | name | what |
//! |---|---|
//! | `kind` | `git`, `files` (a repository without its history), `plain`, `raw` (no other file follows) |
//! | `sent` | paths of the tree that a patch may bring back, including left-out ones; sorted, NUL-terminated |
//! | `dirs` | directories that are sent as entries; sorted, NUL-terminated |
//! | `kept` | `<mode> <oid> 0 TAB <path> NUL`: the host's version of a file left out because the guest changed it |
//! | `archive` | present if much of the content is in no pack: the guest then keeps the second archive |
//! | `submodules` | places whose files are not sent: `x` or `-` (whether the host has files there), the commit or `-`, the path, NUL |
//! | `repositories` | the `.git` directories that are sent with a plain tree; NUL-terminated |
//! | `format` | `sha1` or `sha256` |
//! | `head` | the branch or `-`, then the commit or `-`, one per line |
//! | `name`, `pack`, `idx` | the pack's name and its two files |
//! | `shallow`, `commits` | commits at which the history is cut, commits that are sent; sorted lines |
//! | `tags` | `<oid> <ref>` lines |
//! | `index` | the index for `update-index -z --index-info` |
//! | `seed` | the part of `index` whose files probably match the tree |
//! | `skip-worktree`, `assume-unchanged`, `intent-to-add` | paths, NUL-terminated |
//! | `filters` | names of git filters that would run on the host; NUL-terminated |
//! | `filtered` | files covered by those filters that are unchanged on the host; sorted, NUL-terminated |
//! | `global-attributes` | the caller's attributes for all repositories |
//! | `config`, `exclude`, `attributes`, `sparse-checkout` | text for `.git/config` and for files in `.git/info` |
//! | `partial` | present if the repository is a partial clone, whose missing objects are at its origin |

use super::{Plan, Repo, TreeKind};
use crate::error::{Error, Kind, Result};
use crate::host::hex;
use crate::locks::Cancel;
use crate::workspace::beneath::{Beneath, is_absent};
use crate::workspace::encode::encode;
use crate::workspace::git::{IndexEntry, Tag};
use crate::workspace::tar_writer::{BLOCK, Meta, ReadOutcome, TarWriter, write_all};
use crate::workspace::walk::{Apart, Entry, EntryKind, inside_git_dir, unreadable};
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Read, Write};

const BUFFER_BYTES: usize = 256 * 1024;
/// Limits for files that are not in the pack. If they exceed either limit, the guest keeps the
/// archive, because storing the files as git blobs would take longer.
const LOOSE_BYTES_MAX: u64 = 8 * 1024 * 1024;
const LOOSE_FILES_MAX: usize = 2000;

/// The result of sending a tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Number of entries in the tree.
    pub entries: u64,
    /// Size of the payload.
    pub bytes: u64,
    /// A sentence for each file that vanished or changed while the tree was packed.
    pub warnings: Vec<String>,
}

/// Paths where the guest keeps its own version, and the directories above them.
struct Keep<'a> {
    paths: HashSet<&'a [u8]>,
    ancestors: HashSet<&'a [u8]>,
}

fn ancestors(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.iter()
        .enumerate()
        .filter(|(_, b)| **b == b'/')
        .map(|(at, _)| &path[..at])
}

impl<'a> Keep<'a> {
    fn new(keep: &'a [Vec<u8>]) -> Self {
        let paths: HashSet<&[u8]> = keep.iter().map(Vec::as_slice).collect();
        let ancestors = keep.iter().flat_map(|p| ancestors(p)).collect();
        Self { paths, ancestors }
    }

    fn leaves_out(&self, entry: &Entry) -> bool {
        let path = entry.path.as_slice();
        self.paths.contains(path)
            || (entry.kind != EntryKind::Dir && self.ancestors.contains(path))
            || ancestors(path).any(|a| self.paths.contains(a))
    }
}

impl Plan {
    /// Writes the payload.
    ///
    /// `keep` holds the decoded paths from the daemon's `ready` note, which are left out.
    /// `progress` gets the number of entries and bytes so far. Errors: `invalid_tree` (a file
    /// cannot be read), `conflict` (a file became shorter while it was read), `stream_incomplete`
    /// (the reader is gone), `cancelled`, `host`. After an error the caller must not write a
    /// trailer.
    pub fn send(
        &mut self,
        out: &mut dyn Write,
        keep: &[Vec<u8>],
        progress: &mut dyn FnMut(u64, u64),
        cancel: &Cancel,
    ) -> Result<Sent> {
        let keep = Keep::new(keep);
        let mut beneath = super::open_root(&self.root)?;
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, out);
        let kept = self.kept(&keep, &mut beneath, cancel)?;
        let meta_bytes = self.send_meta(&mut out, kept, progress, cancel)?;
        let mut tar = TarWriter::new(out, cancel);
        let mut warnings = Vec::new();
        let mut done = meta_bytes;
        for entry in self.entries.iter().filter(|e| !keep.leaves_out(e)) {
            let entries = tar.entries;
            let mut note = |n| {
                done += n;
                progress(entries, done);
            };
            if let Some(warning) = send_entry(&mut tar, &mut beneath, entry, &mut note)? {
                warnings.push(warning);
            }
            done = meta_bytes + tar.bytes;
            progress(tar.entries, done);
        }
        let entries = tar.entries;
        let (mut out, tree_bytes) = tar.finish()?;
        out.flush().map_err(|e| match e.kind() {
            std::io::ErrorKind::BrokenPipe => Error::new(
                Kind::StreamIncomplete,
                "send the tree: the daemon stopped reading",
            ),
            _ => Error::io("send the tree", e),
        })?;
        let sent = Sent {
            entries,
            bytes: meta_bytes + tree_bytes,
            warnings,
        };
        progress(sent.entries, sent.bytes);
        Ok(sent)
    }

    /// Builds the `kept` file of the payload.
    fn kept(&self, keep: &Keep<'_>, beneath: &mut Beneath, cancel: &Cancel) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let sha256 = self.repo.as_ref().is_some_and(|r| r.format == "sha256");
        for entry in &self.entries {
            if entry.kind == EntryKind::Dir
                || !keep.leaves_out(entry)
                || inside_git_dir(&entry.path)
            {
                continue;
            }
            match blob_id(beneath, entry, sha256, cancel) {
                Ok(oid) => {
                    out.extend_from_slice(format!("{} {oid} 0\t", entry.git_mode()).as_bytes());
                    out.extend_from_slice(&entry.path);
                    out.push(0);
                }
                Err(Some(e)) => return Err(e),
                Err(None) => {}
            }
        }
        Ok(out)
    }

    fn lists(&self, kept: Vec<u8>) -> Vec<(&'static str, Vec<u8>)> {
        let kind = match self.kind {
            TreeKind::Git => "git\n",
            TreeKind::GitFiles => "files\n",
            TreeKind::Plain => "plain\n",
        };
        let list = |dirs: bool| {
            let chosen = self
                .entries
                .iter()
                .filter(|e| (e.kind == EntryKind::Dir) == dirs && !inside_git_dir(&e.path));
            nul_list(chosen.map(|e| e.path.as_slice()))
        };
        let mut files = vec![
            ("kind", kind.into()),
            ("sent", list(false)),
            ("dirs", list(true)),
            ("kept", kept),
        ];
        files.push((
            "submodules",
            self.apart.iter().flat_map(Apart::record).collect(),
        ));
        files.push((
            "repositories",
            nul_list(self.repositories.iter().map(Vec::as_slice)),
        ));
        if self.is_loose() {
            files.push(("archive", b"1\n".to_vec()));
        }
        if let Some(repo) = &self.repo {
            let sent: HashSet<&[u8]> = self
                .entries
                .iter()
                .filter(|e| e.kind != EntryKind::Dir)
                .map(|e| e.path.as_slice())
                .collect();
            files.extend(repo.lists(&sent, self.kind == TreeKind::Git));
        }
        files.retain(|(name, data)| *name == "kind" || !data.is_empty());
        files
    }

    /// True if much of the content is in no pack. Modified tracked files are not counted: there are
    /// few of them, and finding them would mean reading every file.
    fn is_loose(&self) -> bool {
        let indexed = self.repo.as_ref().filter(|_| self.kind == TreeKind::Git);
        let indexed: HashSet<&[u8]> = indexed
            .iter()
            .flat_map(|r| &r.index)
            .map(|e| e.path.as_slice())
            .collect();
        let loose = || {
            self.entries
                .iter()
                .filter(|e| e.kind == EntryKind::File && !indexed.contains(e.path.as_slice()))
        };
        loose().count() > LOOSE_FILES_MAX || loose().map(|e| e.bytes).sum::<u64>() > LOOSE_BYTES_MAX
    }

    fn send_meta(
        &mut self,
        out: &mut impl Write,
        kept: Vec<u8>,
        progress: &mut dyn FnMut(u64, u64),
        cancel: &Cancel,
    ) -> Result<u64> {
        let lists = self.lists(kept);
        let length = |f: &File| {
            f.metadata()
                .map(|m| m.len())
                .map_err(|e| Error::io("inspect the pack", e))
        };
        let entry = |len: u64| BLOCK + len.next_multiple_of(BLOCK);
        let mut size = 2 * BLOCK
            + lists
                .iter()
                .map(|(_, data)| entry(data.len() as u64))
                .sum::<u64>();
        let pack = self.repo.as_mut().and_then(|r| r.pack.as_mut());
        if let Some(pack) = &pack {
            size += entry(length(&pack.pack)?) + entry(length(&pack.idx)?);
        }
        let line = format!("fcd-import 1 {size}\n");
        write_all(out, line.as_bytes(), cancel)?;
        let mut tar = TarWriter::new(out, cancel);
        for (name, data) in &lists {
            tar.data(name.as_bytes(), data)?;
        }
        if let Some(pack) = pack {
            let mut done = line.len() as u64;
            let mut note = |n| {
                done += n;
                progress(0, done);
            };
            for (name, file) in [
                (b"pack".as_slice(), &mut pack.pack),
                (b"idx", &mut pack.idx),
            ] {
                rewind(file)?;
                tar.plain_file(name, file, 0o444, &mut note)?;
            }
        }
        let (_, bytes) = tar.finish()?;
        if bytes != size {
            return Err(Error::internal(format!(
                "the first archive has {bytes} bytes instead of {size}"
            )));
        }
        Ok(line.len() as u64 + bytes)
    }
}

fn rewind(file: &mut File) -> Result<()> {
    use std::io::Seek;
    file.rewind().map_err(|e| Error::io("read the pack", e))
}

fn nul_list<'a>(paths: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut out = Vec::new();
    for path in paths {
        out.extend_from_slice(path);
        out.push(0);
    }
    out
}

impl Repo {
    fn lists(&self, sent: &HashSet<&[u8]>, with_history: bool) -> Vec<(&'static str, Vec<u8>)> {
        let mut files = vec![
            ("format", format!("{}\n", self.format).into_bytes()),
            ("exclude", self.exclude.clone()),
        ];
        if !with_history {
            return files;
        }
        let lines = |items: &mut dyn Iterator<Item = &String>| {
            items.flat_map(|l| [l.as_bytes(), b"\n"].concat()).collect()
        };
        let flagged = |flag: &dyn Fn(&IndexEntry) -> bool| {
            nul_list(
                self.index
                    .iter()
                    .filter(|e| flag(e))
                    .map(|e| e.path.as_slice()),
            )
        };
        // A partial clone may lack the blob, so the guest hashes the file instead.
        let seeds = |e: &&IndexEntry| {
            !self.partial
                && e.stage == 0
                && e.mode != IndexEntry::GITLINK
                && sent.contains(e.path.as_slice())
                && !inside_git_dir(&e.path)
        };
        let branch = self.head.branch.as_deref().unwrap_or(b"-");
        let oid = self.head.oid.as_deref().unwrap_or("-");
        let tag = |tag: &Tag| [tag.oid.as_bytes(), b" ", &tag.name, b"\n"].concat();
        files.extend([
            ("head", [branch, b"\n", oid.as_bytes(), b"\n"].concat()),
            (
                "name",
                self.pack
                    .as_ref()
                    .map(|p| format!("{}\n", p.name).into_bytes())
                    .unwrap_or_default(),
            ),
            ("shallow", lines(&mut self.history.shallow.iter())),
            ("commits", lines(&mut self.history.commits.iter())),
            ("tags", self.history.tags.iter().flat_map(tag).collect()),
            (
                "index",
                self.index
                    .iter()
                    .filter(|e| !self.is_intent(e))
                    .flat_map(IndexEntry::info)
                    .collect(),
            ),
            (
                "seed",
                self.index
                    .iter()
                    .filter(|e| !self.is_intent(e))
                    .filter(seeds)
                    .flat_map(IndexEntry::info)
                    .collect(),
            ),
            ("skip-worktree", flagged(&|e| e.skip_worktree)),
            ("assume-unchanged", flagged(&|e| e.assume_unchanged)),
            ("intent-to-add", flagged(&|e| self.is_intent(e))),
            ("config", self.config.clone()),
            ("attributes", self.attributes.clone()),
            ("global-attributes", self.global_attributes.clone()),
            (
                "filters",
                nul_list(self.filtered.counts.keys().map(Vec::as_slice)),
            ),
            (
                "filtered",
                nul_list(self.filtered.unchanged.iter().map(Vec::as_slice)),
            ),
            ("sparse-checkout", self.sparse.clone()),
            (
                "partial",
                if self.partial {
                    b"1\n".to_vec()
                } else {
                    Vec::new()
                },
            ),
        ]);
        files
    }

    fn is_intent(&self, entry: &IndexEntry) -> bool {
        self.intent_to_add.contains(&entry.path)
    }
}

/// Sends one entry. Returns a warning if a file or link vanished, or if a file changed, while the
/// tree was packed.
fn send_entry<W: Write>(
    tar: &mut TarWriter<'_, W>,
    beneath: &mut Beneath,
    entry: &Entry,
    progress: &mut dyn FnMut(u64),
) -> Result<Option<String>> {
    let shown = || encode(&entry.path);
    let meta = Meta {
        mode: entry.mode,
        mtime: entry.mtime,
    };
    let gone = || {
        Ok(Some(format!(
            "{} vanished while the tree was packed, so it was not sent",
            shown()
        )))
    };
    match entry.kind {
        EntryKind::Dir => tar.dir(&entry.path, meta).map(|()| None),
        EntryKind::Symlink => match beneath.read_link(&entry.path) {
            Ok(target) => tar
                .symlink(
                    &entry.path,
                    &target,
                    Meta {
                        mode: 0o777,
                        ..meta
                    },
                )
                .map(|()| None),
            Err(e) if is_absent(&e) || e.raw_os_error() == Some(libc::EINVAL) => gone(),
            Err(e) => Err(Error::io(format!("read the link {}", shown()), e)),
        },
        EntryKind::File => {
            let mut file = match open_regular(beneath, entry) {
                Ok(file) => file,
                Err(None) => return gone(),
                Err(Some(e)) => return Err(e),
            };
            Ok(
                match tar.file(&entry.path, &mut file, entry.mode, progress)? {
                    ReadOutcome::Same => None,
                    ReadOutcome::Changed => {
                        Some(format!("{} changed while it was packed", shown()))
                    }
                },
            )
        }
    }
}

/// Opens a regular file for reading. Returns `Err(None)` if the file no longer exists or is no
/// longer a regular file.
fn open_regular(beneath: &mut Beneath, entry: &Entry) -> Result<File, Option<Error>> {
    match beneath.open_file(&entry.path) {
        Ok(file) if file.metadata().is_ok_and(|m| m.is_file()) => Ok(file),
        Ok(_) => Err(None),
        // ENXIO: a socket has replaced the file.
        Err(e) if is_absent(&e) || e.raw_os_error() == Some(libc::ENXIO) => Err(None),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(Some(unreadable(&encode(&entry.path))))
        }
        Err(e) => Err(Some(Error::io(format!("open {}", encode(&entry.path)), e))),
    }
}

/// Computes git's object name of the content: the hash of `blob <size> NUL <bytes>`. Returns
/// `Err(None)` if the entry no longer exists.
fn blob_id(
    beneath: &mut Beneath,
    entry: &Entry,
    sha256: bool,
    cancel: &Cancel,
) -> Result<String, Option<Error>> {
    let io = |e: std::io::Error| Some(Error::io(format!("read {}", encode(&entry.path)), e));
    if entry.kind == EntryKind::Symlink {
        let target = beneath
            .read_link(&entry.path)
            .map_err(|e| if is_absent(&e) { None } else { io(e) })?;
        return hash(target.len() as u64, &mut target.as_slice(), sha256, cancel).map_err(io);
    }
    let file = open_regular(beneath, entry)?;
    let size = file.metadata().map_err(io)?.len();
    hash(size, &mut file.take(size), sha256, cancel).map_err(io)
}

fn hash(size: u64, from: &mut dyn Read, sha256: bool, cancel: &Cancel) -> std::io::Result<String> {
    use sha1::Digest;
    let mut h1 = sha1::Sha1::new();
    let mut h2 = sha2::Sha256::new();
    let mut add = |bytes: &[u8]| {
        if sha256 {
            h2.update(bytes)
        } else {
            h1.update(bytes)
        }
    };
    add(format!("blob {size}\0").as_bytes());
    let mut buffer = vec![0; 64 * 1024];
    loop {
        if let Some(cause) = cancel.cause() {
            return Err(std::io::Error::other(format!("cancelled: {cause}")));
        }
        match from.read(&mut buffer)? {
            0 => break,
            n => add(&buffer[..n]),
        }
    }
    Ok(if sha256 {
        hex::encode(&h2.finalize())
    } else {
        hex::encode(&h1.finalize())
    })
}
