//! Decides which redirects are followed.

use super::address;
use super::url::{Scheme, Url};
use crate::error::{Error, Kind, Result};
use crate::host::text::quoted;

/// Returns the URL that a `Location` header redirects to.
///
/// # Errors
/// `registry_invalid` if the URL has no TLS although `from` has it or although it is not configured
/// as insecure (both are allowed on loopback), or if no registry may direct fcd to its address.
pub(super) fn next(from: &Url, location: &str, insecure: impl Fn(&Url) -> bool) -> Result<Url> {
    let refused = |why: String| {
        Error::new(
            Kind::RegistryInvalid,
            format!("refuse the redirect of {}: {why}", from.origin),
        )
    };
    let to = from
        .join(location)
        .map_err(|why| refused(format!("{why}: {}", quoted(location))))?;
    let is_local = address::is_loopback(from.host()) && address::is_loopback(to.host());
    let downgrade = from.origin.scheme == Scheme::Https && to.origin.scheme == Scheme::Http;
    if downgrade && !is_local {
        return Err(refused(format!("it leads to {}, without TLS", to.origin)));
    }
    if to.origin.scheme == Scheme::Http && !is_local && !insecure(&to) {
        return Err(refused(format!("it leads to {}, without TLS", to.origin)));
    }
    check_host(&to, address::is_loopback(from.host()))
        .map_err(|e| refused(e.message().to_owned()))?;
    Ok(to)
}

/// Checks a URL whose host is an address. A name is checked when it is resolved.
pub(super) fn check_host(to: &Url, loopback_allowed: bool) -> Result<()> {
    if address::is_loopback(to.host()) && !loopback_allowed {
        return Err(Error::new(
            Kind::RegistryInvalid,
            format!("{} is this host itself", to.host()),
        ));
    }
    match address::literal(to.host()) {
        Some(ip) => address::check(ip, to.host(), loopback_allowed),
        None => Ok(()),
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    fn followed(from: &str, location: &str) -> Result<String> {
        let insecure = |url: &Url| url.host() == "insecure";
        next(&Url::parse(from).unwrap(), location, insecure).map(|url| url.to_request())
    }

    #[test]
    fn redirects_to_storage_are_followed() {
        for (from, location, to) in [
            (
                "https://r/v2/",
                "https://cdn/x?sig=1",
                "https://cdn/x?sig=1",
            ),
            ("https://r/v2/", "/x", "https://r/x"),
            ("http://insecure/v2/", "https://cdn/x", "https://cdn/x"),
            ("http://insecure/v2/", "/x", "http://insecure/x"),
            (
                "http://localhost:1/v2/",
                "http://127.0.0.1:2/x",
                "http://127.0.0.1:2/x",
            ),
            (
                "https://localhost:1/v2/",
                "http://127.0.0.1:2/x",
                "http://127.0.0.1:2/x",
            ),
            ("https://r/v2/", "https://10.0.0.1/x", "https://10.0.0.1/x"),
        ] {
            assert_eq!(followed(from, location).unwrap(), to);
        }
    }

    #[test]
    fn redirects_astray_are_refused() {
        for (from, location) in [
            ("https://r/", "http://r/"),
            ("https://r/", "http://cdn/"),
            ("https://r/", "http://insecure/"),
            ("https://r/", "http://127.0.0.1/"),
            ("https://r/", "https://127.0.0.1/"),
            ("https://r/", "https://localhost/"),
            ("https://r/", "https://[::1]/"),
            ("https://r/", "https://169.254.169.254/latest/meta-data"),
            ("https://r/", "https://[::ffff:169.254.169.254]/"),
            ("http://localhost/", "http://169.254.169.254/"),
            ("http://localhost/", "https://169.254.169.254/"),
            ("http://localhost/", "http://other/"),
            ("http://insecure/", "http://other/"),
            ("https://r/", "https://user@cdn/"),
            ("https://r/", "file:///etc/passwd"),
            ("https://r/", "gopher://x/"),
            ("https://r/", ""),
        ] {
            let e = followed(from, location).unwrap_err();
            assert_eq!(e.kind(), Kind::RegistryInvalid, "{location}");
        }
    }
}
