//! Reads the list of paths that an export could not put into a patch or a tree.
//!
//! An export's payload begins with this list: a line `fcd-export 1 <count> <bytes>`, then that
//! number of bytes of records, each a letter, a space, a path and NUL. The guest writes the list,
//! so `fcctl` reads it with the caller's rights and bounds its size.

use super::PATH_BYTES_MAX;
use super::unpack::stream_error;
use crate::error::{Error, Kind, Result};
use std::io::Read;

/// Maximum size of the records. The guest's script truncates its list to this size.
pub const LIST_BYTES_MAX: u64 = 256 * 1024;
const LINE_BYTES_MAX: usize = 64;
const DOING: &str = "read the list of files that the guest could not send";

/// The reason why a path is not part of the patch or tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The `.git` of a repository that was created in the guest, or whose history was changed
    /// there. The repository's files are included.
    Repository,
    /// A submodule, or a repository on the host whose files were not sent. The guest has its own
    /// files there.
    Submodule,
    /// git rejects the name.
    Name,
}

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Left {
    #[serde(serialize_with = "encoded")]
    pub path: Vec<u8>,
    pub why: Why,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct LeftBehind {
    /// The first entries; the list may be truncated.
    pub named: Vec<Left>,
    pub total: u64,
}

fn encoded<S: serde::Serializer>(path: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&super::encode::encode(path))
}

fn unknown() -> Error {
    Error::new(
        Kind::GuestCommandFailed,
        format!("{DOING}: the guest's answer has an unknown form"),
    )
    .hint("a login script in the guest may print text; check with: fcctl exec {vm} -- true")
}

/// Reads the list at the beginning of an export's payload, and leaves the patch or the tree after
/// it unread. Returns `guest_command_failed` for an invalid list, and `stream_incomplete` for a
/// truncated one.
pub fn read(from: &mut dyn Read) -> Result<LeftBehind> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        from.read_exact(&mut byte)
            .map_err(|e| stream_error(DOING, e))?;
        match byte {
            [b'\n'] => break,
            _ if line.len() == LINE_BYTES_MAX => return Err(unknown()),
            [byte] => line.push(byte),
        }
    }
    let numbers = std::str::from_utf8(&line)
        .ok()
        .and_then(|l| l.strip_prefix("fcd-export 1 "))
        .ok_or_else(unknown)?;
    let (total, bytes) = numbers.split_once(' ').ok_or_else(unknown)?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| unknown());
    let (total, bytes) = (number(total)?, number(bytes)?);
    if bytes > LIST_BYTES_MAX {
        return Err(unknown());
    }
    let mut list = vec![0; bytes as usize];
    from.read_exact(&mut list)
        .map_err(|e| stream_error(DOING, e))?;
    // The guest may have truncated the last record.
    list.truncate(list.iter().rposition(|b| *b == 0).map_or(0, |at| at + 1));
    let named = list
        .split(|b| *b == 0)
        .filter(|r| !r.is_empty())
        .map(record)
        .collect::<Result<Vec<_>>>()?;
    let total = total.max(named.len() as u64);
    Ok(LeftBehind { named, total })
}

fn record(record: &[u8]) -> Result<Left> {
    let why = match record.get(..2) {
        Some(b"r ") => Why::Repository,
        Some(b"s ") => Why::Submodule,
        Some(b"n ") => Why::Name,
        _ => return Err(unknown()),
    };
    let path = &record[2..];
    if path.is_empty() || path.len() > PATH_BYTES_MAX {
        return Err(unknown());
    }
    Ok(Left {
        path: path.to_vec(),
        why,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_list_leaves_the_payload_unread() {
        let mut payload = &b"fcd-export 1 3 20\nr a\nb/.git\0s sub\0n xdiff --git"[..];
        let left = read(&mut payload).unwrap();
        let named: Vec<_> = left
            .named
            .iter()
            .map(|l| (l.path.as_slice(), l.why))
            .collect();
        assert_eq!(
            named,
            [
                (&b"a\nb/.git"[..], Why::Repository),
                (b"sub", Why::Submodule)
            ]
        );
        assert_eq!((left.total, payload), (3, &b"diff --git"[..]));
        assert_eq!(
            read(&mut &b"fcd-export 1 0 0\n"[..]).unwrap(),
            LeftBehind::default()
        );
    }

    #[test]
    fn read_list_in_an_unknown_form_is_rejected() {
        let long = [&b"fcd-export 1 "[..], &[b'9'; 100], b"\n"].concat();
        let name = [&b"fcd-export 1 1 5000\nr "[..], &[b'x'; 4997], b"\0"].concat();
        for bad in [
            &b"motd\nfcd-export 1 0 0\n"[..],
            b"fcd-export 1 0\n",
            b"fcd-export 1 x 0\n",
            b"fcd-export 1 0 262145\n",
            b"fcd-export 1 1 4\nq x\0",
            b"fcd-export 1 1 3\nr \0",
            &long,
            &name,
        ] {
            assert_eq!(
                read(&mut &bad[..]).unwrap_err().kind(),
                Kind::GuestCommandFailed
            );
        }
        for cut in [&b""[..], b"fcd-export", b"fcd-export 1 1 4\nr "] {
            assert_eq!(
                read(&mut &cut[..]).unwrap_err().kind(),
                Kind::StreamIncomplete
            );
        }
    }
}
