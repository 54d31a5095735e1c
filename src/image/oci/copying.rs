//! Writes a file system: its metadata, and the content of its files, which several threads copy
//! from the tars of the layers.
//!
//! The crate `mkext4` decides where everything goes. It would pass the content of files through a
//! buffer of its own. So it reads each file from a [`Placeholder`], which provides no data, and
//! [`Sink`] only records which bytes have to be copied, and to which position. The order of the
//! writes does not affect the result.

use super::errors::{Stopped, check_cancel, shown, stopped};
use crate::error::{Error, Kind, Result};
use crate::host::thread;
use crate::locks::Cancel;
use crossbeam_channel::{Receiver, Sender, bounded};
use mkext4::sink::RegionSink;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

const BLOCK_BYTES: u64 = 4096;
/// How much is written at once. Each thread has a buffer of this size, which stays in the
/// processor's cache.
const WRITE_BYTES: usize = 256 << 10;
/// The number of threads that copy the content of files. The kernel lets only one thread write to
/// the file at a time, while the other one reads. More threads would only wait.
const THREADS: usize = 2;
/// How many batches can wait for a thread.
const BATCHES_MAX: usize = 2 * THREADS;
/// The number of pieces in a batch. Files of a few bytes take a block each, so this is rarely
/// reached.
const PIECES_MAX: usize = 512;
pub(super) const DOING: &str = "write the file system";

/// How the content of files is copied.
pub(super) struct Copying<'a> {
    pub(super) out: &'a File,
    pub(super) cancel: &'a Cancel,
    /// Called with the number of bytes that were written since the last call.
    pub(super) progress: &'a (dyn Fn(u64) + Sync),
}

/// The content of one file: a part of a tar.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    pub(super) tar: &'a File,
    pub(super) at: u64,
    /// The file's path, for errors.
    pub(super) path: &'a str,
}

/// Bytes to copy.
struct Piece<'a> {
    source: Source<'a>,
    /// The position in the file system.
    to: u64,
    bytes: usize,
}

/// Pieces that are written at once, because they follow each other in the file system.
#[derive(Default)]
struct Batch<'a> {
    pieces: Vec<Piece<'a>>,
    /// The position of the first piece.
    to: u64,
    /// The bytes from there to the end of the last piece.
    bytes: usize,
}

/// Writes metadata, and passes the content of files on to the threads.
pub(super) struct Sink<'a, 'b> {
    metadata: Collecting<'b>,
    batches: Sender<Batch<'a>>,
    batch: Batch<'a>,
    /// The file whose content the crate is writing. None while it writes metadata.
    source: Option<Source<'a>>,
}

impl<'a> Copying<'a> {
    /// Runs `body`, which describes the file system to the sink, while threads copy.
    pub(super) fn run<'b>(
        &'b self,
        body: impl FnOnce(&mut Sink<'a, 'b>) -> Result<()>,
    ) -> Result<()> {
        std::thread::scope(|scope| {
            let (batches, received) = bounded(BATCHES_MAX);
            let threads: Vec<_> = (0..THREADS)
                .map(|_| {
                    let received = received.clone();
                    thread::spawn_scoped(scope, "write image", move || self.copy_all(&received))
                })
                .collect();
            // If this receiver stayed open, `send` would block after all threads have failed.
            drop(received);
            let mut sink = Sink {
                metadata: Collecting::new(self.out),
                batches,
                batch: Batch::default(),
                source: None,
            };
            let described = body(&mut sink).and_then(|()| sink.finish());
            drop(sink);
            let mut result = described;
            for thread in threads {
                let ended = match thread.map(std::thread::ScopedJoinHandle::join) {
                    Ok(Ok(ended)) => ended,
                    Ok(Err(panic)) => std::panic::resume_unwind(panic),
                    Err(e) => Err(e),
                };
                // A thread's own error says more than the `Stopped` that results from it.
                let is_vague = |e: &Error| e.source_as::<Stopped>().is_some();
                if result.is_ok() || result.as_ref().is_err_and(is_vague) {
                    result = ended.and(result);
                }
            }
            result
        })
    }

    fn copy_all(&self, batches: &Receiver<Batch<'_>>) -> Result<()> {
        let mut buffer = vec![0; WRITE_BYTES];
        for batch in batches {
            check_cancel(self.cancel)?;
            self.copy(&batch, &mut buffer[..batch.bytes])?;
        }
        Ok(())
    }

    fn copy(&self, batch: &Batch<'_>, buffer: &mut [u8]) -> Result<()> {
        let (mut at, mut bytes) = (0, 0);
        for piece in &batch.pieces {
            let begin = (piece.to - batch.to) as usize;
            // Clear the rest of the previous file's last block.
            buffer[at..begin].fill(0);
            at = begin + piece.bytes;
            let Source {
                tar,
                at: from,
                path,
            } = piece.source;
            tar.read_exact_at(&mut buffer[begin..at], from)
                .map_err(|e| match e.kind() {
                    io::ErrorKind::UnexpectedEof => {
                        let path = shown(path.as_bytes());
                        let text = format!("the layer in the cache is too short for {path}");
                        Error::new(Kind::Host, text)
                    }
                    _ => Error::io("read a layer", e),
                })?;
            bytes += piece.bytes as u64;
        }
        let written = self.out.write_all_at(buffer, batch.to);
        written.map_err(|e| Error::io(DOING, e))?;
        (self.progress)(bytes);
        Ok(())
    }
}

impl<'a> Sink<'a, '_> {
    /// Declares that the crate's next bytes are the content of a file, which the threads copy.
    pub(super) fn begin(&mut self, source: Source<'a>) {
        self.source = Some(source);
    }

    fn finish(&mut self) -> Result<()> {
        self.dispatch()
            .and_then(|()| self.metadata.flush())
            .map_err(|e| super::errors::read_error(DOING, e))
    }

    fn dispatch(&mut self) -> io::Result<()> {
        let batch = std::mem::take(&mut self.batch);
        if batch.pieces.is_empty() {
            return Ok(());
        }
        let sent = self.batches.send(batch);
        sent.map_err(|_| super::errors::as_io(stopped()))
    }

    /// Adds a part of a file to the batches, in several pieces if it does not fit into one batch.
    /// Returns the source of what follows.
    fn add(
        &mut self,
        mut source: Source<'a>,
        mut to: u64,
        mut left: usize,
    ) -> io::Result<Source<'a>> {
        while left > 0 {
            let end = self.batch.to + self.batch.bytes as u64;
            let follows = (end..end + BLOCK_BYTES).contains(&to);
            let used = to.saturating_sub(self.batch.to) as usize;
            let is_full = self.batch.pieces.len() >= PIECES_MAX || used >= room(self.batch.to);
            if self.batch.pieces.is_empty() || !follows || is_full {
                self.dispatch()?;
                self.batch.to = to;
            }
            let used = (to - self.batch.to) as usize;
            let bytes = left.min(room(self.batch.to) - used);
            self.batch.pieces.push(Piece { source, to, bytes });
            self.batch.bytes = used + bytes;
            source.at += bytes as u64;
            to += bytes as u64;
            left -= bytes;
        }
        Ok(source)
    }
}

/// Returns the number of bytes from a position to the next multiple of [`WRITE_BYTES`], where its
/// batch must end. The kernel stores an aligned batch in a single folio, which takes a quarter less
/// time than the dozen folios of a batch that begins anywhere.
fn room(to: u64) -> usize {
    WRITE_BYTES - (to % WRITE_BYTES as u64) as usize
}

impl RegionSink for Sink<'_, '_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self.source {
            None => self.metadata.data(offset, bytes),
            Some(source) => {
                self.source = Some(self.add(source, offset, bytes.len())?);
                Ok(())
            }
        }
    }

    fn zeros(&mut self, offset: u64, len: u64) -> io::Result<()> {
        match self.source {
            None => self.metadata.zeros(offset, len),
            // The rest of a file's last block. The output was empty, so these bytes are zero.
            Some(_) => Ok(()),
        }
    }
}

/// Replaces the content of a file for the crate. The threads read the real content.
pub(super) struct Placeholder;

impl Read for Placeholder {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }
}

/// Writes to a file, and joins writes that follow each other.
struct Collecting<'a> {
    file: &'a File,
    /// The position of the collected bytes.
    at: u64,
    bytes: Vec<u8>,
}

impl<'a> Collecting<'a> {
    fn new(file: &'a File) -> Self {
        Self {
            file,
            at: 0,
            bytes: Vec::with_capacity(WRITE_BYTES),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        let written = self.file.write_all_at(&self.bytes, self.at);
        self.bytes.clear();
        written
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.at + self.bytes.len() as u64 != offset
            || self.bytes.len() + bytes.len() > WRITE_BYTES
        {
            self.flush()?;
            self.at = offset;
        }
        if bytes.len() >= WRITE_BYTES {
            self.at = offset + bytes.len() as u64;
            return self.file.write_all_at(bytes, offset);
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes small gaps, so that the write after a gap can be joined to the one before it.
    fn zeros(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let end = self.at + self.bytes.len() as u64;
        if end == offset && !self.bytes.is_empty() && len < BLOCK_BYTES {
            self.bytes.resize(self.bytes.len() + len as usize, 0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn copy(tar: &File, out: &File, pieces: &[(u64, u64, usize)]) -> Result<u64> {
        let written = AtomicU64::new(0);
        let copying = Copying {
            out,
            cancel: &Cancel::try_new().unwrap(),
            progress: &|bytes| {
                written.fetch_add(bytes, Ordering::Relaxed);
            },
        };
        copying.run(|sink| {
            sink.data(0, b"metadata").unwrap();
            for (at, to, bytes) in pieces {
                let (at, path) = (*at, "the/file");
                sink.begin(Source { tar, at, path });
                let data = sink.data(*to, &vec![1; *bytes]);
                data.map_err(|e| super::super::errors::read_error(DOING, e))?;
            }
            Ok(())
        })?;
        Ok(written.into_inner())
    }

    #[test]
    fn pieces_arrive_where_they_belong() {
        let tar = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..5_u32 << 20)
            .map(|n| ((n * 31) >> 7) as u8 | 1)
            .collect();
        tar.write_all_at(&content, 0).unwrap();
        // A large file, small ones that follow each other, and one after a gap.
        let mut pieces = vec![(512, 8 * BLOCK_BYTES, (3 << 20) + 7)];
        let mut to = (8 * BLOCK_BYTES + (3 << 20) + 7).next_multiple_of(BLOCK_BYTES);
        for n in 0..PIECES_MAX as u64 * 2 {
            pieces.push((n * 512, to, 1 + n as usize % 5000));
            to = (to + 1 + n % 5000).next_multiple_of(BLOCK_BYTES);
        }
        pieces.push((4 << 20, to + (5 << 20), 100));
        let out = tempfile::tempfile().unwrap();
        let written = copy(&tar, &out, &pieces).unwrap();
        let mut wanted = vec![0; out.metadata().unwrap().len() as usize];
        wanted[..8].copy_from_slice(b"metadata");
        for (at, to, bytes) in &pieces {
            let at = *at as usize;
            wanted[*to as usize..][..*bytes].copy_from_slice(&content[at..at + bytes]);
        }
        let mut found = vec![0; wanted.len()];
        out.read_exact_at(&mut found, 0).unwrap();
        assert!(found == wanted);
        let total: usize = pieces.iter().map(|(_, _, bytes)| bytes).sum();
        assert_eq!(written, total as u64);
    }

    #[test]
    fn batches_are_aligned() {
        let (tar, out) = (
            File::open("/dev/null").unwrap(),
            File::open("/dev/null").unwrap(),
        );
        let (batches, received) = bounded(100);
        let mut sink = Sink {
            metadata: Collecting::new(&out),
            batches,
            batch: Batch::default(),
            source: None,
        };
        let (tar, at, path) = (&tar, 0, "file");
        let first = 5 * BLOCK_BYTES;
        for (to, bytes) in [(first, 100), (first + BLOCK_BYTES, 3 * WRITE_BYTES)] {
            sink.begin(Source { tar, at, path });
            sink.data(to, &vec![0; bytes]).unwrap();
        }
        sink.finish().unwrap();
        let found: Vec<_> = received
            .try_iter()
            .map(|batch| (batch.to, batch.bytes))
            .collect();
        let unit = WRITE_BYTES as u64;
        let (begin, end) = (first as usize, (first + BLOCK_BYTES) as usize);
        assert_eq!(
            found,
            [
                (first, WRITE_BYTES - begin),
                (unit, WRITE_BYTES),
                (2 * unit, WRITE_BYTES),
                (3 * unit, end),
            ]
        );
    }

    #[test]
    fn failure_of_a_thread_ends_the_copy_and_is_named() {
        let short = tempfile::tempfile().unwrap();
        let out = tempfile::tempfile().unwrap();
        let pieces: Vec<_> = (1..200).map(|n| (0, n << 20, 1 << 20)).collect();
        let e = copy(&short, &out, &pieces).unwrap_err();
        assert_eq!(
            e.to_string(),
            "the layer in the cache is too short for \"the/file\""
        );
        let read_only = File::open("/proc/self/exe").unwrap();
        short.set_len(1 << 20).unwrap();
        let e = copy(&short, &read_only, &pieces).unwrap_err();
        assert!(e.to_string().starts_with(DOING), "{e}");
    }
}
