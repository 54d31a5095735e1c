//! Merges the indexes of layers into one tree, from the lowest layer to the highest.
//!
//! The rules are those of `umoci unpack` and docker, applied to a tree in memory:
//! - An entry replaces what has its path, unless both are directories. A later entry of the same
//!   layer wins.
//! - A link in the middle of a path is followed as in a chroot: it never leaves the tree.
//! - A hard link is a second name of one object, so replacing one name never changes the other.
//! - `.wh.NAME` removes NAME, and `.wh..wh..opq` removes everything in its directory, but only what
//!   comes from lower layers, wherever in the layer the whiteout is.
//!
//! No function here recurses, because a hostile image decides how deep its tree is.

use super::entry::{Entry, EntryKind};
use super::errors::{bad, check_cancel, shown};
use super::layer::LayerIndex;
use super::limits::{DEPTH_MAX, ENTRIES_MAX, LINKS_MAX, STEPS_MAX};
use crate::error::Result;
use crate::locks::Cancel;
use std::collections::BTreeMap;

const WHITEOUT: &str = ".wh.";
/// The prefix of metadata of AUFS, which docker ignores.
const AUFS: &str = ".wh..wh.";
const OPAQUE: &str = ".wh..wh..opq";
/// How many entries are merged between two checks of the cancel token.
const CANCEL_PERIOD: usize = 1024;
/// The maximum number of nodes, including directories that no entry names and nodes that were
/// removed.
const NODES_MAX: u64 = 2 * ENTRIES_MAX;

/// The index of a node in [`Tree::nodes`].
pub(super) type NodeId = u32;
pub(super) const ROOT: NodeId = 0;

/// An entry of one of the merged layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct EntryRef {
    pub(super) layer: u32,
    pub(super) entry: u32,
}

#[derive(Debug)]
pub(super) enum Content<'a> {
    Directory {
        children: BTreeMap<&'a str, NodeId>,
        /// The entry that names the directory, if one does.
        named_by: Option<EntryRef>,
    },
    /// Anything else. Several nodes with one object are hard links.
    Object(EntryRef),
}

#[derive(Debug)]
pub(super) struct Node<'a> {
    pub(super) content: Content<'a>,
    /// The number of the layer that last added the node or something below it, counted from 1.
    layer: u32,
}

/// The merged tree. Removed nodes stay in `nodes`, but nothing refers to them.
#[derive(Debug)]
pub(super) struct Tree<'a> {
    layers: &'a [&'a LayerIndex],
    nodes: Vec<Node<'a>>,
}

/// The result of following a path: existing directories, then names that do not exist yet.
struct Place<'a> {
    directories: Vec<NodeId>,
    missing: Vec<&'a str>,
}

impl<'a> Place<'a> {
    /// Returns the directory, or `None` if it does not exist.
    fn directory(&self) -> Option<NodeId> {
        let last = self.directories.last().copied();
        last.filter(|_| self.missing.is_empty())
    }
}

/// Merges layers, the lowest first.
pub(super) fn merge<'a>(layers: &'a [&'a LayerIndex], cancel: &Cancel) -> Result<Tree<'a>> {
    merge_within(STEPS_MAX, layers, cancel)
}

/// Merges layers in a limited number of steps.
fn merge_within<'a>(
    steps_max: u64,
    layers: &'a [&'a LayerIndex],
    cancel: &Cancel,
) -> Result<Tree<'a>> {
    let mut merger = Merger {
        tree: Tree {
            layers,
            nodes: vec![Node {
                content: empty_directory(),
                layer: 0,
            }],
        },
        layer: 0,
        steps_left: steps_max,
    };
    for (number, layer) in layers.iter().enumerate() {
        merger.layer = number as u32 + 1;
        for (at, entry) in layer.entries.iter().enumerate() {
            if at % CANCEL_PERIOD == 0 {
                check_cancel(cancel)?;
            }
            let id = EntryRef {
                layer: number as u32,
                entry: at as u32,
            };
            let applied = merger.apply(entry, id);
            applied.map_err(|e| {
                let path = shown(entry.path.as_bytes());
                e.context(format!("layer {}: entry {path}", number + 1))
            })?;
        }
    }
    Ok(merger.tree)
}

fn empty_directory<'a>() -> Content<'a> {
    Content::Directory {
        children: BTreeMap::new(),
        named_by: None,
    }
}

impl<'a> Tree<'a> {
    pub(super) fn node(&self, id: NodeId) -> &Node<'a> {
        &self.nodes[id as usize]
    }

    pub(super) fn entry(&self, id: EntryRef) -> &'a Entry {
        &self.layers[id.layer as usize].entries[id.entry as usize]
    }

    fn children(&self, directory: NodeId) -> Option<&BTreeMap<&'a str, NodeId>> {
        match &self.node(directory).content {
            Content::Directory { children, .. } => Some(children),
            Content::Object(_) => None,
        }
    }

    fn child(&self, directory: NodeId, name: &str) -> Option<NodeId> {
        self.children(directory)?.get(name).copied()
    }

    /// Panics if the tree is malformed: if a node has two parents, a name cannot be a file's name,
    /// or an object has the wrong kind.
    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn check(&self) {
        let mut seen = std::collections::HashSet::from([ROOT]);
        let mut work = vec![ROOT];
        while let Some(id) = work.pop() {
            match &self.node(id).content {
                Content::Directory { children, named_by } => {
                    let by = named_by.map(|by| &self.entry(by).kind);
                    assert!(by.is_none_or(|kind| *kind == EntryKind::Directory));
                    for (name, child) in children {
                        assert!(
                            !name.is_empty() && !name.contains('/') && !name.starts_with(WHITEOUT)
                        );
                        assert!(!matches!(*name, "." | ".."));
                        assert!(seen.insert(*child), "{name:?} has two parents");
                        work.push(*child);
                    }
                }
                Content::Object(object) => {
                    let kind = &self.entry(*object).kind;
                    assert!(!matches!(
                        kind,
                        EntryKind::Directory | EntryKind::HardLink { .. }
                    ));
                }
            }
        }
    }
}

struct Merger<'a> {
    tree: Tree<'a>,
    /// The number of the layer that is being merged, counted from 1.
    layer: u32,
    steps_left: u64,
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

impl<'a> Merger<'a> {
    fn apply(&mut self, entry: &'a Entry, id: EntryRef) -> Result<()> {
        let path: &'a str = &entry.path;
        if path.is_empty() {
            return self.set_root(entry, id);
        }
        let (parent, name) = split(path);
        let mut components = parent.split('/').filter(|part| part.starts_with(WHITEOUT));
        if let Some(component) = components.next() {
            if component.starts_with(AUFS) {
                return Ok(());
            }
            return Err(bad("a directory has the name of a whiteout"));
        }
        if name == OPAQUE {
            return self.clear(parent);
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        if let Some(name) = name.strip_prefix(WHITEOUT) {
            return self.remove(parent, name);
        }
        match &entry.kind {
            EntryKind::Directory => self.add_directory(parent, name, id),
            EntryKind::HardLink { target } => {
                let object = self.object(target)?;
                self.add_object(parent, name, object)
            }
            _ => self.add_object(parent, name, id),
        }
    }

    fn set_root(&mut self, entry: &Entry, id: EntryRef) -> Result<()> {
        if entry.kind != EntryKind::Directory {
            return Err(bad("the root of the image must be a directory"));
        }
        self.name_directory(ROOT, id);
        Ok(())
    }

    /// Counts one step of work. Without a limit, links through many directories could multiply the
    /// work.
    fn step(&mut self) -> Result<()> {
        self.spend(1)
    }

    fn spend(&mut self, steps: u64) -> Result<()> {
        let left = self.steps_left.checked_sub(steps);
        self.steps_left = left.ok_or_else(|| bad("merging the layers takes too many steps"))?;
        Ok(())
    }

    /// Follows a path to a directory, through links as in a chroot. Fails if the path leads through
    /// something else.
    fn resolve(&mut self, path: &'a str) -> Result<Place<'a>> {
        let mut place = Place {
            directories: vec![ROOT],
            missing: Vec::new(),
        };
        let (mut rest, mut links): (Vec<&'a str>, usize) = (path.rsplit('/').collect(), 0);
        while let Some(name) = rest.pop() {
            self.step()?;
            match name {
                "" | "." => continue,
                ".." => {
                    let was_missing = place.missing.pop().is_some();
                    if !was_missing && place.directories.len() > 1 {
                        place.directories.pop();
                    }
                    continue;
                }
                _ => {}
            }
            // An entry's path has no such component, but the target of a link may have one.
            if name.starts_with(WHITEOUT) {
                return Err(bad(format!(
                    "a link leads to {}, which is the name of a whiteout",
                    shown(name.as_bytes())
                )));
            }
            if place.directories.len() + place.missing.len() > DEPTH_MAX {
                return Err(bad(format!(
                    "more than {DEPTH_MAX} directories are nested in each other"
                )));
            }
            let child = match place.directory() {
                Some(at) => self.tree.child(at, name),
                None => None,
            };
            let Some(child) = child else {
                place.missing.push(name);
                continue;
            };
            let Content::Object(object) = self.tree.node(child).content else {
                place.directories.push(child);
                continue;
            };
            let EntryKind::Symlink { target } = &self.tree.entry(object).kind else {
                let name = shown(name.as_bytes());
                return Err(bad(format!(
                    "the path leads through {name}, which is not a directory"
                )));
            };
            links += 1;
            if links > LINKS_MAX {
                return Err(bad("the path leads through too many links"));
            }
            if target.starts_with('/') {
                place.directories.truncate(1);
            }
            rest.extend(target.rsplit('/'));
        }
        Ok(place)
    }

    /// Returns the directory at a path. Directories that do not exist are added, and all of them
    /// count as changed by this layer.
    fn directory(&mut self, path: &'a str) -> Result<NodeId> {
        let place = self.resolve(path)?;
        for id in &place.directories {
            self.tree.nodes[*id as usize].layer = self.layer;
        }
        let mut at = *place.directories.last().expect("the root is always there");
        for name in place.missing {
            at = self.put(at, name, empty_directory())?;
        }
        Ok(at)
    }

    /// Adds a node, and replaces the one that has its name.
    fn put(&mut self, parent: NodeId, name: &'a str, content: Content<'a>) -> Result<NodeId> {
        self.step()?;
        if self.tree.nodes.len() as u64 > NODES_MAX {
            return Err(bad(format!(
                "the layers make more than {NODES_MAX} files and directories"
            )));
        }
        let id = self.tree.nodes.len() as NodeId;
        self.tree.nodes.push(Node {
            content,
            layer: self.layer,
        });
        match &mut self.tree.nodes[parent as usize].content {
            Content::Directory { children, .. } => children.insert(name, id),
            Content::Object(_) => unreachable!("a parent is a directory"),
        };
        Ok(id)
    }

    fn name_directory(&mut self, id: NodeId, entry: EntryRef) {
        let node = &mut self.tree.nodes[id as usize];
        node.layer = self.layer;
        if let Content::Directory { named_by, .. } = &mut node.content {
            *named_by = Some(entry);
        }
    }

    fn add_directory(&mut self, parent: &'a str, name: &'a str, entry: EntryRef) -> Result<()> {
        let parent = self.directory(parent)?;
        let present = self.tree.child(parent, name);
        let directory = present.filter(|id| self.tree.children(*id).is_some());
        let id = match directory {
            Some(id) => id,
            None => self.put(parent, name, empty_directory())?,
        };
        self.name_directory(id, entry);
        Ok(())
    }

    fn add_object(&mut self, parent: &'a str, name: &'a str, object: EntryRef) -> Result<()> {
        let parent = self.directory(parent)?;
        self.put(parent, name, Content::Object(object))?;
        Ok(())
    }

    /// Returns the object that a hard link refers to. A link in the last component is not followed.
    fn object(&mut self, target: &'a str) -> Result<EntryRef> {
        let (parent, name) = split(target);
        let place = self.resolve(parent)?;
        let found = place
            .directory()
            .and_then(|parent| self.tree.child(parent, name));
        match found.map(|id| &self.tree.node(id).content) {
            Some(Content::Object(object)) => Ok(*object),
            Some(Content::Directory { .. }) => Err(bad("it is a hard link to a directory")),
            None => {
                let target = shown(target.as_bytes());
                Err(bad(format!(
                    "it is a hard link to {target}, which does not exist"
                )))
            }
        }
    }

    /// Removes the files of lower layers at a name. A name that does not exist is not an error.
    fn remove(&mut self, parent: &'a str, name: &str) -> Result<()> {
        if matches!(name, "" | "." | "..") {
            return Err(bad("the whiteout does not name a file"));
        }
        let Some(parent) = self.lower_directory(parent)? else {
            return Ok(());
        };
        let Some(child) = self.tree.child(parent, name) else {
            return Ok(());
        };
        if self.tree.node(child).layer == self.layer {
            return self.remove_lower(child);
        }
        if let Content::Directory { children, .. } = &mut self.tree.nodes[parent as usize].content {
            children.remove(name);
        }
        Ok(())
    }

    /// Removes the files of lower layers in a directory.
    fn clear(&mut self, path: &'a str) -> Result<()> {
        match self.lower_directory(path)? {
            Some(directory) => self.remove_lower(directory),
            None => Ok(()),
        }
    }

    /// Returns the directory that a whiteout refers to, or `None` if there is nothing to remove.
    fn lower_directory(&mut self, path: &'a str) -> Result<Option<NodeId>> {
        Ok(self.resolve(path)?.directory())
    }

    /// Removes everything below a node that this layer has not added.
    fn remove_lower(&mut self, id: NodeId) -> Result<()> {
        let mut work = vec![id];
        while let Some(at) = work.pop() {
            let Content::Directory { children, .. } = &mut self.tree.nodes[at as usize].content
            else {
                continue;
            };
            let mut kept = std::mem::take(children);
            self.spend(kept.len() as u64 + 1)?;
            kept.retain(|_, child| self.tree.nodes[*child as usize].layer == self.layer);
            work.extend(kept.values());
            if let Content::Directory { children, .. } = &mut self.tree.nodes[at as usize].content {
                *children = kept;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
