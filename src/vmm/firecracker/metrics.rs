//! Reads a VMM's metrics (docs/metrics.md, v1.16): JSON documents, one per line, in a pipe that the
//! VMM has also opened for reading. A line contains the changes since the previous line, so no line
//! may be discarded. If the pipe is too full for a line, part of it may be missing.

use serde_json::Value;
use std::fs::File;
use std::io::{ErrorKind, Read};

/// The maximum number of bytes of metrics that are read. This is more than a pipe holds. A limit is
/// needed because a guest that controls the VMM may write without end.
const BYTES_MAX: usize = 256 << 10;

/// Appends the current content of the pipe to `lines`, and returns at most [`BYTES_MAX`] bytes.
pub(crate) fn read(pipe: &mut File, mut lines: Vec<u8>) -> std::io::Result<Vec<u8>> {
    let mut piece = [0; 16 << 10];
    while lines.len() < BYTES_MAX {
        match pipe.read(&mut piece) {
            Ok(0) => break,
            Ok(n) => lines.extend_from_slice(&piece[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    lines.truncate(BYTES_MAX);
    Ok(lines)
}

/// Parses the lines that are JSON objects, and skips the others. Returns None if there are none.
pub(crate) fn parse(bytes: &[u8]) -> Option<Vec<Value>> {
    let lines = bytes
        .split(|b| *b == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok());
    Some(lines.filter(Value::is_object).collect::<Vec<_>>()).filter(|all| !all.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::OwnedFd;

    #[test]
    fn complete_lines_are_parsed_and_others_skipped() {
        let two = parse(b"rest\":1}\n{\"utc_timestamp_ms\":1}\n\n{\"utc_timestamp_ms\":2}\n{\"utc")
            .unwrap();
        assert_eq!(
            two.iter()
                .map(|m| m["utc_timestamp_ms"].as_u64().unwrap())
                .collect::<Vec<_>>(),
            [1, 2]
        );
        for nothing in [&b""[..], b"\n", b"{", b"7\n", b"\xff\n"] {
            assert_eq!(parse(nothing), None);
        }
    }

    #[test]
    fn read_takes_available_bytes_up_to_limit() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let mut pipe = File::from(OwnedFd::from(reader));
        rustix::fs::fcntl_setfl(&pipe, rustix::fs::OFlags::NONBLOCK).unwrap();
        assert_eq!(read(&mut pipe, b"a".to_vec()).unwrap(), b"a");
        writer.write_all(b"b\n").unwrap();
        assert_eq!(read(&mut pipe, b"a".to_vec()).unwrap(), b"ab\n");
        let mut endless = File::open("/dev/zero").unwrap();
        assert_eq!(read(&mut endless, Vec::new()).unwrap().len(), BYTES_MAX);
    }
}
