//! The cache of layers: for each layer its uncompressed tar and the index of its entries, in one
//! directory.
//!
//! A layer is stored under the digest of its tar (`diff_id`), which was verified when it was
//! written, so it can be shared between images. Next to it, `HEX.blob` says which layer a blob
//! inflates to. The index is written last: a layer without an index does not exist. Files are made
//! under a temporary name, synced and renamed, so a crash leaves temporary files at most.
//!
//! The store knows its directory only by descriptor, so a confined process can use it.

use super::digest::Digest;
use super::index_file;
use super::layer::LayerIndex;
use super::manifest::Layer;
use crate::error::{Error, Kind, Result};
use crate::host::{fs, hex, random};
use rustix::fs::{AtFlags, OFlags};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::SystemTime;

const TAR: &str = "tar";
const INDEX: &str = "index";
const BLOB: &str = "blob";
const TEMPORARY: &str = "tmp-";
const MODE: u32 = 0o600;

/// A layer of the cache. Its tar stays readable while this exists, even if it is pruned.
#[derive(Debug)]
pub struct CachedLayer {
    pub index: LayerIndex,
    pub(super) tar: File,
}

/// What [`LayerStore::prune`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    pub layers: u64,
    pub bytes: u64,
}

#[derive(Debug)]
pub struct LayerStore {
    dir: OwnedFd,
}

/// A file in the store's directory that does not have its name yet. Dropping it removes it.
pub(super) struct Temporary<'a> {
    store: &'a LayerStore,
    name: String,
    pub(super) file: File,
    is_published: bool,
}

fn io(doing: &str, error: impl Into<std::io::Error>) -> Error {
    Error::io(format!("{doing} in the cache of layers"), error)
}

fn is_missing(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
}

impl LayerStore {
    pub fn new(dir: OwnedFd) -> Self {
        Self { dir }
    }

    /// Returns the layer whose tar has this digest. A damaged layer counts as missing, and is
    /// removed.
    pub fn find(&self, diff_id: Digest) -> Result<Option<CachedLayer>> {
        let Some(index) = self.open(&name(diff_id, INDEX))? else {
            return Ok(None);
        };
        let Some(tar) = self.open(&name(diff_id, TAR))? else {
            return Ok(None);
        };
        let tar_bytes = tar.metadata().map_err(|e| io("read a layer", e))?.len();
        match index_file::read(&index, diff_id, tar_bytes) {
            Ok(found) => {
                // The time of the index is the time of its last use, for `prune`.
                let _ = index.set_modified(SystemTime::now());
                Ok(Some(CachedLayer { index: found, tar }))
            }
            Err(e) if e.kind() == Kind::InvalidImage => {
                self.remove(diff_id)?;
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Returns the digest of the tar that a blob inflates to, if a layer came from this blob.
    pub fn find_blob(&self, blob: Digest) -> Result<Option<Digest>> {
        let Some(file) = self.open(&name(blob, BLOB))? else {
            return Ok(None);
        };
        let mut text = String::new();
        let read = file.take(128).read_to_string(&mut text);
        read.map_err(|e| io("read the digest of a layer", e))?;
        Ok(text.parse().ok())
    }

    fn open(&self, name: &str) -> Result<Option<File>> {
        match fs::open_at(&self.dir, name, OFlags::RDONLY, 0) {
            Ok(file) => Ok(Some(file)),
            Err(e) if is_missing(&e) => Ok(None),
            Err(e) => Err(io("open a file", e)),
        }
    }

    pub(super) fn temporary(&self) -> Result<Temporary<'_>> {
        let name = format!("{TEMPORARY}{}", hex::encode(&random::bytes::<12>()));
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let file = fs::open_at(&self.dir, &name, flags, MODE);
        Ok(Temporary {
            store: self,
            name,
            file: file.map_err(|e| io("create a file", e))?,
            is_published: false,
        })
    }

    /// Publishes a layer that was read: the tar in `spool`, and its index.
    pub(super) fn publish(
        &self,
        spool: Temporary<'_>,
        index: LayerIndex,
        layer: &Layer,
    ) -> Result<CachedLayer> {
        let diff_id = layer.diff_id;
        let tar = spool.publish(&name(diff_id, TAR))?;
        let mut reverse = self.temporary()?;
        let written = reverse.file.write_all(diff_id.to_string().as_bytes());
        written.map_err(|e| io("write a file", e))?;
        reverse.publish(&name(layer.blob.digest, BLOB))?;
        let mut file = self.temporary()?;
        index_file::write(&index, diff_id, &mut file.file)?;
        file.publish(&name(diff_id, INDEX))?;
        rustix::fs::fsync(&self.dir).map_err(|e| io("sync the directory", e))?;
        Ok(CachedLayer { index, tar })
    }

    fn unlink(&self, name: &str) -> Result<()> {
        match rustix::fs::unlinkat(&self.dir, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(e) => Err(io("remove a file", e)),
        }
    }

    /// Removes a layer, its index first.
    fn remove(&self, diff_id: Digest) -> Result<()> {
        self.unlink(&name(diff_id, INDEX))?;
        self.unlink(&name(diff_id, TAR))
    }

    /// Removes the layers that were used least recently until the others have at most `bytes_max`
    /// bytes. Layers that a pull is using stay readable for it.
    pub fn prune(&self, bytes_max: u64) -> Result<Pruned> {
        let mut layers = self.layers()?;
        layers.sort_by_key(|layer| std::cmp::Reverse(layer.used));
        let (mut kept, mut pruned) = (0, Pruned::default());
        for layer in layers {
            if kept + layer.bytes <= bytes_max {
                kept += layer.bytes;
                continue;
            }
            self.remove(layer.diff_id)?;
            pruned.layers += 1;
            pruned.bytes += layer.bytes;
        }
        self.remove_dangling()?;
        Ok(pruned)
    }

    /// Returns the size of all layers.
    pub fn bytes(&self) -> Result<u64> {
        Ok(self.layers()?.iter().map(|layer| layer.bytes).sum())
    }

    /// Removes what a crash left: temporary files, and tars without an index. The caller must make
    /// sure that no pull is in progress.
    pub fn remove_temporaries(&self) -> Result<()> {
        for file in self.names()? {
            let is_left = match file.split_once('.') {
                Some((hex, TAR)) => self.open(&format!("{hex}.{INDEX}"))?.is_none(),
                _ => file.starts_with(TEMPORARY),
            };
            if is_left {
                self.unlink(&file)?;
            }
        }
        Ok(())
    }

    /// Removes the names of blobs whose layer is gone.
    fn remove_dangling(&self) -> Result<()> {
        for file in self.names()? {
            let Some((hex, BLOB)) = file.split_once('.') else {
                continue;
            };
            let blob = format!("sha256:{hex}").parse().ok();
            let layer = blob.map(|blob| self.find_blob(blob)).transpose()?.flatten();
            let is_there = match layer {
                Some(diff_id) => self.open(&name(diff_id, INDEX))?.is_some(),
                None => false,
            };
            if !is_there {
                self.unlink(&file)?;
            }
        }
        Ok(())
    }

    fn layers(&self) -> Result<Vec<Stored>> {
        let mut layers = Vec::new();
        for file in self.names()? {
            let Some((hex, INDEX)) = file.split_once('.') else {
                continue;
            };
            let Ok(diff_id) = format!("sha256:{hex}").parse::<Digest>() else {
                continue;
            };
            let (mut bytes, mut used) = (0, SystemTime::UNIX_EPOCH);
            for part in [TAR, INDEX] {
                // Another process may have pruned the layer.
                let Some(file) = self.open(&name(diff_id, part))? else {
                    continue;
                };
                let metadata = file.metadata().map_err(|e| io("read a layer", e))?;
                bytes += metadata.len();
                used = metadata.modified().map_err(|e| io("read a layer", e))?;
            }
            layers.push(Stored {
                diff_id,
                bytes,
                used,
            });
        }
        Ok(layers)
    }

    fn names(&self) -> Result<Vec<String>> {
        let failed = |e| io("list the files", e);
        let entries = rustix::fs::Dir::read_from(&self.dir).map_err(failed)?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            names.extend(entry.file_name().to_str().ok().map(str::to_owned));
        }
        Ok(names)
    }
}

struct Stored {
    diff_id: Digest,
    bytes: u64,
    used: SystemTime,
}

fn name(digest: Digest, part: &str) -> String {
    format!("{}.{part}", digest.hex())
}

impl Temporary<'_> {
    /// Syncs the file and gives it its name, in place of a file that has the name.
    fn publish(mut self, name: &str) -> Result<File> {
        let dir = &self.store.dir;
        self.file.sync_data().map_err(|e| io("sync a file", e))?;
        rustix::fs::renameat(dir, &self.name, dir, name).map_err(|e| io("rename a file", e))?;
        self.is_published = true;
        self.file.try_clone().map_err(|e| io("open a file", e))
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.is_published {
            let _ = self.store.unlink(&self.name);
        }
    }
}
