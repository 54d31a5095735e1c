//! POSIX ACLs. A tar contains them as getxattr(2) returns them, and ext4 stores them in another
//! form.

const XATTR_VERSION: u32 = 2;
const EXT4_VERSION: u32 = 1;
/// The tags of entries that name a user or a group (`ACL_USER`, `ACL_GROUP`).
const WITH_ID: [u16; 2] = [0x02, 0x08];
/// The other tags: `ACL_USER_OBJ`, `ACL_GROUP_OBJ`, `ACL_MASK` and `ACL_OTHER`.
const WITHOUT_ID: [u16; 4] = [0x01, 0x04, 0x10, 0x20];

/// Converts an ACL from the form of getxattr(2) to that of ext4, or returns `None` if it is
/// malformed.
pub(super) fn to_ext4(xattr: &[u8]) -> Option<Vec<u8>> {
    let (version, entries) = xattr.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != XATTR_VERSION || entries.len() % 8 != 0 {
        return None;
    }
    let mut out = EXT4_VERSION.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        out.extend_from_slice(&entry[..4]);
        if WITH_ID.contains(&tag) {
            out.extend_from_slice(&entry[4..]);
        } else if !WITHOUT_ID.contains(&tag) {
            return None;
        }
    }
    Some(out)
}

/// Converts an ACL as ext4 stores it to what getxattr(2) returns, or returns `None` if it is
/// malformed.
pub fn from_ext4(mut acl: &[u8]) -> Option<Vec<u8>> {
    let mut out = XATTR_VERSION.to_le_bytes().to_vec();
    let version = acl.split_off(..4)?;
    if version != EXT4_VERSION.to_le_bytes() {
        return None;
    }
    while !acl.is_empty() {
        let entry = acl.split_off(..4)?;
        out.extend_from_slice(entry);
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        if WITH_ID.contains(&tag) {
            out.extend_from_slice(acl.split_off(..4)?);
        } else if WITHOUT_ID.contains(&tag) {
            // ACL_UNDEFINED_ID.
            out.extend_from_slice(&[0xff; 4]);
        } else {
            return None;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_without_id_lose_their_id() {
        let xattr = [
            &2_u32.to_le_bytes()[..],
            &[1, 0, 6, 0, 255, 255, 255, 255],
            &[2, 0, 7, 0, 0xe8, 3, 0, 0],
        ];
        let ext4 = [
            &1_u32.to_le_bytes()[..],
            &[1, 0, 6, 0],
            &[2, 0, 7, 0, 0xe8, 3, 0, 0],
        ];
        assert_eq!(to_ext4(&xattr.concat()), Some(ext4.concat()));
        assert_eq!(from_ext4(&ext4.concat()), Some(xattr.concat()));
        for wrong in [
            &b""[..],
            b"\x02\0\0\0",
            b"\x01\0\0\0\x02\0\x07\0",
            b"\x01\0\0\0\x03\0\0\0",
        ] {
            assert_eq!(from_ext4(wrong), None);
        }
        for wrong in [
            &b""[..],
            b"\x02\0\0",
            b"\x01\0\0\0",
            b"\x02\0\0\0x",
            b"\x02\0\0\0\x03\0\0\0\0\0\0\0",
        ] {
            assert_eq!(to_ext4(wrong), None);
        }
    }
}
