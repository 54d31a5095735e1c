//! Reads the names in a directory. The index of a large directory looks like unused entries to a
//! reader that does not know indexes.

use super::blocks::Content;
use super::disk::Disk;
use super::inode::Inode;
use super::{damaged, u16_at, u32_at};
use crate::error::{Error, Result};
use std::io::Read;

/// The size limit of one directory. A name takes at most 263 bytes.
const BYTES_MAX: u64 = 512 << 20;
const HEADER_BYTES: usize = 8;

/// A name in a directory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) name: Vec<u8>,
    pub(super) inode: u32,
}

/// Returns the names in a directory, sorted, without `.` and `..`.
pub(super) fn names(disk: &Disk<'_>, inode: &Inode) -> Result<Vec<Name>> {
    if inode.bytes > BYTES_MAX {
        return Err(damaged("a directory is too large"));
    }
    let mut content = Content::of(disk, inode)?;
    let mut block = vec![0; disk.block_bytes as usize];
    let mut names = Vec::new();
    for _ in 0..inode.bytes / disk.block_bytes {
        content.read_exact(&mut block).map_err(|e| {
            let cause = content.take_error();
            cause.unwrap_or_else(|| Error::io("read a directory", e))
        })?;
        parse_block(&block, &mut names)?;
    }
    names.sort_by(|a, b| a.name.cmp(&b.name));
    if names.windows(2).any(|pair| pair[0].name == pair[1].name) {
        return Err(damaged("a directory has a name twice"));
    }
    Ok(names)
}

fn parse_block(block: &[u8], names: &mut Vec<Name>) -> Result<()> {
    let mut rest = block;
    while rest.len() >= HEADER_BYTES {
        let (len, name_len) = (usize::from(u16_at(rest, 4)), usize::from(rest[6]));
        if len < HEADER_BYTES + name_len || len > rest.len() || !len.is_multiple_of(4) {
            return Err(damaged("a directory is malformed"));
        }
        let (inode, name) = (
            u32_at(rest, 0),
            &rest[HEADER_BYTES..HEADER_BYTES + name_len],
        );
        if inode != 0 && name != b"." && name != b".." {
            if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
                return Err(damaged("a directory has an impossible name"));
            }
            names.push(Name {
                name: name.to_vec(),
                inode,
            });
        }
        rest = &rest[len..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(inode: u32, len: u16, name: &[u8]) -> Vec<u8> {
        let mut bytes = inode.to_le_bytes().to_vec();
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&[name.len() as u8, 1]);
        bytes.extend_from_slice(name);
        bytes.resize(usize::from(len), 0);
        bytes
    }

    fn parse(block: &[u8]) -> Result<Vec<Name>> {
        let mut names = Vec::new();
        parse_block(block, &mut names).map(|()| names)
    }

    #[test]
    fn unused_entries_and_dots_are_skipped() {
        let block = [
            entry(2, 12, b"."),
            entry(2, 12, b".."),
            entry(0, 12, b"old"),
            entry(12, 16, b"name"),
        ];
        let names = parse(&block.concat()).unwrap();
        assert_eq!((names[0].inode, names.len()), (12, 1));
        assert_eq!(names[0].name, b"name");
    }

    #[test]
    fn malformed_entries_are_refused() {
        for bad in [
            entry(5, 12, b"a/b"),
            entry(5, 12, b"a\0"),
            entry(5, 12, b""),
            // The length is too long, too short, zero and not aligned.
            entry(5, 16, b"name")[..12].to_vec(),
            entry(5, 8, b"name"),
            vec![0; 12],
            entry(5, 13, b"name"),
        ] {
            assert!(parse(&bad).is_err(), "{bad:?}");
        }
    }
}
