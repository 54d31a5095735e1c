//! The URLs of registries, token servers and redirects.

use super::address;
use std::fmt;
use ureq::http::Uri;

/// The size limit of a URL. Signed URLs of storage services have about 2 KiB.
const URL_BYTES_MAX: usize = 8 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// The part of a URL that determines the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) scheme: Scheme,
    /// The host in lower case. An IPv6 address is in brackets.
    pub(super) host: String,
    pub(super) port: u16,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.name(), self.host)?;
        match self.port == self.scheme.default_port() {
            true => Ok(()),
            false => write!(f, ":{}", self.port),
        }
    }
}

/// A URL. `Display` leaves out the query, which may be a signature.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Url {
    pub(super) origin: Origin,
    path: String,
    query: Option<String>,
}

/// The reason why a text is not a URL that fcd follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    TooLong,
    Syntax,
    Scheme,
    /// A user or a password in front of the host.
    UserInfo,
    Host,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "the URL is too long",
            Self::Syntax => "the URL is malformed",
            Self::Scheme => "the URL is neither http nor https",
            Self::UserInfo => "the URL has a user name",
            Self::Host => "the URL's host is malformed",
        })
    }
}

impl std::error::Error for Malformed {}

/// Splits `HOST` or `HOST:PORT`. The host becomes lower-case.
pub(super) fn split_authority(authority: &str) -> Result<(String, Option<u16>), Malformed> {
    let authority = authority.to_ascii_lowercase();
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (authority.as_str(), None),
    };
    let port = match port {
        None => None,
        Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => Some(
            port.parse()
                .ok()
                .filter(|p| *p > 0)
                .ok_or(Malformed::Host)?,
        ),
        Some(_) => return Err(Malformed::Host),
    };
    match address::is_host(host) && (!host.contains(':') || host.starts_with('[')) {
        true => Ok((host.to_owned(), port)),
        false => Err(Malformed::Host),
    }
}

impl Url {
    pub(super) fn new(scheme: Scheme, authority: &str, path: String) -> Result<Self, Malformed> {
        let (host, port) = split_authority(authority)?;
        let port = port.unwrap_or(scheme.default_port());
        Ok(Self {
            origin: Origin { scheme, host, port },
            path,
            query: None,
        })
    }

    /// Parses an absolute URL.
    pub(super) fn parse(text: &str) -> Result<Self, Malformed> {
        if text.len() > URL_BYTES_MAX {
            return Err(Malformed::TooLong);
        }
        let uri: Uri = text.parse().map_err(|_| Malformed::Syntax)?;
        let scheme = match uri.scheme_str() {
            Some("http") => Scheme::Http,
            Some("https") => Scheme::Https,
            Some(_) => return Err(Malformed::Scheme),
            None => return Err(Malformed::Syntax),
        };
        let authority = uri.authority().ok_or(Malformed::Syntax)?.as_str();
        if authority.contains('@') {
            return Err(Malformed::UserInfo);
        }
        let mut url = Self::new(scheme, authority, uri.path().to_owned())?;
        url.query = uri.query().map(str::to_owned);
        // Check the result, because parsing adds the path `/` if there is none.
        if url.to_request().len() > URL_BYTES_MAX {
            return Err(Malformed::TooLong);
        }
        Ok(url)
    }

    /// Resolves the value of a `Location` header: an absolute URL, or a path on the same host.
    pub(super) fn join(&self, text: &str) -> Result<Self, Malformed> {
        let origin = &self.origin;
        let is_path = text.starts_with('/') && !text.starts_with("//");
        match text.strip_prefix("//") {
            Some(_) => Self::parse(&format!("{}:{text}", origin.scheme.name())),
            None if is_path => Self::parse(&format!(
                "{}://{}:{}{text}",
                origin.scheme.name(),
                origin.host,
                origin.port
            )),
            None => Self::parse(text),
        }
    }

    /// Adds a parameter to the query, percent-encoded.
    pub(super) fn add_query(&mut self, name: &str, value: &str) {
        let query = self.query.get_or_insert_default();
        if !query.is_empty() {
            query.push('&');
        }
        query.push_str(name);
        query.push('=');
        encode(query, value);
    }

    pub(super) fn host(&self) -> &str {
        &self.origin.host
    }

    /// Returns the whole URL, including its query, for a request.
    pub(super) fn to_request(&self) -> String {
        let (origin, path) = (&self.origin, &self.path);
        let query = self.query.iter().flat_map(|query| ["?", query.as_str()]);
        format!("{origin}{path}{}", query.collect::<String>())
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.origin, self.path)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Percent-encodes everything but unreserved characters, for queries and forms.
pub(super) fn encode(into: &mut String, value: &str) {
    use fmt::Write;
    for byte in value.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                into.push(char::from(byte));
            }
            _ => write!(into, "%{byte:02X}").expect("a String takes everything"),
        }
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[track_caller]
    fn parses(text: &str, expected: &str) {
        let url = Url::parse(text).unwrap();
        assert_eq!(url.to_request(), expected);
    }

    #[test]
    fn urls_are_normalized() {
        parses("https://Example.COM/a/b?c=d", "https://example.com/a/b?c=d");
        parses("https://example.com:443", "https://example.com/");
        parses("http://localhost:5000/v2/", "http://localhost:5000/v2/");
        parses("http://[::1]:5000/#part", "http://[::1]:5000/");
        let url = Url::parse("https://example.com/a?secret=1").unwrap();
        assert_eq!(url.to_string(), "https://example.com/a");
        assert_eq!(format!("{url:?}"), "https://example.com/a");
    }

    #[test]
    fn other_texts_are_refused() {
        for (text, why) in [
            ("", Malformed::Syntax),
            ("/path", Malformed::Syntax),
            ("ftp://example.com/", Malformed::Scheme),
            ("file:///etc/passwd", Malformed::Syntax),
            ("https://a@example.com/", Malformed::UserInfo),
            ("https://example.com:80@evil.com/", Malformed::UserInfo),
            ("https://127.1/", Malformed::Host),
            ("https://2852039166/", Malformed::Host),
            ("https://a:0/", Malformed::Host),
            ("https://a:99999/", Malformed::Host),
            ("https://exa mple.com/", Malformed::Syntax),
            ("https://a/\r\nX: y", Malformed::Syntax),
            (
                &format!("https://a/{}", "a".repeat(9000)),
                Malformed::TooLong,
            ),
            (
                &format!("https://a?{}", "a".repeat(URL_BYTES_MAX - 10)),
                Malformed::TooLong,
            ),
        ] {
            assert_eq!(Url::parse(text).unwrap_err(), why, "{text:?}");
        }
    }

    #[test]
    fn locations_are_joined() {
        let base = Url::parse("http://localhost:5000/v2/a?b=c").unwrap();
        let join = |text: &str| base.join(text).map(|url| url.to_request());
        assert_eq!(join("/x?y").unwrap(), "http://localhost:5000/x?y");
        assert_eq!(join("//other:1/x").unwrap(), "http://other:1/x");
        assert_eq!(join("https://cdn/x").unwrap(), "https://cdn/x");
        assert!(join("x/y").is_err() && join("").is_err());
    }

    #[test]
    fn queries_are_encoded() {
        let mut url = Url::parse("https://a/token?x=1").unwrap();
        url.add_query("scope", "repository:a/b:pull&x=#");
        assert_eq!(
            url.to_request(),
            "https://a/token?x=1&scope=repository%3Aa%2Fb%3Apull%26x%3D%23"
        );
    }
}
