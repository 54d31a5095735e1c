//! Parses the file in which a repository names stores to take further objects from.

/// Parses an alternates file as git does: one path per line, comments after `#`, C-style quotes.
/// After a quoted path git skips one byte, whatever it is, and continues.
pub(super) fn alternate_entries(text: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = text.split(|b| *b == 0).next().unwrap_or_default();
    let mut out = Vec::new();
    while !rest.is_empty() {
        let line = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
        let (path, end) = match (rest[0], unquote(rest)) {
            (b'#', _) => (Vec::new(), line),
            (b'"', Some((path, end))) => (path, end),
            _ => (rest[..line].to_owned(), line),
        };
        rest = rest.get(end + 1..).unwrap_or_default();
        if !path.is_empty() {
            out.push(path);
        }
    }
    out
}

/// Parses a quoted path at the start of `text`. Returns the path and the offset after its closing
/// quote, or `None` if the quoting is invalid.
fn unquote(text: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut out = Vec::new();
    let mut at = 1;
    loop {
        match *text.get(at)? {
            b'"' => return Some((out, at + 1)),
            b'\\' => {
                at += 1;
                let c = *text.get(at)?;
                out.push(match c {
                    b'a' => 7,
                    b'b' => 8,
                    b'f' => 12,
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'v' => 11,
                    b'\\' | b'"' => c,
                    b'0'..=b'3' => {
                        let digits = text.get(at..at + 3)?;
                        if !digits.iter().all(|d| (b'0'..=b'7').contains(d)) {
                            return None;
                        }
                        at += 2;
                        digits.iter().fold(0, |n, d| (n << 3) | (d - b'0'))
                    }
                    _ => return None,
                });
            }
            c => out.push(c),
        }
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_entries(text: &str, want: &[&str]) {
        let got = alternate_entries(text.as_bytes());
        let got: Vec<_> = got
            .iter()
            .map(|p| String::from_utf8_lossy(p).into_owned())
            .collect();
        assert_eq!(got, want, "{text:?}");
    }

    #[test]
    fn alternates_file_is_parsed_as_git_parses_it() {
        check_entries("", &[]);
        check_entries("/a\n/b", &["/a", "/b"]);
        check_entries("\n#/c\n../d e\n", &["../d e"]);
        check_entries("\"/a\\tb\\\"\\101\"\n/c", &["/a\tb\"A", "/c"]);
        check_entries("\"/a\"x/b\n", &["/a", "/b"]);
        check_entries("\"/a\n/b\n", &["\"/a", "/b"]);
        check_entries("\"/a\\q\"\n", &["\"/a\\q\""]);
        check_entries("/a\0/b\n", &["/a"]);
    }
}
