//! Turns layers into an ext4 file: reads the layers that the cache does not have, merges all of
//! them, and writes every surviving file once.

use super::budget::Budget;
use super::copying::{Copying, Source};
use super::digest::Digest;
use super::entry::{Entry, EntryKind};
use super::errors::{Stopped, bad, check_cancel, stopped};
use super::files::{IndexedLayer, LayerFile, LayerFiles};
use super::filesystem::{self, Device, Ext4, Filesystem, Fill, Inode, Options};
use super::layer::{LayerIndex, Reading, read_layer};
use super::limits::THREADS_MAX;
use super::manifest::{Blobs, Image, Layer};
use super::merge::{Content, EntryRef, ROOT, Tree, merge};
use crate::api::image::{ImageConfig, ImageHistory};
use crate::error::{Error, Kind, Result};
use crate::host::thread;
use crate::locks::Cancel;
use std::collections::HashMap;
use std::fs::File;
use std::io::Seek;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A directory that ext4 always has. An image that has it too must not be refused.
const LOST_FOUND: &str = "lost+found";

/// The space of an entry in addition to its content: an inode, a directory entry, and on average
/// half a block.
const ENTRY_BYTES: u64 = 4096;
/// The free space on a disk that was enlarged to fit the image's files.
const FREE_BYTES: u64 = 1 << 30;
/// A disk's size is a multiple of this.
const DISK_UNIT_BYTES: u64 = 1 << 20;

/// The progress of a pull. The callback is called from several threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The layer was in the cache, or is the same as a lower one.
    Cached { layer: usize },
    /// This many more bytes of the layer's blob were read.
    Read { layer: usize, bytes: u64 },
    /// The layer is complete and verified.
    Complete { layer: usize },
    /// The layers are merged. `bytes` is the size of all files in the tree.
    Merged { bytes: u64 },
    /// This many more bytes of files were written.
    Written { bytes: u64 },
}

/// The parameters of [`flatten`] in addition to the image.
pub struct Flatten<'a> {
    pub files: &'a dyn LayerFiles,
    /// The file to which the file system is written. Its former content is lost.
    pub out: &'a File,
    /// The size of the file system. It becomes larger if the image's files need more.
    pub disk_bytes: u64,
    /// The size limit of all uncompressed layers together.
    pub unpacked_bytes_max: u64,
    pub progress: &'a (dyn Fn(Progress) + Sync),
    pub cancel: &'a Cancel,
}

/// A file system that was written. It is not synced yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Flattened {
    /// The digest of the manifest.
    pub digest: Digest,
    pub config: ImageConfig,
    pub layers: Vec<Layer>,
    pub history: Vec<ImageHistory>,
    /// The number of files and directories.
    pub entries: u64,
    /// The size of all files together.
    pub bytes: u64,
    /// `PRETTY_NAME` of the image's os-release(5), if it has that file.
    pub os: Option<String>,
}

/// Writes the image to `request.out`. The same image always produces the same bytes.
///
/// # Errors
/// `invalid_image` for hostile or damaged layers; `exhausted` if the image does not fit;
/// `disk_full` and other errors of the host; `cancelled`; those of `blobs`. The output is then
/// incomplete. Layers that were verified stay in the cache, so a retry does not read them again.
pub fn flatten(image: &Image, blobs: &dyn Blobs, request: &Flatten<'_>) -> Result<Flattened> {
    let budget = Budget::new(request.unpacked_bytes_max);
    let layers = read_layers(&image.layers, blobs, request, &budget)?;
    let indexes: Vec<&LayerIndex> = layers.iter().map(|layer| &layer.index).collect();
    let tree = merge(&indexes, request.cancel)?;
    let size = tree_size(&tree);
    (request.progress)(Progress::Merged { bytes: size.bytes });
    let options = Options {
        disk_bytes: size.disk_bytes(request.disk_bytes),
        uuid: uuid_of(image.digest),
        inodes: size.entries,
    };
    let os = super::os_release::pretty_name(&tree, &layers);
    let mut writing: Writing<'_, Ext4> = Writing::new(&tree, &options, request.cancel)?;
    writing.declare()?;
    writing.write(&layers, request)?;
    Ok(Flattened {
        digest: image.digest,
        config: image.config.clone(),
        layers: image.layers.clone(),
        history: image.history.clone(),
        entries: size.entries,
        bytes: size.bytes,
        os,
    })
}

/// Makes a UUID of version 8 (RFC 9562) from a digest, so that the same image has the same UUID.
fn uuid_of(digest: Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest.as_bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// Returns all layers, the lowest first. Several threads read those that are not in the cache, and
/// index those that are. A layer that occurs twice is read once.
fn read_layers(
    layers: &[Layer],
    blobs: &dyn Blobs,
    request: &Flatten<'_>,
    budget: &Budget,
) -> Result<Vec<IndexedLayer>> {
    crate::locks::may_block("file access");
    let mut first_of: HashMap<Digest, usize> = HashMap::new();
    for (at, layer) in layers.iter().enumerate() {
        first_of.entry(layer.diff_id).or_insert(at);
    }
    let mut found: Vec<Option<IndexedLayer>> = Vec::new();
    let mut unread = Vec::new();
    for (at, layer) in layers.iter().enumerate() {
        check_cancel(request.cancel)?;
        found.push(None);
        if first_of[&layer.diff_id] != at {
            (request.progress)(Progress::Cached { layer: at });
            continue;
        }
        let file = request.files.open(layer.diff_id)?;
        unread.push(Unread { at, file });
    }
    let reader = Readers {
        layers,
        blobs,
        request,
        budget,
        unread: &unread,
        next: AtomicUsize::new(0),
        has_failed: AtomicBool::new(false),
    };
    for (at, layer) in reader.run()? {
        found[at] = Some(layer);
    }
    let mut all = Vec::new();
    for (at, layer) in layers.iter().enumerate() {
        all.push(match found[at].take() {
            Some(layer) => layer,
            // This layer has the content of a lower one. It makes a difference only if a layer in
            // between has changed the same files.
            None => again(&all[first_of[&layer.diff_id]], budget)?,
        });
    }
    Ok(all)
}

/// A layer whose entries are not known yet.
struct Unread {
    /// The number of the layer.
    at: usize,
    file: LayerFile,
}

fn charge(index: &LayerIndex, budget: &Budget) -> Result<()> {
    budget.add_bytes(index.tar_bytes)?;
    let mut entries = index.entries.iter();
    entries.try_for_each(|entry| budget.add_entry(entry.metadata_bytes()))
}

fn again(layer: &IndexedLayer, budget: &Budget) -> Result<IndexedLayer> {
    charge(&layer.index, budget)?;
    let tar = layer.tar.try_clone();
    Ok(IndexedLayer {
        index: layer.index.clone(),
        tar: tar.map_err(|e| Error::io("open a layer of the cache", e))?,
    })
}

/// The threads that read layers.
struct Readers<'a> {
    layers: &'a [Layer],
    blobs: &'a dyn Blobs,
    request: &'a Flatten<'a>,
    budget: &'a Budget,
    unread: &'a [Unread],
    next: AtomicUsize,
    has_failed: AtomicBool,
}

impl Readers<'_> {
    /// Reads all layers. Returns each with its number, in any order.
    fn run(&self) -> Result<Vec<(usize, IndexedLayer)>> {
        let threads = self.unread.len().min(THREADS_MAX);
        std::thread::scope(|scope| {
            let started: Vec<_> = (0..threads)
                .map(|_| thread::spawn_scoped(scope, "layer", || self.read_some()))
                .collect();
            let (mut layers, mut failed) = (Vec::new(), None);
            for thread in started {
                match thread.map(std::thread::ScopedJoinHandle::join) {
                    Ok(Ok(Ok(read))) => layers.extend(read),
                    Ok(Ok(Err(e))) => failed = Some(first_cause(failed, e)),
                    Ok(Err(panic)) => std::panic::resume_unwind(panic),
                    Err(e) => {
                        self.has_failed.store(true, Ordering::Relaxed);
                        failed = Some(first_cause(failed, e));
                    }
                }
            }
            failed.map_or(Ok(layers), Err)
        })
    }

    /// Reads layers until none is left or one has failed.
    fn read_some(&self) -> Result<Vec<(usize, IndexedLayer)>> {
        let mut read = Vec::new();
        while let Some(unread) = self.unread.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            let layer = match &unread.file {
                LayerFile::Cached(tar) => self.index(unread.at, tar),
                LayerFile::Empty(spool) => self.read(unread.at, spool),
            };
            let layer = layer.inspect_err(|_| {
                self.has_failed.store(true, Ordering::Relaxed);
            })?;
            read.push((unread.at, layer));
        }
        Ok(read)
    }

    fn index(&self, at: usize, tar: &File) -> Result<IndexedLayer> {
        check_cancel(self.request.cancel)?;
        if self.has_failed.load(Ordering::Relaxed) {
            return Err(stopped());
        }
        let tar = tar.try_clone();
        let tar = tar.map_err(|e| Error::io("open a layer of the cache", e))?;
        let layer = IndexedLayer::of_cached(tar, self.budget)?;
        (self.request.progress)(Progress::Cached { layer: at });
        Ok(layer)
    }

    /// Reads a layer again from its beginning if bytes from an earlier pull may have caused the
    /// error. The budget counts both reads, so a layer that is nearly too large may be refused. The
    /// next pull then succeeds.
    fn read_again(
        &self,
        layer: &Layer,
        mut spool: &File,
        reading: &Reading<'_>,
        error: Error,
    ) -> Result<LayerIndex> {
        crate::locks::may_block("file access");
        let Some(blob) = self.blobs.open_again(&layer.blob)? else {
            return Err(error);
        };
        spool
            .set_len(0)
            .and_then(|()| spool.rewind())
            .map_err(|e| Error::io("empty the file of a layer", e))?;
        read_layer(layer, blob, spool, reading)
    }

    fn read(&self, at: usize, spool: &File) -> Result<IndexedLayer> {
        crate::locks::may_block("file access");
        let layer = &self.layers[at];
        let in_layer = |e: Error| e.context(format!("layer {} ({})", at + 1, layer.blob.digest));
        let progress = |bytes| (self.request.progress)(Progress::Read { layer: at, bytes });
        let reading = Reading {
            budget: self.budget,
            cancel: self.request.cancel,
            has_failed: &self.has_failed,
            progress: &progress,
        };
        let read = || {
            let blob = self.blobs.open(&layer.blob)?;
            let index = match read_layer(layer, blob, spool, &reading) {
                Err(e) if is_of_blob(&e) => self.read_again(layer, spool, &reading, e),
                read => read,
            }?;
            self.request.files.complete(layer)?;
            let tar = spool.try_clone();
            let tar = tar.map_err(|e| Error::io("keep a layer open", e))?;
            Ok(IndexedLayer { index, tar })
        };
        let layer = read().map_err(in_layer)?;
        (self.request.progress)(Progress::Complete { layer: at });
        Ok(layer)
    }
}

/// True for an error that wrong bytes of the blob may have caused.
fn is_of_blob(error: &Error) -> bool {
    matches!(
        error.kind(),
        Kind::InvalidImage | Kind::RegistryInvalid | Kind::Unsupported
    )
}

/// Keeps the error that made the other threads stop.
fn first_cause(before: Option<Error>, error: Error) -> Error {
    match before {
        Some(before) if before.source_as::<Stopped>().is_none() => before,
        _ => error,
    }
}

/// The content of a tree.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    entries: u64,
    bytes: u64,
}

impl Size {
    /// Returns `wanted` if a disk of that size has room for the files, or else a larger size.
    fn disk_bytes(self, wanted: u64) -> u64 {
        let needed = self.bytes / 4 * 5 + self.entries * ENTRY_BYTES;
        if needed <= wanted {
            return wanted;
        }
        (needed + FREE_BYTES).next_multiple_of(DISK_UNIT_BYTES)
    }
}

fn tree_size(tree: &Tree<'_>) -> Size {
    let mut size = Size::default();
    let mut seen = std::collections::HashSet::new();
    let mut work = vec![ROOT];
    while let Some(id) = work.pop() {
        match &tree.node(id).content {
            Content::Directory { children, .. } => {
                size.entries += 1;
                work.extend(children.values());
            }
            Content::Object(object) => {
                if seen.insert(*object) {
                    size.entries += 1;
                    if let EntryKind::File { bytes, .. } = tree.entry(*object).kind {
                        size.bytes = size.bytes.saturating_add(bytes);
                    }
                }
            }
        }
    }
    size
}

/// A name of a regular file that is not in the file system yet.
struct PendingFile<'a> {
    object: EntryRef,
    directory: Inode,
    name: &'a str,
}

/// A file whose content must be written.
struct PendingContent {
    inode: Inode,
    object: EntryRef,
    /// Where the content begins in the layer's tar.
    offset: u64,
}

struct Writing<'a, F> {
    tree: &'a Tree<'a>,
    filesystem: F,
    cancel: &'a Cancel,
    inodes: HashMap<EntryRef, Inode>,
    files: Vec<PendingFile<'a>>,
    contents: Vec<PendingContent>,
}

impl<'a, F: Filesystem> Writing<'a, F> {
    fn new(tree: &'a Tree<'a>, options: &Options, cancel: &'a Cancel) -> Result<Self> {
        Ok(Self {
            tree,
            filesystem: F::new(options)?,
            cancel,
            inodes: HashMap::new(),
            files: Vec::new(),
            contents: Vec::new(),
        })
    }

    /// Adds every name of the tree. Regular files come last and in the order of the layers' tars,
    /// so that each tar is read forwards and the file system is written forwards.
    fn declare(&mut self) -> Result<()> {
        let root = self.filesystem.root();
        let attributes = self.directory_attributes(ROOT);
        self.filesystem.set_root(&attributes)?;
        let mut work = vec![(ROOT, root)];
        while let Some((id, directory)) = work.pop() {
            check_cancel(self.cancel)?;
            let Content::Directory { children, .. } = &self.tree.node(id).content else {
                continue;
            };
            for (name, child) in children {
                if id == ROOT && *name == LOST_FOUND {
                    self.check_lost_found(*child)?;
                    continue;
                }
                match &self.tree.node(*child).content {
                    Content::Directory { .. } => {
                        let attributes = self.directory_attributes(*child);
                        let added = self
                            .filesystem
                            .add_directory(directory, name, &attributes)?;
                        work.push((*child, added));
                    }
                    Content::Object(object) => self.declare_object(*object, directory, name)?,
                }
            }
        }
        self.declare_files()
    }

    fn directory_attributes(&self, id: u32) -> super::entry::Attributes {
        match self.tree.node(id).content {
            Content::Directory {
                named_by: Some(entry),
                ..
            } => self.tree.entry(entry).attributes.clone(),
            _ => filesystem::unnamed_directory(),
        }
    }

    /// Checks that the image's `lost+found` is empty, because ext4 has this directory itself.
    fn check_lost_found(&self, id: u32) -> Result<()> {
        match &self.tree.node(id).content {
            Content::Directory { children, .. } if children.is_empty() => Ok(()),
            _ => Err(bad("the image has files in /lost+found, which ext4 needs")
                .with_kind(Kind::Unsupported)),
        }
    }

    fn declare_object(&mut self, object: EntryRef, directory: Inode, name: &'a str) -> Result<()> {
        let entry = self.tree.entry(object);
        let attributes = &entry.attributes;
        if let EntryKind::File { .. } = entry.kind {
            self.files.push(PendingFile {
                object,
                directory,
                name,
            });
            return Ok(());
        }
        if let Some(inode) = self.inodes.get(&object) {
            return self.filesystem.add_link(directory, name, *inode);
        }
        let device = match &entry.kind {
            EntryKind::Symlink { target } => {
                let added = self
                    .filesystem
                    .add_symlink(directory, name, attributes, target)?;
                self.inodes.insert(object, added);
                return Ok(());
            }
            EntryKind::CharacterDevice { major, minor } => Device::Character {
                major: *major,
                minor: *minor,
            },
            EntryKind::BlockDevice { major, minor } => Device::Block {
                major: *major,
                minor: *minor,
            },
            EntryKind::Fifo => Device::Fifo,
            EntryKind::Directory | EntryKind::File { .. } | EntryKind::HardLink { .. } => {
                unreachable!("the tree has no object of this kind")
            }
        };
        let added = self
            .filesystem
            .add_device(directory, name, attributes, device)?;
        self.inodes.insert(object, added);
        Ok(())
    }

    fn declare_files(&mut self) -> Result<()> {
        let mut files = std::mem::take(&mut self.files);
        // The sort is stable, so that the names of one object keep their order.
        files.sort_by_key(|file| file.object);
        for file in files {
            let entry: &Entry = self.tree.entry(file.object);
            let EntryKind::File { offset, bytes } = entry.kind else {
                continue;
            };
            if let Some(inode) = self.inodes.get(&file.object) {
                self.filesystem
                    .add_link(file.directory, file.name, *inode)?;
                continue;
            }
            let added =
                self.filesystem
                    .add_file(file.directory, file.name, &entry.attributes, bytes)?;
            self.inodes.insert(file.object, added);
            if bytes > 0 {
                self.contents.push(PendingContent {
                    inode: added,
                    object: file.object,
                    offset,
                });
            }
        }
        Ok(())
    }

    fn write(self, layers: &[IndexedLayer], request: &Flatten<'_>) -> Result<()> {
        let tree = self.tree;
        let fills = self.contents.iter().map(|content| Fill {
            inode: content.inode,
            source: Source {
                tar: &layers[content.object.layer as usize].tar,
                at: content.offset,
                path: &tree.entry(content.object).path,
            },
        });
        let copying = Copying {
            out: request.out,
            cancel: request.cancel,
            progress: &|bytes| (request.progress)(Progress::Written { bytes }),
        };
        self.filesystem.write(&copying, fills)
    }
}

/// Adds a merged tree to a file system that is never written.
#[cfg(feature = "fuzz")]
pub(super) fn declare_only(tree: &Tree<'_>, cancel: &Cancel) -> Result<()> {
    let options = Options {
        disk_bytes: 1 << 30,
        uuid: [0; 16],
        inodes: tree_size(tree).entries,
    };
    Writing::<Ext4>::new(tree, &options, cancel)?.declare()
}

#[cfg(test)]
#[path = "flatten_tests.rs"]
mod tests;
