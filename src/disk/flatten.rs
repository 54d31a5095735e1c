//! Writes a VM's root disk into a raw file that depends on nothing else. The VMM must not be
//! running.
//!
//! The VMM has written the disk's file, so its tables are not trusted. The daemon reads a qcow2
//! file itself, because a program such as qemu-img would open the files that it names. Every offset
//! refers to the disk's own file.

use super::copy::{copy_range, punch_range, share_or_copy};
use super::duplicate::Source;
use super::qcow2::{Cluster, Header};
use super::read_at::{Piece, ReadAt};
use super::snapshot::store::exceptions;
use super::{Method, origin};
use crate::error::{Error, Kind, Result};
use crate::host::fs::open_nofollow;
use crate::host::wait::cancelled;
use crate::locks::Cancel;
use std::fs::File;

/// Writes the disk to `to`, an empty file, which then has `size_bytes`. `progress` receives the
/// bytes done and their total.
///
/// # Errors
/// `host` if the disk is damaged, `cancelled`, `disk_full`.
pub fn flatten(
    source: &Source<'_>,
    size_bytes: u64,
    to: &File,
    cancel: &Cancel,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    crate::locks::may_block("file access");
    let doing = |e: Error| e.context(format!("read disk {}", source.path.display()));
    let disk = open_nofollow(source.path).map_err(doing)?;
    let method = source.method.unwrap_or(Method::Copy);
    if !method.needs_image() {
        share_or_copy(&disk, to, cancel, progress).map_err(doing)?;
        return to
            .set_len(size_bytes)
            .map_err(|e| doing(Error::io("set the size of the copy", e)));
    }
    let base = open_nofollow(&origin(source.path, source.base)).map_err(doing)?;
    share_or_copy(&base, to, cancel, &mut |_, _| {}).map_err(doing)?;
    let io = |e| doing(Error::io("copy the guest's changes", e));
    to.set_len(size_bytes).map_err(io)?;
    let mut stopped = false;
    let complete = pieces(&disk, method, size_bytes, &mut |piece| {
        if cancel.is_cancelled() {
            stopped = true;
            return Ok(false);
        }
        match piece.from {
            Some(from) => copy_range(&disk, from, to, piece.at, piece.bytes)?,
            None => punch_range(to, piece.at, piece.bytes)?,
        }
        progress(piece.at, size_bytes);
        Ok(true)
    })
    .map_err(io)?;
    if stopped {
        return Err(doing(cancelled("copy the guest's changes", cancel)));
    }
    if !complete {
        let text = format!("it is not a valid {} disk", method.name());
        return Err(doing(Error::new(Kind::Host, text).hint(
            "start the VM to see whether it still works: fcctl start VM",
        )));
    }
    progress(size_bytes, size_bytes);
    Ok(())
}

/// Visits the parts of a disk that differ from its base, all within `size_bytes`, until `visit`
/// returns false. Returns false if the disk is not valid, and true if all parts were visited or
/// `visit` ended the walk.
pub(super) fn pieces(
    disk: &impl ReadAt,
    method: Method,
    size_bytes: u64,
    visit: &mut dyn FnMut(Piece) -> std::io::Result<bool>,
) -> std::io::Result<bool> {
    let mut within = |mut piece: Piece| {
        if piece.at >= size_bytes {
            return Ok(true);
        }
        piece.bytes = piece.bytes.min(size_bytes - piece.at);
        visit(piece)
    };
    match method {
        Method::Qcow2 => clusters(disk, size_bytes, &mut within),
        Method::DmSnapshot => exceptions(disk, size_bytes, &mut within),
        Method::Reflink | Method::Copy => Ok(true),
    }
}

fn clusters(
    disk: &impl ReadAt,
    size_bytes: u64,
    visit: &mut dyn FnMut(Piece) -> std::io::Result<bool>,
) -> std::io::Result<bool> {
    let Some(header) = Header::read(disk)? else {
        return Ok(false);
    };
    let (bytes, per_table) = (header.cluster_bytes(), header.clusters_per_table());
    let clusters = size_bytes.div_ceil(bytes);
    for index in 0..clusters.div_ceil(per_table) {
        let Some(table) = header.table(disk, index)? else {
            continue;
        };
        let first = index * per_table;
        for n in first..clusters.min(first + per_table) {
            let from = match header.cluster(disk, table, n - first)? {
                Cluster::OfBase => continue,
                Cluster::Zero => None,
                Cluster::At(at) => Some(at),
                Cluster::Compressed => return Ok(false),
            };
            let piece = Piece {
                at: n * bytes,
                from,
                bytes,
            };
            if !visit(piece)? {
                return Ok(true);
            }
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Command;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    const SIZE_BYTES: u64 = 4 << 20;

    fn run(program: &str, args: &[&str]) {
        let command = Command::new(program).args(args);
        let cancel = Cancel::try_new().unwrap();
        let out = crate::host::command::run_any_status(&command, &cancel, &mut |_| {}).unwrap();
        assert_eq!(
            out.status,
            0,
            "{program} {args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    }

    fn flat(dir: &Path, method: Method) -> Result<Vec<u8>> {
        let to = dir.join("flat");
        let file = File::create(&to).unwrap();
        let source = Source {
            method: Some(method),
            path: &dir.join("disk"),
            base: &dir.join("base"),
        };
        flatten(
            &source,
            SIZE_BYTES,
            &file,
            &Cancel::try_new().unwrap(),
            &mut |_, _| {},
        )?;
        Ok(std::fs::read(to).unwrap())
    }

    /// Creates a base that is smaller than the disks.
    fn base(dir: &Path) -> Vec<u8> {
        let bytes = vec![7; 1 << 20];
        std::fs::write(dir.join("base"), &bytes).unwrap();
        bytes
    }

    #[test]
    fn qcow2_disk_is_flattened_as_qemu_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        base(dir.path());
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let (base, disk, size) = (path("base"), path("disk"), SIZE_BYTES.to_string());
        let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
        run("qemu-img", &[&create[..], &[&base, &disk, &size]].concat());
        run(
            "qemu-io",
            &[
                "-f",
                "qcow2",
                "-c",
                "write -P 1 4096 512",
                "-c",
                "write -z 65536 65536",
                "-c",
                "write -P 2 1048000 200000",
                "-c",
                "write -P 3 4190208 4096",
                &disk,
            ],
        );
        let convert = ["convert", "-f", "qcow2", "-O", "raw"];
        run(
            "qemu-img",
            &[&convert[..], &[&disk, &path("wanted")]].concat(),
        );
        let wanted = std::fs::read(path("wanted")).unwrap();
        assert!(flat(dir.path(), Method::Qcow2).unwrap() == wanted);
    }

    #[test]
    fn qcow2_disk_that_cannot_be_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        base(dir.path());
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("disk"), b"QFI").unwrap();
        assert_eq!(
            flat(dir.path(), Method::Qcow2).unwrap_err().kind(),
            Kind::Host
        );
        // A qcow2 file with an external data file would make the daemon read that file.
        std::fs::remove_file(path("disk")).unwrap();
        let option = format!("data_file={}", path("elsewhere"));
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &option,
                &path("disk"),
                "4M",
            ],
        );
        assert_eq!(
            flat(dir.path(), Method::Qcow2).unwrap_err().kind(),
            Kind::Host
        );
    }

    #[test]
    fn device_mapper_store_is_applied_to_its_base() {
        let dir = tempfile::tempdir().unwrap();
        let mut wanted = base(dir.path());
        wanted.resize(SIZE_BYTES as usize, 0);
        let store = File::create(dir.path().join("disk")).unwrap();
        // The format of dm-snap-persistent.c: the header, one area of exceptions, and the chunks.
        for (at, word) in [(0, 0x7041_6e53u32), (4, 1), (8, 1), (12, 8)] {
            store.write_all_at(&word.to_le_bytes(), at).unwrap();
        }
        for (n, (old, byte)) in [(3u64, 1u8), (300, 2), (1023, 3)].into_iter().enumerate() {
            let (n, new) = (n as u64, n as u64 + 2);
            store
                .write_all_at(&old.to_le_bytes(), 4096 + n * 16)
                .unwrap();
            store
                .write_all_at(&new.to_le_bytes(), 4096 + n * 16 + 8)
                .unwrap();
            store.write_all_at(&[byte; 4096], new * 4096).unwrap();
            wanted[old as usize * 4096..][..4096].fill(byte);
        }
        assert!(flat(dir.path(), Method::DmSnapshot).unwrap() == wanted);
        // The kernel has invalidated the snapshot, because its store was full.
        store.write_all_at(&[0], 4).unwrap();
        assert_eq!(
            flat(dir.path(), Method::DmSnapshot).unwrap_err().kind(),
            Kind::Host
        );
    }

    #[test]
    fn raw_disk_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = vec![5; SIZE_BYTES as usize];
        std::fs::write(dir.path().join("disk"), &bytes).unwrap();
        assert!(flat(dir.path(), Method::Copy).unwrap() == bytes);
    }
}
