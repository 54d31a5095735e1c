//! What a VMM tells of itself (docs/metrics.md, v1.16): JSON documents, a line each, in a pipe that it opened for reading, too. A line holds
//! what has happened since the one before, so none may be read in silence; of what does not fit the pipe a part may be missing.

use serde_json::Value;
use std::fs::File;
use std::io::{ErrorKind, Read};

/// More than a pipe holds. The other side is a process that a guest may have taken over: it may write for ever.
const BYTES_MAX: usize = 256 << 10;

/// What is in the pipe now, after `told`.
pub fn read(pipe: &mut File, mut told: Vec<u8>) -> std::io::Result<Vec<u8>> {
    let mut piece = [0; 16 << 10];
    while told.len() < BYTES_MAX {
        match pipe.read(&mut piece) {
            Ok(0) => break,
            Ok(n) => told.extend_from_slice(&piece[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    told.truncate(BYTES_MAX);
    Ok(told)
}

/// The whole ones; none at all: None.
pub fn parse(told: &[u8]) -> Option<Vec<Value>> {
    let lines = told.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
    Some(lines.filter(Value::is_object).collect::<Vec<_>>()).filter(|all| !all.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::OwnedFd;

    #[test]
    fn whole_lines_are_told_and_cut_ones_are_not() {
        let two = parse(b"rest\":1}\n{\"utc_timestamp_ms\":1}\n\n{\"utc_timestamp_ms\":2}\n{\"utc").unwrap();
        assert_eq!(two.iter().map(|m| m["utc_timestamp_ms"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
        for nothing in [&b""[..], b"\n", b"{", b"7\n", b"\xff\n"] {
            assert_eq!(parse(nothing), None);
        }
    }

    #[test]
    fn what_is_there_is_read_and_not_waited_for_nor_without_end() {
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
