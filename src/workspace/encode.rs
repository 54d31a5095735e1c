//! Percent-encodes paths as text: every byte that is not printable ASCII, and `%` itself.

use crate::error::{Error, Kind, Result};

/// Maximum size of all kept paths in one `ready` note, encoded. A frame is limited to 1 MiB.
pub const KEEP_BYTES_MAX: usize = 768 * 1024;

/// Encodes a path: `a%b\n` becomes `a%25b%0A`.
pub fn encode(path: &[u8]) -> String {
    let mut out = String::with_capacity(path.len());
    for &b in path {
        if (b' '..=b'~').contains(&b) && b != b'%' {
            out.push(b as char);
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
    out
}

/// Reverses [`encode`]. Returns `invalid_argument` for text that is not percent-encoded.
pub fn decode(text: &str) -> Result<Vec<u8>> {
    let bad = || Error::invalid(format!("decode path {text:?}: not percent-encoded"));
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        match b {
            b'%' => {
                let pair = [bytes.next().ok_or_else(bad)?, bytes.next().ok_or_else(bad)?];
                let hex = std::str::from_utf8(&pair).map_err(|_| bad())?;
                if !pair.iter().all(u8::is_ascii_hexdigit) {
                    return Err(bad());
                }
                out.push(u8::from_str_radix(hex, 16).map_err(|_| bad())?);
            }
            b' '..=b'~' => out.push(b),
            _ => return Err(bad()),
        }
    }
    Ok(out)
}

/// Encodes all paths, or returns `exhausted` if they do not fit into one `ready` note.
pub fn encode_all<'a>(paths: impl IntoIterator<Item = &'a Vec<u8>>) -> Result<Vec<String>> {
    let encoded: Vec<String> = paths.into_iter().map(|p| encode(p)).collect();
    let bytes: usize = encoded.iter().map(|p| p.len() + 3).sum();
    if bytes > KEEP_BYTES_MAX {
        return Err(Error::new(Kind::Exhausted, format!("the guest changed {} files since the last import", encoded.len()))
            .hint("export them with fcctl workspace export, or replace them with fcctl workspace prepare --overwrite"));
    }
    Ok(encoded)
}

/// Encodes as many paths as fit into one reply, followed by `... and N more` if some do not.
pub fn encode_some<'a>(paths: impl ExactSizeIterator<Item = &'a Vec<u8>>) -> Vec<String> {
    let (count, mut bytes, mut out) = (paths.len(), 0, Vec::new());
    for path in paths {
        let text = encode(path);
        bytes += text.len() + 3;
        if bytes > KEEP_BYTES_MAX {
            out.push(format!("... and {} more", count - out.len()));
            break;
        }
        out.push(text);
    }
    out
}

/// Decodes all paths. Returns `invalid_argument` if one of them is not percent-encoded.
pub fn decode_all<S: AsRef<str>>(paths: &[S]) -> Result<Vec<Vec<u8>>> {
    paths.iter().map(|p| decode(p.as_ref())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encode_round_trips_any_byte() {
        let all: Vec<u8> = (0..=255).collect();
        let text = encode(&all);
        assert!(text.bytes().all(|b| (b' '..=b'~').contains(&b)));
        assert_eq!(decode(&text).unwrap(), all);
        assert_eq!(encode(b"a%b\n"), "a%25b%0A");
    }

    #[test]
    fn decode_text_that_encode_never_writes_is_rejected() {
        for bad in ["%", "%4", "%zz", "%+1", "\n", "é"] {
            assert!(decode(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn encode_too_many_paths_is_reported() {
        let many = vec![vec![b'\n'; 300]; 2000];
        assert_eq!(encode_all(&many).unwrap_err().kind(), Kind::Exhausted);
        let some = encode_some(many.iter());
        assert_eq!(
            *some.last().unwrap(),
            format!("... and {} more", 2000 - (some.len() - 1))
        );
        assert_eq!(encode_some(many[..3].iter()).len(), 3);
    }
}
