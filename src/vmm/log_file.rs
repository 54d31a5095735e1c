//! A log of limited size in two files, and a reader that follows it from one file to the next.

use crate::host::fs::{open_at, open_dir};
use rustix::fs::{AtFlags, OFlags};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

pub(super) const CURRENT: &str = "console.log";
pub(super) const OLDER: &str = "console.log.1";
const MODE: u32 = 0o600;
/// The prefix of a line from fcd in a log.
pub(super) const MARK: &str = "--- fcd: ";
/// The number of bytes that are read at once when searching for the last lines.
const BLOCK_BYTES: u64 = 64 * 1024;

/// Appends to a log. When both files are full, the older one is dropped. A directory may have only
/// one writer.
pub(super) struct LogWriter {
    dir: OwnedFd,
    file: File,
    size: u64,
    half: u64,
    is_at_line_start: bool,
}

impl LogWriter {
    /// Opens the log in `dir`, and creates it if it does not exist. `bytes_max` limits the size of
    /// both files together.
    pub(super) fn open(dir: &Path, bytes_max: u64) -> io::Result<Self> {
        let dir = open_dir(dir).map_err(io::Error::other)?;
        let file = open_at(
            &dir,
            CURRENT,
            OFlags::RDWR | OFlags::APPEND | OFlags::CREATE,
            MODE,
        )?;
        let size = file.metadata()?.len();
        let mut last = *b"\n";
        if size > 0 {
            file.read_exact_at(&mut last, size - 1)?;
        }
        Ok(Self {
            dir,
            file,
            size,
            half: (bytes_max / 2).max(1),
            is_at_line_start: last == *b"\n",
        })
    }

    /// Appends a line from fcd. Ends the log's last line first if it is incomplete.
    pub(super) fn append_mark(&mut self, mark: &str) -> io::Result<()> {
        let start = if self.is_at_line_start { "" } else { "\r\n" };
        self.append(format!("{start}{MARK}{mark} ---\r\n").as_bytes())
    }

    /// Appends bytes. After an error, some of them may have been written.
    pub(super) fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.size >= self.half {
                self.rotate()?;
            }
            let room = usize::try_from(self.half - self.size).unwrap_or(usize::MAX);
            let n = self.file.write(&bytes[..bytes.len().min(room)])?;
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.size += n as u64;
            self.is_at_line_start = bytes[n - 1] == b'\n';
            bytes = &bytes[n..];
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        crate::locks::may_block("file access");
        rustix::fs::renameat(&self.dir, CURRENT, &self.dir, OLDER)?;
        self.file = open_at(
            &self.dir,
            CURRENT,
            OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE,
            MODE,
        )?;
        self.size = self.file.metadata()?.len();
        Ok(())
    }
}

/// Reads a log from a starting line, and then everything that is appended.
pub(super) struct LogReader {
    dir: OwnedFd,
    /// The file that is being read and its inode number, which cannot be reused while the file is
    /// open.
    at: Option<(File, u64)>,
    offset: u64,
}

impl LogReader {
    /// Opens a log at its last `tail` lines, or at its beginning if `tail` is None. A missing log
    /// is empty.
    pub(super) fn open(dir: &Path, tail: Option<u64>) -> io::Result<Self> {
        let dir = open_dir(dir).map_err(io::Error::other)?;
        let mut reader = Self {
            dir,
            at: None,
            offset: 0,
        };
        let (older, current) = (reader.open_file(OLDER)?, reader.open_file(CURRENT)?);
        let Some(lines) = tail else {
            reader.at = older.or(current);
            return Ok(reader);
        };
        let mut wanted = lines;
        if let Some((file, ino)) = current {
            let found = seek_lines(&file, &mut wanted, true)?;
            reader.offset = found.unwrap_or(0);
            reader.at = Some((file, ino));
            if found.is_some() {
                return Ok(reader);
            }
        }
        if let Some((file, ino)) = older {
            reader.offset = seek_lines(&file, &mut wanted, reader.at.is_none())?.unwrap_or(0);
            reader.at = Some((file, ino));
        }
        Ok(reader)
    }

    fn open_file(&self, name: &str) -> io::Result<Option<(File, u64)>> {
        match open_at(&self.dir, name, OFlags::RDONLY | OFlags::NONBLOCK, 0) {
            Ok(file) => {
                let ino = file.metadata()?.ino();
                Ok(Some((file, ino)))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn ino_of(&self, name: &str) -> Option<u64> {
        crate::locks::may_block("file access");
        rustix::fs::statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .ok()
            .map(|s| s.st_ino)
    }

    /// Reads the next bytes. Returns 0 if there is nothing new.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Every iteration but the last moves to a newer file. The limit guards against a very fast
        // writer.
        for _ in 0..8 {
            let Some((file, ino)) = &self.at else {
                self.at = self.open_file(CURRENT)?;
                self.offset = 0;
                if self.at.is_none() {
                    return Ok(0);
                }
                continue;
            };
            // Check the name before reading the bytes, so that everything in this file is read
            // before moving to the next.
            let is_current = self.ino_of(CURRENT).is_none_or(|current| current == *ino);
            // A file that became shorter was truncated, so start again.
            if file.metadata()?.len() < self.offset {
                self.offset = 0;
            }
            let n = file.read_at(buffer, self.offset)?;
            self.offset += n as u64;
            if n > 0 || is_current {
                return Ok(n);
            }
            let next = if self.ino_of(OLDER) == Some(*ino) {
                CURRENT
            } else {
                OLDER
            };
            self.at = self.open_file(next)?;
            self.offset = 0;
        }
        Ok(0)
    }
}

/// Returns the offset at which the last `wanted` lines begin. If they begin before this file,
/// returns None and subtracts the number of lines in this file from `wanted`. `is_last` is true for
/// the file with the end of the log, where a final line feed does not count.
fn seek_lines(file: &File, wanted: &mut u64, is_last: bool) -> io::Result<Option<u64>> {
    let mut end = file.metadata()?.len();
    if *wanted == 0 {
        return Ok(Some(end));
    }
    let mut skip_last = is_last;
    while end > 0 {
        let start = end.saturating_sub(BLOCK_BYTES);
        let mut block = vec![0; (end - start) as usize];
        file.read_exact_at(&mut block, start)?;
        for (i, byte) in block.iter().enumerate().rev() {
            let was_last = std::mem::take(&mut skip_last);
            if *byte != b'\n' || was_last {
                continue;
            }
            *wanted -= 1;
            if *wanted == 0 {
                return Ok(Some(start + i as u64 + 1));
            }
        }
        end = start;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(reader: &mut LogReader) -> String {
        let mut text = Vec::new();
        let mut buffer = [0; 7];
        loop {
            match reader.read(&mut buffer).unwrap() {
                0 => return String::from_utf8(text).unwrap(),
                n => text.extend_from_slice(&buffer[..n]),
            }
        }
    }

    #[test]
    fn log_stays_within_its_bound_and_keeps_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogWriter::open(dir.path(), 64).unwrap();
        for i in 0..100 {
            log.append(format!("line {i}\n").as_bytes()).unwrap();
            let size = |name| std::fs::metadata(dir.path().join(name)).map_or(0, |m| m.len());
            assert!(size(CURRENT) <= 32 && size(OLDER) <= 32);
        }
        log.append(&[b'x'; 500]).unwrap();
        log.append(b"\nend\n").unwrap();
        let text = all(&mut LogReader::open(dir.path(), None).unwrap());
        assert!(
            text.len() >= 32 && text.len() <= 64 && text.ends_with("x\nend\n"),
            "{text}"
        );
        let again = LogWriter::open(dir.path(), 64).unwrap();
        assert_eq!(again.size, log.size);
    }

    #[test]
    fn last_lines_are_found_across_both_files() {
        let dir = tempfile::tempdir().unwrap();
        let check = |older: Option<&str>, current: Option<&str>, lines, expected: &str| {
            for (name, text) in [(OLDER, older), (CURRENT, current)] {
                let _ = std::fs::remove_file(dir.path().join(name));
                if let Some(text) = text {
                    std::fs::write(dir.path().join(name), text).unwrap();
                }
            }
            assert_eq!(
                all(&mut LogReader::open(dir.path(), lines).unwrap()),
                expected,
                "{older:?} {current:?} {lines:?}"
            );
        };
        check(None, None, None, "");
        check(None, None, Some(3), "");
        check(None, Some("a\nb\nc\n"), Some(2), "b\nc\n");
        check(None, Some("a\nb\nc"), Some(2), "b\nc");
        check(None, Some("a\nb\n"), Some(9), "a\nb\n");
        check(None, Some("a\nb\n"), Some(0), "");
        check(Some("a\nb\n"), Some("c\nd\n"), Some(2), "c\nd\n");
        check(Some("a\nb\n"), Some("c\nd\n"), Some(3), "b\nc\nd\n");
        check(Some("a\nb\n"), Some("c\nd\n"), Some(4), "a\nb\nc\nd\n");
        check(Some("a\nbb"), Some("bb\nd\n"), Some(2), "bbbb\nd\n");
        check(Some("a\nb\n"), Some(""), Some(1), "");
        check(Some("a\nb\n"), None, Some(1), "b\n");
        check(Some("a\n"), Some("b\n"), None, "a\nb\n");
        let long = "y".repeat(3 * BLOCK_BYTES as usize);
        check(
            None,
            Some(&format!("a\n{long}\nz\n")),
            Some(2),
            &format!("{long}\nz\n"),
        );
    }

    #[test]
    fn reader_follows_rotated_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut reader = LogReader::open(dir.path(), None).unwrap();
        assert_eq!(all(&mut reader), "");
        let mut log = LogWriter::open(dir.path(), 20).unwrap();
        let mut seen = String::new();
        let mut expected = String::new();
        for i in 0..50 {
            let line = format!("{i}\n");
            log.append(line.as_bytes()).unwrap();
            expected += &line;
            seen += &all(&mut reader);
        }
        assert_eq!(seen, expected);
        // A reader that misses two rotations continues with the oldest file that still exists.
        for i in 0..50 {
            log.append(format!("late {i}\n").as_bytes()).unwrap();
        }
        let late = all(&mut reader);
        assert!(late.ends_with("late 49\n") && late.len() <= 20, "{late}");
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join(CURRENT)).unwrap();
        assert!(LogWriter::open(dir.path(), 64).is_err());
        assert!(LogReader::open(dir.path(), None).is_err());
    }
}
