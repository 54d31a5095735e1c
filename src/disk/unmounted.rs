//! Determines whether a guest has unmounted its root disk. If no daemon saw how the guest ended,
//! this is the only evidence.
//!
//! ext4 sets a flag in its superblock while it is mounted for writing. It clears the flag when it
//! is unmounted or mounted read-only, which is the last step of a shutdown. After a panic, a reset
//! or the death of its VMM, the flag is still set. This module reads only three numbers at fixed
//! offsets (Documentation/filesystems/ext4/super.rst), because a guest controls the content of the
//! file system. A guest that forges the numbers can only claim that it shut down.

use super::Method;
use super::qcow2::{Cluster, Header};
use super::read_at::{ReadAt, read};
use crate::error::{Error, Result};
use crate::host::fs::open_nofollow;
use std::path::Path;

/// The offset of the superblock on the disk.
const SUPERBLOCK_AT: u64 = 1024;
/// The length of the part of the superblock that is read.
const SUPERBLOCK_BYTES: usize = 0x64;
/// The offsets of three fields in the superblock. The first two fields have two bytes, the third
/// has four.
const MAGIC_AT: usize = 0x38;
const STATE_AT: usize = 0x3a;
const INCOMPAT_AT: usize = 0x60;
const MAGIC: u16 = 0xef53;
const STATE_VALID: u16 = 1;
const INCOMPAT_RECOVER: u32 = 4;

/// True if the guest has unmounted its root disk at `path`, or mounted it read-only, since it last
/// wrote to it. No VMM may be running. A disk without a valid ext4 file system counts as mounted.
pub fn is_unmounted(path: &Path, method: Method) -> Result<bool> {
    let file = open_nofollow(path)?;
    look(&file, method).map_err(|e| {
        Error::io(
            format!("find out whether {} was unmounted", path.display()),
            e,
        )
    })
}

/// Does the work of [`is_unmounted`] for an open disk, whose bytes are not trusted.
pub(super) fn look(disk: &impl ReadAt, method: Method) -> std::io::Result<bool> {
    let begins_at = match method {
        Method::Reflink | Method::Copy | Method::DmSnapshot => Some(0),
        Method::Qcow2 => first_cluster(disk)?,
    };
    let Some(begins_at) = begins_at else {
        return Ok(false);
    };
    let mut superblock = [0; SUPERBLOCK_BYTES];
    read(
        disk,
        &mut superblock,
        begins_at.saturating_add(SUPERBLOCK_AT),
    )?;
    Ok(says_unmounted(&superblock))
}

fn says_unmounted(superblock: &[u8; SUPERBLOCK_BYTES]) -> bool {
    let u16_at = |at: usize| u16::from_le_bytes([superblock[at], superblock[at + 1]]);
    let incompat = u32::from_le_bytes(
        superblock[INCOMPAT_AT..INCOMPAT_AT + 4]
            .try_into()
            .unwrap_or_default(),
    );
    u16_at(MAGIC_AT) == MAGIC
        && u16_at(STATE_AT) & STATE_VALID != 0
        && incompat & INCOMPAT_RECOVER == 0
}

/// Returns the offset of the disk's first cluster in a qcow2 file. Returns None if the guest has
/// not written that cluster yet, or if the file is not a supported qcow2 file. The guest writes the
/// cluster when it mounts the disk.
fn first_cluster(file: &impl ReadAt) -> std::io::Result<Option<u64>> {
    let Some(header) = Header::read(file)? else {
        return Ok(None);
    };
    let Some(table) = header.table(file, 0)? else {
        return Ok(None);
    };
    Ok(match header.cluster(file, table, 0)? {
        Cluster::At(at) => Some(at),
        Cluster::OfBase | Cluster::Zero | Cluster::Compressed => None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::qcow2::HEADER_BYTES;
    use super::super::root::QCOW2_MAGIC;
    use super::*;
    use crate::host::Command;
    use crate::locks::Cancel;
    use std::fs::File;
    use std::io::Write;

    fn run(program: &str, args: &[&str]) {
        let command = Command::new(program).args(args);
        let out = crate::host::command::run_any_status(
            &command,
            &Cancel::try_new().unwrap(),
            &mut |_| {},
        )
        .unwrap();
        assert_eq!(
            out.status,
            0,
            "{program} {args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    }

    /// Creates an ext4 file system that is marked as mounted or unmounted.
    fn ext4(path: &Path, is_mounted: bool) {
        File::create(path).unwrap().set_len(16 << 20).unwrap();
        run(
            "mke2fs",
            &["-q", "-F", "-t", "ext4", path.to_str().unwrap()],
        );
        if is_mounted {
            run(
                "debugfs",
                &["-w", "-R", "feature needs_recovery", path.to_str().unwrap()],
            );
        }
    }

    #[test]
    fn mounted_flag_is_read_from_raw_and_qcow2_disks() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for is_mounted in [false, true] {
            let (raw, qcow2) = (path("raw"), path("qcow2"));
            ext4(&raw, is_mounted);
            assert_eq!(is_unmounted(&raw, Method::Copy).unwrap(), !is_mounted);
            let [from, to] = [&raw, &qcow2].map(|p| p.to_str().unwrap());
            run(
                "qemu-img",
                &["convert", "-f", "raw", "-O", "qcow2", from, to],
            );
            assert_eq!(is_unmounted(&qcow2, Method::Qcow2).unwrap(), !is_mounted);
            run(
                "qemu-img",
                &["convert", "-c", "-f", "raw", "-O", "qcow2", from, to],
            );
            assert!(
                !is_unmounted(&qcow2, Method::Qcow2).unwrap(),
                "compressed clusters are not supported"
            );
        }
        // The guest has not written anything yet.
        let on_top = path("on-top");
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                path("raw").to_str().unwrap(),
                on_top.to_str().unwrap(),
            ],
        );
        assert!(!is_unmounted(&on_top, Method::Qcow2).unwrap());
    }

    #[test]
    fn disk_without_valid_ext4_counts_as_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let mut header = vec![0; HEADER_BYTES];
        header[..4].copy_from_slice(&QCOW2_MAGIC);
        header[7] = 3;
        header[23] = 16;
        header[39] = 1;
        let at_the_end = [&header[..40], &[0xff; 40]].concat();
        for bytes in [&b""[..], b"QFI\xfb", &[0xff; 4096], &header, &at_the_end] {
            File::create(&path).unwrap().write_all(bytes).unwrap();
            for method in [Method::Copy, Method::Qcow2] {
                assert!(
                    !is_unmounted(&path, method).unwrap(),
                    "{method:?}: {bytes:x?}"
                );
            }
        }
        std::fs::rename(&path, dir.path().join("other")).unwrap();
        assert!(is_unmounted(&path, Method::Copy).is_err());
        std::os::unix::fs::symlink("other", &path).unwrap();
        assert!(is_unmounted(&path, Method::Copy).is_err());
    }
}
