//! The space that images take on the host's disk. Images share files: a tag shares the files of the
//! image that it names, and a committed image shares the kernel of its base. This module therefore
//! counts files, each once, instead of images.

use super::registry::{INITRD, KERNEL, ROOTFS};
use crate::error::{Error, Result};
use crate::sched::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The unit of `st_blocks` (stat(2)).
const BLOCK_BYTES: u64 = 512;

/// Files of images and the space that they take. A file that several images share counts once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskUse {
    bytes: HashMap<FileId, u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FileId {
    device: u64,
    inode: u64,
}

impl DiskUse {
    /// Returns the files in the directory of an image, or in one that becomes an image. A file that
    /// does not exist takes no space.
    pub fn of_directory(dir: &Path) -> Result<Self> {
        crate::locks::may_block("file access");
        let mut found = Self::default();
        for name in [KERNEL, INITRD, ROOTFS] {
            match dir.join(name).symlink_metadata() {
                Ok(stat) => found.add_file(&stat),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => {
                    let doing = format!("read the size of {}", dir.join(name).display());
                    return Err(Error::io(doing, e));
                }
            }
        }
        Ok(found)
    }

    /// Returns the one file of an image that has no kernel.
    pub fn of_file(file: &File) -> Result<Self> {
        let stat = file.metadata();
        let mut found = Self::default();
        found.add_file(&stat.map_err(|e| Error::io("read the size of the image", e))?);
        Ok(found)
    }

    fn add_file(&mut self, stat: &Metadata) {
        let id = FileId {
            device: stat.dev(),
            inode: stat.ino(),
        };
        self.bytes.insert(id, stat.blocks() * BLOCK_BYTES);
    }

    pub fn add(&mut self, other: &Self) {
        self.bytes.extend(&other.bytes);
    }

    /// Removes the files that `other` also has.
    pub fn remove(&mut self, other: &Self) {
        self.bytes.retain(|file, _| !other.bytes.contains_key(file));
    }

    /// Returns the space that all files take together.
    pub fn bytes(&self) -> u64 {
        self.bytes.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_with_two_names_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
        for dir in [&one, &two] {
            std::fs::create_dir(dir).unwrap();
            std::fs::write(dir.join(ROOTFS), vec![1; 1 << 16]).unwrap();
        }
        std::fs::write(one.join(KERNEL), vec![1; 1 << 16]).unwrap();
        std::fs::hard_link(one.join(KERNEL), two.join(KERNEL)).unwrap();
        let of = |dir: &Path| DiskUse::of_directory(dir).unwrap();
        let (first, second) = (of(&one), of(&two));
        assert_eq!((first.bytes(), second.bytes()), (2 << 16, 2 << 16));
        let mut both = first.clone();
        both.add(&second);
        assert_eq!(both.bytes(), 3 << 16);
        both.add(&first);
        assert_eq!(both.bytes(), 3 << 16);
        both.remove(&second);
        assert_eq!(both.bytes(), 1 << 16);
        let root = File::open(one.join(ROOTFS)).unwrap();
        assert_eq!(DiskUse::of_file(&root).unwrap().bytes(), 1 << 16);
        assert_eq!(of(dir.path()), DiskUse::default());
    }
}
