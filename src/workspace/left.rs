//! The list of what an export could not put into a patch or a tree. The payload begins with it: a line
//! `fcd-export 1 <count> <bytes>`, then so many bytes of records, each a letter, a blank, a path and NUL. The guest
//! writes it, so it is read by `fcctl` with the caller's rights, and bounded.

use super::PATH_BYTES_MAX;
use super::unpack::stream_error;
use crate::error::{Error, Kind, Result};
use std::io::Read;

/// Most bytes of records; the guest's script cuts its list there.
pub const LIST_BYTES_MAX: u64 = 256 * 1024;
const LINE_BYTES_MAX: usize = 64;
const DOING: &str = "read what the guest could not send";

/// Why something is not part of what comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The `.git` of a repository that was made in the guest, or in which something was done there. Its files come.
    Repository,
    /// A submodule, or a repository on the host whose files were not sent: the guest has files of its own there.
    Submodule,
    /// git refuses such a name.
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
    /// The first of them.
    pub named: Vec<Left>,
    pub total: u64,
}

fn encoded<S: serde::Serializer>(path: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&super::encode::encode(path))
}

fn unknown() -> Error {
    Error::new(Kind::GuestCommandFailed, format!("{DOING}: the guest answered in an unknown form"))
        .hint("something in the guest may print at login: look with fcctl exec {vm} -- true")
}

/// Reads the beginning of an export's payload. What follows it is the patch or the tree.
pub fn read(from: &mut dyn Read) -> Result<LeftBehind> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        from.read_exact(&mut byte).map_err(|e| stream_error(DOING, e))?;
        match byte {
            [b'\n'] => break,
            _ if line.len() == LINE_BYTES_MAX => return Err(unknown()),
            [byte] => line.push(byte),
        }
    }
    let numbers = std::str::from_utf8(&line).ok().and_then(|l| l.strip_prefix("fcd-export 1 ")).ok_or_else(unknown)?;
    let (total, bytes) = numbers.split_once(' ').ok_or_else(unknown)?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| unknown());
    let (total, bytes) = (number(total)?, number(bytes)?);
    if bytes > LIST_BYTES_MAX {
        return Err(unknown());
    }
    let mut list = vec![0; bytes as usize];
    from.read_exact(&mut list).map_err(|e| stream_error(DOING, e))?;
    // The last record may have been cut.
    list.truncate(list.iter().rposition(|b| *b == 0).map_or(0, |at| at + 1));
    let named = list.split(|b| *b == 0).filter(|r| !r.is_empty()).map(record).collect::<Result<Vec<_>>>()?;
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
    Ok(Left { path: path.to_vec(), why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_is_read_and_the_payload_stays() {
        let mut payload = &b"fcd-export 1 3 20\nr a\nb/.git\0s sub\0n xdiff --git"[..];
        let left = read(&mut payload).unwrap();
        let named: Vec<_> = left.named.iter().map(|l| (l.path.as_slice(), l.why)).collect();
        assert_eq!(named, [(&b"a\nb/.git"[..], Why::Repository), (b"sub", Why::Submodule)]);
        assert_eq!((left.total, payload), (3, &b"diff --git"[..]));
        assert_eq!(read(&mut &b"fcd-export 1 0 0\n"[..]).unwrap(), LeftBehind::default());
    }

    #[test]
    fn list_of_an_unknown_form_is_refused() {
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
            assert_eq!(read(&mut &bad[..]).unwrap_err().kind(), Kind::GuestCommandFailed);
        }
        for cut in [&b""[..], b"fcd-export", b"fcd-export 1 1 4\nr "] {
            assert_eq!(read(&mut &cut[..]).unwrap_err().kind(), Kind::StreamIncomplete);
        }
    }
}
