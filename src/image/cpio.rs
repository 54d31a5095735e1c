//! Reads and writes an initramfs: a cpio archive in the "newc" format, which the kernel documents
//! in Documentation/driver-api/early-userspace/buffer-format.rst.

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const TYPE: u32 = 0o170_000;
/// The length of a member's header: the magic number and thirteen fields.
const HEAD_BYTES: usize = 110;
const TRAILER: &str = "TRAILER!!!";

/// Writes an archive. The same calls produce the same bytes: members belong to root, have the time
/// 0 and are numbered in order.
#[derive(Default)]
pub(super) struct Cpio {
    bytes: Vec<u8>,
    members: u32,
}

impl Cpio {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn dir(&mut self, path: &str, mode: u32) {
        self.member(path, DIRECTORY | mode, 2, &[]);
    }

    pub(super) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.member(path, FILE | mode, 1, content);
    }

    pub(super) fn symlink(&mut self, path: &str, target: &str) {
        self.member(path, SYMLINK | 0o777, 1, target.as_bytes());
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.members = 0;
        self.member_with_inode(0, TRAILER, 0, 1, &[]);
        self.bytes
    }

    fn member(&mut self, path: &str, mode: u32, links: u32, content: &[u8]) {
        self.members += 1;
        self.member_with_inode(self.members, path, mode, links, content);
    }

    fn member_with_inode(&mut self, inode: u32, path: &str, mode: u32, links: u32, content: &[u8]) {
        let size = u32::try_from(content.len()).expect("a member below 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("a short path");
        // The fields are ino, mode, uid, gid, nlink, mtime, filesize, maj, min, rmaj, rmin,
        // namesize and chksum.
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Returns the content of a regular file in an archive, or None if there is no such file or the
/// archive is malformed.
pub(super) fn find<'a>(archive: &'a [u8], path: &str) -> Option<&'a [u8]> {
    let mut at = 0usize;
    loop {
        let head = archive.get(at..at.checked_add(HEAD_BYTES)?)?;
        let field = |n: usize| {
            let text = std::str::from_utf8(head.get(6 + 8 * n..14 + 8 * n)?).ok()?;
            u32::from_str_radix(text, 16).ok()
        };
        if !head.starts_with(b"070701") {
            return None;
        }
        let (mode, size, name_size) = (field(1)?, field(6)? as usize, field(11)? as usize);
        let name_at = at + HEAD_BYTES;
        let name = archive
            .get(name_at..name_at.checked_add(name_size)?)?
            .strip_suffix(&[0])?;
        let content_at = name_at
            .checked_add(name_size)?
            .checked_next_multiple_of(4)?;
        let content = archive.get(content_at..content_at.checked_add(size)?)?;
        if name == path.as_bytes() && mode & TYPE == FILE {
            return Some(content);
        }
        if name == TRAILER.as_bytes() {
            return None;
        }
        at = content_at.checked_add(size)?.checked_next_multiple_of(4)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Command, Commands, HostCommands};
    use crate::locks::Cancel;
    use expect_test::expect;

    #[test]
    fn file_is_found_and_truncated_archive_has_none() {
        let mut cpio = Cpio::new();
        cpio.dir("bin", 0o755);
        cpio.symlink("bin/sh", "tool");
        cpio.file("bin/tool", 0o755, b"12345");
        let bytes = cpio.finish();
        assert_eq!(find(&bytes, "bin/tool"), Some(&b"12345"[..]));
        assert_eq!(
            (find(&bytes, "bin/sh"), find(&bytes, "none"), find(b"", "x")),
            (None, None, None)
        );
        let end = bytes.windows(5).position(|w| w == b"12345").unwrap();
        assert!((0..end + 5).all(|len| find(&bytes[..len], "bin/tool").is_none()));
    }

    #[test]
    fn archive_is_readable_by_cpio() {
        let mut cpio = Cpio::new();
        cpio.dir("bin", 0o755);
        cpio.file("bin/tool", 0o755, b"12345");
        cpio.symlink("bin/sh", "tool");
        let bytes = cpio.finish();
        assert_eq!(bytes.len() % 4, 0);
        let command = Command::new("cpio")
            .args(["-itv", "--quiet", "--numeric-uid-gid"])
            .env("TZ", "UTC")
            .stdin(bytes);
        let out = HostCommands
            .run(&command, &Cancel::try_new().unwrap(), &mut |_| {})
            .unwrap();
        expect![[r#"
            drwxr-xr-x   2 0        0               0 Jan  1  1970 bin
            -rwxr-xr-x   1 0        0               5 Jan  1  1970 bin/tool
            lrwxrwxrwx   1 0        0               4 Jan  1  1970 bin/sh -> tool
        "#]]
        .assert_eq(&String::from_utf8(out.stdout).unwrap());
    }
}
