//! The ways to create a root disk from an image, and which of them this host supports.

use super::root::SIZE_UNIT_BYTES;
use super::{Cloned, ficlone, snapshot};
use crate::error::{Error, Kind, Result};
use std::path::Path;

/// A way to create a root disk from the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// A raw file that shares extents with the image (FICLONE). It does not depend on the image's
    /// file.
    Reflink,
    /// A qcow2 file with the image's file as its backing file, which must not change.
    Qcow2,
    /// A device-mapper snapshot of the image's file, which must not change. Changes go to a
    /// separate file.
    DmSnapshot,
    /// A full copy of the image, which is as sparse as the image.
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

    /// True if a disk of this kind reads the image's file as long as the disk exists.
    pub const fn needs_image(self) -> bool {
        matches!(self, Self::Qcow2 | Self::DmSnapshot)
    }
}

/// The method that was chosen for a directory, and the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    pub method: Method,
    /// A text for users, such as `reflink: the file system cannot share blocks (...)`.
    pub reason: String,
}

/// Chooses the method for disks in `dir`: `wanted` if it is given, otherwise the best that works.
/// `Copy` is chosen only if it is wanted, because each VM then takes the time and space of a full
/// copy of the image.
///
/// # Errors
/// `unsupported`, with the reasons, if the wanted method does not work, or if none of the others
/// does.
pub fn probe(dir: &Path, wanted: Option<Method>, reads_qcow2: bool) -> Result<Probe> {
    let mut refused = Vec::new();
    for method in wanted.map_or_else(
        || vec![Method::Reflink, Method::Qcow2, Method::DmSnapshot],
        |m| vec![m],
    ) {
        match can(dir, method, reads_qcow2)? {
            Ok(reason) => {
                refused.push(format!("{}: {reason}", method.name()));
                return Ok(Probe {
                    method,
                    reason: refused.join("; "),
                });
            }
            Err(why) => refused.push(format!("{}: {why}", method.name())),
        }
    }
    let message = format!(
        "choose a method for root disks in {}: {}",
        dir.display(),
        refused.join("; ")
    );
    Err(Error::new(Kind::Unsupported, message).hint(
        "set driver = \"copy\" under [disk] in the configuration to copy the image for each VM",
    ))
}

/// Checks one method. Returns the reason why it works or why it does not.
fn can(
    dir: &Path,
    method: Method,
    reads_qcow2: bool,
) -> Result<std::result::Result<String, String>> {
    Ok(match method {
        Method::Reflink => match try_clone(dir)? {
            Cloned::Yes => Ok("the file system shares blocks between files".to_owned()),
            Cloned::No(why) => Err(format!("the file system cannot share blocks ({why})")),
        },
        Method::Qcow2 if reads_qcow2 => Ok("the VMM supports it".to_owned()),
        Method::Qcow2 => Err("the VMM does not support it".to_owned()),
        Method::DmSnapshot => {
            snapshot::probe(dir).map(|()| "the host has device-mapper".to_owned())
        }
        Method::Copy => Ok("the configuration asks for it".to_owned()),
    })
}

/// Tries FICLONE with two small files in `dir`.
fn try_clone(dir: &Path) -> Result<Cloned> {
    crate::locks::may_block("file access");
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
    fn method_names_round_trip() {
        for method in Method::ALL {
            assert_eq!(Method::from_name(method.name()), Some(method));
        }
        assert_eq!(Method::from_name("raid"), None);
    }

    #[test]
    fn wanted_method_is_used_or_refused_with_reason() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            probe(dir.path(), Some(Method::Copy), false).unwrap().method,
            Method::Copy
        );
        let e = probe(dir.path(), Some(Method::Qcow2), false).unwrap_err();
        assert_eq!(
            (e.kind(), e.hint_text().is_some()),
            (Kind::Unsupported, true)
        );
        assert!(e.message().contains("the VMM does not support it"), "{e}");
        let best = probe(dir.path(), None, true).unwrap();
        assert!(
            matches!(best.method, Method::Reflink | Method::Qcow2),
            "{best:?}"
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn copy_is_never_a_fallback() {
        let dir = tempfile::tempdir().unwrap();
        if let Ok(best) = probe(dir.path(), None, false) {
            assert_ne!(best.method, Method::Copy);
        }
    }
}
