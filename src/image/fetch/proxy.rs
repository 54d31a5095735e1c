//! Chooses the proxy for a host, from the values of `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`.
//!
//! ureq uses one proxy for every request, so it is given none, and `transport` makes the tunnel.

use super::address;
use super::url::{Origin, Scheme, split_authority};
use crate::api::registry::Secret;
use crate::error::{Error, Kind, Result};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// The variables' values. A proxy's URL may have a password.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proxies {
    pub https: Option<Secret>,
    pub http: Option<Secret>,
    pub no_proxy: String,
}

/// An HTTP proxy that makes tunnels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Proxy {
    pub(super) host: String,
    pub(super) port: u16,
    /// The value of `Proxy-Authorization`.
    pub(super) authorization: Option<Secret>,
}

impl Proxies {
    /// Reads the variables. Lower-case names work too, as with curl and Go.
    pub fn from_env(env: &dyn Fn(&str) -> Option<String>) -> Self {
        let read = |name: &str| {
            let value = env(name).filter(|value| !value.is_empty());
            value.or_else(|| env(&name.to_ascii_lowercase()))
        };
        Self {
            https: read("HTTPS_PROXY").map(Secret::new),
            http: read("HTTP_PROXY").map(Secret::new),
            no_proxy: read("NO_PROXY").unwrap_or_default(),
        }
    }

    /// Returns the proxy for an origin, or None if the connection is direct.
    ///
    /// # Errors
    /// `invalid_argument` if the variable has a value that is not the URL of an HTTP proxy.
    pub(super) fn choose(&self, origin: &Origin) -> Result<Option<Proxy>> {
        let (name, value) = match origin.scheme {
            Scheme::Https => ("HTTPS_PROXY", &self.https),
            Scheme::Http => ("HTTP_PROXY", &self.http),
        };
        let value = value.as_ref().map(|value| value.reveal().trim());
        let Some(value) = value.filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        // Through a proxy, loopback would be the proxy's own, not this host's.
        if address::is_loopback(&origin.host) || is_excepted(&self.no_proxy, origin) {
            return Ok(None);
        }
        parse(value).map(Some).ok_or_else(|| {
            // The value is not shown, because it may have a password.
            Error::new(
                Kind::InvalidArgument,
                format!("the value of {name} is not http://HOST:PORT"),
            )
            .hint("fcd uses HTTP proxies only, not SOCKS or HTTPS ones")
        })
    }
}

/// Parses `[http://][USER[:PASSWORD]@]HOST[:PORT][/]`.
fn parse(value: &str) -> Option<Proxy> {
    let rest = match value.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
        Some(_) => return None,
        None => value,
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (user, authority) = match rest.rsplit_once('@') {
        Some((user, authority)) => (Some(user), authority),
        None => (None, rest),
    };
    let (host, port) = split_authority(authority).ok()?;
    let authorization = match user {
        Some(user) => {
            let (user, password) = user.split_once(':').unwrap_or((user, ""));
            let mut pair = decode(user)?;
            pair.push(b':');
            pair.extend(decode(password)?);
            Some(Secret::new(format!(
                "Basic {}",
                BASE64_STANDARD.encode(pair)
            )))
        }
        None => None,
    };
    Some(Proxy {
        host,
        port: port.unwrap_or(80),
        authorization,
    })
}

/// Decodes percent-encoded text.
fn decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digit = |b: u8| char::from(b).to_digit(16);
        let (high, low) = (digit(bytes.next()?)?, digit(bytes.next()?)?);
        out.push(u8::try_from(high * 16 + low).ok()?);
    }
    Some(out)
}

/// True if `NO_PROXY` names the origin: by `*`, a host, a domain (with or without a dot in front),
/// an address, a network as `ADDRESS/BITS`, or any of these with a port.
fn is_excepted(no_proxy: &str, origin: &Origin) -> bool {
    let host = origin.host.trim_end_matches('.');
    no_proxy
        .split(',')
        .map(|entry| entry.trim().to_ascii_lowercase())
        .filter(|entry| !entry.is_empty())
        .any(|entry| entry == "*" || matches(&entry, host, origin.port))
}

fn matches(entry: &str, host: &str, port: u16) -> bool {
    if let (Some(network), Some(address)) = (Network::parse(entry), address::literal(host)) {
        return network.contains(address);
    }
    let (name, wanted) = match entry.rsplit_once(':') {
        // An IPv6 address without brackets has no port.
        Some((name, port)) if !name.contains(':') || name.ends_with(']') => {
            match port.parse::<u16>() {
                Ok(port) => (name, Some(port)),
                Err(_) => return false,
            }
        }
        _ => (entry, None),
    };
    if wanted.is_some_and(|wanted| wanted != port) {
        return false;
    }
    if let Some(address) = address::literal(host) {
        return address::literal(name) == Some(address);
    }
    let domain = name.strip_prefix("*.").or(name.strip_prefix('.'));
    let (domain, only_below) = (domain.unwrap_or(name), domain.is_some());
    let below = host
        .strip_suffix(domain)
        .is_some_and(|front| front.ends_with('.'));
    below || (!only_below && host == domain)
}

struct Network {
    address: IpAddr,
    bits: u32,
}

impl Network {
    fn parse(text: &str) -> Option<Self> {
        let (address, bits) = text.split_once('/')?;
        let (address, bits) = (address.parse().ok()?, bits.parse().ok()?);
        let max = if matches!(address, IpAddr::V4(_)) {
            32
        } else {
            128
        };
        (bits <= max).then_some(Self { address, bits })
    }

    fn contains(&self, other: IpAddr) -> bool {
        match (self.address, other) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let host_bits = 32 - self.bits;
                (a.to_bits() ^ b.to_bits())
                    .checked_shr(host_bits)
                    .unwrap_or(0)
                    == 0
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let host_bits = 128 - self.bits;
                (a.to_bits() ^ b.to_bits())
                    .checked_shr(host_bits)
                    .unwrap_or(0)
                    == 0
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod unit {
    use super::super::url::Url;
    use super::*;

    fn chosen(proxies: &Proxies, url: &str) -> Option<String> {
        let origin = Url::parse(url).unwrap().origin;
        let proxy = proxies.choose(&origin).unwrap()?;
        Some(format!("{}:{}", proxy.host, proxy.port))
    }

    fn proxies(no_proxy: &str) -> Proxies {
        Proxies {
            https: Some(Secret::new("http://proxy:3128")),
            http: Some(Secret::new("plain")),
            no_proxy: no_proxy.into(),
        }
    }

    #[test]
    fn variables_are_read_in_both_cases() {
        let env = |name: &str| match name {
            "HTTPS_PROXY" | "no_proxy" => Some(name.to_owned()),
            "HTTP_PROXY" => Some(String::new()),
            "http_proxy" => Some("lower".to_owned()),
            _ => None,
        };
        let proxies = Proxies::from_env(&env);
        assert_eq!(proxies.https, Some(Secret::new("HTTPS_PROXY")));
        assert_eq!(proxies.http, Some(Secret::new("lower")));
        assert_eq!(proxies.no_proxy, "no_proxy");
    }

    #[test]
    fn scheme_decides_which_proxy() {
        let both = proxies("");
        assert_eq!(chosen(&both, "https://a/").unwrap(), "proxy:3128");
        assert_eq!(chosen(&both, "http://a/").unwrap(), "plain:80");
        assert_eq!(chosen(&Proxies::default(), "https://a/"), None);
        let empty = Proxies {
            https: Some(Secret::new(" ")),
            ..Proxies::default()
        };
        assert_eq!(chosen(&empty, "https://a/"), None);
    }

    #[test]
    fn loopback_is_never_reached_by_proxy() {
        for url in ["https://localhost/", "https://127.0.0.1/", "https://[::1]/"] {
            assert_eq!(chosen(&proxies(""), url), None, "{url}");
        }
    }

    #[test]
    fn no_proxy_names_hosts_domains_networks_and_ports() {
        for (entry, host, excepted) in [
            ("*", "a.example.com", true),
            ("example.com", "example.com", true),
            ("example.com", "a.example.com", true),
            ("example.com", "notexample.com", false),
            (".example.com", "a.example.com", true),
            (".example.com", "example.com", false),
            ("*.example.com", "a.example.com", true),
            ("EXAMPLE.com", "example.com", true),
            ("x, example.com ,y", "example.com", true),
            ("example.com:443", "example.com", true),
            ("example.com:8443", "example.com", false),
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "11.1.2.3", false),
            ("10.0.0.0/33", "10.1.2.3", false),
            ("0.0.0.0/0", "10.1.2.3", true),
            ("10.1.2.3", "10.1.2.3", true),
            ("fd00::/8", "[fd00::1]", true),
            ("fd00::1", "[fd00::1]", true),
            ("[fd00::1]:443", "[fd00::1]", true),
            ("", "example.com", false),
            (",", "example.com", false),
        ] {
            let direct = chosen(&proxies(entry), &format!("https://{host}/")).is_none();
            assert_eq!(direct, excepted, "{entry} {host}");
        }
    }

    #[test]
    fn user_and_password_are_decoded() {
        let proxy = parse("http://a%40b:p%3Aq@proxy.example:8080/").unwrap();
        assert_eq!((proxy.host.as_str(), proxy.port), ("proxy.example", 8080));
        let value = proxy.authorization.unwrap();
        let encoded = value.reveal().strip_prefix("Basic ").unwrap();
        assert_eq!(BASE64_STANDARD.decode(encoded).unwrap(), b"a@b:p:q");
    }

    #[test]
    fn other_proxies_are_refused_without_their_password() {
        for value in [
            "socks5://x:canary@y:1",
            "https://y",
            "http://y:z:1",
            "http://%zz@y",
        ] {
            let proxies = Proxies {
                https: Some(Secret::new(value)),
                ..Proxies::default()
            };
            let origin = Url::parse("https://a/").unwrap().origin;
            let e = proxies.choose(&origin).unwrap_err();
            assert_eq!(e.kind(), Kind::InvalidArgument);
            assert!(!format!("{e:?}").contains("canary"));
        }
    }
}
