//! Reads extended attributes, which are in the inode, in a block of their own, or in both.

use super::disk::Disk;
use super::inode::Inode;
use super::{damaged, u16_at, u32_at, unsupported};
use crate::error::Result;
use crate::image::oci::acl_of_ext4;

const MAGIC: u32 = 0xea02_0000;
/// The length of the magic number before the entries in an inode.
const INODE_HEADER_BYTES: usize = 4;
const BLOCK_HEADER_BYTES: usize = 32;
const ENTRY_BYTES: usize = 16;
/// The prefixes of the names, indexed by their number on the disk. Linux does not use the numbers
/// with an empty prefix.
const PREFIXES: [&str; 8] = [
    "",
    "user.",
    "system.posix_acl_access",
    "system.posix_acl_default",
    "trusted.",
    "",
    "security.",
    "system.",
];

/// One attribute, as getxattr(2) returns it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Xattr {
    pub(super) name: String,
    pub(super) value: Vec<u8>,
}

/// Returns the attributes of a file.
pub(super) fn xattrs(disk: &Disk<'_>, inode: &Inode) -> Result<Vec<Xattr>> {
    let mut found = Vec::new();
    let area = inode.xattr_area();
    if area.len() > INODE_HEADER_BYTES && u32_at(area, 0) == MAGIC {
        let entries = &area[INODE_HEADER_BYTES..];
        parse(entries, entries, &mut found)?;
    }
    if inode.xattr_block() != 0 {
        let mut block = vec![0; disk.block_bytes as usize];
        disk.read_block(inode.xattr_block(), &mut block)?;
        if u32_at(&block, 0) != MAGIC {
            return Err(damaged("a block of attributes is malformed"));
        }
        parse(&block[BLOCK_HEADER_BYTES..], &block, &mut found)?;
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Reads entries whose values are at offsets into `values`.
fn parse(mut entries: &[u8], values: &[u8], found: &mut Vec<Xattr>) -> Result<()> {
    let malformed = || damaged("the attributes of a file are malformed");
    while entries.len() >= ENTRY_BYTES && u32_at(entries, 0) != 0 {
        let (name_len, prefix) = (usize::from(entries[0]), usize::from(entries[1]));
        let (at, bytes) = (usize::from(u16_at(entries, 2)), u32_at(entries, 8) as usize);
        if u32_at(entries, 4) != 0 {
            return Err(unsupported("keeps attributes in inodes of their own"));
        }
        let name = entries.get(ENTRY_BYTES..ENTRY_BYTES + name_len);
        let value = at.checked_add(bytes).and_then(|end| values.get(at..end));
        let (Some(name), Some(value)) = (name, value) else {
            return Err(malformed());
        };
        let prefix = PREFIXES.get(prefix).filter(|prefix| !prefix.is_empty());
        let name = std::str::from_utf8(name).map_err(|_| malformed())?;
        if let Some(prefix) = prefix {
            let value = if prefix.contains("posix_acl") {
                acl_of_ext4(value).ok_or_else(malformed)?
            } else {
                value.to_vec()
            };
            let name = format!("{prefix}{name}");
            // A pax record cannot represent such a name.
            if !name.contains(['=', '\0']) {
                found.push(Xattr { name, value });
            }
        }
        let len = (ENTRY_BYTES + name_len).next_multiple_of(4);
        entries = entries.get(len..).ok_or_else(malformed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(prefix: u8, name: &[u8], at: u16, bytes: u32) -> Vec<u8> {
        let mut entry = vec![name.len() as u8, prefix];
        entry.extend_from_slice(&at.to_le_bytes());
        entry.extend_from_slice(&[0; 4]);
        entry.extend_from_slice(&bytes.to_le_bytes());
        entry.extend_from_slice(&[0; 4]);
        entry.extend_from_slice(name);
        entry.resize(entry.len().next_multiple_of(4), 0);
        entry
    }

    #[test]
    fn attributes_are_read() {
        let mut area = [entry(1, b"key", 60, 5), entry(6, b"capability", 56, 4)].concat();
        area.resize(56, 0);
        area.extend_from_slice(b"capsvalue");
        let mut found = Vec::new();
        parse(&area, &area, &mut found).unwrap();
        let found: Vec<_> = found.iter().map(|x| (&*x.name, &*x.value)).collect();
        assert_eq!(
            found,
            [
                ("user.key", &b"value"[..]),
                ("security.capability", &b"caps"[..])
            ]
        );
    }

    #[test]
    fn values_and_names_outside_the_area_are_refused() {
        for bad in [
            entry(1, b"key", 60, 1),
            entry(1, b"key", u16::MAX, u32::MAX),
            entry(1, b"long name", 0, 1)[..20].to_vec(),
            entry(1, b"\xff", 0, 1),
            entry(2, b"", 0, 1),
        ] {
            assert!(parse(&bad, &bad, &mut Vec::new()).is_err(), "{bad:?}");
        }
    }
}
