//! An entry of a layer.

use super::errors::{bad, shown};
use super::limits::{DEPTH_MAX, NAME_BYTES_MAX, PATH_BYTES_MAX};
use crate::error::{Kind, Result};

/// A layer's entry for one path. The path has no leading slash; the root is the empty path.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub path: Box<str>,
    pub kind: EntryKind,
    pub attributes: Attributes,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum EntryKind {
    Directory,
    /// The content is at this position in the layer's uncompressed tar.
    File {
        offset: u64,
        bytes: u64,
    },
    Symlink {
        target: Box<str>,
    },
    /// Another name of the file at this path.
    HardLink {
        target: Box<str>,
    },
    CharacterDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Attributes {
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    pub xattrs: Vec<Xattr>,
}

/// A time since the epoch. It may be negative; the nanoseconds always count forwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Time {
    pub seconds: i64,
    pub nanoseconds: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Xattr {
    pub name: Box<str>,
    pub value: Box<[u8]>,
}

impl Entry {
    /// Returns the bytes that the entry keeps in memory in addition to its own size.
    pub(super) fn metadata_bytes(&self) -> usize {
        let target = match &self.kind {
            EntryKind::Symlink { target } | EntryKind::HardLink { target } => target.len(),
            _ => 0,
        };
        let xattrs = self.attributes.xattrs.iter();
        let xattrs: usize = xattrs.map(|x| x.name.len() + x.value.len() + 32).sum();
        self.path.len() + target + xattrs
    }
}

/// Normalizes a path from a layer: removes a leading slash, empty components and dots. Refuses `..`
/// everywhere, because no honest tool writes it.
pub(super) fn clean_path(path: &[u8]) -> Result<Box<str>> {
    let text = std::str::from_utf8(path).map_err(|_| {
        let message = format!("the name {} is not UTF-8", shown(path));
        bad(message).with_kind(Kind::Unsupported)
    })?;
    let mut clean = String::with_capacity(text.len());
    let mut depth = 0;
    for component in text
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
    {
        if component == ".." {
            return Err(bad(format!("the path {} has a ..", shown(path))));
        }
        if component.len() > NAME_BYTES_MAX {
            return Err(bad(format!(
                "a name in the path {} has more than {NAME_BYTES_MAX} bytes",
                shown(path)
            )));
        }
        if depth > 0 {
            clean.push('/');
        }
        clean.push_str(component);
        depth += 1;
    }
    if clean.len() > PATH_BYTES_MAX || depth > DEPTH_MAX || clean.contains('\0') {
        return Err(bad(format!("the path {} is not a valid path", shown(path))));
    }
    Ok(clean.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_brought_into_normal_form() {
        for (path, clean) in [
            ("a/b", "a/b"),
            ("./a//b/", "a/b"),
            ("/a/./b", "a/b"),
            ("./", ""),
            ("/", ""),
            ("...", "..."),
            ("a b\n", "a b\n"),
        ] {
            assert_eq!(&*clean_path(path.as_bytes()).unwrap(), clean);
        }
        clean_path("n".repeat(NAME_BYTES_MAX).as_bytes()).unwrap();
    }

    #[test]
    fn impossible_paths_are_refused() {
        let long = "n".repeat(NAME_BYTES_MAX + 1);
        let deep = "d/".repeat(DEPTH_MAX + 1);
        let wide = format!("{}/", "n".repeat(NAME_BYTES_MAX)).repeat(17);
        for path in ["..", "../a", "a/../b", "/..", "a\0b", &long, &deep, &wide] {
            let error = clean_path(path.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidImage, "{path:?}");
        }
        assert_eq!(clean_path(b"a\xff").unwrap_err().kind(), Kind::Unsupported);
    }
}
