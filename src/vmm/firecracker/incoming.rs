//! Splits and parses the HTTP/1.1 answers of Firecracker's API server. It does no I/O, so that it
//! can be fuzzed.
//!
//! A guest may control the VMM, so the parser keeps at most one answer, regardless of the input.

/// The limit of an answer's body. The longest answer is a whole configuration, which has a few
/// kilobytes.
pub(crate) const BODY_BYTES_MAX: usize = 64 << 10;
/// The limit of an answer's headers, which normally have about 150 bytes.
pub(crate) const HEAD_BYTES_MAX: usize = 8 << 10;
pub(crate) const HEADERS_MAX: usize = 32;
/// The statuses that are accepted. Lower ones are not final, and the client never requests them
/// (`Expect: 100-continue`).
pub(crate) const STATUSES: std::ops::Range<u16> = 200..600;

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
    /// True if the server says that a field of the request is deprecated.
    pub is_deprecated: bool,
}

/// The received bytes of one answer.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    buffer: Vec<u8>,
    head: Option<Head>,
    /// True if a line feed has arrived since the last attempt. The head is parsed only then, so
    /// that a slow sender does not cause repeated parsing.
    is_worth_a_look: bool,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    status: u16,
    len: usize,
    body_len: usize,
    is_deprecated: bool,
}

impl Incoming {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.is_worth_a_look |= bytes.contains(&b'\n');
        self.buffer.extend_from_slice(bytes);
    }

    /// True if no bytes are buffered. If bytes are buffered before a request, the server has sent
    /// an answer without a request.
    pub(crate) fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Returns the answer, or None if it is not complete yet. The error is the reason why the bytes
    /// are not HTTP.
    pub(crate) fn answer(&mut self) -> Result<Option<Answer>, String> {
        let head = match self.head {
            Some(head) => head,
            None => match self.parse_head()? {
                Some(head) => *self.head.insert(head),
                None if self.buffer.len() > HEAD_BYTES_MAX => {
                    return Err("its headers do not end".to_owned());
                }
                None => return Ok(None),
            },
        };
        let end = head.len + head.body_len;
        if self.buffer.len() < end {
            return Ok(None);
        }
        self.head = None;
        let body = self.buffer[head.len..end].to_vec();
        self.buffer.drain(..end);
        self.is_worth_a_look = self.buffer.contains(&b'\n');
        Ok(Some(Answer {
            status: head.status,
            body,
            is_deprecated: head.is_deprecated,
        }))
    }

    fn parse_head(&mut self) -> Result<Option<Head>, String> {
        if !std::mem::take(&mut self.is_worth_a_look) {
            return Ok(None);
        }
        // Parse up to the last complete line, so that the result does not depend on how the bytes
        // were split.
        let lines = self
            .buffer
            .iter()
            .rposition(|b| *b == b'\n')
            .map_or(0, |at| at + 1);
        match parse_head(&self.buffer[..lines])? {
            Some(head) if head.len > HEAD_BYTES_MAX => Err("its headers are too long".to_owned()),
            Some(head) if head.body_len > BODY_BYTES_MAX => {
                Err(format!("it announces {} bytes", head.body_len))
            }
            head => Ok(head),
        }
    }

    #[cfg(any(test, feature = "fuzz"))]
    pub(crate) fn buffered(&self) -> usize {
        self.buffer.len()
    }
}

/// Parses the status line and the headers of an answer. Returns None if more bytes are needed.
fn parse_head(bytes: &[u8]) -> Result<Option<Head>, String> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(len) = response.parse(bytes).map_err(|e| e.to_string())? else {
        return Ok(None);
    };
    let status = response
        .code
        .filter(|code| STATUSES.contains(code))
        .ok_or("it has no status")?;
    let all = |name: &'static str| {
        response
            .headers
            .iter()
            .filter(move |h| h.name.eq_ignore_ascii_case(name))
            .map(|h| h.value)
    };
    // The server never sends this header, which could make the end of the body ambiguous.
    if all("transfer-encoding").next().is_some() {
        return Err("its body is chunked".to_owned());
    }
    let mut lengths = all("content-length");
    let body_len = lengths.next().map_or(Ok(0), parse_length)?;
    if lengths.next().is_some() {
        return Err("it has two lengths".to_owned());
    }
    Ok(Some(Head {
        status,
        len,
        body_len,
        is_deprecated: all("deprecation").next().is_some(),
    }))
}

fn parse_length(text: &[u8]) -> Result<usize, String> {
    let text = std::str::from_utf8(text).map_err(|e| e.to_string())?.trim();
    let length = Some(text)
        .filter(|t| t.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|t| t.parse().ok());
    length.ok_or_else(|| {
        format!(
            "its length is {:?}",
            text.chars().take(32).collect::<String>()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(bytes: &[u8]) -> String {
        let mut incoming = Incoming::default();
        incoming.push(bytes);
        incoming.answer().unwrap_err()
    }

    #[test]
    fn answer_with_ambiguous_length_is_error() {
        let head = |fields: &str| format!("HTTP/1.1 200 \r\n{fields}\r\n\r\nhello").into_bytes();
        assert_eq!(
            error(&head("Content-Length: 5\r\nContent-Length: 5")),
            "it has two lengths"
        );
        assert_eq!(error(b"HTTP/1.1 000 \r\n\r\n"), "it has no status");
        assert_eq!(
            error(&head("Transfer-Encoding: chunked")),
            "its body is chunked"
        );
        assert_eq!(error(&head("Content-Length: +5")), "its length is \"+5\"");
        assert_eq!(
            error(&head(&format!("Content-Length: {}", "9".repeat(1000)))).len(),
            "its length is \"\"".len() + 32
        );
        assert_eq!(
            error(&head(&format!("Content-Length: {}", BODY_BYTES_MAX + 1))),
            "it announces 65537 bytes"
        );
    }

    #[test]
    fn head_above_bound_is_error_even_in_one_piece() {
        let long = format!("HTTP/1.1 200 \r\nX: {}\r\n\r\n", "x".repeat(HEAD_BYTES_MAX));
        assert_eq!(error(long.as_bytes()), "its headers are too long");
        assert_eq!(
            error(&long.as_bytes()[..HEAD_BYTES_MAX + 1]),
            "its headers do not end"
        );
        assert_eq!(error(&[b'x'; HEAD_BYTES_MAX + 1]), "its headers do not end");
    }

    /// Covers a bug that `scripts/fuzz firecracker-http` found.
    #[test]
    fn header_is_parsed_once_its_line_is_complete() {
        let mut incoming = Incoming::default();
        incoming.push(b"HTTP/1.1 400 \r\nno head");
        assert_eq!(incoming.answer(), Ok(None));
        incoming.push(b"er\r\n");
        assert!(incoming.answer().is_err());
    }
}
