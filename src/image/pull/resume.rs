//! The helper's side of partial downloads: a blob whose beginning an earlier pull has received.

use crate::error::Result;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// The blob as it arrives.
pub(super) type Body<'a> = Box<dyn Read + Send + 'a>;
/// Opens the blob at an offset.
pub(super) type OpenFrom<'a> = Box<dyn Fn(u64) -> Result<Body<'a>> + Send + 'a>;

/// Reads the file first and the registry afterwards, and adds what the registry sends to the file.
pub(super) struct Resuming<'a> {
    file: File,
    /// The number of bytes of the blob that the file contained at first.
    known: u64,
    size: u64,
    position: u64,
    open: OpenFrom<'a>,
    body: Option<Body<'a>>,
    /// False if the disk has no room for the file.
    keeps: bool,
}

impl<'a> Resuming<'a> {
    /// Opens a blob of `size` bytes. Connects to the registry at once if the file is empty.
    pub(super) fn new(file: File, size: u64, open: OpenFrom<'a>) -> Result<Self> {
        crate::locks::may_block("file access");
        let known = match file.metadata().map(|stat| stat.len()) {
            Ok(len) if len <= size => len,
            // The file is not a part of this blob.
            _ => {
                let _ = file.set_len(0);
                0
            }
        };
        let body = match known {
            0 => Some(open(0)?),
            _ => None,
        };
        Ok(Self {
            file,
            known,
            size,
            position: 0,
            open,
            body,
            keeps: true,
        })
    }

    /// True if a part of the blob comes from an earlier pull.
    pub(super) fn is_resumed(&self) -> bool {
        self.known > 0
    }

    fn read_body(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let body = match &mut self.body {
            Some(body) => body,
            // Nothing is left to request from the registry.
            None if self.position == self.size => return Ok(0),
            body => body.insert((self.open)(self.position).map_err(io::Error::other)?),
        };
        body.read(into)
    }
}

impl Read for Resuming<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        crate::locks::may_block("file access");
        if into.is_empty() {
            return Ok(0);
        }
        if self.position < self.known {
            let left = usize::try_from(self.known - self.position).unwrap_or(usize::MAX);
            let max = left.min(into.len());
            let n = self.file.read_at(&mut into[..max], self.position)?;
            if n > 0 {
                self.position += n as u64;
                return Ok(n);
            }
            // The file has become shorter, so the rest comes from the registry.
            self.known = self.position;
        }
        let n = self.read_body(into)?;
        if self.keeps && self.file.write_all_at(&into[..n], self.position).is_err() {
            // The pull does not need this file, and may need its space.
            self.keeps = false;
            let _ = self.file.set_len(0);
        }
        self.position += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};
    use std::io::Cursor;
    use std::sync::atomic::{AtomicU64, Ordering};

    const BLOB: &[u8] = b"the bytes of a layer";
    /// The second value that [`read`] returns if nothing was requested from the registry.
    const NOT_ASKED: u64 = u64::MAX;

    /// Returns a file with the content `kept`.
    fn file(kept: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(kept, 0).unwrap();
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Reads the blob, of which the registry sends at most `sent` bytes. Returns what was read, and
    /// the offset that was requested from the registry.
    fn read(file: &File, sent: usize) -> (Vec<u8>, u64) {
        let asked = AtomicU64::new(NOT_ASKED);
        let open = |from: u64| {
            asked.store(from, Ordering::Relaxed);
            let rest = &BLOB[from as usize..];
            let body: Body<'_> = Box::new(Cursor::new(&rest[..sent.min(rest.len())]));
            Ok(body)
        };
        let size = BLOB.len() as u64;
        let mut blob = Resuming::new(file.try_clone().unwrap(), size, Box::new(open)).unwrap();
        let mut bytes = Vec::new();
        blob.read_to_end(&mut bytes).unwrap();
        drop(blob);
        (bytes, asked.into_inner())
    }

    #[test]
    fn interrupted_blob_is_continued() {
        let file = file(b"");
        assert_eq!(read(&file, 9), (BLOB[..9].to_vec(), 0));
        assert_eq!(content(&file), &BLOB[..9]);
        assert_eq!(read(&file, 99), (BLOB.to_vec(), 9));
        assert_eq!(content(&file), BLOB);
        // A complete blob is not requested again.
        assert_eq!(read(&file, 99), (BLOB.to_vec(), NOT_ASKED));
    }

    #[test]
    fn file_that_is_longer_than_blob_is_not_used() {
        let file = file(&[BLOB, b"x"].concat());
        assert_eq!(read(&file, 99), (BLOB.to_vec(), 0));
        assert_eq!(content(&file), BLOB);
    }

    #[test]
    fn full_disk_costs_only_the_partial_download() {
        // Writing to this device always fails because it is full.
        let full = File::options().read(true).write(true).open("/dev/full");
        let open = |_| -> Result<Body<'_>> { Ok(Box::new(BLOB)) };
        let mut blob = Resuming::new(full.unwrap(), BLOB.len() as u64, Box::new(open)).unwrap();
        let mut bytes = Vec::new();
        blob.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, BLOB);
    }

    #[test]
    fn refusal_of_the_rest_keeps_what_is_there() {
        let file = file(b"the");
        let open = |_| Err(Error::new(Kind::RegistryUnreachable, "no route"));
        let mut blob = Resuming::new(file.try_clone().unwrap(), 20, Box::new(open)).unwrap();
        let e = blob.read_to_end(&mut Vec::new()).unwrap_err();
        let e = e.downcast::<Error>().unwrap();
        assert_eq!(e.kind(), Kind::RegistryUnreachable);
        assert_eq!(content(&file), b"the");
    }
}
