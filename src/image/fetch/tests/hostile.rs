//! Tests with a registry that lies, floods, drips, or redirects to forbidden places.

use super::*;
use crate::host::thread::spawn;

/// Returns settings whose limits fit registries that are slow on purpose.
fn impatient(registry: &str) -> Settings {
    let mut settings = settings(registry);
    settings.limits = limits();
    settings
}

#[test]
fn lying_digests_are_refused() {
    let other = sha256(b"other");
    let fake = Fake::start({
        let other = other.clone();
        move |_| manifest(b"{}").header("Docker-Content-Digest", &other)
    });
    let mut client = client(settings(&fake.name()));
    fails(client.manifest(&tag()), Kind::RegistryInvalid);
    // Here the header has the requested digest, but the bytes do not.
    fails(
        client.manifest(&Selector::Digest(other)),
        Kind::RegistryInvalid,
    );
    assert_eq!(fake.seen().len(), 2);
}

#[test]
fn wrong_media_types_are_refused() {
    for (value, kind) in [
        ("text/html", Kind::RegistryInvalid),
        (
            "application/vnd.oci.image.config.v1+json",
            Kind::RegistryInvalid,
        ),
        ("", Kind::RegistryInvalid),
        (
            "application/vnd.docker.distribution.manifest.v1+prettyjws",
            Kind::Unsupported,
        ),
    ] {
        let fake = Fake::start(move |_| Answer::new(200).header("Content-Type", value).body(b"{}"));
        fails(client(settings(&fake.name())).manifest(&tag()), kind);
    }
    let fake = Fake::start(|_| Answer::new(200).body(b"{}"));
    fails(
        client(settings(&fake.name())).manifest(&tag()),
        Kind::RegistryInvalid,
    );
}

#[test]
fn endless_bodies_end_at_limit() {
    for status in [200, 404, 500] {
        let fake = Fake::start(move |_| Answer::new(status).header("Content-Type", OCI).endless());
        let e = client(impatient(&fake.name()))
            .manifest(&tag())
            .unwrap_err();
        let expected = match status {
            200 => Kind::RegistryInvalid,
            404 => Kind::ReferenceNotFound,
            _ => Kind::RegistryBusy,
        };
        assert_eq!(e.kind(), expected, "{e:?}");
    }
}

#[test]
fn large_announced_bodies_are_not_read() {
    let fake = Fake::start(|_| {
        Answer::new(200)
            .header("Content-Type", OCI)
            .cut(b"{}", 10_001)
    });
    fails(
        client(settings(&fake.name())).manifest(&tag()),
        Kind::RegistryInvalid,
    );
}

#[test]
fn endless_header_ends_at_limit() {
    let fake =
        Fake::start(|_| Answer::raw(&format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(1 << 20))));
    fails(
        client(settings(&fake.name())).manifest(&tag()),
        Kind::RegistryInvalid,
    );
    let many = Answer::raw(&format!(
        "HTTP/1.1 200 OK\r\n{}\r\n",
        "X: y\r\n".repeat(10_000)
    ));
    let fake = Fake::start(move |_| many.clone());
    fails(
        client(settings(&fake.name())).manifest(&tag()),
        Kind::RegistryInvalid,
    );
}

#[test]
fn other_protocols_are_refused() {
    for text in ["", "SSH-2.0-OpenSSH\r\n", "HTTP/9 x\r\n\r\n", "\0\0\0\0"] {
        let fake = Fake::start(move |_| Answer::raw(text));
        let e = client(settings(&fake.name())).manifest(&tag()).unwrap_err();
        assert!(
            matches!(e.kind(), Kind::RegistryInvalid | Kind::RegistryUnreachable),
            "{e:?}"
        );
    }
}

#[test]
fn dripping_manifest_is_given_up() {
    let fake = Fake::start(|_| Answer::new(200).header("Content-Type", OCI).drip());
    fails(
        client(impatient(&fake.name())).manifest(&tag()),
        Kind::RegistryUnreachable,
    );
}

#[test]
fn dripping_blob_is_given_up() {
    let fake = Fake::start(|_| Answer::new(200).drip());
    let client = client(impatient(&fake.name()));
    let digest = sha256(b"x");
    let e = client.blob_bytes(&digest, 1 << 30, 1 << 30).unwrap_err();
    assert_eq!(e.kind(), Kind::RegistryUnreachable, "{e:?}");
    assert!(
        e.to_string().contains("less than 10000 bytes in 300ms"),
        "{e}"
    );
    // It was resumed as often as the limits allow.
    assert!(fake.seen().len() >= 3);
}

#[test]
fn silence_ends_at_deadline() {
    // The registry is silent in the header.
    let fake = Fake::start(|_| Answer::new(200).silence());
    fails(
        client(impatient(&fake.name())).manifest(&tag()),
        Kind::RegistryUnreachable,
    );
    // The registry is silent in the body.
    let mut settings = settings(&fake.name());
    settings.limits.idle = Duration::from_millis(200);
    let fake =
        Fake::start(|_| Answer::raw("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n").silence());
    settings.repository.registry = fake.name();
    let result = client(settings).blob_bytes(&sha256(b"x"), 9, 9);
    fails(result, Kind::RegistryUnreachable);
}

#[test]
fn everything_ends_at_total_deadline() {
    let fake = Fake::start(|_| Answer::new(200).silence());
    let mut settings = settings(&fake.name());
    settings.limits.total = Duration::from_millis(300);
    fails(client(settings).manifest(&tag()), Kind::Timeout);
}

#[test]
fn endless_429_ends() {
    let year = (365 * 24 * 3600).to_string();
    let body = br#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}"#;
    let fake = Fake::start(move |_| Answer::new(429).header("Retry-After", &year).body(body));
    let e = client(settings(&fake.name())).manifest(&tag()).unwrap_err();
    assert_eq!(e.kind(), Kind::RegistryBusy);
    assert!(
        e.to_string()
            .ends_with("answers 429: TOOMANYREQUESTS: slow down"),
        "{e}"
    );
    assert_eq!(fake.seen().len(), 3);
}

#[test]
fn busy_registry_is_asked_again() {
    let fake = Fake::start(counted(vec![
        Answer::new(503),
        Answer::new(429).header("Retry-After", "0"),
        manifest(b"{}"),
    ]));
    client(settings(&fake.name())).manifest(&tag()).unwrap();
    assert_eq!(fake.seen().len(), 3);
}

#[test]
fn redirect_to_another_host_gets_no_credential() {
    let storage = Fake::start(|_| manifest(b"{}"));
    let location = format!("http://{}/stored?sig=1", storage.name());
    let registry = Fake::start(move |asked| match asked.header("authorization") {
        None => Answer::new(401).header("WWW-Authenticate", "Basic realm=x"),
        Some(_) => Answer::new(307).header("Location", &location),
    });
    let mut settings = settings(&registry.name());
    settings.credential = basic();
    client(settings).manifest(&tag()).unwrap();
    let seen = registry.seen();
    assert_eq!(
        seen.last().unwrap().header("authorization"),
        Some("Basic YW5uOmNhbmFyeQ==")
    );
    let seen = storage.seen();
    assert_eq!(seen[0].path, "/stored?sig=1");
    assert_eq!(seen[0].header("authorization"), None);
}

#[test]
fn redirect_on_same_host_keeps_credential() {
    let fake = Fake::start(
        |asked| match (asked.header("authorization"), asked.path.as_str()) {
            (None, _) => Answer::new(401).header("WWW-Authenticate", "Basic realm=x"),
            (_, "/moved") => manifest(b"{}"),
            _ => Answer::new(308).header("Location", "/moved"),
        },
    );
    let mut settings = settings(&fake.name());
    settings.credential = basic();
    client(settings).manifest(&tag()).unwrap();
}

#[test]
fn endless_redirects_end() {
    let fake =
        Fake::start(|asked| Answer::new(302).header("Location", &format!("/{}", asked.number)));
    let text = fails(
        client(settings(&fake.name())).manifest(&tag()),
        Kind::RegistryInvalid,
    );
    assert!(text.ends_with("redirects more than 3 times"), "{text}");
    assert_eq!(fake.seen().len(), 4);
}

#[test]
fn redirects_to_forbidden_addresses_are_refused() {
    for location in [
        "http://169.254.169.254/latest/meta-data",
        "https://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/",
        "http://other.example/",
        "https://127.0.0.1/",
        "http://localhost/",
        "file:///etc/passwd",
        "https://user:pw@other.example/",
        "",
    ] {
        let fake = Fake::start(move |_| Answer::new(307).header("Location", location));
        let mut client = client_by_name(&fake, |_| {});
        fails(client.manifest(&tag()), Kind::RegistryInvalid);
        assert_eq!(fake.seen().len(), 1, "{location}");
    }
    let fake = Fake::start(move |_| Answer::new(307));
    let mut client = client_by_name(&fake, |_| {});
    fails(client.manifest(&tag()), Kind::RegistryInvalid);
}

#[test]
fn name_that_resolves_to_loopback_is_refused_after_redirect() {
    // Unlike an address, this name must be resolved, which /etc/hosts or DNS does.
    let target = Target {
        host: "localhost".into(),
        port: 1,
        reach: Reach::Network,
    };
    let cancel = Cancel::try_new().unwrap();
    let soon = Instant::now() + Duration::from_secs(10);
    fails(
        SystemDialer.dial(&target, soon, &cancel),
        Kind::RegistryInvalid,
    );
}

#[test]
fn cancel_ends_a_wait_for_a_reply_and_for_a_body() {
    let cut = Answer::raw("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n").silence();
    for answer in [Answer::new(200).silence(), cut] {
        let fake = Fake::start(move |_| answer.clone());
        let cancel = Cancel::try_new().unwrap();
        let dial = Arc::new(SystemDialer);
        let client = Client::new(settings(&fake.name()), dial, cancel.clone()).unwrap();
        let thread = spawn("pull", move || client.blob_bytes(&sha256(b"x"), 9, 9)).unwrap();
        while fake.seen().is_empty() {
            std::thread::yield_now();
        }
        cancel.cancel(crate::locks::CancelCause::Requested);
        fails(thread.join().unwrap(), Kind::Cancelled);
    }
}

#[test]
fn cancelled_client_sends_nothing() {
    let fake = Fake::start(|_| manifest(b"{}"));
    let cancel = Cancel::try_new().unwrap();
    let dial = Arc::new(SystemDialer);
    let mut client = Client::new(settings(&fake.name()), dial, cancel.clone()).unwrap();
    cancel.cancel(crate::locks::CancelCause::Requested);
    fails(client.manifest(&tag()), Kind::Cancelled);
    assert!(fake.seen().is_empty());
}
