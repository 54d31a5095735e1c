//! Selects how much of the history is sent, and makes the pack that holds it.

use super::stores::CheckedStores;
use super::{Git, parse};
use crate::error::{Error, Kind, Result};
use crate::workspace::options::History;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Maximum number of attempts to make the pack while the repository changes.
const PACK_TRIES: usize = 5;
const PACK_DEADLINE: Duration = Duration::from_secs(1800);
/// How many commits beyond the requested depth the first query asks for, so that one query is
/// enough for a linear history.
const LOOK_AHEAD: u32 = 200;
/// Maximum size of the list of commits at which a shallow repository ends.
const SHALLOW_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Maximum number of tags that are sent.
const TAGS_MAX: usize = 10_000;

/// The part of the history that is sent.
#[derive(Debug, Default)]
pub(in crate::workspace) struct HistorySelection {
    /// Commits whose parents are not sent, including those at which the repository itself is
    /// shallow.
    pub shallow: BTreeSet<String>,
    /// The commits that are sent. The set is empty if the whole history is sent.
    pub commits: BTreeSet<String>,
    pub tags: Vec<Tag>,
}

/// A tag that is sent.
#[derive(Debug)]
pub(in crate::workspace) struct Tag {
    /// A full ref name such as `refs/tags/v1`, in any encoding.
    pub name: Vec<u8>,
    pub oid: String,
}

/// A pack and its index. Both files are unlinked already.
#[derive(Debug)]
pub(in crate::workspace) struct Pack {
    /// The pack's name, `pack-<hash>`.
    pub name: String,
    pub pack: File,
    pub idx: File,
}

impl Git {
    /// Selects the commits to send and where the history is cut.
    pub(crate) fn history(&self, head: &str, depth: History) -> Result<HistorySelection> {
        let own = self.own_shallow()?;
        let History::Depth(depth) = depth else {
            let tags = self.tags(None)?;
            return Ok(HistorySelection {
                shallow: own,
                commits: BTreeSet::new(),
                tags,
            });
        };
        let (commits, mut shallow) = self.within(head, depth)?;
        shallow.extend(own.into_iter().filter(|c| commits.contains(c)));
        let tags = self.tags(Some(&commits))?;
        Ok(HistorySelection {
            shallow,
            commits,
            tags,
        })
    }

    /// Returns the commits at which this repository itself is shallow.
    fn own_shallow(&self) -> Result<BTreeSet<String>> {
        let text = self.own_file("shallow", SHALLOW_BYTES_MAX)?;
        Ok(String::from_utf8_lossy(&text)
            .lines()
            .filter(|l| parse::is_oid(l))
            .map(str::to_owned)
            .collect())
    }

    /// Returns the commits at most `depth - 1` steps from `head`, and those among them that have a
    /// parent outside the set.
    fn within(&self, head: &str, depth: u32) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
        let mut parents = HashMap::new();
        let count = format!(
            "--max-count={}",
            depth.saturating_mul(2).saturating_add(LOOK_AHEAD)
        );
        self.parents_into(
            &mut parents,
            &["rev-list", "--parents", &count, head, "--"],
            "",
        )?;
        let mut seen: BTreeSet<String> = BTreeSet::from([head.to_owned()]);
        let mut shallow = BTreeSet::new();
        let mut frontier = vec![head.to_owned()];
        for step in 1..=depth {
            let unknown: Vec<&str> = frontier
                .iter()
                .filter(|c| !parents.contains_key(*c))
                .map(String::as_str)
                .collect();
            if !unknown.is_empty() {
                let input = unknown.join("\n") + "\n";
                self.parents_into(
                    &mut parents,
                    &["rev-list", "--parents", "--no-walk", "--stdin"],
                    &input,
                )?;
            }
            let mut next = Vec::new();
            for commit in frontier {
                let of = parents.get(&commit).cloned().unwrap_or_default();
                if step == depth {
                    if !of.is_empty() {
                        shallow.insert(commit);
                    }
                    continue;
                }
                next.extend(of.into_iter().filter(|p| seen.insert(p.clone())));
            }
            frontier = next;
            if frontier.is_empty() {
                break;
            }
        }
        Ok((seen, shallow))
    }

    fn parents_into(
        &self,
        parents: &mut HashMap<String, Vec<String>>,
        args: &[&str],
        input: &str,
    ) -> Result<()> {
        let command = self.commands.command(args).stdin(input);
        let (_, text) = self
            .commands
            .ask_status(&command, &[0])
            .map_err(|e| self.commands.refused(e))?;
        for line in String::from_utf8_lossy(&text).lines() {
            let mut words = line.split(' ').map(str::to_owned);
            if let Some(commit) = words.next() {
                parents.insert(commit, words.collect());
            }
        }
        Ok(())
    }

    /// Lists the local objects that are needed for the commits, tags and blobs in `wanted`. Objects
    /// that a partial clone lacks are not fetched.
    fn present_objects(&self, wanted: String, history: &HistorySelection) -> Result<Vec<u8>> {
        let args = [
            "rev-list",
            "--objects",
            "--no-object-names",
            "--missing=allow-any",
            "--stdin",
        ];
        // If the history is cut, the input names every commit.
        let walk = if history.commits.is_empty() {
            None
        } else {
            Some("--no-walk=unsorted")
        };
        let command = self
            .commands
            .command(&args)
            .args(walk)
            .stdin(wanted)
            .deadline(PACK_DEADLINE);
        Ok(self
            .commands
            .ask_status(&command, &[0])
            .map_err(|e| self.commands.refused(e))?
            .1)
    }

    /// Lists the tags that name one of `commits`, or with `None` every tag that HEAD contains.
    fn tags(&self, commits: Option<&BTreeSet<String>>) -> Result<Vec<Tag>> {
        let format =
            "--format=%(objecttype) %(*objecttype) %(objectname) %(*objectname) %(refname)";
        let mut args = vec!["for-each-ref", format];
        if commits.is_none() {
            args.push("--merged=HEAD");
        }
        args.push("refs/tags");
        // A tag whose object is missing must not make the import fail. In that case no tags are
        // sent.
        let (status, text) = self
            .commands
            .ask_status(&self.commands.command(&args), &[0, 1, 128])?;
        let text = if status == 0 { text } else { Vec::new() };
        let mut out = Vec::new();
        for line in text.split(|b| *b == b'\n').take(TAGS_MAX) {
            let words: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
            let [kind, inner, oid, peeled, name] = words[..] else {
                continue;
            };
            let target = if kind == b"commit" { oid } else { peeled };
            let is_commit = kind == b"commit" || inner == b"commit";
            let (oid, target) = (
                String::from_utf8_lossy(oid),
                String::from_utf8_lossy(target),
            );
            if is_commit && commits.is_none_or(|c| c.contains(&*target)) {
                out.push(Tag {
                    name: name.to_owned(),
                    oid: oid.into_owned(),
                });
            }
        }
        Ok(out)
    }
}

/// Makes a pack of the history and `blobs` in a directory below `dir`. Returns `None` if there is
/// nothing to pack, and `conflict` if the repository changed during every attempt.
///
/// Another user may change the repository while git reads it and then undo the change, to get
/// objects of another repository into the pack. To prevent that, each object store is checked
/// through a descriptor before and after, and git reads through the same descriptor, which no
/// rename above it can affect.
pub(in crate::workspace) fn pack(
    git: &Git,
    head: Option<&str>,
    history: &HistorySelection,
    blobs: &HashSet<String>,
    partial: bool,
    dir: &Path,
) -> Result<Option<Pack>> {
    for tried in 0..PACK_TRIES {
        let before = git.layout.check(&git.allowed)?;
        let fresh = before.is_fresh();
        let packed = pack_once(
            git,
            head,
            history,
            blobs,
            partial,
            (&before, &dir.join(tried.to_string())),
        );
        if !fresh && git.layout.check(&git.allowed)?.is_as(&before) {
            return packed;
        }
    }
    Err(Error::new(
        Kind::Conflict,
        "pack the history: the repository changed while it was read",
    )
    .hint("wait until nothing writes to it, then run the command again"))
}

fn pack_once(
    git: &Git,
    head: Option<&str>,
    history: &HistorySelection,
    blobs: &HashSet<String>,
    partial: bool,
    (store, dir): (&CheckedStores, &Path),
) -> Result<Option<Pack>> {
    let wanted: Vec<&str> = head
        .into_iter()
        .chain(history.tags.iter().map(|tag| tag.oid.as_str()))
        .chain(blobs.iter().map(String::as_str))
        .collect();
    if wanted.is_empty() {
        return Ok(None);
    }
    let lines =
        |oids: &mut dyn Iterator<Item = &str>| oids.flat_map(|oid| [oid, "\n"]).collect::<String>();
    // pack-objects fails at a tree that a partial clone lacks; rev-list skips such a tree.
    let (walk, input) = if partial {
        let commits = history.commits.iter().map(String::as_str);
        (
            None,
            git.present_objects(lines(&mut wanted.into_iter().chain(commits)), history)?,
        )
    } else {
        let cut: String = history
            .shallow
            .iter()
            .map(|commit| format!("--shallow {commit}\n"))
            .collect();
        (
            Some("--revs"),
            (cut + &lines(&mut wanted.into_iter())).into_bytes(),
        )
    };
    let objects = dir.join("objects");
    std::fs::create_dir_all(objects.join("pack"))
        .map_err(|e| Error::io("create a directory for the pack", e))?;
    let args = [
        "-c",
        "pack.packSizeLimit=0",
        "-c",
        "pack.writeReverseIndex=false",
        "pack-objects",
    ];
    let options = ["--delta-base-offset", "-q"];
    let base = dir.join("pack");
    let mut alternates = std::ffi::OsString::new();
    for (n, store) in store.stores().enumerate() {
        let view = dir.join(format!("store-{n}"));
        view_of(store, &view).map_err(|e| Error::io(format!("create {}", view.display()), e))?;
        alternates.push(if n == 0 { "" } else { ":" });
        alternates.push(alternate(&view));
    }
    let command = git
        .commands
        .command(&args)
        .args(walk)
        .args(options)
        .arg(&base)
        // git writes its temporary file into the object directory, which must not be the caller's.
        .env("GIT_OBJECT_DIRECTORY", &objects)
        .env("GIT_ALTERNATE_OBJECT_DIRECTORIES", alternates)
        .stdin(input)
        .deadline(PACK_DEADLINE);
    let (_, hash) = git
        .commands
        .ask_status(&command, &[0])
        .map_err(|e| e.context("pack the history"))?;
    let hash = String::from_utf8_lossy(hash.trim_ascii()).into_owned();
    if !parse::is_oid(&hash) {
        return Err(Error::new(
            Kind::CommandFailed,
            "pack the history: git did not name a pack",
        ));
    }
    let name = format!("pack-{hash}");
    let open = |ext: &str| {
        let path = dir.join(format!("{name}.{ext}"));
        File::open(&path).map_err(|e| Error::io(format!("open {}", path.display()), e))
    };
    Ok(Some(Pack {
        pack: open("pack")?,
        idx: open("idx")?,
        name,
    }))
}

/// Creates a directory through which git reads an object store by its descriptor.
///
/// git resolves the path of a store to one without links (`link_alt_odb_entry` in its
/// object-file.c). A bare `/proc/PID/fd/N` would become the original path, which another user may
/// swap. git does not resolve the entries inside a store, so this directory links to `pack` and to
/// the loose object directories. `info` is left out, because the alternates that it names have
/// views of their own.
fn view_of(store: &OwnedFd, at: &Path) -> std::io::Result<()> {
    std::fs::create_dir(at)?;
    let target = PathBuf::from(format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        store.as_raw_fd()
    ));
    for item in std::fs::read_dir(&target)? {
        let name = item?.file_name();
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(name.as_os_str());
        if bytes == b"pack" || (bytes.len() == 2 && bytes.iter().all(u8::is_ascii_hexdigit)) {
            std::os::unix::fs::symlink(target.join(&name), at.join(&name))?;
        }
    }
    Ok(())
}

/// Quotes a path for git's colon-separated list of alternates.
fn alternate(path: &Path) -> std::ffi::OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut out = vec![b'"'];
    for &b in path.as_os_str().as_bytes() {
        match b {
            b'"' | b'\\' => out.extend([b'\\', b]),
            b' '..=b'~' => out.push(b),
            _ => out.extend(format!("\\{b:03o}").into_bytes()),
        }
    }
    out.push(b'"');
    std::ffi::OsString::from_vec(out)
}
