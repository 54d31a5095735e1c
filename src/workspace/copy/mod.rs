//! Copies files and directories into guests and out of them, for `fcctl cp`.
//!
//! A copy is a command in the guest whose standard input or output is a tar:
//! - [`script`] builds the command from two shell scripts and explains how it ended.
//! - [`list`] lists the entries of paths on the host, and [`pack`] writes their tar.
//! - [`forward`] forwards a tar that the caller or another guest made.
//! - [`land`] writes files from a guest to their destination on the host.
//!
//! The guest is hostile. Nothing that it sends is written outside of the destination, and no link
//! in the destination is followed. In the guest, everything is unpacked beside the destination and
//! moved there once the tar's last entry has arrived. A copy that is cut off therefore leaves no
//! incomplete file on either side.

pub mod forward;
pub mod land;
pub mod list;
pub mod pack;
pub mod script;

#[cfg(test)]
mod tests;

use crate::error::{Error, Kind};
use crate::locks::Cancel;

/// The kind of file at a path to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    File,
    Link,
    Dir,
}

/// The amount that was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Copied {
    /// The number of files, links and directories.
    pub entries: u64,
    /// The number of bytes of their content, without holes.
    pub bytes: u64,
}

impl std::ops::AddAssign for Copied {
    fn add_assign(&mut self, other: Self) {
        self.entries += other.entries;
        self.bytes += other.bytes;
    }
}

/// Returns the last component of a path, under which it is copied into a directory. Returns `None`
/// for the root and for paths that end with `.` or `..`, whose content is copied.
pub fn name_of(path: &[u8]) -> Option<&[u8]> {
    let end = path.iter().rposition(|b| *b != b'/')? + 1;
    let name = path[..end].rsplit(|b| *b == b'/').next()?;
    (name != b"." && name != b"..").then_some(name)
}

/// True if a path can only be a directory: it ends with a slash, `.` or `..`.
pub fn must_be_dir(path: &[u8]) -> bool {
    path.ends_with(b"/") || name_of(path).is_none()
}

/// Returns `cancelled` if the token has fired.
fn check_cancel(cancel: &Cancel) -> crate::error::Result<()> {
    match cancel.cause() {
        Some(cause) => Err(Error::new(
            Kind::Cancelled,
            format!("copy: cancelled: {cause}"),
        )),
        None => Ok(()),
    }
}

/// Formats a path for messages.
fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
