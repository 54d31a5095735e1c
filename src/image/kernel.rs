//! Extracts the kernel and its modules from the distribution's package.
//!
//! The package contains a bzImage. QEMU's microvm and Firecracker boot the ELF file inside it
//! (PVH), so the guest need not unpack the kernel.

use crate::error::{Error, Kind, Result};
use std::collections::BTreeMap;

/// The offsets of the boot protocol's fields (Documentation/arch/x86/boot.rst in the kernel).
const SETUP_SECTORS_AT: usize = 0x1f1;
const MAGIC_AT: usize = 0x202;
const VERSION_AT: usize = 0x206;
const KERNEL_VERSION_AT: usize = 0x20e;
const VERSION_LEN_MAX: usize = 64;
const PAYLOAD_OFFSET_AT: usize = 0x248;
const PAYLOAD_LENGTH_AT: usize = 0x24c;
/// The first version of the protocol with a payload.
const VERSION_MIN: u16 = 0x0208;
const SECTOR: usize = 512;
/// The size limit of an unpacked kernel. A malformed image may claim any size.
pub(super) const VMLINUX_BYTES_MAX: u32 = 512 << 20;

/// A signed module ends with this mark (include/linux/module_signature.h in the kernel).
const SIGNATURE_MARK: &[u8] = b"~Module signature appended~\n";
/// The size of `struct module_signature`, whose last four bytes are the signature's length,
/// big-endian.
const SIGNATURE_STRUCT: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Lz4,
    Zstd,
    Xz,
    Gzip,
}

impl Compression {
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        // This is the magic of lz4's legacy frame, the only format that the kernel's build uses for
        // lz4.
        const MAGICS: [(&[u8], Compression); 4] = [
            (&[0x02, 0x21, 0x4c, 0x18], Compression::Lz4),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
            (&[0x1f, 0x8b, 0x08], Compression::Gzip),
        ];
        MAGICS
            .iter()
            .find(|(magic, _)| bytes.starts_with(magic))
            .map(|(_, c)| *c)
    }

    /// Returns the program that unpacks this format, and the suffix that the program expects.
    pub(super) const fn program(self) -> (&'static str, &'static str) {
        match self {
            Compression::Lz4 => ("lz4", "lz4"),
            Compression::Zstd => ("zstd", "zst"),
            Compression::Xz => ("xz", "xz"),
            Compression::Gzip => ("gzip", "gz"),
        }
    }
}

/// The compressed kernel inside a bzImage.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Payload<'a> {
    pub compression: Compression,
    pub bytes: &'a [u8],
    /// The size of the ELF file.
    pub unpacked_bytes: u32,
}

/// Finds the payload. The last four bytes of the field are the unpacked length, little-endian.
pub(super) fn payload(image: &[u8]) -> Result<Payload<'_>> {
    let bad = |what: &str| Error::new(Kind::Unsupported, format!("read the kernel image: {what}"));
    let u32_at = |at: usize| {
        image
            .get(at..at + 4)
            .map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")))
    };
    if image.get(MAGIC_AT..MAGIC_AT + 4) != Some(b"HdrS") {
        return Err(bad("it is not a bzImage"));
    }
    let version = image
        .get(VERSION_AT..VERSION_AT + 2)
        .map(|b| u16::from_le_bytes([b[0], b[1]]));
    if version.is_none_or(|v| v < VERSION_MIN) {
        return Err(bad("its boot protocol is too old"));
    }
    let (Some(offset), Some(length)) = (u32_at(PAYLOAD_OFFSET_AT), u32_at(PAYLOAD_LENGTH_AT))
    else {
        return Err(bad("it is truncated"));
    };
    // 0 means 4 sectors.
    let sectors = match image[SETUP_SECTORS_AT] {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * SECTOR + offset as usize;
    let field = start
        .checked_add(length as usize)
        .and_then(|end| image.get(start..end))
        .ok_or_else(|| bad("it is truncated"))?;
    let (bytes, unpacked) = field
        .split_last_chunk::<4>()
        .ok_or_else(|| bad("its payload is empty"))?;
    let unpacked_bytes = u32::from_le_bytes(*unpacked);
    if unpacked_bytes == 0 || unpacked_bytes > VMLINUX_BYTES_MAX {
        return Err(bad("its payload has an impossible length"));
    }
    let compression =
        Compression::of(bytes).ok_or_else(|| bad("its payload has an unknown compression"))?;
    Ok(Payload {
        compression,
        bytes,
        unpacked_bytes,
    })
}

/// Returns the version in a bzImage's header, or None if it has none. `kernel_version` is the
/// offset of a text, counted from the second sector.
pub(super) fn version(image: &[u8]) -> Option<String> {
    let at = image
        .get(KERNEL_VERSION_AT..KERNEL_VERSION_AT + 2)
        .map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])))?;
    let version = if at == 0 {
        None
    } else {
        image.get(at + SECTOR..).and_then(word)
    };
    version.filter(|version| version.starts_with(|c: char| c.is_ascii_digit()))
}

/// Returns the first word of a text, up to a blank or a NUL. Returns None if that word cannot be a
/// version because of its characters or its length (`__NEW_UTS_LEN`).
pub(super) fn word(text: &[u8]) -> Option<String> {
    let end = text
        .iter()
        .take(VERSION_LEN_MAX + 1)
        .position(|b| *b == b' ' || *b == 0)?;
    let is_plain = |b: &u8| b.is_ascii_alphanumeric() || b"._+~-".contains(b);
    (end > 0 && text[..end].iter().all(is_plain))
        .then(|| String::from_utf8_lossy(&text[..end]).into_owned())
}

/// Strips the signature from a module, if it has one. The guest then has no signature to verify,
/// which saves an RSA computation per module on a slow guest.
pub(super) fn without_signature(module: &[u8]) -> &[u8] {
    let Some(rest) = module.strip_suffix(SIGNATURE_MARK) else {
        return module;
    };
    let Some((body, info)) = rest.split_last_chunk::<SIGNATURE_STRUCT>() else {
        return module;
    };
    let length = u32::from_be_bytes(info[8..].try_into().expect("four bytes")) as usize;
    body.len()
        .checked_sub(length)
        .map_or(module, |end| &body[..end])
}

/// Reduces `modules.dep` to the modules in `names`, with file names instead of paths, for modules
/// that are all in one directory.
pub(super) fn flat_modules_dep(modules_dep: &str, names: &[String]) -> String {
    let file = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
    let mut lines = BTreeMap::new();
    for line in modules_dep.lines() {
        let Some((path, needs)) = line.split_once(':') else {
            continue;
        };
        let name = file(path);
        if names.contains(&name) {
            let needs: String = needs
                .split_whitespace()
                .map(|n| format!(" {}", file(n)))
                .collect();
            lines.insert(name, needs);
        }
    }
    lines
        .iter()
        .map(|(name, needs)| format!("{name}:{needs}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(payload: &[u8], length: u32) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR];
        image[SETUP_SECTORS_AT] = 1;
        image[MAGIC_AT..MAGIC_AT + 4].copy_from_slice(b"HdrS");
        image[VERSION_AT..VERSION_AT + 2].copy_from_slice(&0x020fu16.to_le_bytes());
        image[PAYLOAD_OFFSET_AT..PAYLOAD_OFFSET_AT + 4].copy_from_slice(&16u32.to_le_bytes());
        image[PAYLOAD_LENGTH_AT..PAYLOAD_LENGTH_AT + 4].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(&[0xaa; 16]);
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what follows");
        image
    }

    #[test]
    fn payload_is_found_without_its_length_field() {
        let mut bytes = vec![0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3];
        bytes.extend_from_slice(&1000u32.to_le_bytes());
        let image = bzimage(&bytes, 11);
        let found = payload(&image).unwrap();
        assert_eq!(
            found,
            Payload {
                compression: Compression::Zstd,
                bytes: &bytes[..7],
                unpacked_bytes: 1000
            }
        );
    }

    #[test]
    fn broken_images_are_refused() {
        let mut good = vec![0x1f, 0x8b, 0x08, 0];
        good.extend_from_slice(&1000u32.to_le_bytes());
        assert!(payload(&bzimage(&good, 8)).is_ok());
        for (image, why) in [
            (Vec::new(), "not a bzImage"),
            (b"\x7fELF".to_vec(), "not a bzImage"),
            (bzimage(&good, 8)[..SECTOR * 2].to_vec(), "truncated"),
            (bzimage(&good, u32::MAX), "truncated"),
            (bzimage(&good, 3), "empty"),
            (bzimage(&[1, 2, 3, 4, 1, 0, 0, 0], 8), "unknown compression"),
            (
                bzimage(&[0x1f, 0x8b, 0x08, 0, 0, 0, 0, 0xff], 8),
                "impossible length",
            ),
        ] {
            let e = payload(&image).unwrap_err().to_string();
            assert!(e.contains(why), "{e}");
        }
    }

    #[test]
    fn module_signature_is_stripped() {
        let mut module = b"body signature".to_vec();
        module.extend_from_slice(&[0; 8]);
        module.extend_from_slice(&10u32.to_be_bytes());
        module.extend_from_slice(SIGNATURE_MARK);
        assert_eq!(without_signature(&module), b"body");
        assert_eq!(without_signature(b"body"), b"body");
        let claims_too_much = [&[0; 8][..], &99u32.to_be_bytes(), SIGNATURE_MARK].concat();
        assert_eq!(without_signature(&claims_too_much), claims_too_much);
    }

    #[test]
    fn dependencies_are_flattened() {
        let dep =
            "kernel/b/x.ko: kernel/a/y.ko kernel/c/z.ko\nkernel/a/y.ko:\nkernel/q/other.ko:\n";
        let names = ["x.ko".to_owned(), "y.ko".to_owned()];
        assert_eq!(flat_modules_dep(dep, &names), "x.ko: y.ko z.ko\ny.ko:\n");
    }
}
