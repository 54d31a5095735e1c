//! PAX records, which extend the next header of a tar.

use super::entry::{Time, Xattr};
use super::errors::bad;
use super::limits::XATTR_BYTES_MAX;
use crate::error::{Kind, Result};

/// The records of a PAX header about the next entry. Records that an image does not need are
/// ignored.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: Vec<Xattr>,
}

const XATTR: &str = "SCHILY.xattr.";

impl Pax {
    /// Parses the records `LENGTH KEY=VALUE\n`. A record without a value is ignored, as in Go's
    /// archive/tar. A key with two different values is refused, because readers would disagree
    /// about it.
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self> {
        let damaged = || bad("a PAX header of the tar is damaged");
        let mut pax = Self::default();
        while !bytes.is_empty() {
            let space = bytes.iter().take(20).position(|b| *b == b' ');
            let space = space.ok_or_else(damaged)?;
            let length = std::str::from_utf8(&bytes[..space]).ok();
            let length: usize = length.and_then(|n| n.parse().ok()).ok_or_else(damaged)?;
            let record = bytes.get(space + 1..length).ok_or_else(damaged)?;
            let (b'\n', record) = record.split_last().ok_or_else(damaged)? else {
                return Err(damaged());
            };
            let equals = record.iter().position(|b| *b == b'=');
            let (key, value) = record.split_at(equals.ok_or_else(damaged)?);
            if let Ok(key) = std::str::from_utf8(key) {
                pax.add(key, &value[1..])?;
            }
            bytes = &bytes[length..];
        }
        Ok(pax)
    }

    fn add(&mut self, key: &str, value: &[u8]) -> Result<()> {
        if key.starts_with("GNU.sparse.") {
            return Err(sparse());
        }
        if value.is_empty() {
            return Ok(());
        }
        if let Some(name) = key.strip_prefix(XATTR) {
            return self.add_xattr(name, value);
        }
        let text = std::str::from_utf8(value).unwrap_or_default();
        let number = || text.parse::<i64>().map_err(|_| wrong(key));
        match key {
            "path" => once(&mut self.path, key, name(key, value)?),
            "linkpath" => once(&mut self.link, key, name(key, value)?),
            "size" => once(&mut self.size, key, text.parse().map_err(|_| wrong(key))?),
            "uid" => once(&mut self.uid, key, number()?),
            "gid" => once(&mut self.gid, key, number()?),
            "mtime" => once(&mut self.mtime, key, time(text).ok_or_else(|| wrong(key))?),
            _ => Ok(()),
        }
    }

    fn add_xattr(&mut self, name: &str, value: &[u8]) -> Result<()> {
        self.xattrs.retain(|xattr| &*xattr.name != name);
        let used: usize = self
            .xattrs
            .iter()
            .map(|x| x.name.len() + x.value.len())
            .sum();
        if name.is_empty() || name.len() > 255 || name.contains('\0') {
            return Err(bad("an extended attribute in the tar has no valid name"));
        }
        if used + name.len() + value.len() > XATTR_BYTES_MAX {
            return Err(bad(format!(
                "the extended attributes of an entry have more than {XATTR_BYTES_MAX} bytes"
            )));
        }
        self.xattrs.push(Xattr {
            name: name.into(),
            value: value.into(),
        });
        Ok(())
    }

    /// True if the header changes something that a global header must not change.
    pub(super) fn names_an_entry(&self) -> bool {
        self.path.is_some() || self.link.is_some() || self.size.is_some()
    }
}

/// Returns the error for a sparse file. Docker, buildah and umoci expand sparse files before they
/// make a layer.
pub(super) fn sparse() -> crate::error::Error {
    bad("the tar has a sparse file")
        .with_kind(Kind::Unsupported)
        .hint("build the image with docker or buildah, which store whole files")
}

fn wrong(key: &str) -> crate::error::Error {
    bad(format!("the record {key} in a PAX header is damaged"))
}

fn name(key: &str, value: &[u8]) -> Result<Vec<u8>> {
    if value.contains(&0) {
        return Err(wrong(key));
    }
    Ok(value.to_vec())
}

fn once<T: PartialEq>(field: &mut Option<T>, key: &str, value: T) -> Result<()> {
    match field {
        Some(present) if *present != value => Err(bad(format!(
            "a PAX header has two different values of {key}"
        ))),
        _ => {
            *field = Some(value);
            Ok(())
        }
    }
}

/// Parses decimal seconds with an optional fraction, which is cut to nanoseconds.
fn time(text: &str) -> Option<Time> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some(Time {
            seconds: seconds.checked_sub(1)?,
            nanoseconds: 1_000_000_000 - nanoseconds,
        });
    }
    Some(Time {
        seconds,
        nanoseconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut length = body.len() + 1;
        while length != body.len() + length.to_string().len() {
            length += 1;
        }
        [length.to_string().as_bytes(), &body].concat()
    }

    #[test]
    fn records_are_read() {
        let records = [
            record("path", "a/é".as_bytes()),
            record("comment", b"\xff"),
            record("mtime", b"-1.25"),
            record("uid", b"4294967294"),
            record("gid", b""),
            record("SCHILY.xattr.user.a", b"\0=\n\xff"),
        ];
        let pax = Pax::parse(&records.concat()).unwrap();
        assert_eq!(pax.path.as_deref(), Some("a/é".as_bytes()));
        let time = pax.mtime.unwrap();
        assert_eq!((time.seconds, time.nanoseconds), (-2, 750_000_000));
        assert_eq!((pax.uid, pax.gid), (Some(4_294_967_294), None));
        assert_eq!(&*pax.xattrs[0].value, b"\0=\n\xff");
        assert!(pax.names_an_entry());
    }

    #[test]
    fn times_have_fractions_and_signs() {
        for (text, seconds, nanoseconds) in [
            ("0", 0, 0),
            ("1.5", 1, 500_000_000),
            ("1.1234567899", 1, 123_456_789),
            ("-3", -3, 0),
            ("-0.5", -1, 500_000_000),
        ] {
            let expected = Time {
                seconds,
                nanoseconds,
            };
            assert_eq!(time(text), Some(expected), "{text}");
        }
        for wrong in ["", ".", "x", "1.x", "99999999999999999999"] {
            assert_eq!(time(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn damaged_records_are_refused() {
        let twice = [record("path", b"a"), record("path", b"b")].concat();
        let large = record("SCHILY.xattr.user.a", &[0; XATTR_BYTES_MAX]);
        for (bytes, kind) in [
            (&b"x"[..], Kind::InvalidImage),
            (b"5 a=b", Kind::InvalidImage),
            (b"99 a=b\n", Kind::InvalidImage),
            (b"0 a=b\n", Kind::InvalidImage),
            (b"3 \n", Kind::InvalidImage),
            (b"6 ab\n\n", Kind::InvalidImage),
            (&record("size", b"-1"), Kind::InvalidImage),
            (&record("path", b"a\0b"), Kind::InvalidImage),
            (&record("SCHILY.xattr.", b"a"), Kind::InvalidImage),
            (&record("GNU.sparse.major", b"1"), Kind::Unsupported),
            (&large, Kind::InvalidImage),
            (&twice, Kind::InvalidImage),
        ] {
            let error = Pax::parse(bytes).unwrap_err();
            assert_eq!(error.kind(), kind, "{bytes:?}");
        }
    }
}
