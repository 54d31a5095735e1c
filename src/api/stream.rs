//! Framing of workspace streams: an encoder and a decoder that do no I/O, and blocking adapters for
//! both. [`super::workspace`] describes the format.

use super::workspace::{CHUNK_BYTES_MAX, TRAILER_BYTES_MAX, Trailer};
use crate::error::{Error, Kind};
use crate::host::hex;
use sha2::{Digest, Sha256};
use std::io::{self, Read, Write};

/// How much [`ChunkWriter`] buffers before it writes a chunk.
const WRITER_CHUNK_BYTES: usize = 64 * 1024;
const HEADER_BYTES: usize = 4;

/// The error for a stream that is malformed or ends too early. It is wrapped in an `io::Error`, and
/// [`error`] extracts it.
#[derive(Debug)]
pub struct Broken(String);

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Broken {}

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Broken(what.into()))
}

/// Converts an error of a stream. [`Broken`] becomes `stream_incomplete`; other errors are
/// converted by [`Error::io`].
pub fn error(doing: impl Into<String>, source: io::Error) -> Error {
    if source.get_ref().is_some_and(|inner| inner.is::<Broken>()) {
        return Error::new(Kind::StreamIncomplete, doing)
            .with_source(source)
            .hint("run the command again");
    }
    Error::io(doing, source)
}

/// The sender's side, which produces headers and the trailer.
#[derive(Default)]
pub struct Encoder {
    sha256: Sha256,
    bytes: u64,
}

impl Encoder {
    /// Returns the header for `payload`, which has 1 to `CHUNK_BYTES_MAX` bytes.
    pub fn header(&mut self, payload: &[u8]) -> [u8; HEADER_BYTES] {
        debug_assert!(!payload.is_empty() && payload.len() <= CHUNK_BYTES_MAX);
        self.sha256.update(payload);
        self.bytes += payload.len() as u64;
        (payload.len() as u32).to_be_bytes()
    }

    /// Returns the bytes that end the stream (a chunk of length 0 and the trailer), and the trailer
    /// itself.
    pub fn end(self, entries: u64) -> (Vec<u8>, Trailer) {
        let trailer = Trailer {
            entries,
            bytes: self.bytes,
            sha256: hex::encode(&self.sha256.finalize()),
        };
        let mut bytes = vec![0; HEADER_BYTES];
        bytes.extend(serde_json::to_vec(&trailer).expect("a plain struct"));
        (bytes, trailer)
    }
}

enum State {
    Header {
        have: [u8; HEADER_BYTES],
        filled: usize,
    },
    Payload {
        left: usize,
    },
    Trailer {
        json: Vec<u8>,
    },
    Finished(Trailer),
}

/// The receiver's side. Read at most [`Decoder::want`] bytes, pass them to [`Decoder::take`], and
/// call [`Decoder::end`] at the end of file.
pub struct Decoder {
    state: State,
    sha256: Sha256,
    bytes: u64,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            state: State::Header {
                have: [0; HEADER_BYTES],
                filled: 0,
            },
            sha256: Sha256::default(),
            bytes: 0,
        }
    }
}

impl Decoder {
    /// Returns the most bytes to read next, which is never 0.
    pub fn want(&self) -> usize {
        match &self.state {
            State::Header { filled, .. } => HEADER_BYTES - filled,
            State::Payload { left } => *left,
            // One byte more than allowed, to detect a trailer that is too long.
            State::Trailer { json } => TRAILER_BYTES_MAX + 1 - json.len(),
            State::Finished(_) => 1,
        }
    }

    /// Processes bytes that were read. Returns true if they are payload and false if they are
    /// framing.
    ///
    /// # Errors
    /// Fails with [`Broken`] if a chunk or the trailer is too long, or if bytes follow the end.
    pub fn take(&mut self, bytes: &[u8]) -> io::Result<bool> {
        match &mut self.state {
            State::Header { have, filled } => {
                have[*filled..*filled + bytes.len()].copy_from_slice(bytes);
                *filled += bytes.len();
                if *filled == HEADER_BYTES {
                    self.state = match u32::from_be_bytes(*have) as usize {
                        0 => State::Trailer { json: Vec::new() },
                        n if n > CHUNK_BYTES_MAX => {
                            return Err(broken(format!("a chunk of {n} bytes exceeds the limit")));
                        }
                        left => State::Payload { left },
                    };
                }
                Ok(false)
            }
            State::Payload { left } => {
                self.sha256.update(bytes);
                self.bytes += bytes.len() as u64;
                *left -= bytes.len();
                if *left == 0 {
                    self.state = State::Header {
                        have: [0; HEADER_BYTES],
                        filled: 0,
                    };
                }
                Ok(true)
            }
            State::Trailer { json } => {
                json.extend_from_slice(bytes);
                if json.len() > TRAILER_BYTES_MAX {
                    return Err(broken("a trailer that is too long"));
                }
                Ok(false)
            }
            State::Finished(_) => Err(broken("bytes after the end")),
        }
    }

    /// Checks at the end of file that the stream is complete, and returns its trailer. May be
    /// called more than once.
    pub fn end(&mut self) -> io::Result<&Trailer> {
        if let State::Trailer { json } = &self.state {
            let trailer: Trailer = serde_json::from_slice(json)
                .map_err(|e| broken(format!("the trailer after {} bytes: {e}", self.bytes)))?;
            let sha256 = hex::encode(&self.sha256.clone().finalize());
            if trailer.bytes != self.bytes || trailer.sha256 != sha256 {
                return Err(broken(format!(
                    "the trailer announces {} bytes and {} arrived, or their digests differ",
                    trailer.bytes, self.bytes
                )));
            }
            self.state = State::Finished(trailer);
        }
        match &self.state {
            State::Finished(trailer) => Ok(trailer),
            _ => Err(broken(format!(
                "the stream broke off after {} bytes",
                self.bytes
            ))),
        }
    }

    /// Returns the trailer, once [`Decoder::end`] has succeeded.
    pub fn trailer(&self) -> Option<&Trailer> {
        match &self.state {
            State::Finished(trailer) => Some(trailer),
            _ => None,
        }
    }
}

/// Frames the bytes that are written to it. The receiver sees an incomplete stream unless
/// [`ChunkWriter::finish`] is called.
pub struct ChunkWriter<W: Write> {
    inner: W,
    encoder: Encoder,
    /// The next chunk: space for its header, then its payload.
    buffer: Vec<u8>,
}

impl<W: Write> ChunkWriter<W> {
    pub fn new(inner: W) -> Self {
        let mut buffer = Vec::with_capacity(HEADER_BYTES + WRITER_CHUNK_BYTES);
        buffer.resize(HEADER_BYTES, 0);
        Self {
            inner,
            encoder: Encoder::default(),
            buffer,
        }
    }

    fn flush_chunk(&mut self) -> io::Result<()> {
        if self.buffer.len() > HEADER_BYTES {
            let header = self.encoder.header(&self.buffer[HEADER_BYTES..]);
            self.buffer[..HEADER_BYTES].copy_from_slice(&header);
            self.inner.write_all(&self.buffer)?;
            self.buffer.truncate(HEADER_BYTES);
        }
        Ok(())
    }

    /// Returns the number of payload bytes so far.
    #[cfg(any(test, feature = "fakes"))]
    pub fn bytes(&self) -> u64 {
        self.encoder.bytes + (self.buffer.len() - HEADER_BYTES) as u64
    }

    /// Writes the rest of the payload and the trailer. The stream is complete when the reader sees
    /// the end of file after the trailer.
    pub fn finish(mut self, entries: u64) -> io::Result<(W, Trailer)> {
        self.flush_chunk()?;
        let (end, trailer) = self.encoder.end(entries);
        self.inner.write_all(&end)?;
        self.inner.flush()?;
        Ok((self.inner, trailer))
    }
}

impl<W: Write> Write for ChunkWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = HEADER_BYTES + WRITER_CHUNK_BYTES - self.buffer.len();
        let n = bytes.len().min(room);
        self.buffer.extend_from_slice(&bytes[..n]);
        if n == room {
            self.flush_chunk()?;
        }
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.flush_chunk()?;
        self.inner.flush()
    }
}

/// Reads the payload. A read returns 0 only after a valid trailer; a stream without one is an
/// error.
pub struct ChunkReader<R: Read> {
    inner: R,
    decoder: Decoder,
}

impl<R: Read> ChunkReader<R> {
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            decoder: Decoder::default(),
        }
    }

    /// Discards the rest of the payload and returns the trailer.
    #[cfg(any(test, feature = "fakes"))]
    pub fn finish(mut self) -> io::Result<Trailer> {
        io::copy(&mut self, &mut io::sink())?;
        self.decoder.end().cloned()
    }
}

impl<R: Read> Read for ChunkReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        read_payload(&mut self.decoder, buffer, |b| self.inner.read(b))
    }
}

/// Reads from a stream until `buffer` has some payload, or returns 0 at the end of a complete
/// stream. The daemon also passes non-blocking sources, so `WouldBlock` is returned to the caller.
pub fn read_payload(
    decoder: &mut Decoder,
    buffer: &mut [u8],
    mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
) -> io::Result<usize> {
    if buffer.is_empty() || decoder.trailer().is_some() {
        return Ok(0);
    }
    loop {
        let max = decoder.want().min(buffer.len());
        let n = match read(&mut buffer[..max]) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if n == 0 {
            return decoder.end().map(|_| 0);
        }
        if decoder.take(&buffer[..n])? {
            return Ok(n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn framed(payload: &[u8], entries: u64) -> Vec<u8> {
        let mut writer = ChunkWriter::new(Vec::new());
        writer.write_all(payload).unwrap();
        writer.finish(entries).unwrap().0
    }

    /// A reader that returns at most as many bytes per read as its second field says.
    struct Drip<'a>(&'a [u8], usize);
    impl Read for Drip<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(buffer.len()).min(self.0.len());
            buffer[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    fn kind_of(stream: &[u8]) -> Kind {
        error("read", ChunkReader::new(stream).finish().unwrap_err()).kind()
    }

    proptest! {
        #[test]
        fn round_trip(payload in proptest::collection::vec(any::<u8>(), 0..200_000), step in 1usize..70_000) {
            let stream = framed(&payload, 7);
            let mut reader = ChunkReader::new(Drip(&stream, step));
            let mut back = Vec::new();
            reader.read_to_end(&mut back).unwrap();
            prop_assert_eq!(&back, &payload);
            let trailer = reader.finish().unwrap();
            prop_assert_eq!((trailer.entries, trailer.bytes), (7, payload.len() as u64));
        }

        #[test]
        fn every_cut_is_incomplete(payload in proptest::collection::vec(any::<u8>(), 0..2_000), cut in any::<prop::sample::Index>()) {
            let stream = framed(&payload, 7);
            prop_assert_eq!(kind_of(&stream[..cut.index(stream.len())]), Kind::StreamIncomplete);
        }
    }

    #[test]
    fn changed_byte_is_detected() {
        let mut stream = framed(b"hello, world", 1);
        stream[6] ^= 1;
        assert_eq!(kind_of(&stream), Kind::StreamIncomplete);
    }

    #[test]
    fn malformed_streams_are_refused() {
        let long_chunk = ((CHUNK_BYTES_MAX + 1) as u32).to_be_bytes();
        let long_trailer = [vec![0; 4], vec![b' '; TRAILER_BYTES_MAX + 1]].concat();
        let after_the_end = [framed(b"x", 1), b"y".to_vec()].concat();
        for stream in [
            &long_chunk[..],
            &long_trailer,
            &after_the_end,
            &[0, 0, 0, 0],
            &[],
        ] {
            assert_eq!(kind_of(stream), Kind::StreamIncomplete);
        }
    }

    #[test]
    fn other_errors_keep_their_kind() {
        assert_eq!(
            error("write", io::Error::from_raw_os_error(libc::ENOSPC)).kind(),
            Kind::DiskFull
        );
    }
}
