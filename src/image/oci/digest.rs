//! Digests of blobs, and readers that compute them.

use crate::error::{Error, Kind, Result};
use crate::host::{hex, text};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use std::fmt;
use std::io::Read;
use std::str::FromStr;

/// A SHA-256 digest. Its text is `sha256:` and 64 lower-case hexadecimal digits; no other algorithm
/// is accepted, so a digest is always safe as a file name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

const PREFIX: &str = "sha256:";

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Self(<Sha256 as sha2::Digest>::digest(bytes).into())
    }

    pub(super) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Returns the 64 hexadecimal digits.
    pub fn hex(&self) -> String {
        hex::encode(&self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(digest: &str) -> Result<Self> {
        let digits = digest.strip_prefix(PREFIX).map(str::as_bytes);
        digits.and_then(decode).map(Self).ok_or_else(|| {
            let shown = text::quoted(digest);
            let message = format!("{shown} is not a digest: sha256: and 64 digits are expected");
            Error::new(Kind::InvalidImage, message)
        })
    }
}

fn decode(digits: &[u8]) -> Option<[u8; 32]> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; 32];
    if digits.len() != 2 * bytes.len() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

impl TryFrom<String> for Digest {
    type Error = Error;
    fn try_from(digest: String) -> Result<Self> {
        digest.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// A reader that counts and hashes what is read through it.
pub(super) struct Hashing<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
}

impl<R> Hashing<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            hash: <Sha256 as sha2::Digest>::new(),
            bytes: 0,
        }
    }

    /// Returns the digest of everything that was read.
    pub(super) fn digest(self) -> Digest {
        Digest(<Sha256 as sha2::Digest>::finalize(self.hash).into())
    }

    pub(super) fn count(&self) -> u64 {
        self.bytes
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        sha2::Digest::update(&mut self.hash, &buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_is_parsed_strictly() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(empty.parse::<Digest>().unwrap(), Digest::of(b""));
        assert_eq!(Digest::of(b"").to_string(), empty);
        for wrong in [
            "",
            "sha256:",
            &empty[7..],
            &empty[..70],
            &format!("{empty}0"),
            &empty.to_uppercase(),
            &empty.replace("sha256", "sha512"),
            &empty.replace('e', "/"),
        ] {
            let error = wrong.parse::<Digest>().unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidImage, "{wrong}");
        }
    }

    #[test]
    fn hashing_reader_sees_every_byte_once() {
        let mut reader = Hashing::new(&b"some bytes"[..]);
        std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
        assert_eq!(reader.count(), 10);
        assert_eq!(reader.digest(), Digest::of(b"some bytes"));
    }
}
