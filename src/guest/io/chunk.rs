//! Reads and writes the framed workspace streams without blocking. This is the daemon's side of
//! [`crate::api::stream`].

use crate::api::stream::{Decoder, Encoder, read_payload};
use crate::api::workspace::{CHUNK_BYTES_MAX, Trailer};
use crate::error::{Error, Result};
use crate::guest::wait::Wait;
use crate::guest::{Sink, Source};
use crate::locks::Cancel;
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The payload of a framed stream. A read returns 0 only after a matching trailer. If the stream
/// ends in any other way, the read fails with an error that [`crate::api::stream::error`] turns
/// into `stream_incomplete`.
pub struct ChunkSource<S: Source> {
    inner: S,
    decoder: Decoder,
    bytes: Arc<AtomicU64>,
}

impl<S: Source> ChunkSource<S> {
    /// Creates a source that reads from `inner` and adds the size of the payload to `bytes`.
    pub fn new(inner: S, bytes: Arc<AtomicU64>) -> Self {
        Self {
            inner,
            decoder: Decoder::default(),
            bytes,
        }
    }

    /// Returns the trailer once it has arrived, matches the payload, and is followed by EOF.
    pub fn finished(&self) -> Option<&Trailer> {
        self.decoder.trailer()
    }
}

impl<S: Source> Source for ChunkSource<S> {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.fd()
    }
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = read_payload(&mut self.decoder, buffer, |b| self.inner.read(b))?;
        self.bytes.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Writes framed chunks. At most one chunk is buffered in memory.
pub struct ChunkSink<S: Sink> {
    inner: S,
    encoder: Encoder,
    pending: Vec<u8>,
    at: usize,
    bytes: Arc<AtomicU64>,
}

impl<S: Sink> ChunkSink<S> {
    /// Creates a sink that writes to `inner` and adds the size of the payload to `bytes`.
    pub fn new(inner: S, bytes: Arc<AtomicU64>) -> Self {
        Self {
            inner,
            encoder: Encoder::default(),
            pending: Vec::new(),
            at: 0,
            bytes,
        }
    }

    fn flush_some(&mut self) -> io::Result<()> {
        while self.at < self.pending.len() {
            match self.inner.write(&self.pending[self.at..])? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => self.at += n,
            }
        }
        self.pending.clear();
        self.at = 0;
        Ok(())
    }

    /// Writes the buffered chunk and the trailer. Errors: `cancelled`, `timeout` at the deadline,
    /// `host` if nobody reads.
    pub fn finish(mut self, entries: u64, deadline: Instant, cancel: &Cancel) -> Result<Trailer> {
        let (end, trailer) = std::mem::take(&mut self.encoder).end(entries);
        self.pending.extend(end);
        let wait = Wait::new(cancel).deadline(Some(deadline));
        loop {
            wait.check()?;
            match self.flush_some() {
                Ok(()) => return Ok(trailer),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(Error::io("write the end of the stream", e)),
            }
            let fds: Vec<_> = self
                .inner
                .fd()
                .map(|fd| PollFd::new(fd, PollFlags::POLLOUT))
                .into_iter()
                .collect();
            wait.poll(&fds, None)?;
        }
    }
}

impl<S: Sink> Sink for ChunkSink<S> {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.fd()
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.flush_some()?;
        let payload = &bytes[..bytes.len().min(CHUNK_BYTES_MAX)];
        if payload.is_empty() {
            return Ok(0);
        }
        let header = self.encoder.header(payload);
        self.pending.extend_from_slice(&header);
        self.pending.extend_from_slice(payload);
        self.bytes
            .fetch_add(payload.len() as u64, Ordering::Relaxed);
        match self.flush_some() {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
            _ => Ok(payload.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::stream::{self, ChunkReader, ChunkWriter};
    use crate::error::Kind;
    use crate::guest::io::fifo::{Direction, accept};
    use crate::guest::io::{BytesSource, FdSink, FdSource};
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn chunk_source_counts_and_verifies_over_a_fifo() {
        let (r, w) = pipe();
        let bytes = Arc::new(AtomicU64::new(0));
        let mut source = ChunkSource::new(
            FdSource::new(accept(r, Direction::Read).unwrap()),
            bytes.clone(),
        );
        assert_eq!(
            source.read(&mut [0; 10]).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        let mut writer = ChunkWriter::new(std::fs::File::from(w));
        writer.write_all(b"hello").unwrap();
        writer.flush().unwrap();
        let mut buffer = [0; 10];
        assert_eq!(source.read(&mut buffer).unwrap(), 5);
        assert_eq!(
            source.read(&mut buffer).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        assert!(source.finished().is_none());
        drop(writer.finish(3).unwrap());
        assert_eq!(source.read(&mut buffer).unwrap(), 0);
        assert_eq!(source.finished().unwrap().entries, 3);
        assert_eq!(bytes.load(Ordering::Relaxed), 5);
    }

    #[test]
    fn chunk_source_that_breaks_off_is_an_error_and_never_an_end() {
        let mut writer = ChunkWriter::new(Vec::new());
        writer.write_all(b"hello").unwrap();
        let (framed, _) = writer.finish(1).unwrap();
        let mut source = ChunkSource::new(BytesSource::new(&framed[..9]), Arc::default());
        assert_eq!(source.read(&mut [0; 10]).unwrap(), 5);
        for _ in 0..2 {
            let e = stream::error("import", source.read(&mut [0; 10]).unwrap_err());
            assert_eq!(e.kind(), Kind::StreamIncomplete);
        }
        assert!(source.finished().is_none());
    }

    #[test]
    fn chunk_sink_frames_under_backpressure() {
        let (r, w) = pipe();
        let mut sink = ChunkSink::new(
            FdSink::new(accept(w, Direction::Write).unwrap()),
            Arc::default(),
        );
        let payload: Vec<u8> = (0..500_000u32).map(|i| i as u8).collect();
        let reader = crate::host::thread::spawn("reader", move || {
            let mut reader = ChunkReader::new(std::fs::File::from(r));
            let mut back = Vec::new();
            reader.read_to_end(&mut back).unwrap();
            (back, reader.finish().unwrap())
        })
        .unwrap();
        let cancel = Cancel::try_new().unwrap();
        let wait = Wait::new(&cancel).deadline(Some(Instant::now() + Duration::from_secs(10)));
        let mut rest = &payload[..];
        while !rest.is_empty() {
            match sink.write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(e) => {
                    assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
                    wait.poll(&[PollFd::new(sink.fd().unwrap(), PollFlags::POLLOUT)], None)
                        .unwrap();
                }
            }
        }
        let sent = sink
            .finish(9, Instant::now() + Duration::from_secs(10), &cancel)
            .unwrap();
        let (back, trailer) = reader.join().unwrap();
        assert!(back == payload);
        assert_eq!(trailer, sent);
    }

    #[test]
    fn chunk_sink_that_nobody_reads_finishes_at_deadline_or_cancel() {
        let (_r, w) = pipe();
        let make = || {
            let fd = rustix::io::dup(&w).unwrap();
            let mut sink = ChunkSink::new(
                FdSink::new(accept(fd, Direction::Write).unwrap()),
                Arc::default(),
            );
            // At most two writes succeed: one fills the pipe, the other is buffered.
            while sink.write(&[0; 200_000]).is_ok() {}
            sink
        };
        let cancel = Cancel::try_new().unwrap();
        let soon = Instant::now() + Duration::from_millis(30);
        assert_eq!(
            make().finish(0, soon, &cancel).unwrap_err().kind(),
            Kind::Timeout
        );
        cancel.cancel(crate::locks::CancelCause::VmStopped);
        let e = make()
            .finish(0, Instant::now() + Duration::from_secs(10), &cancel)
            .unwrap_err();
        assert_eq!(
            (e.kind(), e.to_string().as_str()),
            (Kind::Cancelled, "cancelled: the VM was stopped")
        );
    }
}
