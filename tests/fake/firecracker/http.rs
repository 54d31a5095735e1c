//! Reads HTTP requests and writes responses.

use super::vmm::Outcome;
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

pub const PAYLOAD_BYTES_MAX: usize = 51_200;

pub struct Request {
    pub method: String,
    pub path: String,
    pub body: Vec<u8>,
}

/// Reads one request. Returns `None` if the connection ends or fails, and `Some(Err(length))` if
/// the body is too long.
pub fn read_request(
    stream: &mut UnixStream,
    buffer: &mut Vec<u8>,
) -> Option<Result<Request, usize>> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut parsed = httparse::Request::new(&mut headers);
        if let Ok(httparse::Status::Complete(len)) = parsed.parse(buffer) {
            let length = parsed
                .headers
                .iter()
                .find(|h| h.name.eq_ignore_ascii_case("content-length"));
            let length = length
                .and_then(|h| std::str::from_utf8(h.value).ok()?.parse().ok())
                .unwrap_or(0);
            if length > PAYLOAD_BYTES_MAX {
                return Some(Err(length));
            }
            if buffer.len() >= len + length {
                let (method, path) = (parsed.method?.to_owned(), parsed.path?.to_owned());
                let body = buffer[len..len + length].to_vec();
                buffer.drain(..len + length);
                return Some(Ok(Request { method, path, body }));
            }
        }
        let mut piece = [0; 4096];
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => return None,
            Ok(n) => buffer.extend_from_slice(&piece[..n]),
        }
    }
}

pub fn respond(stream: &mut UnixStream, outcome: &Outcome) {
    let head = |status: u16| {
        format!("HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n")
    };
    let with = |status, body: String| {
        format!(
            "{}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            head(status),
            body.len()
        )
    };
    let text = match outcome {
        Ok(None) => head(204) + "\r\n",
        Ok(Some(body)) => with(200, body.to_string()),
        Err(message) if message.contains('\n') => {
            with(400, format!("{{ \"error\": \"{message}\" }}"))
        }
        Err(message) => with(400, json!({ "fault_message": message }).to_string()),
    };
    let _ = stream.write_all(text.as_bytes());
}
