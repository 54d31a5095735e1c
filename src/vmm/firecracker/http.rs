//! An HTTP/1.1 client for Firecracker's API server (micro_http, v1.16). The server handles one
//! request at a time on a persistent connection. Its status line has no reason phrase, and an
//! answer with status 204 has neither a body nor a length. A guest may control the VMM, so every
//! read has a size limit and a deadline.

pub(super) use super::incoming::Answer;
use super::incoming::Incoming;
use crate::error::{Error, Kind, Result};
use crate::vmm::conversation::Conversation;
use crate::vmm::dial::Deadline;
use std::os::unix::net::UnixStream;

/// The server's default limit of a request's body (`--http-api-max-payload-size`).
pub(super) const REQUEST_BODY_BYTES_MAX: usize = 51_200;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Put,
    Patch,
}

impl Method {
    const fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
        }
    }
}

/// A conversation with the server.
pub(super) struct Connection<'a> {
    conversation: Conversation<'a>,
    incoming: Incoming,
}

impl<'a> Connection<'a> {
    /// Begins a conversation over `stream`, which must be non-blocking.
    pub(super) fn new(stream: UnixStream, deadline: Deadline<'a>) -> Self {
        Self {
            conversation: Conversation::new(stream, deadline),
            incoming: Incoming::default(),
        }
    }

    /// Sends a request and reads its answer, even if the status is an error.
    ///
    /// # Errors
    /// `timeout` or `cancelled`, or `vmm_failed` if the server hangs up or does not speak HTTP.
    pub(super) fn request(&mut self, method: Method, path: &str, body: &[u8]) -> Result<Answer> {
        let doing = format!("ask the VMM: {} {path}", method.name());
        if body.len() > REQUEST_BODY_BYTES_MAX {
            return Err(Error::internal(format!(
                "{doing}: the body of {} bytes is too large",
                body.len()
            )));
        }
        let mut message = format!(
            "{} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n",
            method.name()
        );
        if method != Method::Get {
            message += &format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                body.len()
            );
        }
        message += "\r\n";
        let mut bytes = message.into_bytes();
        bytes.extend_from_slice(body);
        if !self.incoming.is_empty() {
            return Err(no_http(&doing, "there was an answer without a request"));
        }
        self.conversation.send(&bytes, &doing)?;
        self.answer(&doing)
    }

    fn answer(&mut self, doing: &str) -> Result<Answer> {
        let mut piece = [0; 4096];
        loop {
            if let Some(answer) = self
                .incoming
                .answer()
                .map_err(|what| no_http(doing, &what))?
            {
                return Ok(answer);
            }
            let n = self.conversation.read(&mut piece, doing)?;
            self.incoming.push(&piece[..n]);
        }
    }
}

fn no_http(doing: &str, what: &str) -> Error {
    Error::new(
        Kind::VmmFailed,
        format!("{doing}: the answer is not HTTP: {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::locks::Cancel;
    use crate::sched::Instant;
    use crate::vmm::firecracker::incoming::{HEAD_BYTES_MAX, HEADERS_MAX};
    use std::io::{Read, Write};
    use std::time::Duration;

    /// Talks to a server that answers each request with one of the pieces and then hangs up.
    fn ask(pieces: &[&[u8]]) -> Result<Vec<Answer>> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let cancel = Cancel::try_new().unwrap();
        let deadline = Deadline {
            at: Instant::now() + Duration::from_secs(20),
            cancel: &cancel,
        };
        let mut connection = Connection::new(ours, deadline);
        std::thread::scope(|s| {
            s.spawn(move || {
                let mut request_piece = [0; 1];
                for piece in pieces {
                    let mut request = Vec::new();
                    while !request.ends_with(b"{}")
                        && theirs.read(&mut request_piece).is_ok_and(|n| n > 0)
                    {
                        request.extend_from_slice(&request_piece);
                    }
                    let _ = theirs.write_all(piece);
                }
                let _ = theirs.shutdown(std::net::Shutdown::Write);
                let _ = theirs.read_to_end(&mut Vec::new());
            });
            let mut answers = Vec::new();
            let asked = (0..pieces.len().min(2)).try_for_each(|_| {
                answers.push(connection.request(Method::Put, "/x", b"{}")?);
                Ok(())
            });
            drop(connection);
            asked.map(|()| answers)
        })
    }

    const NO_CONTENT: &[u8] =
        b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";

    #[test]
    fn answers_with_and_without_body_are_parsed() {
        let (head, rest) = (
            b"HTTP/1.1 400 \r\nContent-Le".as_slice(),
            b"ngth: 5\r\nDeprecation: true\r\n\r\nhello",
        );
        let answers = ask(&[NO_CONTENT, &[head, rest].concat()]).unwrap();
        assert_eq!(
            answers[0],
            Answer {
                status: 204,
                body: Vec::new(),
                is_deprecated: false
            }
        );
        assert_eq!(
            answers[1],
            Answer {
                status: 400,
                body: b"hello".to_vec(),
                is_deprecated: true
            }
        );
        // The answers are also parsed if they are split at any point.
        let all = [NO_CONTENT, head, rest].concat();
        for cut in 0..all.len() {
            let (mut incoming, mut found) = (Incoming::default(), Vec::new());
            for piece in [&all[..cut], &all[cut..]] {
                incoming.push(piece);
                while let Some(answer) = incoming.answer().unwrap() {
                    found.push(answer);
                }
            }
            assert_eq!(found, answers, "{cut}");
        }
    }

    #[test]
    fn answer_without_request_is_error() {
        let e = ask(&[&[NO_CONTENT, NO_CONTENT].concat(), NO_CONTENT]).unwrap_err();
        assert!(e.to_string().contains("an answer without a request"), "{e}");
    }

    #[test]
    fn invalid_http_is_error() {
        let long = format!("HTTP/1.1 200 \r\nX: {}", "x".repeat(2 * HEAD_BYTES_MAX));
        let many = format!(
            "HTTP/1.1 200 \r\n{}\r\n",
            "a: b\r\n".repeat(HEADERS_MAX + 1)
        );
        let cases: [(&[u8], &str); 9] = [
            (b"", "hung up"),
            (
                b"HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\nshort",
                "hung up",
            ),
            (b"SSH-2.0-OpenSSH\r\n\r\n", "not HTTP"),
            (b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n", "not HTTP"),
            (
                b"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n",
                "not HTTP",
            ),
            (
                b"HTTP/1.1 200 \r\nContent-Length: 18446744073709551616\r\n\r\n",
                "not HTTP",
            ),
            (b"HTTP/1.1 \xff\r\n\r\n", "not HTTP"),
            (long.as_bytes(), "not HTTP"),
            (many.as_bytes(), "not HTTP"),
        ];
        for (bytes, said) in cases {
            let e = ask(&[bytes]).unwrap_err();
            assert!(
                e.kind() == Kind::VmmFailed && e.to_string().contains(said),
                "{:?}: {e}",
                String::from_utf8_lossy(bytes)
            );
        }
    }

    #[test]
    fn silent_server_times_out_and_can_be_cancelled() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let cancel = Cancel::try_new().unwrap();
        let mut connection = Connection::new(
            ours,
            Deadline {
                at: Instant::now(),
                cancel: &cancel,
            },
        );
        assert_eq!(
            connection
                .request(Method::Get, "/", b"")
                .unwrap_err()
                .kind(),
            Kind::Timeout
        );
        cancel.cancel(crate::locks::CancelCause::Requested);
        assert_eq!(
            connection
                .request(Method::Get, "/", b"")
                .unwrap_err()
                .kind(),
            Kind::Cancelled
        );
        let big = vec![b'x'; REQUEST_BODY_BYTES_MAX + 1];
        assert_eq!(
            connection
                .request(Method::Put, "/", &big)
                .unwrap_err()
                .kind(),
            Kind::Internal
        );
    }
}
