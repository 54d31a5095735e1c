//! How a root disk comes from an image, and which way this host can go.

use super::root::SIZE_UNIT_BYTES;
use super::{Cloned, ficlone, snapshot};
use crate::error::{Error, Kind, Result};
use std::path::Path;

/// How a root disk shares the image's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// A raw file that shares extents (FICLONE); independent of the image's file.
    Reflink,
    /// A qcow2 file with the image's file behind it, which must stay as it is.
    Qcow2,
    /// A device-mapper snapshot of the image's file, which must stay as it is; changes are in a file of their own.
    DmSnapshot,
    /// A raw file of its own, as sparse as the image's.
    Copy,
}

impl Method {
    const ALL: [Self; 4] = [Self::Reflink, Self::Qcow2, Self::DmSnapshot, Self::Copy];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Reflink => "reflink",
            Self::Qcow2 => "qcow2",
            Self::DmSnapshot => "dm-snapshot",
            Self::Copy => "copy",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|m| m.name() == name)
    }

    /// Whether a disk made so reads the image for as long as it lives.
    pub const fn needs_image(self) -> bool {
        matches!(self, Self::Qcow2 | Self::DmSnapshot)
    }
}

/// What a directory's file system and this host can, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    pub method: Method,
    /// For people: `reflink: ext4 cannot share blocks between files (operation not supported)`.
    pub reason: String,
}

/// The way to go for disks in `dir`: `wanted`, or the best there is. Never the copy unless it is wanted: it is slow, and takes the
/// image's size for each VM.
///
/// Errors: `unsupported` with the reason where the wanted one, or each, cannot be gone.
pub fn probe(dir: &Path, wanted: Option<Method>, reads_qcow2: bool) -> Result<Probe> {
    let mut refused = Vec::new();
    for method in wanted.map_or_else(|| vec![Method::Reflink, Method::Qcow2, Method::DmSnapshot], |m| vec![m]) {
        match can(dir, method, reads_qcow2)? {
            Ok(reason) => {
                refused.push(format!("{}: {reason}", method.name()));
                return Ok(Probe { method, reason: refused.join("; ") });
            }
            Err(why) => refused.push(format!("{}: {why}", method.name())),
        }
    }
    let message = format!("make root disks in {}: {}", dir.display(), refused.join("; "));
    Err(Error::new(Kind::Unsupported, message)
        .hint("driver = \"copy\" under [disk] works everywhere, at the price of a copy for each VM"))
}

/// Why it can be gone, or why not.
fn can(dir: &Path, method: Method, reads_qcow2: bool) -> Result<std::result::Result<String, String>> {
    Ok(match method {
        Method::Reflink => match try_clone(dir)? {
            Cloned::Yes => Ok("the file system shares blocks between files".to_owned()),
            Cloned::No(why) => Err(format!("the file system cannot share blocks ({why})")),
        },
        Method::Qcow2 if reads_qcow2 => Ok("the VMM reads it".to_owned()),
        Method::Qcow2 => Err("the VMM does not read it".to_owned()),
        Method::DmSnapshot => snapshot::probe(dir).map(|()| "the host has device-mapper".to_owned()),
        Method::Copy => Ok("the configuration says so".to_owned()),
    })
}

/// Tries it on two small files.
fn try_clone(dir: &Path) -> Result<Cloned> {
    let io = |e: std::io::Error| Error::io(format!("probe {}", dir.display()), e);
    let source = tempfile::NamedTempFile::new_in(dir).map_err(io)?;
    source.as_file().set_len(SIZE_UNIT_BYTES).map_err(io)?;
    let target = tempfile::NamedTempFile::new_in(dir).map_err(io)?;
    ficlone(target.as_file(), source.as_file()).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names() {
        for method in Method::ALL {
            assert_eq!(Method::from_name(method.name()), Some(method));
        }
        assert_eq!(Method::from_name("raid"), None);
    }

    #[test]
    fn what_is_wanted_is_taken_or_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(probe(dir.path(), Some(Method::Copy), false).unwrap().method, Method::Copy);
        let e = probe(dir.path(), Some(Method::Qcow2), false).unwrap_err();
        assert_eq!((e.kind(), e.hint_text().is_some()), (Kind::Unsupported, true));
        assert!(e.message().contains("the VMM does not read it"), "{e}");
        let best = probe(dir.path(), None, true).unwrap();
        assert!(matches!(best.method, Method::Reflink | Method::Qcow2), "{best:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn nothing_falls_back_to_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        if let Ok(best) = probe(dir.path(), None, false) {
            assert_ne!(best.method, Method::Copy);
        }
    }
}
