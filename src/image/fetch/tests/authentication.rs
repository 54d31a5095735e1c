//! Tests of challenges, tokens and credentials.

use super::*;

/// A registry with a token server on the same port. It requires `Bearer TOKEN` for manifests.
fn with_tokens(token: &'static str) -> Fake {
    Fake::start(move |asked| {
        let host = asked.header("host").unwrap();
        if asked.path.starts_with("/token") {
            return Answer::new(200).body(format!(r#"{{"token":"{token}"}}"#).as_bytes());
        }
        match asked.header("authorization") {
            Some(value) if value == format!("Bearer {token}") => manifest(b"{}"),
            _ => Answer::new(401).header(
                "WWW-Authenticate",
                &format!(r#"Bearer realm="http://{host}/token",service="reg",scope="registry:catalog:* repository:app:push""#),
            ),
        }
    })
}

fn token_requests(fake: &Fake) -> Vec<Asked> {
    let seen = fake.seen();
    seen.into_iter()
        .filter(|asked| asked.path.starts_with("/token"))
        .collect()
}

#[test]
fn anonymous_token_is_fetched_and_kept() {
    let fake = with_tokens("t1");
    let mut client = client(settings(&fake.name()));
    client.manifest(&tag()).unwrap();
    let requests = token_requests(&fake);
    assert_eq!(requests.len(), 1);
    assert_eq!(
        requests[0].path,
        "/token?service=reg&scope=repository%3Aapp%3Apull"
    );
    assert_eq!(requests[0].header("authorization"), None);
    // A clone of the client keeps the token.
    client.clone().manifest(&tag()).unwrap();
    assert_eq!(fake.seen().len(), 1);
}

#[test]
fn password_goes_to_token_server_only() {
    let fake = with_tokens("t2");
    let mut settings = settings(&fake.name());
    settings.credential = basic();
    client(settings).manifest(&tag()).unwrap();
    for asked in fake.seen() {
        let expected = asked.path.starts_with("/token");
        let has_password = asked
            .header("authorization")
            .is_some_and(|v| v.starts_with("Basic "));
        assert_eq!(has_password, expected, "{asked:?}");
    }
}

#[test]
fn identity_token_is_exchanged() {
    let fake = with_tokens("t3");
    let mut settings = settings(&fake.name());
    settings.credential = Credential::Identity {
        token: Secret::new("canary"),
    };
    client(settings).manifest(&tag()).unwrap();
    let requests = token_requests(&fake);
    assert_eq!((requests.len(), requests[0].method.as_str()), (1, "POST"));
    assert_eq!(
        requests[0].body,
        "grant_type=refresh_token&client_id=fcd&service=reg\
         &scope=repository%3Aapp%3Apull&refresh_token=canary"
    );
}

#[test]
fn expired_token_is_replaced_once() {
    let fake = Fake::start(|asked| {
        let host = asked.header("host").unwrap();
        let challenge = format!(r#"Bearer realm="http://{host}/token""#);
        let challenge = Answer::new(401).header("WWW-Authenticate", &challenge);
        match (asked.path.as_str(), asked.number) {
            (path, n) if path.starts_with("/token") => {
                Answer::new(200).body(format!(r#"{{"access_token":"t{n}"}}"#).as_bytes())
            }
            // The first token expires after one manifest.
            (_, 2 | 5) => manifest(b"{}"),
            _ => challenge,
        }
    });
    let mut client = client(settings(&fake.name()));
    client.manifest(&tag()).unwrap();
    client.manifest(&tag()).unwrap();
    let sent: Vec<_> = fake
        .seen()
        .iter()
        .map(|asked| asked.header("authorization").unwrap_or("-").to_owned())
        .collect();
    assert_eq!(sent, ["-", "-", "Bearer t1", "Bearer t1", "-", "Bearer t4"]);
}

#[test]
fn endless_401_ends() {
    let body = br#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
    let fake = Fake::start(|_| {
        Answer::new(401)
            .header("WWW-Authenticate", "Basic realm=x")
            .body(body)
    });
    let mut settings = settings(&fake.name());
    settings.credential = basic();
    let e = client(settings).manifest(&tag()).unwrap_err();
    assert_eq!(e.kind(), Kind::RegistryDenied);
    assert_eq!(
        e.hint_text().unwrap(),
        format!("fcctl login {}", fake.name())
    );
    assert!(e.to_string().contains("refuses the credentials"), "{e}");
    assert_eq!(fake.seen().len(), 2);
}

#[test]
fn login_is_asked_for() {
    let fake = Fake::start(|_| Answer::new(401).header("WWW-Authenticate", "Basic realm=x"));
    let text = fails(
        client(settings(&fake.name())).manifest(&tag()),
        Kind::RegistryDenied,
    );
    assert!(text.contains("requires a login"), "{text}");
    let fake = Fake::start(|_| Answer::new(401).header("WWW-Authenticate", "Negotiate"));
    fails(
        client(settings(&fake.name())).manifest(&tag()),
        Kind::Unsupported,
    );
    let fake = Fake::start(|_| Answer::new(403));
    fails(
        client(settings(&fake.name())).manifest(&tag()),
        Kind::RegistryDenied,
    );
}

#[test]
fn token_servers_at_forbidden_addresses_get_no_credential() {
    for realm in [
        "http://169.254.169.254/latest/meta-data",
        "https://169.254.169.254/latest/meta-data",
        "https://evil.example/token",
        "https://auth.docker.io/token",
        "http://evil.example/token",
        "http://127.0.0.1/token",
        "https://localhost/token",
        "https://[::ffff:a9fe:a9fe]/token",
        "/token",
    ] {
        let fake = Fake::start(move |_| {
            Answer::new(401).header("WWW-Authenticate", &format!("Bearer realm=\"{realm}\""))
        });
        let mut client = client_by_name(&fake, |settings| settings.credential = basic());
        fails(client.manifest(&tag()), Kind::RegistryInvalid);
        let seen = fake.seen();
        assert_eq!(seen.len(), 1, "{realm}");
        assert_eq!(seen[0].header("authorization"), None);
    }
}

#[test]
fn login_after_redirect_is_refused() {
    let storage = Fake::start(|_| Answer::new(401).header("WWW-Authenticate", "Basic realm=x"));
    let location = format!("http://{}/x", storage.name());
    let registry = Fake::start(move |_| Answer::new(307).header("Location", &location));
    let mut settings = settings(&registry.name());
    settings.credential = basic();
    fails(client(settings).manifest(&tag()), Kind::RegistryDenied);
    assert!(
        storage
            .seen()
            .iter()
            .all(|asked| asked.header("authorization").is_none())
    );
}

#[test]
fn hostile_token_servers_are_bounded() {
    let year = (365 * 24 * 3600).to_string();
    for (answer, kind) in [
        (Answer::new(200).endless(), Kind::RegistryInvalid),
        (Answer::new(200).body(b"{}"), Kind::RegistryInvalid),
        (
            Answer::new(200).body(b"{\"token\":\"a\\r\\nX: y\"}"),
            Kind::RegistryInvalid,
        ),
        (
            Answer::new(429).header("Retry-After", &year),
            Kind::RegistryBusy,
        ),
        (
            Answer::new(302).header("Location", "/token2"),
            Kind::RegistryInvalid,
        ),
        (Answer::new(401), Kind::RegistryDenied),
    ] {
        let fake = Fake::start(move |asked| {
            let host = asked.header("host").unwrap();
            match asked.path.starts_with("/token") {
                true => answer.clone(),
                false => Answer::new(401).header(
                    "WWW-Authenticate",
                    &format!("Bearer realm=\"http://{host}/token\""),
                ),
            }
        });
        fails(client(settings(&fake.name())).manifest(&tag()), kind);
        assert!(fake.seen().len() <= 6);
    }
}

#[test]
fn user_name_with_line_break_adds_no_header() {
    let fake = Fake::start(|asked| {
        let host = asked.header("host").unwrap();
        Answer::new(401).header(
            "WWW-Authenticate",
            &format!("Bearer realm=\"http://{host}/t\""),
        )
    });
    let mut settings = settings(&fake.name());
    settings.credential = Credential::Basic {
        user: "ann\r\nX: y".into(),
        password: Secret::new("canary"),
    };
    // Base64 turns any text into a valid header.
    fails(client(settings).manifest(&tag()), Kind::RegistryDenied);
    assert!(fake.seen().iter().all(|asked| asked.header("x").is_none()));
}
