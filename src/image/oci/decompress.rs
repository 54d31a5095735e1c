//! Inflates a layer: gzip with any number of members, zstd with any number of frames, or a plain
//! tar.
//!
//! The first bytes decide, not the media type, because docker does the same and media types are
//! often wrong. The decompressors are in this process, because an external program would have to be
//! found and confined first.

use super::errors::{as_io, bad};
use super::limits::ZSTD_WINDOW_LOG_MAX;
use crate::error::{Error, Kind};
use std::io::{BufRead, Chain, Cursor, Read};

const MAGIC_BYTES: usize = 4;
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Formats that docker can read, but that tools no longer use for images.
const OTHERS: &[(&str, &[u8])] = &[("xz", b"\xfd7zX"), ("bzip2", b"BZh")];

type Whole<R> = Chain<Cursor<Vec<u8>>, R>;

pub(super) enum Decoder<R: BufRead> {
    Gzip(Box<flate2::bufread::MultiGzDecoder<Whole<R>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, Whole<R>>>),
    Plain(Whole<R>),
}

/// True for the first bytes of a zstd frame, which may be a skippable one.
fn is_zstd(magic: &[u8]) -> bool {
    let is_skippable = matches!(magic, [0x50..=0x5f, 0x2a, 0x4d, 0x18]);
    magic == ZSTD || is_skippable
}

/// Looks at the first bytes and returns the reader that inflates them.
pub(super) fn decoder<R: BufRead>(mut reader: R) -> std::io::Result<Decoder<R>> {
    let mut magic = Vec::with_capacity(MAGIC_BYTES);
    (&mut reader)
        .take(MAGIC_BYTES as u64)
        .read_to_end(&mut magic)?;
    let other = OTHERS.iter().find(|(_, first)| magic.starts_with(first));
    if let Some((name, _)) = other {
        let message = format!("the layer is compressed with {name}");
        let error = Error::new(Kind::Unsupported, message);
        return Err(as_io(error.hint("push the image again with gzip or zstd")));
    }
    let (is_gzip, is_zstd) = (magic.starts_with(&GZIP), is_zstd(&magic));
    let whole = Cursor::new(magic).chain(reader);
    Ok(if is_gzip {
        Decoder::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(whole)))
    } else if is_zstd {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(whole)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        Decoder::Zstd(Box::new(decoder))
    } else {
        Decoder::Plain(whole)
    })
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Decoder::Gzip(decoder) => decoder.read(buffer).map_err(|e| damaged("gzip", e)),
            Decoder::Zstd(decoder) => decoder.read(buffer).map_err(|e| damaged("zstd", e)),
            Decoder::Plain(reader) => reader.read(buffer),
        }
    }
}

/// Converts an error of the decompressor. An error of the reader below it is returned unchanged.
fn damaged(format: &str, error: std::io::Error) -> std::io::Error {
    let is_ours = error.get_ref().is_some_and(|e| e.is::<Error>());
    if is_ours || error.raw_os_error().is_some() {
        return error;
    }
    as_io(bad(format!("the {format} data is damaged")).with_source(error))
}

/// Inflates a whole layer from memory.
#[cfg(any(test, feature = "fuzz"))]
pub(super) fn inflate(bytes: &[u8], bytes_max: u64) -> Result<Vec<u8>, Error> {
    let mut out = Vec::new();
    let read = decoder(bytes).and_then(|decoder| decoder.take(bytes_max).read_to_end(&mut out));
    read.map_err(|e| super::errors::read_error("inflate", e))?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::stream::encode_all(bytes, 1).unwrap()
    }

    #[track_caller]
    fn check(compressed: &[u8], plain: &[u8]) {
        assert_eq!(inflate(compressed, 1 << 20).unwrap(), plain);
    }

    #[test]
    fn formats_are_recognised_by_their_first_bytes() {
        check(b"", b"");
        check(b"x", b"x");
        check(b"plain bytes", b"plain bytes");
        check(&gzip(b"some"), b"some");
        check(&zstd(b"some"), b"some");
        for other in [&b"\xfd7zXZ\0 and more"[..], b"BZh9 and more"] {
            assert_eq!(inflate(other, 100).unwrap_err().kind(), Kind::Unsupported);
        }
    }

    #[test]
    fn several_members_are_one_stream() {
        check(
            &[gzip(b"one "), gzip(b""), gzip(b"two")].concat(),
            b"one two",
        );
        check(&[zstd(b"one "), zstd(b"two")].concat(), b"one two");
        let skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc";
        check(&[&skippable[..], &zstd(b"two")].concat(), b"two");
    }

    #[test]
    fn damaged_data_is_an_invalid_image() {
        for good in [gzip(&[7; 5000]), zstd(&[7; 5000])] {
            let mut wrong = good.clone();
            let middle = good.len() - 6;
            wrong[middle] ^= 0x55;
            for bytes in [
                &good[..good.len() - 1],
                &good[..5],
                &[&good[..], b"rest"].concat(),
            ] {
                let error = inflate(bytes, 1 << 20).unwrap_err();
                assert_eq!(error.kind(), Kind::InvalidImage, "{error}");
            }
            let _ = inflate(&wrong, 1 << 20);
        }
    }

    #[test]
    fn zstd_window_is_limited() {
        let with_window = |log: u32| {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(log).unwrap();
            encoder.write_all(b"few bytes").unwrap();
            encoder.finish().unwrap()
        };
        check(&with_window(ZSTD_WINDOW_LOG_MAX), b"few bytes");
        let error = inflate(&with_window(ZSTD_WINDOW_LOG_MAX + 1), 100).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidImage, "{error}");
    }
}
