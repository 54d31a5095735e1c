//! The cache of unpacked layers, one tar archive per layer. Its name is the layer's diff id: the
//! SHA-256 digest of the archive, which the daemon has computed itself. Therefore users can share
//! layers without trusting each other.

use super::partial::{self, Partials, hex_of};
use crate::error::{Error, Result};
use crate::host::hex;
use crate::image::oci::limits::UNPACKED_BYTES_MAX;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use sha2::{Digest, Sha256};
use std::fs::{DirBuilder, File, FileTimes};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const LAYERS_DIR: &str = "layers";
const DIGEST_PREFIX: &str = "sha256:";
const PIECE_BYTES: usize = 1 << 20;

/// The cache. It keeps nothing in memory.
#[derive(Clone, Debug)]
pub(crate) struct Layers {
    dir: PathBuf,
    pub(super) partials: Partials,
    bytes_max: u64,
}

/// The number of layers and their space, which [`Layers::prune`] has removed or [`Layers::used`]
/// has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pruned {
    pub layers: u64,
    pub bytes: u64,
}

/// One cached layer, or a partial download.
struct Cached {
    path: PathBuf,
    bytes: u64,
    used_at: SystemTime,
    is_partial: bool,
}

impl Layers {
    /// Opens `<state_dir>/layers`, which is created if it does not exist. Layers beyond `bytes_max`
    /// are removed after each pull.
    pub(crate) fn open(state_dir: &Path, bytes_max: u64) -> Result<Self> {
        let dir = state_dir.join(LAYERS_DIR);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|e| Error::io(format!("create the layer cache {}", dir.display()), e))?;
        Ok(Self {
            partials: Partials::open(&dir)?,
            dir,
            bytes_max,
        })
    }

    /// Returns the archive of a layer for reading, or None if it is not cached. Marks it as used.
    pub(crate) fn get(&self, diff_id: &str) -> Result<Option<File>> {
        crate::locks::may_block("file access");
        let Some(path) = self.path(diff_id) else {
            return Ok(None);
        };
        match File::open(&path) {
            Ok(file) => {
                // The time only orders layers for pruning, so a failure does not matter.
                let _ = file.set_times(FileTimes::new().set_modified(SystemTime::now()));
                Ok(Some(file))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format!("open the cached layer {diff_id}"), e)),
        }
    }

    /// Creates an empty file without a name, which disappears when it is closed.
    pub(crate) fn new_file(&self) -> Result<File> {
        crate::locks::may_block("file access");
        let io = |e| Error::io(format!("create a file in {}", self.dir.display()), e);
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(&self.dir, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => Ok(fd.into()),
            // Some file systems have no O_TMPFILE. The file that replaces it cannot be added to the
            // cache.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
                tempfile::tempfile_in(&self.dir).map_err(io)
            }
            Err(e) => Err(io(e.into())),
        }
    }

    /// Adds a file that [`Self::new_file`] created to the cache if its content has the digest
    /// `diff_id`. Returns true if the layer is cached now. `gives_up` is called repeatedly while
    /// the digest is computed, and stops it by returning true.
    pub(crate) fn insert(
        &self,
        diff_id: &str,
        file: &File,
        gives_up: &dyn Fn() -> bool,
    ) -> Result<bool> {
        crate::locks::may_block("file access");
        let Some(path) = self.path(diff_id) else {
            return Ok(false);
        };
        let io = |e| Error::io(format!("cache the layer {diff_id}"), e);
        // A helper that was taken over can write a file of holes whose digest takes hours.
        if file.metadata().map_err(io)?.len() > UNPACKED_BYTES_MAX {
            return Ok(false);
        }
        let Some(found) = digest(file, gives_up).map_err(io)? else {
            return Ok(false);
        };
        if found != diff_id {
            log::warn!("the layer {diff_id} is not cached, because its content is {found}");
            return Ok(false);
        }
        file.set_permissions(std::fs::Permissions::from_mode(0o444))
            .map_err(io)?;
        file.sync_all().map_err(io)?;
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        match rustix::fs::linkat(CWD, &unnamed, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(true),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::OPNOTSUPP) => Ok(false),
            Err(e) => Err(io(e.into())),
        }
    }

    /// Removes old partial downloads. Then removes the least recently used layers and partial
    /// downloads until the cache fits its limit.
    pub(crate) fn trim(&self) -> Result<Pruned> {
        self.remove_beyond(self.bytes_max)
    }

    /// Returns how many layers are cached, and how much space they and the partial downloads use.
    pub(crate) fn used(&self) -> Result<Pruned> {
        let mut used = Pruned::default();
        for layer in self.list()? {
            used.layers += u64::from(!layer.is_partial);
            used.bytes += layer.bytes;
        }
        Ok(used)
    }

    /// Removes all layers and partial downloads. Pulls in progress keep the files that they have
    /// open.
    pub(crate) fn prune(&self) -> Result<Pruned> {
        self.remove_beyond(0)
    }

    fn remove_beyond(&self, bytes_max: u64) -> Result<Pruned> {
        crate::locks::may_block("file access");
        let mut cached = self.list()?;
        cached.sort_by_key(|layer| layer.used_at);
        let mut total: u64 = cached.iter().map(|layer| layer.bytes).sum();
        let mut pruned = Pruned::default();
        for layer in cached {
            let is_old = layer.is_partial
                && (layer.used_at.elapsed()).is_ok_and(|age| age > partial::AGE_MAX);
            if total <= bytes_max && !is_old {
                continue;
            }
            match std::fs::remove_file(&layer.path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("remove {}", layer.path.display()), e));
                }
                _ => {}
            }
            total -= layer.bytes;
            pruned.layers += u64::from(!layer.is_partial);
            pruned.bytes += layer.bytes;
        }
        Ok(pruned)
    }

    /// Lists the layers and the partial downloads.
    fn list(&self) -> Result<Vec<Cached>> {
        let mut cached = Vec::new();
        Self::list_directory(&self.dir, false, &mut cached)?;
        Self::list_directory(self.partials.dir(), true, &mut cached)?;
        Ok(cached)
    }

    fn list_directory(dir: &Path, is_partial: bool, cached: &mut Vec<Cached>) -> Result<()> {
        crate::locks::may_block("file access");
        let io = |e| Error::io(format!("read the layer cache {}", dir.display()), e);
        for entry in std::fs::read_dir(dir).map_err(io)? {
            let entry = entry.map_err(io)?;
            // Another thread may remove the layer after it was listed.
            let Ok(stat) = entry.metadata() else {
                continue;
            };
            if stat.is_file() {
                cached.push(Cached {
                    path: entry.path(),
                    bytes: stat.blocks() * 512,
                    used_at: stat.modified().map_err(io)?,
                    is_partial,
                });
            }
        }
        Ok(())
    }

    /// Returns the path of a layer, or None if `diff_id` is not a SHA-256 digest.
    fn path(&self, diff_id: &str) -> Option<PathBuf> {
        hex_of(diff_id).map(|hex| self.dir.join(hex))
    }
}

/// Computes the digest of a whole file. Returns None if the caller gives up.
pub(in crate::image) fn digest(
    file: &File,
    gives_up: &dyn Fn() -> bool,
) -> std::io::Result<Option<String>> {
    let mut hash = Sha256::new();
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    loop {
        if gives_up() {
            return Ok(None);
        }
        match file.read_at(&mut piece, at)? {
            0 => break,
            len => {
                hash.update(&piece[..len]);
                at += len as u64;
            }
        }
    }
    Ok(Some(format!(
        "{DIGEST_PREFIX}{}",
        hex::encode(&hash.finalize())
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::Duration;

    fn id(content: &[u8]) -> String {
        format!("sha256:{}", hex::encode(&Sha256::digest(content)))
    }

    fn add(layers: &Layers, content: &[u8], diff_id: &str) -> bool {
        let mut file = layers.new_file().unwrap();
        file.write_all(content).unwrap();
        layers.insert(diff_id, &file, &|| false).unwrap()
    }

    #[test]
    fn layer_is_cached_only_under_its_own_digest() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path(), u64::MAX).unwrap();
        assert!(add(&layers, b"one", &id(b"one")));
        assert!(add(&layers, b"one", &id(b"one")), "it is cached already");
        assert!(!add(&layers, b"evil", &id(b"two")));
        for not_a_digest in ["sha256:../../x", "md5:1", "", "sha256:AA"] {
            assert!(!add(&layers, b"x", not_a_digest), "{not_a_digest}");
        }
        let mut found = layers.get(&id(b"one")).unwrap().unwrap();
        assert_eq!(std::io::read_to_string(&mut found).unwrap(), "one");
        assert!(layers.get(&id(b"two")).unwrap().is_none());
        // The entries are the layer and the directory of partial downloads.
        assert_eq!(std::fs::read_dir(&layers.dir).unwrap().count(), 2);
    }

    #[test]
    fn insert_that_is_given_up_caches_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path(), u64::MAX).unwrap();
        let file = layers.new_file().unwrap();
        assert!(!layers.insert(&id(b""), &file, &|| true).unwrap());
    }

    #[test]
    fn least_recently_used_layers_are_removed_first() {
        let dir = tempfile::tempdir().unwrap();
        let block = vec![7; 4096];
        let layers = Layers::open(dir.path(), 2 * 4096).unwrap();
        let contents: Vec<Vec<u8>> = (0..3u8).map(|n| [&block[1..], &[n]].concat()).collect();
        for (age, content) in [30, 20, 10].into_iter().zip(&contents) {
            assert!(add(&layers, content, &id(content)));
            let file = File::open(layers.path(&id(content)).unwrap()).unwrap();
            let at = SystemTime::now() - Duration::from_secs(age);
            file.set_times(FileTimes::new().set_modified(at)).unwrap();
        }
        let used = layers.used().unwrap();
        assert_eq!((used.layers, used.bytes), (3, 3 * 4096));
        // This makes the oldest layer the newest.
        drop(layers.get(&id(&contents[0])).unwrap());
        assert_eq!(
            layers.trim().unwrap(),
            Pruned {
                layers: 1,
                bytes: 4096
            }
        );
        assert!(layers.get(&id(&contents[1])).unwrap().is_none());
        assert_eq!(layers.prune().unwrap().layers, 2);
        assert_eq!(layers.prune().unwrap(), Pruned::default());
    }

    #[test]
    fn old_partial_downloads_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers::open(dir.path(), u64::MAX).unwrap();
        for (uid, age) in [(1, partial::AGE_MAX * 2), (2, partial::AGE_MAX / 2)] {
            let mut file = layers.partials.get(uid, &id(b"")).unwrap().unwrap();
            file.write_all(&[1; 4096]).unwrap();
            let at = SystemTime::now() - age;
            file.set_times(FileTimes::new().set_modified(at)).unwrap();
        }
        let left = || std::fs::read_dir(layers.partials.dir()).unwrap().count();
        let (layers_removed, bytes) = (0, 4096);
        let removed = layers.trim().unwrap();
        assert_eq!((removed.layers, removed.bytes), (layers_removed, bytes));
        assert_eq!(left(), 1);
        layers.prune().unwrap();
        assert_eq!(left(), 0);
    }
}
