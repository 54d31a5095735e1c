//! Records the size and the digest of an image's files.

use super::registry::{FileRecord, ROOTFS};
use crate::error::{Error, Kind, Result};
use crate::host::hex;
use crate::locks::Cancel;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

const BLOCK: usize = 4096;

/// Returns the size and the digest of a file. The root file system is sparse, so its digest covers
/// only its non-zero blocks of 4096 bytes, each preceded by its number (64 bits, little-endian).
/// The digest therefore does not depend on the positions of the holes.
pub(super) fn record(dir: &Path, name: &str, cancel: &Cancel) -> Result<FileRecord> {
    crate::locks::may_block("file access");
    let io = |e: std::io::Error| Error::io(format!("hash {name}"), e);
    let file = File::open(dir.join(name)).map_err(io)?;
    record_file(&file, name, cancel)
}

/// Like [`record`], but for an open file.
pub(super) fn record_file(file: &File, name: &str, cancel: &Cancel) -> Result<FileRecord> {
    let io = |e: std::io::Error| Error::io(format!("hash {name}"), e);
    let bytes = file.metadata().map_err(io)?.len();
    let sparse = name == ROOTFS;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 * BLOCK];
    let mut at = 0;
    while at < bytes {
        if let Some(cause) = cancel.cause() {
            return Err(Error::new(
                Kind::Cancelled,
                format!("hash {name}: cancelled: {cause}"),
            ));
        }
        if sparse {
            match rustix::fs::seek(file.as_fd(), rustix::fs::SeekFrom::Data(at)) {
                Ok(data) => at = data / BLOCK as u64 * BLOCK as u64,
                Err(rustix::io::Errno::NXIO) => break,
                Err(e) => return Err(io(e.into())),
            }
        }
        let n = file.read_at(&mut buffer, at).map_err(io)?;
        if n == 0 {
            break;
        }
        if sparse {
            for (i, block) in buffer[..n]
                .chunks(BLOCK)
                .enumerate()
                .filter(|(_, b)| b.iter().any(|byte| *byte != 0))
            {
                hash.update((at / BLOCK as u64 + i as u64).to_le_bytes());
                hash.update(block);
                // The file may end within a block.
                hash.update(&[0; BLOCK][block.len()..]);
            }
        } else {
            hash.update(&buffer[..n]);
        }
        at += n as u64;
    }
    let sha256 = hex::encode(&hash.finalize());
    Ok(FileRecord {
        name: name.to_owned(),
        bytes,
        sha256,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_of_sparse_file_does_not_depend_on_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(ROOTFS);
        let cancel = Cancel::try_new().unwrap();
        let file = File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_at(b"x", 700_000).unwrap();
        let sparse = record(dir.path(), ROOTFS, &cancel).unwrap();
        let mut full = vec![0; 1 << 20];
        full[700_000] = b'x';
        std::fs::write(&path, &full).unwrap();
        assert_eq!(record(dir.path(), ROOTFS, &cancel).unwrap(), sparse);
        full[700_001] = b'x';
        std::fs::write(&path, &full).unwrap();
        assert_ne!(record(dir.path(), ROOTFS, &cancel).unwrap(), sparse);
    }
}
