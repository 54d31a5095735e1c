//! The fuzz target for the parts of a registry's replies that this module parses itself, for
//! `tests/fuzz`.

use super::auth;
use super::challenge::{self, Challenge};
use super::redirect;
use super::reply::{ContentRange, error_message};
use super::settings::{Repository, Settings};
use super::transport::tunnel_status;
use super::url::{Scheme, Url};
use super::{address, auth::parse_token};
use crate::api::registry::{Credential, Secret};

/// Parses an input as each part of a reply: its lines as values of headers, and all of it as a body
/// and as a proxy's reply.
pub fn replies(input: &[u8]) {
    error_message(input);
    tunnel_status(input);
    if let Some(token) = parse_token(input) {
        assert!(token.reveal().bytes().all(|b| b.is_ascii_graphic()));
    }
    let text = String::from_utf8_lossy(input);
    let from = Url::parse("https://registry.example/v2/").expect("a URL");
    let anonymous = Settings::new(Repository {
        registry: "registry.example".into(),
        name: "app".into(),
    });
    let with_credential = Settings {
        credential: Credential::Basic {
            user: "ann".into(),
            password: Secret::new("canary"),
        },
        ..anonymous.clone()
    };
    let chosen = challenge::choose(text.split('\n'));
    for line in text.split('\n') {
        if let Some(range) = ContentRange::parse(line) {
            assert!(range.first <= range.last);
        }
        if let Ok(url) = Url::parse(line) {
            let again = Url::parse(&url.to_request()).expect("what was written is a URL");
            assert!(again == url, "{url:?} is read as {again:?}");
        }
        if let Ok(to) = redirect::next(&from, line, |_| false) {
            check(&to);
        }
        if let Ok(realm) = auth::realm(line, &from.origin, &anonymous) {
            check(&realm);
        }
        if let Ok(realm) = auth::realm(line, &from.origin, &with_credential) {
            check(&realm);
            assert_eq!(realm.host(), "registry.example");
        }
    }
    if let Some(Challenge::Bearer(bearer)) = chosen {
        assert!(bearer.realm.len() <= text.len());
    }
}

/// Checks that a URL that a registry has sent uses TLS and does not name this host.
fn check(to: &Url) {
    assert_eq!(to.origin.scheme, Scheme::Https);
    assert!(!address::is_loopback(to.host()));
    if let Some(ip) = address::literal(to.host()) {
        assert!(address::check(ip, to.host(), false).is_ok());
    }
}
