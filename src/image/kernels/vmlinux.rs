//! Extracts a `vmlinux` from an ELF file or a bzImage.

use super::elf::{is_elf, is_whole};
use super::read::read_file;
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use crate::image::kernel::{self, VMLINUX_BYTES_MAX};
use crate::image::registry::KERNEL;
use crate::image::unpack::unpack;
use crate::locks::Cancel;
use object::elf::{ET_DYN, ET_EXEC};
use std::path::Path;

/// The text before the version in a kernel (init/version.c).
const BANNER: &[u8] = b"Linux version ";

/// Writes `out/vmlinux` and returns the kernel's version.
pub(super) fn take_kernel(
    commands: &dyn Commands,
    path: &Path,
    out: &Path,
    cancel: &Cancel,
) -> Result<String> {
    crate::locks::may_block("file access");
    let bytes = read_file(path, u64::from(VMLINUX_BYTES_MAX))?;
    if bytes.starts_with(b"\x7fELF") {
        check_elf(&bytes)?;
        std::fs::write(out.join(KERNEL), &bytes).map_err(|e| Error::io("write the kernel", e))?;
        return version_in(&bytes)
            .ok_or_else(|| Error::new(Kind::Unsupported, "it does not contain a Linux version"));
    }
    let payload = kernel::payload(&bytes)?;
    unpack(commands, &payload, out, cancel)?;
    let unpacked = read_file(&out.join(KERNEL), u64::from(VMLINUX_BYTES_MAX))?;
    check_elf(&unpacked)?;
    kernel::version(&bytes)
        .or_else(|| version_in(&unpacked))
        .ok_or_else(|| Error::new(Kind::Unsupported, "it does not contain a Linux version"))
}

fn check_elf(bytes: &[u8]) -> Result<()> {
    if is_elf(bytes, &[ET_EXEC, ET_DYN]) {
        return if is_whole(bytes) {
            Ok(())
        } else {
            Err(Error::new(
                Kind::Unsupported,
                "the kernel is truncated: a loadable segment is not in the file",
            )
            .hint("copy or download the file again"))
        };
    }
    Err(Error::new(
        Kind::Unsupported,
        "it is not a kernel for x86-64 (vmlinux or bzImage)",
    )
    .hint("use a distribution's /boot/vmlinuz-VERSION"))
}

/// Returns the version, which follows the banner, or None if there is none.
fn version_in(bytes: &[u8]) -> Option<String> {
    let mut rest = bytes;
    loop {
        let at = rest.iter().position(|b| *b == BANNER[0])?;
        rest = &rest[at..];
        if let Some(text) = rest.strip_prefix(BANNER) {
            let version = kernel::word(text);
            if version
                .as_ref()
                .is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit()))
            {
                return version;
            }
        }
        rest = &rest[1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_follows_the_banner() {
        let text = b"\0Linux version %s\0LLinux version 6.1.9-x (gcc)\0";
        assert_eq!(version_in(text).as_deref(), Some("6.1.9-x"));
        assert_eq!(version_in(b"Linux version "), None);
    }

    #[test]
    fn file_that_is_not_a_kernel_is_refused() {
        let mut elf = vec![0; 128];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16] = 2;
        elf[18] = 62;
        // The file has one loadable segment of 8 bytes at the end.
        (elf[32], elf[54], elf[56]) = (64, 56, 1);
        (elf[64 + 8], elf[64 + 32]) = (120, 8);
        check_elf(&elf).unwrap();
        assert!(
            check_elf(&elf[..127])
                .unwrap_err()
                .to_string()
                .contains("truncated")
        );
        for (at, byte) in [
            (32, 73),
            (54, 55),
            (56, 0),
            (56, 2),
            (64 + 8, 121),
            (64 + 15, 0xff),
        ] {
            let mut bad = elf.clone();
            bad[at] = byte;
            assert_eq!(
                check_elf(&bad).unwrap_err().kind(),
                Kind::Unsupported,
                "{at}"
            );
        }
        for (at, byte) in [(4, 1), (5, 2), (16, 1), (18, 183)] {
            let mut bad = elf.clone();
            bad[at] = byte;
            assert_eq!(
                check_elf(&bad).unwrap_err().kind(),
                Kind::Unsupported,
                "{at}"
            );
        }
        assert!(check_elf(&elf[..20]).is_err() && check_elf(b"\x7fELF").is_err());
    }
}
