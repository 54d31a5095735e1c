//! Owners and extended attributes of files, as a tar records them.

use rustix::io::Errno;
use std::io;
use std::os::fd::AsFd;

/// The numbers of a file's owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// An extended attribute, such as `user.origin`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Xattr {
    pub name: String,
    pub value: Vec<u8>,
}

/// The attributes that an entry records in addition to its mode and time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Extra {
    pub owner: Owner,
    pub xattrs: Vec<Xattr>,
}

/// The prefix of attributes that ordinary users may set.
const USER: &str = "user.";
/// The attribute that gives a program some of root's rights.
const CAPABILITY: &str = "security.capability";
/// Maximum size of the list of names, and of one value. The kernel has the same limits (xattr(7)).
const BYTES_MAX: usize = 64 * 1024;

/// Reads the attributes that a copy into a guest keeps. Returns none if the file system does not
/// support attributes.
pub(super) fn read(fd: impl AsFd) -> io::Result<Vec<Xattr>> {
    let mut names = vec![0; BYTES_MAX];
    let length = match rustix::fs::flistxattr(&fd, &mut names[..]) {
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for name in names[..length].split(|b| *b == 0) {
        let Ok(name) = std::str::from_utf8(name) else {
            continue;
        };
        // GNU tar would cut such a name off at the `=`.
        if !(name.starts_with(USER) || name == CAPABILITY) || name.contains('=') {
            continue;
        }
        let mut value = vec![0; BYTES_MAX];
        match rustix::fs::fgetxattr(&fd, name, &mut value[..]) {
            // The attribute has just been removed.
            Err(Errno::NODATA) => continue,
            other => value.truncate(other?),
        }
        let name = name.to_owned();
        found.push(Xattr { name, value });
    }
    Ok(found)
}

/// Sets the attributes that a user may set. A guest's other attributes, such as capabilities, are
/// never set on the host.
pub(super) fn set(fd: impl AsFd, attributes: &[Xattr]) -> io::Result<()> {
    for one in attributes.iter().filter(|one| one.name.starts_with(USER)) {
        let flags = rustix::fs::XattrFlags::empty();
        match rustix::fs::fsetxattr(&fd, one.name.as_str(), &one.value, flags) {
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
