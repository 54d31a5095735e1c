//! Reads a blob, and resumes if the connection is lost.

use super::reply::{Reply, from_io};
use super::session::{Session, Wanted};
use super::url::Origin;
use crate::error::{Error, Kind, Result};
use std::io::{self, Read};

/// How many bytes must arrive before a reader may resume once more.
const BYTES_PER_RESUME: u64 = 16 << 20;
const DISCARD_BYTES: usize = 16 * 1024;

/// Reads a blob of a known size. If the connection is lost, it continues at the same byte, a
/// bounded number of times. [`error_of`] returns fcd's error from an I/O error of this reader.
pub struct Blob {
    session: Session,
    digest: String,
    size: u64,
    offset: u64,
    body: Option<Body>,
    resumes_left: u32,
    /// The bytes that were read since `resumes_left` last increased.
    earned: u64,
    is_ended: bool,
}

struct Body {
    origin: Origin,
    reader: Box<dyn Read + Send>,
    /// The bytes still to be discarded, because the registry sends the whole blob instead of the
    /// rest.
    repeated: u64,
}

impl Blob {
    /// Opens the blob at the byte `from`, which must exist unless the blob is empty.
    pub(super) fn open(session: Session, digest: &str, size: u64, from: u64) -> Result<Self> {
        let resumes_left = session.limits().retries;
        let mut blob = Self {
            session,
            digest: digest.to_owned(),
            size,
            offset: from,
            body: None,
            resumes_left,
            earned: 0,
            is_ended: false,
        };
        let body = blob.request().map_err(|e| blob.in_context(e))?;
        blob.body = Some(body);
        Ok(blob)
    }

    fn in_context(&self, error: Error) -> Error {
        let repository = &self.session.settings().repository;
        error.context(format!("fetch {} of {repository}", self.digest))
    }

    /// Requests the rest of the blob.
    fn request(&mut self) -> Result<Body> {
        let path = self.session.settings().repository.path();
        let reply = self.session.get(&Wanted {
            path: format!("{path}/blobs/{}", self.digest),
            accept: "*/*",
            from: (self.offset > 0).then_some(self.offset),
        })?;
        let repeated = match reply.status {
            200 => self.check_whole(&reply)?,
            206 if self.offset > 0 => self.check_rest(&reply)?,
            _ => return Err(self.session.refusal(reply)),
        };
        Ok(Body {
            origin: reply.origin.clone(),
            reader: reply.into_reader(),
            repeated,
        })
    }

    /// Checks a reply with the whole blob. Returns how many of its bytes were read before.
    fn check_whole(&self, reply: &Reply) -> Result<u64> {
        match reply.content_length() {
            Some(length) if length != self.size => Err(invalid(format!(
                "{} sends {length} bytes, but the manifest says {}",
                reply.origin, self.size
            ))),
            _ => Ok(self.offset),
        }
    }

    /// Checks a reply with the rest of the blob. A registry may send less than the rest.
    fn check_rest(&self, reply: &Reply) -> Result<u64> {
        let range = reply.content_range();
        let fits = range.is_some_and(|range| {
            // The check of `last` comes before the addition, which can therefore not overflow.
            range.first == self.offset
                && range.total.is_none_or(|total| total == self.size)
                && range.last < self.size
                && (reply.content_length()).is_none_or(|sent| sent == range.last - range.first + 1)
        });
        match fits {
            true => Ok(0),
            false => Err(invalid(format!(
                "{} did not send the requested range from byte {}",
                reply.origin, self.offset
            ))),
        }
    }

    fn read_on(&mut self, into: &mut [u8]) -> Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            if self.offset == self.size {
                self.check_end()?;
                return Ok(0);
            }
            if self.body.is_none() {
                self.body = Some(self.request()?);
            }
            match self.read_body(into) {
                Ok(Some(n)) => return Ok(n),
                Ok(None) => {}
                Err(e) if e.kind() == Kind::RegistryUnreachable => self.lost(e)?,
                Err(e) => return Err(e),
            }
        }
    }

    /// Reads from the connection once. Returns None if the bytes are discarded because they repeat
    /// earlier ones.
    fn read_body(&mut self, into: &mut [u8]) -> Result<Option<usize>> {
        let Some(body) = &mut self.body else {
            return Ok(None);
        };
        let mut known = [0; DISCARD_BYTES];
        let left = match body.repeated {
            0 => self.size - self.offset,
            repeated => repeated,
        };
        let buffer = match body.repeated {
            0 => into,
            _ => known.as_mut_slice(),
        };
        let max = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let n = body
            .reader
            .read(&mut buffer[..max])
            .map_err(|e| from_io(e, &body.origin))?;
        if n == 0 {
            let why = format!(
                "{} ended at byte {} of {}",
                body.origin, self.offset, self.size
            );
            return Err(Error::new(Kind::RegistryUnreachable, why));
        }
        if body.repeated > 0 {
            body.repeated -= n as u64;
            return Ok(None);
        }
        self.offset += n as u64;
        self.earned += n as u64;
        if self.earned >= BYTES_PER_RESUME {
            self.earned = 0;
            self.resumes_left = (self.resumes_left + 1).min(self.session.limits().retries);
        }
        Ok(Some(n))
    }

    /// Prepares to resume. Returns the error if the blob was resumed too often.
    fn lost(&mut self, error: Error) -> Result<()> {
        self.body = None;
        if self.resumes_left == 0 {
            return Err(error);
        }
        self.resumes_left -= 1;
        self.session.pause(0, None)
    }

    /// Checks that nothing follows the last byte, which also makes the connection reusable. If the
    /// connection is lost here, that does not matter.
    fn check_end(&mut self) -> Result<()> {
        if let Some(mut body) = self.body.take()
            && !self.is_ended
            && body.repeated == 0
            && matches!(body.reader.read(&mut [0]), Ok(1..))
        {
            return Err(invalid(format!(
                "{} sends more than {} bytes",
                body.origin, self.size
            )));
        }
        self.is_ended = true;
        Ok(())
    }
}

fn invalid(why: String) -> Error {
    Error::new(Kind::RegistryInvalid, why)
}

impl Read for Blob {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.read_on(into)
            .map_err(|e| io::Error::other(self.in_context(e)))
    }
}

/// Returns the error that a [`Blob`] failed with.
#[cfg(test)]
pub(super) fn error_of(error: io::Error) -> Error {
    match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Error>())
    {
        Some(ours) => ours.clone(),
        None => Error::io("read a blob", error),
    }
}
