//! An initramfs as the kernel reads it: a cpio archive of the "newc" kind.
//!
//! Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const TRAILER: &str = "TRAILER!!!";

/// Writes members owned by root, dated 0, numbered in order: the same calls give the same bytes.
#[derive(Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    members: u32,
}

impl Cpio {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn dir(&mut self, path: &str, mode: u32) {
        self.member(path, DIRECTORY | mode, 2, &[]);
    }

    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.member(path, FILE | mode, 1, content);
    }

    pub fn symlink(&mut self, path: &str, target: &str) {
        self.member(path, SYMLINK | 0o777, 1, target.as_bytes());
    }

    pub fn finish(mut self) -> Vec<u8> {
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
        // ino mode uid gid nlink mtime filesize maj min rmaj rmin namesize chksum
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Command, Commands, HostCommands};
    use crate::locks::Cancel;
    use expect_test::expect;

    #[test]
    fn cpio_itself_reads_it() {
        let mut cpio = Cpio::new();
        cpio.dir("bin", 0o755);
        cpio.file("bin/tool", 0o755, b"12345");
        cpio.symlink("bin/sh", "tool");
        let bytes = cpio.finish();
        assert_eq!(bytes.len() % 4, 0);
        let command = Command::new("cpio").args(["-itv", "--quiet", "--numeric-uid-gid"]).env("TZ", "UTC").stdin(bytes);
        let out = HostCommands.run(&command, &Cancel::try_new().unwrap(), &mut |_| {}).unwrap();
        expect![[r#"
            drwxr-xr-x   2 0        0               0 Jan  1  1970 bin
            -rwxr-xr-x   1 0        0               5 Jan  1  1970 bin/tool
            lrwxrwxrwx   1 0        0               4 Jan  1  1970 bin/sh -> tool
        "#]]
        .assert_eq(&String::from_utf8(out.stdout).unwrap());
    }
}
