//! A reply, its bounded body, and the errors of an exchange.

use super::transport::Network;
use super::url::Origin;
use crate::error::{Error, Kind, Result};
use crate::host::text::printable;
use crate::sched::Instant;
use std::io::{self, Read};
use std::time::Duration;
use ureq::Body;
use ureq::http::{HeaderMap, HeaderName, Response, header};

/// The size limit of the part of an error's body that is read.
const ERROR_BYTES_MAX: u64 = 16 * 1024;
/// The length limit of a registry's message in fcd's errors.
const MESSAGE_CHARS_MAX: usize = 300;

pub(super) struct Reply {
    pub(super) origin: Origin,
    pub(super) status: u16,
    headers: HeaderMap,
    body: Body,
    deadline: Instant,
}

/// The range in a reply with status 206: `bytes FIRST-LAST/TOTAL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ContentRange {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) total: Option<u64>,
}

impl ContentRange {
    pub(super) fn parse(value: &str) -> Option<Self> {
        let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.trim().split_once('-')?;
        let total = match total {
            "*" => None,
            total => Some(number(total)?),
        };
        let range = Self {
            first: number(first)?,
            last: number(last)?,
            total,
        };
        let fits = range.total.is_none_or(|total| range.last < total);
        (range.first <= range.last && fits).then_some(range)
    }
}

/// Parses digits only. `u64::from_str` would accept a sign.
fn number(text: &str) -> Option<u64> {
    match text.bytes().all(|b| b.is_ascii_digit()) {
        true => text.parse().ok(),
        false => None,
    }
}

impl Reply {
    pub(super) fn new(origin: Origin, response: Response<Body>, network: &Network) -> Self {
        let (head, body) = response.into_parts();
        Self {
            origin,
            status: head.status.as_u16(),
            headers: head.headers,
            body,
            deadline: Instant::now() + network.limits.small_body,
        }
    }

    pub(super) fn header(&self, name: HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub(super) fn named_header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub(super) fn headers(&self, name: HeaderName) -> impl Iterator<Item = &str> {
        self.headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
    }

    pub(super) fn content_length(&self) -> Option<u64> {
        number(self.header(header::CONTENT_LENGTH)?)
    }

    pub(super) fn content_range(&self) -> Option<ContentRange> {
        ContentRange::parse(self.header(header::CONTENT_RANGE)?)
    }

    /// Returns the media type without parameters, in lower case.
    pub(super) fn media_type(&self) -> Option<String> {
        let value = self.header(header::CONTENT_TYPE)?;
        let media_type = value.split(';').next().unwrap_or_default();
        Some(media_type.trim().to_ascii_lowercase())
    }

    /// Returns how long the registry asks fcd to wait. A date instead of seconds is ignored.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        number(self.header(header::RETRY_AFTER)?.trim()).map(Duration::from_secs)
    }

    /// Reads the whole body. Fails if it has more than `max` bytes or takes too long.
    pub(super) fn read_all(self, max: u64) -> Result<Vec<u8>> {
        let too_large = |origin: &Origin| {
            Error::new(
                Kind::RegistryInvalid,
                format!("the reply of {origin} has more than {max} bytes"),
            )
        };
        if self.content_length().is_some_and(|length| length > max) {
            return Err(too_large(&self.origin));
        }
        let (origin, deadline) = (self.origin, self.deadline);
        let mut body = self.body.into_reader();
        let mut bytes = Vec::new();
        let mut buffer = [0; 8192];
        loop {
            let n = body.read(&mut buffer).map_err(|e| from_io(e, &origin))?;
            if n == 0 {
                return Ok(bytes);
            }
            bytes.extend_from_slice(&buffer[..n]);
            if bytes.len() as u64 > max {
                return Err(too_large(&origin));
            }
            if Instant::now() > deadline {
                return Err(Error::new(
                    Kind::RegistryUnreachable,
                    format!("the reply of {origin} took too long"),
                ));
            }
        }
    }

    /// Returns the body. [`from_io`] converts its errors into fcd's.
    pub(super) fn into_reader(self) -> Box<dyn Read + Send> {
        Box::new(self.body.into_reader())
    }

    /// Returns the registry's error message, shortened and with only printable characters.
    pub(super) fn into_message(self) -> Option<String> {
        let bytes = self.read_all(ERROR_BYTES_MAX).ok()?;
        error_message(&bytes)
    }
}

#[derive(serde::Deserialize)]
struct Errors {
    #[serde(default)]
    errors: Vec<OneError>,
    /// Docker Hub's token server sends only this member.
    #[serde(default)]
    details: Option<String>,
}

#[derive(serde::Deserialize)]
struct OneError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// Returns the first error in a body that follows the distribution specification.
pub(super) fn error_message(bytes: &[u8]) -> Option<String> {
    let parsed: Errors = serde_json::from_slice(bytes).ok()?;
    let text = match parsed.errors.into_iter().next() {
        Some(error) if error.code.is_empty() => error.message,
        Some(error) if error.message.is_empty() => error.code,
        Some(error) => format!("{}: {}", error.code, error.message),
        None => parsed.details?,
    };
    let short: String = text.chars().take(MESSAGE_CHARS_MAX).collect();
    (!short.trim().is_empty()).then(|| printable(short.trim()))
}

/// The source of the error if a peer does not speak TLS.
#[derive(Clone, Copy, Debug)]
pub(super) struct NotTls;

impl std::fmt::Display for NotTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the peer does not speak TLS")
    }
}

impl std::error::Error for NotTls {}

/// Converts an error of ureq into fcd's. An error of `transport` comes out unchanged.
pub(super) fn from_ureq(error: ureq::Error) -> Error {
    let invalid = |why: String| Error::new(Kind::RegistryInvalid, why);
    match error {
        ureq::Error::Io(e) => from_io_error(e),
        ureq::Error::Rustls(e) => from_tls(&e),
        ureq::Error::Timeout(_) => Error::new(
            Kind::RegistryUnreachable,
            "there was no complete answer in time",
        ),
        ureq::Error::LargeResponseHeader(_, max) => {
            invalid(format!("the header of the reply has more than {max} bytes"))
        }
        other => invalid(format!(
            "the reply is not valid HTTP: {}",
            printable(&other.to_string())
        )),
    }
}

/// Converts an error of reading a body into fcd's.
pub(super) fn from_io(error: io::Error, origin: &Origin) -> Error {
    from_ureq(error.into()).context(format!("read from {origin}"))
}

fn from_io_error(error: io::Error) -> Error {
    let inner = error.get_ref();
    if let Some(ours) = inner.and_then(|inner| inner.downcast_ref::<Error>()) {
        return ours.clone();
    }
    if let Some(tls) = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        return from_tls(tls);
    }
    Error::new(Kind::RegistryUnreachable, "the connection was lost").with_source(error)
}

fn from_tls(error: &rustls::Error) -> Error {
    use rustls::Error as Tls;
    match error {
        Tls::InvalidCertificate(why) => untrusted(why),
        Tls::NoCertificatesPresented | Tls::UnsupportedNameType => {
            Error::new(Kind::RegistryUntrusted, format!("TLS failed: {error}"))
        }
        Tls::InvalidMessage(_) => {
            Error::new(Kind::RegistryUnreachable, "TLS failed").with_source(NotTls)
        }
        other => Error::new(Kind::RegistryUnreachable, format!("TLS failed: {other}")),
    }
}

fn untrusted(why: &rustls::CertificateError) -> Error {
    use rustls::CertificateError as Why;
    let error = Error::new(
        Kind::RegistryUntrusted,
        format!("its certificate is not trusted: {why}"),
    );
    match why {
        Why::Expired
        | Why::ExpiredContext { .. }
        | Why::NotValidYet
        | Why::NotValidYetContext { .. } => {
            error.hint("check the clock of this host (date), then the registry's certificate")
        }
        _ => error,
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn content_range_is_strict() {
        let parse = ContentRange::parse;
        let range = |first, last, total| Some(ContentRange { first, last, total });
        assert_eq!(parse("bytes 5-9/10"), range(5, 9, Some(10)));
        assert_eq!(parse("bytes 5-9/*"), range(5, 9, None));
        for value in [
            "",
            "bytes 5-9",
            "bytes 9-5/10",
            "bytes 5-10/10",
            "bytes */10",
            "bytes +5-9/10",
            "bytes 5-9/99999999999999999999",
            "items 5-9/10",
        ] {
            assert_eq!(parse(value), None, "{value}");
        }
    }

    #[test]
    fn error_messages_are_short_and_harmless() {
        let message = |text: &str| error_message(text.as_bytes());
        assert_eq!(
            message(r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow \u001b[2Jdown"}]}"#)
                .unwrap(),
            "TOOMANYREQUESTS: slow \\u{1b}[2Jdown"
        );
        assert_eq!(
            message(r#"{"details":"incorrect username"}"#).unwrap(),
            "incorrect username"
        );
        assert_eq!(message(r#"{"errors":[]}"#), None);
        assert_eq!(message("<html>"), None);
        let long = format!(
            r#"{{"errors":[{{"code":"X","message":"{}"}}]}}"#,
            "a".repeat(9000)
        );
        assert_eq!(message(&long).unwrap().len(), 300);
    }
}
